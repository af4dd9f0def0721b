"""The harness of the benchmarks: cases, timing, memory, the machine and its limits, results on disk."""
