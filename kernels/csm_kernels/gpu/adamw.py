"""The Triton kernel of ``adamw`` and its launcher: float32 or bf16 weights, moments in float32 or 8 bits, stochastic or
compensated rounding.

PyTorch's operators widen a chunk, update it and narrow it again. By count this moves 74 bytes per weight in bf16 with
float32 moments and 94 with 8-bit moments; the kernel moves the 22 and 10 bytes that have to be read and written.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from csm_kernels.constants import DRAW_TILE, MOMENT_BLOCK
from csm_kernels.gpu.jit import jit, tl

BLOCK = 1024  # elements of a program
WARPS = 8  # four elements a thread: values of all types have one layout, so nothing goes through shared memory
NEAREST, STOCHASTIC, KAHAN = 0, 1, 2
DTYPES = (torch.bfloat16, torch.float32)

# --- kernel -----------------------------------------------------------------------------------------------------------
# Prefixes: p_ pointer. A program owns BLOCK elements; their indices are int64 before anything multiplies them.


@jit()
def _mix(x):
    return (x ^ (x >> 16)) * 0x7FEB352D


@jit()
def _finish(x):
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@jit()
def _one_minus_exp(x):
    """1 - e^x for x <= 0, accurate to float32's rounding, also near zero."""
    series = 1.0 + x * (1 / 8)
    series = 1.0 + x * (1 / 7) * series
    series = 1.0 + x * (1 / 6) * series
    series = 1.0 + x * (1 / 5) * series
    series = 1.0 + x * (1 / 4) * series
    series = 1.0 + x * (1 / 3) * series
    series = 1.0 + x * (1 / 2) * series
    return tl.where(x > -0.35, -x * series, 1.0 - tl.exp(x))


@jit()
def _round_to_bf16(x):
    """The nearest bf16 number, ties to even. A conversion does the same, but truncates in Triton's interpreter."""
    bits = x.to(tl.uint32, bitcast=True)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return tl.where(x == x, nearest.to(tl.float32, bitcast=True), x)


@jit()
def _nearest_code(x, p_map):
    """The index of the nearest of the 256 ascending values at ``p_map``."""
    code = tl.zeros_like(x).to(tl.int32)
    for power in tl.static_range(8):
        higher = code + (128 >> power)
        code = tl.where(x >= tl.load(p_map + higher), higher, code)
    above = tl.minimum(code + 1, 255)
    return tl.where(tl.load(p_map + above) - x < x - tl.load(p_map + code), above, code)


# Settings change from step to step, so they are not specialised; n is, because loads are 16 bytes wide only where it is
# a multiple of 16.
@jit("keep", "size", "log_beta1", "log_beta2", "fresh", "fresh_square", "eps", "counters", "salt", "tiles")
def _adamw_kernel(
    # data
    p_weight,  # [n]
    p_grad,  # [n]
    p_mean,  # [n] float32, or uint8 codes if EIGHT
    p_square,  # [n] the same
    p_mean_scale,  # [n / 256] float32, if EIGHT
    p_square_scale,  # the same
    p_mean_map,  # [256] float32, the values of the codes, if EIGHT
    p_square_map,  # the same
    p_rest,  # [n] bf16, if ROUNDING is KAHAN
    p_live,  # [n / BLOCK] uint8, which programs had a gradient, if LIVE
    p_step,  # [] float32
    p_found_inf,  # [] float32, if MAY_SKIP
    p_grad_scale,  # [] float32, if SCALES
    # settings
    n,
    keep,  # 1 - lr weight_decay
    size,  # lr
    log_beta1,
    log_beta2,
    fresh,  # 1 - beta1
    fresh_square,  # 1 - beta2
    eps,
    counters,
    salt,
    tiles,
    # meta
    ROUNDING: tl.constexpr,
    EIGHT: tl.constexpr,
    LIVE: tl.constexpr,
    MAY_SKIP: tl.constexpr,
    SCALES: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    QUANTIZED: tl.constexpr,
):
    """m += (1 - beta1) (g - m); v = beta2 v + (1 - beta2) g^2; w = w keep - lr / (1 - beta1^t) m / (sqrt(v / (1 -
    beta2^t)) + eps), in float32."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    inside = tl.arange(0, BLOCK)
    place = first + inside
    here = place < n
    if MAY_SKIP:
        here = here & (tl.load(p_found_inf) + tl.zeros([BLOCK], dtype=tl.float32) != 1.0)
    grad = tl.load(p_grad + place, mask=here, other=0.0).to(tl.float32)
    if LIVE:
        # NaN counts as a gradient, too.
        lives = tl.maximum(tl.load(p_live + tl.program_id(0)).to(tl.int32), tl.max((grad != 0.0).to(tl.int32), axis=0))
        tl.store(p_live + tl.program_id(0), lives.to(tl.uint8))
        here = here & (inside * 0 + lives != 0)
    if SCALES:
        grad = grad / tl.load(p_grad_scale)
    weight = tl.load(p_weight + place, mask=here, other=0.0).to(tl.float32)
    if ROUNDING == 2:
        weight += tl.load(p_rest + place, mask=here, other=0.0).to(tl.float32)
    if EIGHT:
        p_scales = place // QUANTIZED
        mean = tl.load(p_mean_map + tl.load(p_mean + place, mask=here, other=0).to(tl.int32))
        mean *= tl.load(p_mean_scale + p_scales, mask=here, other=0.0)
        square = tl.load(p_square_map + tl.load(p_square + place, mask=here, other=0).to(tl.int32))
        square *= tl.load(p_square_scale + p_scales, mask=here, other=0.0)
    else:
        mean = tl.load(p_mean + place, mask=here, other=0.0)
        square = tl.load(p_square + place, mask=here, other=0.0)

    step = tl.load(p_step)
    mean += fresh * (grad - mean)
    square = square * (1.0 - fresh_square) + fresh_square * grad * grad
    root = tl.sqrt(_one_minus_exp(step * log_beta2))
    weight = weight * keep - size / _one_minus_exp(step * log_beta1) * mean / (tl.sqrt(square) / root + eps)

    if ROUNDING == 1:
        # The random bits of csm_fast.train.optim.rounding.RoundingBits. A program's elements lie in one tile.
        salted = _mix(_mix(step.to(tl.int32).to(tl.uint32, bitcast=True) + salt.to(tl.uint32, bitcast=True)))
        within = (first % TILE).to(tl.uint32) + inside.to(tl.uint32)
        words = _finish(_mix(counters.to(tl.uint32, bitcast=True) + within // 2) ^ salted)
        tile = (first // TILE).to(tl.uint32)
        key = _finish(_mix(tiles.to(tl.uint32, bitcast=True) + tile // 2) ^ _mix(salted))
        key = tl.where(tile == 0, key * 0, (key >> (tile % 2 * 16)) & 0xFFFF)
        draws = ((words >> (within % 2 * 16)) & 0xFFFF) ^ key
        noisy = weight.to(tl.uint32, bitcast=True) + draws
        weight = (noisy & 0xFFFF0000).to(tl.float32, bitcast=True)
    elif p_weight.dtype.element_ty == tl.bfloat16:
        exact = weight
        weight = _round_to_bf16(exact)
        if ROUNDING == 2:
            tl.store(p_rest + place, _round_to_bf16(exact - weight).to(tl.bfloat16), mask=here)
    tl.store(p_weight + place, weight.to(p_weight.dtype.element_ty), mask=here)
    if EIGHT:
        ROWS: tl.constexpr = BLOCK // QUANTIZED
        row = tl.arange(0, ROWS)
        scales = first // QUANTIZED + row
        scaled_here = tl.max(tl.reshape(here.to(tl.int32), (ROWS, QUANTIZED)), axis=1) != 0
        mean = tl.reshape(tl.where(here, mean, 0.0), (ROWS, QUANTIZED))
        square = tl.reshape(tl.where(here, square, 0.0), (ROWS, QUANTIZED))
        mean_scale, square_scale = tl.max(tl.abs(mean), axis=1), tl.max(square, axis=1)
        tl.store(p_mean_scale + scales, mean_scale, mask=scaled_here)
        tl.store(p_square_scale + scales, square_scale, mask=scaled_here)
        mean /= tl.where(mean_scale == 0.0, 1.0, mean_scale)[:, None]
        square /= tl.where(square_scale == 0.0, 1.0, square_scale)[:, None]
        mean, square = tl.reshape(mean, (BLOCK,)), tl.reshape(square, (BLOCK,))
        tl.store(p_mean + place, _nearest_code(mean, p_mean_map).to(tl.uint8), mask=here)
        # Never the code of zero: where the gradient then is zero, as in rows of a table that a step does not read, the
        # first moment would be divided by eps alone.
        square_code = tl.maximum(_nearest_code(square, p_square_map), 1)
        tl.store(p_square + place, square_code.to(tl.uint8), mask=here)
    else:
        tl.store(p_mean + place, mean, mask=here)
        tl.store(p_square + place, square, mask=here)


# --- launcher ---------------------------------------------------------------------------------------------------------


def count_parts(numel: int) -> int:
    """How many programs update a weight, which is how many parts ``live`` marks."""
    return -(-numel // BLOCK)


def launch_adamw_(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    scales: tuple[Tensor, Tensor] | None,
    maps: Tensor | None,
    compensation: Tensor | None,
    live: Tensor | None,
    step: Tensor,
    found_inf: Tensor | None,
    grad_scale: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    draws: tuple[int, int, int] | None,
) -> None:
    """Arguments as in ``csm_kernels.adamw``. The host never waits for the device.

    Raises:
        ValueError: tensors of other types or layouts.
    """
    tensors = weight, grad, exp_avg, exp_avg_sq, compensation
    if not all(x is None or (x.is_contiguous() and x.numel() == weight.numel()) for x in tensors):
        raise ValueError("adamw_ takes contiguous tensors of one size")
    if live is not None and live.numel() != count_parts(weight.numel()):
        raise ValueError(f"live has {live.numel()} marks for {count_parts(weight.numel())} parts")
    if weight.dtype not in DTYPES or (scales is None) != (exp_avg.dtype == torch.float32):
        raise ValueError(f"there is no adamw_ for {weight.dtype} with moments in {exp_avg.dtype}")
    n = weight.numel()
    if not n:
        return
    bf16 = weight.dtype == torch.bfloat16
    rounding = KAHAN if compensation is not None else STOCHASTIC if bf16 and draws else NEAREST
    with torch.cuda.device_of(weight):
        _adamw_kernel[(count_parts(n),)](
            weight,
            grad,
            exp_avg,
            exp_avg_sq,
            *(scales or (step, step)),  # a form does not read what it does not have
            *((step, step) if maps is None else maps),
            weight if compensation is None else compensation,
            step if live is None else live,
            step,
            step if found_inf is None else found_inf,
            step if grad_scale is None else grad_scale,
            n,
            1.0 - lr * weight_decay,
            lr,
            math.log(beta1) if beta1 else -math.inf,
            math.log(beta2) if beta2 else -math.inf,
            1.0 - beta1,
            1.0 - beta2,
            eps,
            *(draws or (0, 0, 0)),
            ROUNDING=rounding,
            EIGHT=scales is not None,
            LIVE=live is not None,
            MAY_SKIP=found_inf is not None,
            SCALES=grad_scale is not None,
            BLOCK=BLOCK,
            TILE=DRAW_TILE,
            QUANTIZED=MOMENT_BLOCK,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
