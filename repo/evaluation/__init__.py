"""Evaluation on held-out prompts: responses, statistics, tables and signs of reward hacking."""
