"""Reward and cost of a response: the scorers, the held-out judge, and what is safe."""
