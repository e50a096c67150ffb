"""From the turns of a token store to packs: which documents share one, in what order, and which frames are supervised.

Imports ``config`` and ``system``. ``fit`` has no torch: the planner uses it.
"""
