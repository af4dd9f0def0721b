"""Prompts, token sequences and their layout in one forward pass."""
