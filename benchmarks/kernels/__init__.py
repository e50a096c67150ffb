"""Every operator against its alternatives: ``python -m benchmarks.kernels``."""
