"""Linear layer and cross-entropy in one operator that never holds all logits."""

from __future__ import annotations

import torch
from torch import Tensor

DEFAULT_BYTE_BUDGET = 64 * 2**20


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients are formed in the forward pass, chunk by chunk, while a chunk's logits exist.

    With p = softmax(h W) and a row weight w, d(w CE)/d logits = w (p - onehot(target)). All weights enter here, so
    what comes from above is one scalar that scales both gradients (Liger's fused linear cross-entropy does the same).
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, weights, byte_budget, wants_hidden, wants_weight):
        rows, heads, _ = hidden.shape
        vocab = weight.shape[-1]
        accumulate = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.empty_like(weight) if wants_weight else None
        per_head = torch.zeros(heads, dtype=accumulate, device=hidden.device)

        row_bytes = vocab * torch.finfo(accumulate).bits // 8
        rows_per_chunk = max(1, min(rows, byte_budget // row_bytes))
        # Whole heads first: the weight gradient of a head is then finished within one chunk.
        heads_per_chunk = max(1, min(heads, byte_budget // (row_bytes * rows_per_chunk)))
        for first_head in range(0, heads, heads_per_chunk):
            some_heads = slice(first_head, min(heads, first_head + heads_per_chunk))
            w = weight[some_heads]
            # With several row chunks the heads' gradient is summed in the wide dtype and rounded once.
            total = None if rows_per_chunk == rows else torch.zeros(w.shape, dtype=accumulate, device=w.device)
            for first in range(0, rows, rows_per_chunk):
                some = slice(first, min(rows, first + rows_per_chunk))
                h = hidden[some, some_heads].transpose(0, 1)
                logits = torch.bmm(h, w).to(accumulate)
                target = targets[some, some_heads].t().unsqueeze(-1)
                # [heads, rows], or [1, rows] for all heads
                row_weight = (weights[some, some_heads] if weights.shape[1] > 1 else weights[some]).t().to(accumulate)
                lse = logits.logsumexp(-1)
                loss = (lse - logits.gather(-1, target).squeeze(-1)) * row_weight
                per_head[some_heads] += loss.sum(-1)
                if grad_hidden is None and grad_weight is None:
                    continue
                grad = logits.sub_(lse.unsqueeze(-1)).exp_()
                grad.scatter_add_(-1, target, torch.full_like(target, -1, dtype=accumulate))
                grad = grad.mul_(row_weight.unsqueeze(-1)).to(hidden.dtype)
                if grad_hidden is not None:
                    grad_hidden[some, some_heads] = torch.bmm(grad, w.transpose(1, 2)).transpose(0, 1)
                if grad_weight is not None:
                    part = torch.bmm(h.transpose(1, 2), grad)
                    total = part if total is None else total.add_(part)
            if grad_weight is not None and total is not None:
                grad_weight[some_heads] = total
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(per_head)
        return per_head.sum(), per_head

    @staticmethod
    def backward(ctx, grad_loss, _):
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_loss.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = grad_weight * grad_loss.to(grad_weight.dtype)
        return grad_hidden, grad_weight, None, None, None, None, None


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, byte_budget: int = DEFAULT_BYTE_BUDGET
) -> tuple[Tensor, Tensor]:
    """Weighted cross-entropy of C heads over the same rows: ``sum_mc weights[m, c] CE(hidden[m, c] @ weight[c])``.

    Args:
        hidden: [M, C, D].
        weight: [C, D, V], same dtype as ``hidden``. Logits are formed in that dtype, softmax in float32 (float64
            for float64 inputs).
        targets: [M, C] int64, each in [0, V).
        weights: [M, 1] or [M, C]; 0 leaves a row out.
        byte_budget: most bytes of logits held at once (never less than one row of one head).

    Returns:
        The scalar loss, and the detached weighted sums per head [C], both float32 (float64 for float64 inputs).
    """
    grad_mode = torch.is_grad_enabled()
    return _LinearCrossEntropy.apply(
        hidden,
        weight,
        targets,
        weights,
        byte_budget,
        grad_mode and hidden.requires_grad,
        grad_mode and weight.requires_grad,
    )
