"""Files, locks, devices, memory and the terminal: what any program needs. Knows nothing of speech or models; imports
no other room."""
