"""The version of csm_fast; ``setup.py`` reads it here."""

__version__ = "0.1.0"
