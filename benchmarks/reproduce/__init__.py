"""Reproduce the paper's claim: exactly on a table of answers (table.py), and on a language model (language.py)."""
