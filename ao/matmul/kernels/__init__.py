"""Triton kernels, imported by the functions that launch them: Triton comes with GPU builds of PyTorch only."""
