"""Kernels of the router's own for CPUs: its gate, and the sum of the partial sums."""
