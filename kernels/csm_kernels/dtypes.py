"""In which dtype an operator computes what needs more precision than its inputs have."""

import torch


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of norms, rotations, softmax and sums: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32
