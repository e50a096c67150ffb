"""How much memory and time a run takes, before anything is loaded. No file here imports torch.

Imports ``config``, ``packing.fit``, ``system`` and ``csm_kernels.constants``.
"""
