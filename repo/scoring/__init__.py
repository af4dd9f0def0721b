"""Scores of responses: the scorers of reward and cost, the held-out judge, and the definition of safe."""
