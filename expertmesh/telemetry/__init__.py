"""Metrics: declared and read here, whatever shows them."""
