"""Kernels in Triton (Tillet et al. 2019) for CUDA devices. Imports torch and triton; nobody imports it without them."""
