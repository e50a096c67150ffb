"""Models and adapters on disk: names of tensors, reading, writing, merging, formats of other tools.

Imports ``model``, ``config`` and ``system``. ``shape`` and ``config_json`` do not import torch, so that
``csm-fast plan`` starts without it.
"""
