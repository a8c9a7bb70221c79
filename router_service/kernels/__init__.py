"""Kernels for a router on a GPU."""
