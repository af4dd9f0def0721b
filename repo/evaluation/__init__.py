"""Evaluation on held-out prompts: responses, statistics, tables, signs of reward hacking."""
