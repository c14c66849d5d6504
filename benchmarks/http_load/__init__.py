"""`splitfire up` under a load tool that nobody here wrote."""
