"""Test and measure the kernels beside their peers, and the training loop, on one GPU within six minutes: `make gpu`.

__main__.py     the command: starts each part as a process of its own, merges their results, prints the tables
plan.py         sizes and rounds of a real run and of a rehearsal; parts, their order and their time limits
part.py         what runs in a part's process
rehearsal.py    what a rehearsal on a CPU changes
agreement.py    every way compiled and compared with fp64 before it is timed, in many processes
measuring.py    cases timed one after the other, each written to disk at once
losses.py, linear.py, call.py, forms.py     the parts that measure; kernel.py launches the fused kernel alone
loop/           the training loop: updates, reference, decoding and a whole step of two models
suite.py, outcomes.py                       the tests that need a GPU
"""
