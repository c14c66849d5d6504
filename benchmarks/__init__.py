"""Measurements, never tests: ratios side by side in one run, with machine, commit and command beside every number."""
