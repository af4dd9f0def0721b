"""The models of a run: policy, reference, critics, their attention and their sharding."""
