"""Block sizes for the kernels of kpt-plugin-triton on AMD GPUs, one file an architecture.

Computed, not measured: a wavefront has 64 lanes, so that the same block takes half as many of them.
`kpt bench --tune` on the hardware writes tables that come before these.
"""
