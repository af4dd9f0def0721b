"""The models of a run: policy, reference and critics, their attention, and their sharding."""
