"""From recordings and transcripts to a token store: metadata, sound, text, codes, and the store's files.

Imports ``packing``, ``config`` and ``system``.
"""
