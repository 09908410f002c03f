"""Triton kernels for GPUs of every vendor that Triton compiles for."""
