"""The configuration of a run: its fields, the parser, old names of fields, and the presets."""
