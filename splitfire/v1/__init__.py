"""Generated from proto/ by scripts/genproto; never edited."""
