"""csm_fast against what others train with: ``python -m benchmarks.compare``."""
