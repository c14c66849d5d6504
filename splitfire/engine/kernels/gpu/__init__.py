"""The ops of ../ as Triton kernels, one file each. Importing one needs triton, not a GPU; nothing imports them on a CPU.

Triton's interpreter (TRITON_INTERPRET=1, set before triton is imported) computes them on a CPU, which is how they are tested there.
"""
