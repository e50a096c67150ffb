"""Models and adapters on disk: names of tensors, reading, writing, merging, other tools' formats.

Imports ``model``, ``config`` and ``system``.
"""
