"""The training loop on one GPU: updates, reference and decoding of two models, beside goals and what was before.

models.py      policies of known shapes with random weights; nothing is downloaded
goals.py       what the rows are to reach, and what an H200 took before
measuring.py   the stages of a loop, each timed and written to disk at once
table.py       the table of the results
"""
