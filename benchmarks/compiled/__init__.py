"""What can be counted about the Triton kernels without a GPU: their machine code, and the bytes they move.

The kernels are compiled ahead of time for every target (kernels.py), with any supported version of Triton
(versions.py). Their machine code is read (machine_code.py, occupancy.py); in Triton's interpreter their loads and
stores are counted (traffic.py). No speed follows from any of these counts.
"""
