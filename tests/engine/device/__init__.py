"""The GPU's runner on a CPU: kernels in Triton's interpreter, a stand-in for CUDA graphs."""
