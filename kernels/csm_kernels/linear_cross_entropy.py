"""Linear layer and cross-entropy in one operator that never holds all logits.

For C heads over the same M rows, ``loss = sum_mc w[m, c] CE(hidden[m, c] @ weight[c], target[m, c])``. The work is done
in chunks of some heads and some rows (``head_chunks``). All weights of the loss enter here, so the gradient from above
is one scalar, and the gradients can be computed while the logits of a chunk exist: with p = softmax(h W),
d(w CE)/d logits = w (p - onehot(target)). Liger's fused linear cross-entropy does the same.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from csm_kernels import head_chunks
from csm_kernels.choice import resolve
from csm_kernels.constants import LOGITS_BUDGET
from csm_kernels.dtypes import wide_dtype
from csm_kernels.gpu import linear_cross_entropy as gpu

IGNORE = -100
# Where gradients are computed in fp16, the weights of a head's rows sum up to at most this: an element of the weight's
# gradient is at most this times the largest element of ``hidden``, which may be 256 before fp16's 65,504 are reached.
FP16_SUM = 256.0


def reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The definition, with all logits at once: what ``linear_cross_entropy`` is tested against. Arguments and results
    as there."""
    wide = wide_dtype(hidden.dtype)
    logits = torch.einsum("mcd,cdv->mcv", hidden, weight).to(wide)
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="none")
    per_head = (losses.view(targets.shape) * weights.to(wide)).sum(0)
    return per_head.sum() * scale, per_head.detach()


# --- registered operator ----------------------------------------------------------------------------------------------


def _losses_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor,
    scale: float,
    byte_budget: int,
    wants_hidden: bool,
    wants_weight: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss [], losses per head [C], and the gradients for an upstream gradient of 1 (in fp16: of ``_fp16_unit``), which
    have no elements where they are not wanted. ``impl``: "triton", "cpu" or "reference"."""
    ignored = targets == IGNORE
    row_weights = weights.to(wide_dtype(hidden.dtype)).masked_fill(ignored, 0.0).expand(targets.shape)
    unit = _fp16_unit(weights, scale) if hidden.dtype == torch.float16 else None
    if unit is not None:
        row_weights = row_weights * unit
    inputs = (hidden, weight, targets.masked_fill(ignored, 0), row_weights, scale, byte_budget)
    if impl == "triton":
        results = gpu.losses_and_gradients(*inputs, wants_hidden, wants_weight)
    elif impl == "cpu":
        from csm_kernels.cpu import heads

        results = heads.losses_and_gradients(*inputs, wants_hidden, wants_weight)
    else:
        results = head_chunks.losses_and_gradients(*inputs, wants_hidden, wants_weight)
    per_head, grad_hidden, grad_weight = results
    if unit is not None:
        per_head /= unit
    return per_head.sum() * scale, per_head, grad_hidden, grad_weight


def _fp16_unit(weights: Tensor, scale: float) -> Tensor:
    """A power of two, [] float32, that multiplies the loss while its gradients are computed in fp16. The scale of a
    trainer's GradScaler is only known in the backward pass, too late for gradients that weights of 1 / 16384 have
    rounded to zero."""
    total = weights.float().abs().sum(0).amax() * abs(scale)
    return torch.where(total > 0, torch.exp2(torch.floor(torch.log2(FP16_SUM / total))), 1.0)


_linear_cross_entropy = torch.library.custom_op(
    "csm_kernels::linear_cross_entropy", _losses_and_gradients, mutates_args=()
)


@_linear_cross_entropy.register_fake
def _(hidden, weight, targets, weights, scale, byte_budget, wants_hidden, wants_weight, impl):
    wide = wide_dtype(hidden.dtype)
    loss, per_head = hidden.new_empty((), dtype=wide), hidden.new_empty(hidden.shape[1], dtype=wide)
    return loss, per_head, *head_chunks.empty_gradients(hidden, weight, wants_hidden, wants_weight)


def _setup_context(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # saves zeros of the weight's size for an output that is not used
    _save_for_backward(ctx, inputs, output[2:])


def _save_for_backward(ctx, inputs, grads):
    ctx.wants, ctx.scale = inputs[6:8], inputs[4]
    ctx.save_for_backward(*grads, inputs[3] if inputs[0].dtype == torch.float16 else None)


def _backward(ctx, grad_loss, *_):
    if grad_loss is None:
        return (None,) * 9
    *saved, weights = ctx.saved_tensors
    if weights is not None:
        grad_loss = grad_loss / _fp16_unit(weights, ctx.scale)
    # Unless the graph is kept, nothing reads the saved gradients again, so they are returned as they are or scaled in
    # place: a second tensor of the size of the weights would take memory, and on a CPU time.
    unshared = all(type(grad) is Tensor for grad in saved) and not _graph_is_kept()
    if unshared and _is_one(grad_loss):
        grads = [grad if wanted else None for grad, wanted in zip(saved, ctx.wants, strict=True)]
        return *grads, None, None, None, None, None, None, None
    scale = Tensor.mul_ if unshared else Tensor.mul
    scaled = [
        scale(grad, grad_loss.to(grad.dtype)) if wanted else None for grad, wanted in zip(saved, ctx.wants, strict=True)
    ]
    return *scaled, None, None, None, None, None, None, None


def _is_one(grad: Tensor) -> bool:
    """Whether the gradient of the loss is 1. False on other devices than a CPU, where the host would have to wait."""
    return grad.device.type == "cpu" and type(grad) is Tensor and grad.item() == 1


def _graph_is_kept() -> bool:
    """Whether this backward pass runs with ``retain_graph``; True if PyTorch cannot say."""
    is_kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if is_kept is None else is_kept()


_linear_cross_entropy.register_autograd(_backward, setup_context=_setup_context)


class _Direct(torch.autograd.Function):
    """The operator without PyTorch's dispatcher, which takes half a millisecond for a registered one: on a CPU as long
    as the matrix products of a short pack."""

    @staticmethod
    def forward(ctx, *inputs):
        loss, per_head, *grads = _losses_and_gradients(*inputs)
        ctx.mark_non_differentiable(per_head)
        ctx.set_materialize_grads(False)
        _save_for_backward(ctx, inputs, grads)
        return loss, per_head

    @staticmethod
    def backward(ctx, grad_loss, _):
        return _backward(ctx, grad_loss)


def _is_direct(*inputs: Tensor) -> bool:
    """Whether nothing needs to see the registered operator: plain tensors on a CPU, outside of torch.compile."""
    plain = all(x.device.type == "cpu" and type(x) in (Tensor, torch.nn.Parameter) for x in inputs)
    return plain and not torch.compiler.is_compiling()


# --- public function --------------------------------------------------------------------------------------------------


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor,
    byte_budget: int = LOGITS_BUDGET,
    impl: str = "auto",
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Weighted cross-entropy of C heads over the same rows:
    ``scale * sum_mc weights[m, c] CE(hidden[m, c] @ weight[c])``.

    Args:
        hidden: [M, C, D].
        weight: [C, D, V], same dtype as ``hidden``; any strides (also a transposed view of a [V, D] linear layer).
            Logits have that dtype; softmax is in float32 (float64 for float64 inputs, not with ``impl="triton"``).
        targets: [M, C] int64, each in [0, V), or -100: such an entry counts nothing.
        weights: [M, 1] or [M, C]; 0 leaves a row out.
        byte_budget: most bytes of logits held at once, beside the float32 accumulator of one head's weight gradient
            if the rows of one head do not fit (never less than one row of one head).
        impl: "triton" (a GPU, or the interpreter); "torch": PyTorch's operators; "auto": "triton" on CUDA where it is
            installed; or an answer of ``csm_kernels.choice.resolve``.
        scale: of the loss. Given here instead of multiplied afterwards, it needs no pass over the gradients.

    Returns:
        The scalar loss, and the detached weighted sums per head [C] without ``scale``, both float32 (float64 for
        float64 inputs).

    Raises:
        ValueError: an unknown ``impl``, or ``impl="triton"`` with float64.
        ImportError: ``impl="triton"`` without Triton.
    """
    grad_mode = torch.is_grad_enabled()
    call = _Direct.apply if _is_direct(hidden, weight, targets, weights) else _linear_cross_entropy
    loss, per_head, *_ = call(
        hidden,
        weight,
        targets,
        weights,
        scale,
        byte_budget,
        grad_mode and hidden.requires_grad,
        grad_mode and weight.requires_grad,
        resolve(impl, hidden.device, hidden.dtype).impl,
    )
    return loss, per_head.detach()
