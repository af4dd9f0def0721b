"""Measure how fast, how large and how exact ours and the peers are. `make bench`; docs/benchmarks.md has the results.

bench_*.py     the suites, one question each: `pytest benchmarks/bench_loss.py`
harness/       cases, timing, memory, the machine and its limits, results on disk
workloads/     models, the parts of a training step, TRL's trainer, the packages ours is compared with
reporting/     Markdown tables and figures; report.py is the command that writes them
compiled/      registers, spills, access widths, bytes and launches of the Triton kernels, counted without a GPU
gpu/           tests and comparisons on one GPU: `make gpu`
reproduce/     the paper's claim on a table of answers (`make demo`) and on a language model (`make reproduce`), and the
               default run with ten seeds (`make seeds`)
"""
