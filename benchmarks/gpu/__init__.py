"""What benchmarks/gpu_kernels.py measures, one file an op family."""
