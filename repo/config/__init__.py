"""The configuration of a run: its fields, how it is read, and the presets."""
