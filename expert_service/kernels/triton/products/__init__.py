"""The Triton kernels: pairs sorted by expert, two grouped products, sums by row."""
