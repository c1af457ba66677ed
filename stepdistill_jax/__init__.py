"""Distilling Step-by-Step (Hsieh et al. 2023, arXiv:2305.02301) in JAX and Flax."""

__version__ = "0.1.0"
