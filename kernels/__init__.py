"""Triton kernels, one file an operation; `dinofast.ops` launches them."""
