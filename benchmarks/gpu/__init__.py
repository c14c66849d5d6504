"""What a GPU has to show: correctness, then speed beside opponents, in one call."""
