"""All Triton: kernels and their launchers. Nothing here imports ``csm_kernels.cpu``."""
