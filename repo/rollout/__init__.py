"""Sampling of responses and the KV cache it decodes with."""
