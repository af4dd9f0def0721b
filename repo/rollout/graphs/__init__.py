"""Decoding in buffers of fixed size, in which a step can be replayed as a CUDA graph, rollout after rollout.

buffers.py   the static cache and the inputs of a step
weights.py   copies of the weights at addresses that stay
steps.py     the three ways to compute a step: fused layers, the model with an attention kernel, the model with a mask
decoder.py   the decoder: buckets of rows, a graph for each
held.py      what is kept from one rollout to the next
choice.py    which way a model takes, by a trial
"""
