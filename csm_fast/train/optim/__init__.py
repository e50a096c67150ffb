"""The optimizer: parameter groups, schedule, AdamW and its rounding."""
