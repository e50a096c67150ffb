"""Benchmarks and comparisons with the tools people use today; run them as ``python -m benchmarks.<name>``."""
