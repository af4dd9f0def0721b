"""Adapters for training loops of others; each needs an extra of its own and is imported by its full name only."""
