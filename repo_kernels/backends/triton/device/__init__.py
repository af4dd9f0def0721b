"""Functions that run on the device: the parts that the kernels are made of."""
