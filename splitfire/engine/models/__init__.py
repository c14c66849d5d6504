"""The models an engine can run, as plain functions over plain tensors."""
