"""Sparse-to-dense motion: one face image driven by landmarks (Zhao, Wu and Guo 2021)."""
