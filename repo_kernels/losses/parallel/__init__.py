"""Heads whose vocabulary is divided among processes."""
