"""Families: every causal-LM family that the installed transformers has, tiny and random, and what becomes of it here."""
