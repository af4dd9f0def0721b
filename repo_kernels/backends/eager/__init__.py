"""The eager backend."""
