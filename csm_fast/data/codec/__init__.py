"""Codecs: Mimi through transformers or moshi, and the offline codec of tests and demos.

Imports ``config`` and ``system``.
"""
