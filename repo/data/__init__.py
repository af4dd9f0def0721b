"""The data of a run: prompts, token sequences, and their layout in one forward pass."""
