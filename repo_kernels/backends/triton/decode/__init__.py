"""The Triton kernels of a decode step: attention over a static cache, the parts of a layer, and sampling."""
