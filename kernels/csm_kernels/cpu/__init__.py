"""The forms for CPUs: the C++ library, its operators, and what surrounds them. Imports nothing of ``csm_kernels.gpu``.

Operators import these modules when they first run on a CPU, so that nothing on CUDA depends on a C++ compiler.
"""
