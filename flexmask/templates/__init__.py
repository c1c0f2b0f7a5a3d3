"""Kernels as real modules, and the assembly of one self-contained file from them. Importing this package does not import triton."""
