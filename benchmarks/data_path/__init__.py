"""The loader and the store: ``python -m benchmarks.data_path``."""
