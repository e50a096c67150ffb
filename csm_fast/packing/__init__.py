"""Rows of a token store laid out as packs: which conversations share one, in what order, and which frames are
supervised.

Imports ``config`` and ``system``. ``fit`` has no torch: the planner uses it.
"""
