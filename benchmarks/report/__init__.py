"""The tables of the documents from recorded results: ``python -m benchmarks.report``."""
