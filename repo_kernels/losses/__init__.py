"""The losses: their arguments, and their operators and autograd over the backends."""
