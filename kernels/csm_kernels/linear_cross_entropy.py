"""Linear layer and cross-entropy in one operator that never holds all logits.

For C heads over the same M rows, ``loss = sum_mc w[m, c] CE(hidden[m, c] @ weight[c], target[m, c])``. Work goes chunk
by chunk: some heads, some rows. Each chunk is one batched GEMM to logits, one pass that turns logits into loss and
gradient in place with float32 softmax, and one GEMM for each gradient that is wanted. All weights enter here, so what
comes from above is one scalar and the gradients can be formed while a chunk's logits exist: with p = softmax(h W),
d(w CE)/d logits = w (p - onehot(target)) (Liger's fused linear cross-entropy does the same).
"""

from __future__ import annotations

import torch
from torch import Tensor

from csm_kernels.constants import HEAD_COLUMNS, LOGITS_BUDGET
from csm_kernels.cpu import heads as cpu_heads
from csm_kernels.cpu import linear as cpu_linear
from csm_kernels.cpu import passes as cpu_passes
from csm_kernels.dtypes import wide_dtype

try:
    import triton
    import triton.language as tl
except ImportError:  # the PyTorch form needs none
    triton = None

IGNORE = -100
# Most that the weights of a head's rows sum up to where gradients are formed in fp16: a gradient of its weight is at
# most that times the largest number of ``hidden``, which may be 256 before fp16's 65,504 are reached.
FP16_SUM = 256.0

# --- reference --------------------------------------------------------------------------------------------------------


def softmax_cross_entropy_(
    logits: Tensor, targets: Tensor, weights: Tensor, wants_grad: bool, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Weighted cross-entropy of one chunk, and its gradient.

    Args:
        logits: [c, m, V] contiguous, in the compute dtype; overwritten by the gradient where that is wanted.
        targets: [c, m] int64, each in [0, V).
        weights: [c, m] in the wide dtype.
        scale: of the gradient.

    Returns:
        losses [c, m] in the wide dtype, and scale d(sum of losses)/d logits [c, m, V] in the compute dtype (the logits
        where it is not wanted).
    """
    flat = logits.view(-1, logits.shape[-1])
    targets, row_weights = targets.reshape(-1), weights.reshape(-1)
    if logits.device.type == "cpu":
        losses = cpu_passes.cross_entropy_(flat, targets, row_weights, wants_grad, scale)
    else:
        losses = torch.empty_like(row_weights)
        cpu_passes.plain_cross_entropy_(flat, targets, row_weights, losses, wants_grad, scale)
    return losses.view(weights.shape), logits


# --- kernels ------------------------------------------------------------------------------------------------------
# Prefixes: p_ pointer, o_ offsets, b_ block of values, i_ index.


def _jit(kernel):
    """Compiled once per vocabulary and dtype: no specialisation on the number of rows or the scale."""
    return kernel if triton is None else triton.jit(kernel, do_not_specialize=["rows", "scale"])


@_jit
def _softmax_cross_entropy_kernel(
    # data
    p_logits,  # [heads, rows, COLUMNS], of which VOCAB columns count; the gradient takes their place
    p_targets,  # [heads, rows]
    p_weights,  # [heads, rows] float32
    p_losses,  # [heads, rows] float32
    # sizes
    rows,
    # of the gradient
    scale,
    # meta
    VOCAB: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    WANTS_GRAD: tl.constexpr,
):
    """One program per (row, head): a row of logits is read once, and its gradient written in its place."""
    i_row = tl.program_id(1).to(tl.int64) * rows + tl.program_id(0)
    p_row = p_logits + i_row * COLUMNS
    o_column = tl.arange(0, BLOCK)
    # Whole groups of 64 columns are loaded, which is what lets the loads be 16 bytes wide; VOCAB is odd.
    b_logits = tl.load(p_row + o_column, mask=o_column < COLUMNS, other=0.0).to(tl.float32)
    b_logits = tl.where(o_column < VOCAB, b_logits, float("-inf"))
    target = tl.load(p_targets + i_row)
    weight = tl.load(p_weights + i_row)
    highest = tl.max(b_logits, axis=0)
    b_exp = tl.exp(b_logits - highest)
    total = tl.sum(b_exp, axis=0)
    # The target's logit comes from the registers: a load of its own would race with the store below.
    picked = tl.sum(tl.where(o_column == target, b_logits, 0.0), axis=0)
    tl.store(p_losses + i_row, (tl.log(total) + highest - picked) * weight)
    if WANTS_GRAD:
        b_grad = (b_exp / total - tl.where(o_column == target, 1.0, 0.0)) * (weight * scale)
        # The padding becomes zero, so the GEMMs that follow may read it.
        tl.store(p_row + o_column, b_grad.to(p_logits.dtype.element_ty), mask=o_column < COLUMNS)


# --- launchers --------------------------------------------------------------------------------------------------------


def launch_softmax_cross_entropy_(
    logits: Tensor, targets: Tensor, weights: Tensor, wants_grad: bool, vocab: int, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """``softmax_cross_entropy_`` on padded logits [c, m, columns], in place; float32 softmax."""
    heads, rows, columns = logits.shape
    losses = torch.empty(heads, rows, dtype=torch.float32, device=logits.device)
    if losses.numel():
        block, num_warps = launch_shape(columns)
        with torch.cuda.device_of(logits):
            _softmax_cross_entropy_kernel[(rows, heads)](
                logits,
                targets.contiguous(),
                weights.contiguous(),
                losses,
                rows,
                float(scale),
                VOCAB=vocab,
                COLUMNS=columns,
                BLOCK=block,
                WANTS_GRAD=wants_grad,
                num_warps=num_warps,
                enable_fp_fusion=True,  # of Triton 3.10 the default is not
            )
    return losses, logits


def launch_shape(columns: int) -> tuple[int, int]:
    """(block of columns, warps): 16 logits a thread at V = 2051, so the row stays in registers between its uses."""
    block = max(16, 1 << (columns - 1).bit_length())
    return block, min(8, max(1, block // 512))


def _chunks(rows: int, heads: int, row_bytes: int, head_bytes: int, total_bytes: int, budget: int) -> tuple[int, int]:
    """(rows, heads) of a chunk: whole heads first, so that a head's weight gradient is finished within one chunk and
    needs no accumulator; with more rows than fit, one head at a time beside its accumulator.

    Args:
        row_bytes: a row of one head's logits.
        head_bytes: what a head needs beside them: its padded copy, and its padded gradient.
        total_bytes: the accumulator of one head's weight gradient.
        budget: of them all. One row of one head always fits.
    """
    per_head = rows * row_bytes + head_bytes
    if per_head <= budget:
        return max(1, rows), max(1, min(heads, budget // max(1, per_head)))
    left = max(budget - total_bytes - head_bytes, budget // 4)
    return max(1, min(rows, left // row_bytes)), 1


# --- the whole --------------------------------------------------------------------------------------------------------


def _losses_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor,
    scale: float,
    byte_budget: int,
    wants_hidden: bool,
    wants_weight: bool,
    use_triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss [], losses per head [C], and the gradients (empty where not wanted) for an upstream gradient of 1, in fp16
    for one of ``_fp16_unit``."""
    rows, heads, width = hidden.shape
    vocab = weight.shape[-1]
    wide = wide_dtype(hidden.dtype)
    wants_grad = wants_hidden or wants_weight
    row_weights = weights.to(wide).masked_fill(targets == IGNORE, 0.0).expand(rows, heads)
    targets = targets.masked_fill(targets == IGNORE, 0)
    if hidden.device.type == "cpu" and not use_triton and cpu_heads.serves(hidden, weight, targets, byte_budget):
        per_head, grad_hidden, grad_weight = cpu_heads.heads_cross_entropy(
            hidden, weight, targets, row_weights, scale, wants_hidden, wants_weight
        )
        return per_head.sum() * scale, per_head, grad_hidden, grad_weight
    unit = _fp16_unit(weights, scale) if hidden.dtype == torch.float16 else None
    if unit is not None:
        row_weights = row_weights * unit
    grad_hidden = torch.empty_like(hidden) if wants_hidden else hidden.new_empty(0)
    grad_weight = hidden.new_empty(0)
    per_head = torch.zeros(heads, dtype=wide, device=hidden.device)

    columns = -(-vocab // HEAD_COLUMNS) * HEAD_COLUMNS if use_triton else vocab
    element = hidden.element_size()
    head_bytes = width * columns * element * (1 + wants_weight) if columns != vocab else 0
    total_bytes = width * columns * torch.finfo(wide).bits // 8 if wants_weight else 0
    rows_per_chunk, heads_per_chunk = _chunks(rows, heads, columns * element, head_bytes, total_bytes, byte_budget)
    whole = rows_per_chunk == rows and columns == vocab
    by_library = hidden.device.type == "cpu" and cpu_linear.serves(hidden.dtype) and not use_triton
    if by_library:  # a product at a time
        heads_per_chunk = 1
    if wants_weight and not (whole and by_library and heads == 1):
        grad_weight = torch.empty_like(weight)
    for first_head in range(0, heads, heads_per_chunk):
        some_heads = slice(first_head, min(heads, first_head + heads_per_chunk))
        w = weight[some_heads]
        if columns != vocab:
            w = torch.nn.functional.pad(w, (0, columns - vocab))
        total = torch.zeros(w.shape, dtype=wide, device=w.device) if rows_per_chunk != rows else None
        for first in range(0, rows, rows_per_chunk):
            some = slice(first, min(rows, first + rows_per_chunk))
            h = hidden[some, some_heads].transpose(0, 1)
            logits = _product(h, w)
            target, row_weight = targets[some, some_heads].t(), row_weights[some, some_heads].t()
            if use_triton:
                losses, grad = launch_softmax_cross_entropy_(logits, target, row_weight, wants_grad, vocab, scale)
            else:
                losses, grad = softmax_cross_entropy_(logits, target, row_weight, wants_grad, scale)
            per_head[some_heads] += losses.sum(-1)
            if wants_hidden:
                grad_hidden[some, some_heads] = _product(grad, w.transpose(1, 2)).transpose(0, 1)
            if wants_weight and grad_weight.numel() == 0:
                grad_weight = _gradient_of_one(h[0], grad[0], weight)
            elif wants_weight and whole:
                _product_(grad_weight[some_heads], h, grad, by_library)
            elif wants_weight:
                part = _product(h.transpose(1, 2), grad)
                total = part if total is None else total.add_(part)
        if wants_weight and total is not None:
            grad_weight[some_heads] = total[..., :vocab]
    if unit is not None:
        per_head /= unit
    return per_head.sum() * scale, per_head, grad_hidden, grad_weight


def _fp16_unit(weights: Tensor, scale: float) -> Tensor:
    """A power of two, [] float32, that the loss is multiplied by while its gradients are formed in fp16: what a trainer
    scales its loss by is only known afterwards, when weights of 1 / 16384 have made zeros of most of them."""
    total = weights.float().abs().sum(0).amax() * abs(scale)
    return torch.where(total > 0, torch.exp2(torch.floor(torch.log2(FP16_SUM / total))), 1.0)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b for every head; of one as a plain product, which PyTorch's for CPUs does twice as fast where b is
    transposed."""
    return cpu_linear.product(a[0], b[0]).unsqueeze(0) if len(a) == 1 else torch.bmm(a, b)


def _product_(out: Tensor, h: Tensor, grad: Tensor, by_library: bool) -> None:
    """out = h^T grad, written along rows: the weight of a linear layer comes as a transposed view, and into such a one
    PyTorch's bf16 product on a CPU is hundreds of times slower."""
    if by_library:
        out.copy_(_gradient_of_one(h[0], grad[0], out))
    elif out.stride(-1) == 1:
        torch.bmm(h.transpose(1, 2), grad, out=out)
    else:
        torch.bmm(grad.transpose(1, 2), h, out=out.transpose(1, 2))


def _gradient_of_one(h: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
    """h^T grad of one head as [1, D, V], its numbers in memory as those of ``weight``."""
    if weight.stride(-1) == 1:
        return cpu_linear.product(h.t(), grad).unsqueeze(0)
    return cpu_linear.product(grad.t(), h).t().unsqueeze(0)


# --- registered op ----------------------------------------------------------------------------------------------------

_linear_cross_entropy = torch.library.custom_op(
    "csm_kernels::linear_cross_entropy", _losses_and_gradients, mutates_args=()
)


@_linear_cross_entropy.register_fake
def _(hidden, weight, targets, weights, scale, byte_budget, wants_hidden, wants_weight, use_triton):
    wide = wide_dtype(hidden.dtype)
    return (
        hidden.new_empty((), dtype=wide),
        hidden.new_empty(hidden.shape[1], dtype=wide),
        torch.empty_like(hidden) if wants_hidden else hidden.new_empty(0),
        torch.empty_like(weight) if wants_weight else hidden.new_empty(0),
    )


def _setup_context(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # or there would be zeros of the size of the weight for an output nobody uses
    _keep(ctx, inputs, output[2:])


def _keep(ctx, inputs, grads):
    ctx.wants, ctx.scale = inputs[6:8], inputs[4]
    ctx.save_for_backward(*grads, inputs[3] if inputs[0].dtype == torch.float16 else None)


def _backward(ctx, grad_loss, *_):
    if grad_loss is None:
        return (None,) * 9
    *saved, weights = ctx.saved_tensors
    if weights is not None:
        grad_loss = grad_loss / _fp16_unit(weights, ctx.scale)
    # Nobody sees the saved gradients again unless the graph is kept, so they are handed on as they are, or scaled where
    # they lie: a second tensor of the size of the weights is memory, and on a CPU time too.
    mine = all(type(grad) is Tensor for grad in saved) and not _graph_is_kept()
    if mine and _is_one(grad_loss):
        grads = [grad if wanted else None for grad, wanted in zip(saved, ctx.wants, strict=True)]
        return *grads, None, None, None, None, None, None, None
    scale = Tensor.mul_ if mine else Tensor.mul
    scaled = [
        scale(grad, grad_loss.to(grad.dtype)) if wanted else None for grad, wanted in zip(saved, ctx.wants, strict=True)
    ]
    return *scaled, None, None, None, None, None, None, None


def _is_one(grad: Tensor) -> bool:
    """Whether nothing scales the loss any more, where asking costs nothing: on another device the host would wait."""
    return grad.device.type == "cpu" and type(grad) is Tensor and grad.item() == 1


def _graph_is_kept() -> bool:
    """Whether this backward pass runs with ``retain_graph``; True where PyTorch does not tell."""
    tell = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if tell is None else tell()


_linear_cross_entropy.register_autograd(_backward, setup_context=_setup_context)


class _Direct(torch.autograd.Function):
    """The operator without the dispatcher, whose way through a registered one takes half a millisecond: on a CPU as
    long as the products of a short pack."""

    @staticmethod
    def forward(ctx, *inputs):
        loss, per_head, *grads = _losses_and_gradients(*inputs)
        ctx.mark_non_differentiable(per_head)
        ctx.set_materialize_grads(False)
        _keep(ctx, inputs, grads)
        return loss, per_head

    @staticmethod
    def backward(ctx, grad_loss, _):
        return _backward(ctx, grad_loss)


def _is_direct(*inputs: Tensor) -> bool:
    """Whether nothing is there that would have to see the operator: on a CPU, run as it is written."""
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
        weight: [C, D, V], same dtype as ``hidden``; any strides (a transposed view of a [V, D] linear layer will do).
            Logits are formed in that dtype, softmax in float32 (float64 for float64 inputs, ``impl="torch"`` only).
        targets: [M, C] int64, each in [0, V), or -100: such an entry counts nothing.
        weights: [M, 1] or [M, C]; 0 leaves a row out.
        byte_budget: most bytes of logits held at once, beside the float32 accumulator of one head's weight gradient
            where the rows of one head do not fit (never less than one row of one head).
        impl: "triton" (a GPU, or the interpreter), "torch", or "auto": triton on CUDA where it is installed.
        scale: of the loss. Given here and not multiplied afterwards, it needs no pass over the gradients.

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
        uses_triton(impl, hidden),
    )
    return loss, per_head.detach()


def uses_triton(impl: str, x: Tensor) -> bool:
    """Whether ``impl`` means the kernels for a tensor like ``x``."""
    if impl not in ("auto", "triton", "torch"):
        raise ValueError(f"impl is {impl!r}; use 'auto', 'triton' or 'torch'")
    if impl == "triton" and triton is None:
        raise ImportError("impl='triton' needs Triton; install it, or use impl='torch'")
    if impl == "triton" and x.dtype == torch.float64:
        raise ValueError("the Triton kernels compute in float32; use impl='torch' for float64")
    if impl == "auto":
        return triton is not None and x.device.type == "cuda" and x.dtype != torch.float64
    return impl == "triton"
