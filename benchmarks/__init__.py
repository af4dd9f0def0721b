"""Benchmarks: how fast, how large and how exact ours and the peers are. `make bench`; README.md says more."""
