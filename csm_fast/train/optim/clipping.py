"""The norm of all gradients, and clipping by it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from csm_fast import ops
from csm_fast.train.optim.adamw import AdamW

_NORM_PIECE = 2**22  # values


def tensor_norm(x: Tensor) -> Tensor:
    """[] float32, or float64 as ``x``. In pieces: a CPU widens bf16 as a whole here, twice what is to be dropped."""
    if (squares := ops.sum_of_squares(x)) is not None:
        return squares.sqrt().float()
    dtype = ops.wide_dtype(x.dtype)
    pieces = [torch.linalg.vector_norm(piece, dtype=dtype) for piece in x.flatten().split(_NORM_PIECE)]
    return torch.linalg.vector_norm(torch.stack(pieces))


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """[] float32 (float64 where gradients are): the norm of all gradients together, summed up in that type also where
    they are in bf16."""
    squares, others = [], []
    for p in parameters:
        if p.grad is None:
            continue
        if (square := ops.sum_of_squares(p.grad)) is not None:
            squares.append(square)
        else:
            others.append(p.grad)
    dtype = torch.float64 if any(grad.dtype == torch.float64 for grad in others) else torch.float32
    if any(grad.device.type == "cpu" for grad in others):
        squares += [tensor_norm(grad).square() for grad in others]
    elif others:
        squares += [norm.square() for norm in torch._foreach_norm(others, 2, dtype=dtype)]
    return torch.stack(squares).sum().sqrt().to(dtype) if squares else torch.zeros(())


def clip_gradients(optimizer: torch.optim.Optimizer, most: float, norm: Tensor) -> None:
    """Has the next update take the gradients as if their norm, ``norm`` [], were at most ``most``; 0: as they are.

    ``csm_fast.train.optim.adamw.AdamW`` scales what it reads, so no pass over memory is made for it; gradients of
    other optimizers are scaled where they lie. Sizes are those of ``torch.nn.utils.clip_grad_norm_``.
    """
    if isinstance(optimizer, AdamW):
        optimizer.grad_scale = ((norm + 1e-6) / most).clamp(min=1.0).float() if most else None
    elif most:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grads_with_norm_(parameters, most, norm)
