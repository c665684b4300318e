"""Checks of the CUDA kernels that need no GPU; `ci/cuda_static.py` is their command line."""
