"""The operators the model is built from, and the only importer of ``csm_kernels``."""

from __future__ import annotations

import torch
from csm_kernels.frame_embed import frame_embed
from csm_kernels.linear_cross_entropy import linear_cross_entropy as _linear_cross_entropy
from torch import Tensor

__all__ = ["frame_embed", "linear_cross_entropy"]


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """``csm_kernels``' operator, honouring autocast: operands are cast as ``torch.nn.functional.linear`` would.

    Shapes and results as in ``csm_kernels.linear_cross_entropy``.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    else:
        dtype = torch.promote_types(hidden.dtype, weight.dtype)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    return _linear_cross_entropy(hidden, weight, targets, weights)
