"""All Triton: kernels and their launchers. Imports nothing of ``csm_kernels.cpu``."""
