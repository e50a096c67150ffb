"""Files, locks, devices, memory, the hub and the terminal: what any program needs, without speech or models.

Imports no other room.
"""
