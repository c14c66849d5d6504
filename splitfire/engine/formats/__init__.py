"""How quantised checkpoints store a matrix, and the way back: one file a family, from its tensors to rows of numbers.

A family says which tensors a matrix has (`parts`, checked against the headers before anything is read) and how to read its elements
(`open_rows`). The arithmetic is the same for all: (element - zero point) * scale, in fp32 (scales.py).
"""
