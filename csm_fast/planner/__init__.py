"""How much memory and time a run takes, before anything is loaded. No file here imports torch.

Imports ``config``, ``packing`` (without torch) and ``system``.
"""
