"""Benchmarks that compare a run with a stored run of the same machine: ``pytest benchmarks/``."""
