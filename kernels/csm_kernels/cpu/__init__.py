"""The CPU library in C++ and its operators. Nothing here imports ``csm_kernels.gpu``."""
