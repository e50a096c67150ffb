"""The validation loss, and the probe that a saved adapter carries.

Imports ``model``, ``packing`` and what is below them.
"""
