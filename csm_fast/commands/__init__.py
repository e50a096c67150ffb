"""The commands behind ``csm-fast``, one file each, thin over the rooms below."""
