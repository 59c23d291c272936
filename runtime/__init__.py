"""Canonical ops, and the loader that builds, caches and launches the kernels that run them."""
