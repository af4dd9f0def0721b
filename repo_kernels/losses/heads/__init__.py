"""Losses of hidden states and a head: logits that exist a chunk at a time."""
