"""The Triton kernels of ``depth_attention`` and their launchers.

A program owns one key-value head of one frame. It keeps the rotated K tile and the V tile on the chip and goes through
the query heads that share them. A row of scores fits one tile, so the forward saves nothing but its inputs: the
backward recomputes the scores, their maxima and their sums from what it loads anyway.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from csm_kernels.gpu.jit import KERNEL_DTYPES, jit, tl, triton

MAX_LENGTH, HEAD_WIDTHS = 64, (32, 64, 128)

# --- kernels ----------------------------------------------------------------------------------------------------------
# Prefixes: p_ pointer, s_ stride, o_ offsets, b_ block of values, i_ index. K is LENGTH rounded up for tl.dot.
#
# A tile is loaded contiguously, tl.split separates its pairs once, and even and odd columns then stay apart: a dot over
# d is the sum of one over the even and one over the odd columns, in any order that both operands share. A tl.join
# before a dot would undo the split in registers, but Triton takes it for packed 4-bit operands and then does not use
# ldmatrix. V and the gradient of the output come in a left and a right half, so that every dot is [K, d/2] or [K, K].
#
# The loop over heads is pipelined in two stages. This overlaps loads with arithmetic, and it keeps the rotation in the
# layout of its load: without it, the compiler moves the rotation into the layout of the dot's operand, where every warp
# repeats it.


@jit()
def _load_rotated(p_x, o_x, m_x, b_cos, b_sin, K: tl.constexpr, D: tl.constexpr):
    """Even and odd columns of a [K, D] tile, rotated in float32 and rounded."""
    b_x = tl.load(p_x + o_x, mask=m_x, other=0.0)
    b_even, b_odd = tl.split(tl.reshape(b_x.to(tl.float32), (K, D // 2, 2)))
    return (b_even * b_cos - b_odd * b_sin).to(b_x.dtype), (b_odd * b_cos + b_even * b_sin).to(b_x.dtype)


@jit()
def _store_rotated_back(p_x, o_x, m_x, b_even, b_odd, b_cos, b_sin, K: tl.constexpr, D: tl.constexpr):
    """The transposed rotation of a gradient in float32, its pairs interleaved again."""
    dtype = p_x.dtype.element_ty
    b_x = tl.join((b_even * b_cos + b_odd * b_sin).to(dtype), (b_odd * b_cos - b_even * b_sin).to(dtype))
    tl.store(p_x + o_x, tl.reshape(b_x, (K, D)), mask=m_x)


@jit()
def _forward_kernel(
    # data
    p_q,
    p_k,
    p_v,
    p_cos,
    p_sin,
    p_out,
    # strides of frames, positions and heads; columns are contiguous
    s_qm,
    s_qk,
    s_qh,
    s_km,
    s_kk,
    s_kh,
    s_vm,
    s_vk,
    s_vh,
    # meta
    LENGTH: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    SCALE: tl.constexpr,
):
    """softmax(rotate(q) rotate(k)^T scale, causal) v for the GROUP query heads of one key-value head of one frame."""
    HALF: tl.constexpr = D // 2
    i_frame = tl.program_id(0).to(tl.int64) // KV_HEADS
    i_kv = tl.program_id(0).to(tl.int64) % KV_HEADS
    i_row = tl.arange(0, K)
    row = i_row[:, None].to(tl.int64)
    column = tl.arange(0, D)[None, :]
    half = tl.arange(0, HALF)[None, :]
    live = row < LENGTH
    seen = i_row[None, :] <= i_row[:, None]  # also hides keys past the end from every row that is kept

    b_cos = tl.load(p_cos + row * HALF + half, mask=live, other=0.0)
    b_sin = tl.load(p_sin + row * HALF + half, mask=live, other=0.0)
    o_k = i_frame * s_km + row * s_kk + i_kv * s_kh + column
    b_k_even, b_k_odd = _load_rotated(p_k, o_k, live, b_cos, b_sin, K, D)
    o_v = i_frame * s_vm + row * s_vk + i_kv * s_vh + half
    b_v_left = tl.load(p_v + o_v, mask=live, other=0.0)
    b_v_right = tl.load(p_v + o_v + HALF, mask=live, other=0.0)

    o_q = i_frame * s_qm + row * s_qk + column
    o_out = (i_frame * LENGTH + row) * (KV_HEADS * GROUP * D) + half
    for n in tl.range(0, GROUP, num_stages=2):
        i_head = i_kv * GROUP + n
        b_q_even, b_q_odd = _load_rotated(p_q, o_q + i_head * s_qh, live, b_cos, b_sin, K, D)
        b_s = tl.dot(b_q_even, b_k_even.T, input_precision="ieee")
        b_s = tl.dot(b_q_odd, b_k_odd.T, b_s, input_precision="ieee")
        b_s = tl.where(seen, b_s * (SCALE * 1.4426950408889634), float("-inf"))  # log2(e): exp2 is one instruction
        b_p = tl.exp2(b_s - tl.max(b_s, 1)[:, None])
        b_p = (b_p / tl.sum(b_p, 1)[:, None]).to(b_v_left.dtype)
        b_left = tl.dot(b_p, b_v_left, input_precision="ieee")
        b_right = tl.dot(b_p, b_v_right, input_precision="ieee")
        p_head = p_out + o_out + i_head * D
        tl.store(p_head, b_left.to(b_v_left.dtype), mask=live)
        tl.store(p_head + HALF, b_right.to(b_v_left.dtype), mask=live)


@jit()
def _backward_kernel(
    # data
    p_q,
    p_k,
    p_v,
    p_cos,
    p_sin,
    p_do,
    p_dq,
    p_dk,
    p_dv,
    # strides of frames, positions and heads; columns are contiguous
    s_qm,
    s_qk,
    s_qh,
    s_km,
    s_kk,
    s_kh,
    s_vm,
    s_vk,
    s_vh,
    s_dm,
    s_dk,
    s_dh,
    # meta
    LENGTH: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    SCALE: tl.constexpr,
    WANTS_Q: tl.constexpr,
    WANTS_K: tl.constexpr,
    WANTS_V: tl.constexpr,
):
    """All gradients of one key-value head of one frame. One program adds up its query heads, so no atomics are needed.

    With s = rotate(q) rotate(k)^T scale, p = softmax(s) and o = p v:
    dv = p^T do, dp = do v^T, ds = p (dp - rowsum(p dp)), dq = rotate^T(ds rotate(k)) scale, dk = rotate^T(ds^T
    rotate(q)) scale. The kernel computes the transposes, [keys, queries]. Then k, v, p^T and ds^T are left operands,
    which each warp holds as a whole, and q and do are right operands, of which it holds its columns. A softmax stays
    within a warp.
    """
    HALF: tl.constexpr = D // 2
    i_frame = tl.program_id(0).to(tl.int64) // KV_HEADS
    i_kv = tl.program_id(0).to(tl.int64) % KV_HEADS
    i_row = tl.arange(0, K)
    row = i_row[:, None].to(tl.int64)
    column = tl.arange(0, D)[None, :]
    half = tl.arange(0, HALF)[None, :]
    live = row < LENGTH
    seen = i_row[:, None] <= i_row[None, :]  # queries past the end have zero gradients and add nothing

    b_cos = tl.load(p_cos + row * HALF + half, mask=live, other=0.0)
    b_sin = tl.load(p_sin + row * HALF + half, mask=live, other=0.0)
    o_k = i_frame * s_km + row * s_kk + i_kv * s_kh + column
    b_k_even, b_k_odd = _load_rotated(p_k, o_k, live, b_cos, b_sin, K, D)
    o_v = i_frame * s_vm + row * s_vk + i_kv * s_vh + half
    b_v_left = tl.load(p_v + o_v, mask=live, other=0.0)
    b_v_right = tl.load(p_v + o_v + HALF, mask=live, other=0.0)

    b_dk_even = tl.zeros((K, HALF), tl.float32)
    b_dk_odd = tl.zeros((K, HALF), tl.float32)
    b_dv_left = tl.zeros((K, HALF), tl.float32)
    b_dv_right = tl.zeros((K, HALF), tl.float32)
    o_q = i_frame * s_qm + row * s_qk + column
    o_do = i_frame * s_dm + row * s_dk + half
    o_dq = (i_frame * LENGTH + row) * (KV_HEADS * GROUP * D) + column
    for n in tl.range(0, GROUP, num_stages=2):
        i_head = i_kv * GROUP + n
        b_q_even, b_q_odd = _load_rotated(p_q, o_q + i_head * s_qh, live, b_cos, b_sin, K, D)
        p_do_head = p_do + o_do + i_head * s_dh
        b_do_left = tl.load(p_do_head, mask=live, other=0.0)
        b_do_right = tl.load(p_do_head + HALF, mask=live, other=0.0)
        b_s = tl.dot(b_k_even, b_q_even.T, input_precision="ieee")
        b_s = tl.dot(b_k_odd, b_q_odd.T, b_s, input_precision="ieee")
        b_s = tl.where(seen, b_s * (SCALE * 1.4426950408889634), float("-inf"))
        b_p = tl.exp2(b_s - tl.max(b_s, 0)[None, :])
        b_p = b_p / tl.sum(b_p, 0)[None, :]
        if WANTS_V:
            b_pt = b_p.to(b_do_left.dtype)
            b_dv_left = tl.dot(b_pt, b_do_left, b_dv_left, input_precision="ieee")
            b_dv_right = tl.dot(b_pt, b_do_right, b_dv_right, input_precision="ieee")
        if WANTS_Q or WANTS_K:
            b_dp = tl.dot(b_v_left, b_do_left.T, input_precision="ieee")
            b_dp = tl.dot(b_v_right, b_do_right.T, b_dp, input_precision="ieee")
            b_ds = (b_p * (b_dp - tl.sum(b_p * b_dp, 0)[None, :]) * SCALE).to(b_q_even.dtype)
            if WANTS_K:
                b_dk_even = tl.dot(b_ds, b_q_even, b_dk_even, input_precision="ieee")
                b_dk_odd = tl.dot(b_ds, b_q_odd, b_dk_odd, input_precision="ieee")
            if WANTS_Q:
                b_dq_even = tl.dot(b_ds.T, b_k_even, input_precision="ieee")
                b_dq_odd = tl.dot(b_ds.T, b_k_odd, input_precision="ieee")
                _store_rotated_back(p_dq, o_dq + i_head * D, live, b_dq_even, b_dq_odd, b_cos, b_sin, K, D)

    o_kv = (i_frame * LENGTH + row) * (KV_HEADS * D) + i_kv * D
    if WANTS_K:
        _store_rotated_back(p_dk, o_kv + column, live, b_dk_even, b_dk_odd, b_cos, b_sin, K, D)
    if WANTS_V:
        tl.store(p_dv + o_kv + half, b_dv_left.to(p_dv.dtype.element_ty), mask=live)
        tl.store(p_dv + o_kv + half + HALF, b_dv_right.to(p_dv.dtype.element_ty), mask=live)


# --- launchers --------------------------------------------------------------------------------------------------------


# Registers per thread and shared memory for csm-1b (K = 32, d = 128), compiled ahead of time by Triton 3.7; those of
# Triton 3.6 differ by at most 8 registers. Timings are not part of this table.
#
#                      warps   sm_80   sm_86   sm_89   sm_90  sm_100  sm_120   shared     sm_75, fp16
#   forward   bf16         4     126     128     128     126     128     128   28 KiB    162, 40 KiB
#   backward  bf16         8     201     201     201     204     204     194   44 KiB    255 + 320 spilled, 40 KiB
#   forward   fp32         8     198     197     197      80      80      80   64 KiB
#   backward  fp32         8     254     246     246     248     248     248   84 KiB
#
# Only sm_75 spills: Turing has no asynchronous copies, so its loop is not pipelined (see above). With 4 warps the
# backward needs all 255 registers and spills 16 to 32 bytes on sm_100 and sm_120. Two other forms were worse: scores as
# [queries, keys] took 233 to 248 registers in the backward with 8 warps, and spilled 300 bytes when limited to 128 for
# a second program on a multiprocessor; two heads in one tile of 64 rows spilled in the backward and took 190 registers
# in the forward. Where K >= d / 2, Triton lays out the warps of the backward worse: K = 64 with d = 128 spills 3 KiB
# (8 bytes on sm_90), K = 64 with d = 64 up to 1.3 KiB, K = 32 with d = 64 up to 16 bytes. Their results are right, but
# this file is not tuned for them.


def _num_warps(dtype_bytes: int, backward: bool) -> int:
    return 8 if backward or dtype_bytes == 4 else 4


def _block(length: int) -> int:
    """Rows of a tile: a power of two, at least the 16 of a tensor core."""
    block = 16
    while block < length:
        block *= 2
    return block


def _meta(q: Tensor, k: Tensor, backward: bool) -> dict[str, int | float | bool]:
    _, length, heads, width = q.shape
    return {
        "LENGTH": length,
        "KV_HEADS": k.shape[2],
        "GROUP": heads // k.shape[2],
        "K": _block(length),
        "D": width,
        "SCALE": 1 / math.sqrt(width),
        "num_warps": _num_warps(q.element_size(), backward),
        "enable_fp_fusion": True,
    }


def _with_contiguous_columns(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in tensors)


def launch_forward(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The output, [M, K, H, d]; shapes as in ``depth_attention``.

    Raises:
        ValueError: tensors that the kernels do not support.
    """
    if not q.is_cuda and not triton.knobs.runtime.interpret:
        raise ValueError("depth_attention: impl='triton' needs CUDA tensors, or Triton's interpreter")
    if reason := why_unsupported(q, cos):
        raise ValueError(f"depth_attention: impl='triton' is for {reason}")
    q, k, v = _with_contiguous_columns(q, k, v)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel():
        grid = (q.shape[0] * k.shape[2],)
        strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
        with torch.cuda.device_of(q):
            _forward_kernel[grid](
                q, k, v, cos.contiguous(), sin.contiguous(), out, *strides, **_meta(q, k, backward=False)
            )
    return out


def launch_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, wants: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv; empty where not wanted."""
    grad, q, k, v = _with_contiguous_columns(grad, q, k, v)
    grads = [
        torch.empty(x.shape if wanted else 0, dtype=x.dtype, device=x.device)
        for x, wanted in zip((q, k, v), wants, strict=True)
    ]
    if q.numel():
        grid = (q.shape[0] * k.shape[2],)
        strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad.stride()[:3])
        flags = dict(zip(("WANTS_Q", "WANTS_K", "WANTS_V"), wants, strict=True))
        with torch.cuda.device_of(q):
            _backward_kernel[grid](
                q, k, v, cos.contiguous(), sin.contiguous(), grad, *grads, *strides, **_meta(q, k, True), **flags
            )
    return grads[0], grads[1], grads[2]


def why_unsupported(q: Tensor, cos: Tensor) -> str:
    """What the kernels support, if these inputs are something else; empty if they support them."""
    if q.dtype not in KERNEL_DTYPES or cos.dtype != torch.float32:
        return f"bfloat16, float16 and float32 with a float32 table, not {q.dtype} with {cos.dtype}"
    if q.shape[1] > MAX_LENGTH or q.shape[3] not in HEAD_WIDTHS:
        return f"at most {MAX_LENGTH} positions and heads of {HEAD_WIDTHS}, not {q.shape[1]} and {q.shape[3]}"
    if q.is_cuda:
        # Four to six tiles of K or V are in use at once.
        needed, available = 6 * _block(q.shape[1]) * q.shape[3] * q.element_size(), _shared_memory(str(q.device))
        if needed > available:
            return f"tiles that need {available} bytes of shared memory at most, not {needed}"
    return ""


@torch.compiler.assume_constant_result
def _shared_memory(device: str) -> int:
    """Bytes that a block may use: 64 KiB on Turing, at least 99 KiB on later GPUs."""
    return (99 if torch.cuda.get_device_properties(device).major >= 8 else 64) * 1024
