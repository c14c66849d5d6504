"""Kernels for GPUs, computed by Triton's interpreter in fp32, against the torch ops of the same names."""
