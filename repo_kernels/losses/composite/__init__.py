"""The losses composed of PyTorch's own differentiable operators: log-softmax, gather, the terms of the eager backend.

They serve what looks into a function and finds nothing in a compiled kernel: forward-mode derivatives, and vmap, grad,
jacobians and Hessians of `torch.func`, with derivatives of any order. They also are the loss of log-probabilities that
the caller has computed. No shape depends on a value.
"""
