"""Experts on CPUs: oneDNN's products, kernels of our own for AVX-512, and what shares threads."""
