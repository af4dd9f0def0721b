"""Facts about the compiled Triton kernels."""
