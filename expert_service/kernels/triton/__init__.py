"""Experts on GPUs, with Triton."""
