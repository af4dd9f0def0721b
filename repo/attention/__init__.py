"""Attention over packed rows: the function that transformers' models call, the kernels, and the choice among them."""
