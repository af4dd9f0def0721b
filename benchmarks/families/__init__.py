"""Families: every causal-LM family that the installed transformers has, tiny and random, tried here."""
