"""Faster layers for a transformer on the CPU: linear, norm, gated MLP, rotary embedding and attention."""
