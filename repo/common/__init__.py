"""Helpers that every package of `repo` uses: errors, files, seeds, the C library's memory, processes, renamed names."""
