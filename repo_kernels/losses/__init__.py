"""The losses: arguments, operators and autograd over the backends."""
