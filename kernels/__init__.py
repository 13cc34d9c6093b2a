"""Triton kernels of ssod_fast, installed as `ssod_fast.kernels`."""
