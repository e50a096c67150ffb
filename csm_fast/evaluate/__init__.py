"""The validation loss, and the probe that is saved with an adapter.

Imports ``model``, ``packing`` and what is below them.
"""
