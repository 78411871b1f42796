"""fastmae.kernels: Triton kernels for CUDA, one file an op, under the same names as fastmae/ops/."""
