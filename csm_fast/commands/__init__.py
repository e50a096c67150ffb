"""One file per command: ``run`` takes the finished config and returns the exit status. ``cli`` alone imports them.

Imports every room below.
"""

INTERRUPTED = 130  # exit status that shells use for Ctrl-C; also of a run that was saved but is unfinished
