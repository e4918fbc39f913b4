"""Kernels: each a plain-torch reference and a fast path of the same signature."""
