"""The Triton kernels of ``frame_embed`` and their launchers.

Forward: one pass over what is read. Backward: the (codebook, code) keys are sorted once. Each touched table row is the
float32 sum of its occurrences, in the order of the rows, and is written once. There are no atomics, so the same input
gives the same bits, and the host never waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from csm_kernels.gpu.jit import KERNEL_DTYPES, jit, tl, triton

# --- kernels ----------------------------------------------------------------------------------------------------------
# Prefixes: n_ count, p_ pointer. A program owns BLOCK_D columns; row numbers are int64 before D multiplies them.

# Sizes that change from pack to pack.
_jit = jit("M", "n_rows", "n_text", "n_first", "vocab")


@_jit
def _forward_kernel(
    # data
    p_tokens,  # [N, K + 1]
    p_is_audio,  # [N]
    p_text_table,  # [n_text, D]
    p_audio_table,  # [K * vocab, D]
    p_out,  # [N, D]
    # shapes
    n_text,
    vocab,
    K: tl.constexpr,
    D: tl.constexpr,
    # meta
    IDS: tl.constexpr,  # K, rounded up to a power of 2
    BLOCK_D: tl.constexpr,
    ROUND: tl.constexpr,
):
    """One row, BLOCK_D columns. Neighbouring programs share a row, so table rows are read as a whole."""
    BLOCKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    row = (tl.program_id(0) // BLOCKS).to(tl.int64)
    cols = (tl.program_id(0) % BLOCKS) * BLOCK_D + tl.arange(0, BLOCK_D)
    live = cols < D
    p_tokens += row * (K + 1)
    acc = tl.zeros([BLOCK_D], dtype=tl.float32)
    if tl.load(p_is_audio + row) != 0:
        ids = tl.arange(0, IDS)
        codes = tl.load(p_tokens + ids, mask=ids < K, other=0)
        unknown = tl.max(((codes < 0) | (codes >= vocab)).to(tl.int32), axis=0) != 0
        # A round is one load of [ROUND, BLOCK_D], of which each lane holds ROUND pieces of 16 bytes: several loads are
        # in flight before the first is added. With one code per iteration, ptxas saves registers and keeps two.
        for first in range(0, K, ROUND):
            k = first + tl.arange(0, ROUND)
            code = tl.load(p_tokens + k, mask=k < K, other=0)
            code = tl.where((code < 0) | (code >= vocab), 0, code)
            table_row = (code + k * vocab).to(tl.int64)
            p_rows = p_audio_table + table_row[:, None] * D + cols[None, :]
            acc += tl.sum(tl.load(p_rows, mask=(k < K)[:, None] & live[None, :], other=0.0).to(tl.float32), axis=0)
    else:
        token = tl.load(p_tokens + K)
        unknown = (token < 0) | (token >= n_text)
        token = tl.where(unknown, 0, token).to(tl.int64)
        acc = tl.load(p_text_table + token * D + cols, mask=live).to(tl.float32)
    acc = tl.where(unknown, float("nan"), acc)
    tl.store(p_out + row * D + cols, acc.to(p_out.dtype.element_ty), mask=live)


@_jit
def _sum_kernel(
    # data
    p_grad,  # [n_first, D]
    p_more,  # [.., D] the gradients from n_first on, if TWO
    p_keys,  # [M] sorted: table rows, n_rows for what is not embedded
    p_source,  # [M] the gradient that each key gets
    p_starts,  # [pieces + 1] where each piece begins in p_keys, M from the last on
    p_place,  # [n_rows] where a table row lies in p_out, if COMPACT
    p_partial,  # [2 * chunks, D] float32
    p_out,  # [n_rows, D], or the touched rows only if COMPACT
    # shapes
    M,
    n_rows,
    n_first,
    D: tl.constexpr,
    # meta
    CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROUND: tl.constexpr,
    TWO: tl.constexpr,
    COMPACT: tl.constexpr,
):
    """Sum one piece: a run of equal keys, cut where CHUNK divides the position. dtable[r] = sum of grad over r's run.

    A run of one piece is finished here. Each piece of a longer run leaves a float32 partial sum. A chunk holds at most
    two such pieces: one that begins with the chunk (slot 2c), and one that begins later and ends with it (slot 2c + 1).
    """
    start = tl.load(p_starts + tl.program_id(0))
    end = tl.load(p_starts + tl.program_id(0) + 1)
    if start < M:
        key = tl.load(p_keys + start)
        if key < n_rows:
            cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
            live = cols < D
            acc = tl.zeros([BLOCK_D], dtype=tl.float32)
            for first in range(start, end, ROUND):
                i = first + tl.arange(0, ROUND)
                row = tl.load(p_source + i, mask=i < end, other=0).to(tl.int64)
                here = (i < end)[:, None] & live[None, :]
                if TWO:
                    p_rows = p_more + (row - n_first)[:, None] * D + cols[None, :]
                    there = here & (row >= n_first)[:, None]
                    acc += tl.sum(tl.load(p_rows, mask=there, other=0.0).to(tl.float32), axis=0)
                    here &= (row < n_first)[:, None]
                p_rows = p_grad + row[:, None] * D + cols[None, :]
                acc += tl.sum(tl.load(p_rows, mask=here, other=0.0).to(tl.float32), axis=0)
            before = tl.load(p_keys + start - 1, mask=start > 0, other=-1)
            after = tl.load(p_keys + end, mask=end < M, other=-1)
            if (before != key) & (after != key):
                row = key.to(tl.int64)
                if COMPACT:
                    row = tl.load(p_place + key).to(tl.int64)
                tl.store(p_out + row * D + cols, acc.to(p_out.dtype.element_ty), mask=live)
            else:
                slot = 2 * (start // CHUNK) + (start % CHUNK != 0).to(tl.int32)
                tl.store(p_partial + slot.to(tl.int64) * D + cols, acc, mask=live)


@_jit
def _join_kernel(
    # data
    p_keys,  # [M]
    p_place,  # [n_rows]
    p_partial,  # [2 * chunks, D] float32
    p_out,
    # shapes
    M,
    n_rows,
    D: tl.constexpr,
    # meta
    CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COMPACT: tl.constexpr,
):
    """Sum the partial sums of a run of several pieces. The program at the first cut through the run does this."""
    chunk = tl.program_id(0) + 1
    key = tl.load(p_keys + chunk * CHUNK)
    left = tl.load(p_keys + chunk * CHUNK - 1)
    before = (chunk - 1) * CHUNK
    earlier = tl.load(p_keys + before - 1, mask=before > 0, other=-1)
    if (key < n_rows) & (left == key) & (earlier != key):
        cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        live = cols < D
        slot = 2 * (chunk - 1) + (tl.load(p_keys + before) != key).to(tl.int32)
        acc = tl.load(p_partial + slot.to(tl.int64) * D + cols, mask=live)
        inside = chunk > 0  # True, as a tensor
        while inside:
            acc += tl.load(p_partial + (2 * chunk).to(tl.int64) * D + cols, mask=live)
            chunk += 1
            inside = tl.load(p_keys + chunk * CHUNK, mask=chunk * CHUNK < M, other=-1) == key
        row = key.to(tl.int64)
        if COMPACT:
            row = tl.load(p_place + key).to(tl.int64)
        tl.store(p_out + row * D + cols, acc.to(p_out.dtype.element_ty), mask=live)


# --- launchers --------------------------------------------------------------------------------------------------------
# Fixed configurations, chosen by counting. A lane loads 16 bytes of bfloat16 at once.

# 1,024 columns in 4 warps: 8 per lane. On sm_90 this takes 40 registers, so 12 programs share an SM. The machine code
# keeps about 4 loads of a round in flight: 96 KiB per SM of an H200, where bandwidth times latency (4.3 TB/s x 1 us /
# 132) needs 33 KiB. More columns or longer rounds would reduce the number of programs.
_FORWARD = {"block_d": 1024, "round": 8}
# Each row of the gradient is read once per codebook. Columns are the slow axis of the grid, so the part in use at once
# is 512 columns wide and fits the L2 cache (16,384 rows x 1 KiB). Runs are short: 8 on average for that many rows.
_BACKWARD = {"block_d": 512, "round": 8}
# A piece is at most 256 additions, in 32 consecutive rounds of loads. Scratch is two float32 rows per 256 keys.
_CHUNK = 256


def _columns(width: int, block_d: int) -> tuple[int, int, int]:
    """Columns per program, programs per row, warps."""
    block_d = min(block_d, triton.next_power_of_2(width))
    return block_d, triton.cdiv(width, block_d), max(1, block_d // 256)


def launch_forward(tokens: Tensor, is_audio: Tensor, text_table: Tensor, audio_table: Tensor) -> Tensor:
    """The sum of each row's live embeddings, [N, D]; shapes as in ``frame_embed``.

    Raises:
        ValueError: tables that the kernel does not support.
    """
    for table in (text_table, audio_table):
        if not table.is_cuda and not triton.knobs.runtime.interpret:
            raise ValueError("frame_embed: impl='triton' needs CUDA tensors, or Triton's interpreter")
        if table.dtype not in KERNEL_DTYPES:
            raise ValueError(f"frame_embed: impl='triton' is for bfloat16, float16 and float32, not {table.dtype}")
    rows, num_codebooks = tokens.shape[0], tokens.shape[1] - 1
    width = audio_table.shape[1]
    tokens, is_audio = tokens.contiguous(), is_audio.contiguous()
    text_table, audio_table = text_table.contiguous(), audio_table.contiguous()
    out = torch.empty((rows, width), dtype=audio_table.dtype, device=audio_table.device)
    block_d, blocks, num_warps = _columns(width, _FORWARD["block_d"])
    if rows:
        with torch.cuda.device_of(out):
            _forward_kernel[(rows * blocks,)](
                tokens,
                is_audio,
                text_table,
                audio_table,
                out,
                text_table.shape[0],
                audio_table.shape[0] // num_codebooks,
                K=num_codebooks,
                D=width,
                IDS=triton.next_power_of_2(num_codebooks),
                BLOCK_D=block_d,
                ROUND=_FORWARD["round"],
                num_warps=num_warps,
                num_stages=1,
                enable_fp_fusion=True,
            )
    return out


def launch_backward(
    grad: Tensor, more: Tensor | None, keys: Tensor, source: Tensor, n_rows: int, out: Tensor, place: Tensor | None
) -> None:
    """Sum the gradient of one table into ``out``. No shape depends on the data: surplus programs return at once.

    Args:
        grad, more: [N, D] and [.., D]: the gradients that ``source`` indexes, one after the other.
        keys, source: [M], see ``_sum_kernel``.
        n_rows: rows of the table.
        out: [n_rows, D], zeros; or the touched rows only.
        place: [n_rows], where a touched row lies in ``out``; None if ``out`` is the gradient of the whole table.

    Raises:
        ValueError: too many keys for int32.
    """
    count, width = keys.numel(), grad.shape[1]
    if not count:
        return
    if count >= 2**31 - _CHUNK:
        raise ValueError(f"frame_embed: {count} embeddings in one backward pass; at most 2**31 - {_CHUNK - 1}")
    grad = grad.contiguous()
    cuts = (count - 1) // _CHUNK
    pieces = min(count, n_rows) + cuts  # at most; keys that were not embedded sort last and may be cut off
    begins = torch.ones_like(keys, dtype=torch.bool)
    torch.ne(keys[1:], keys[:-1], out=begins[1:])
    begins[::_CHUNK] = True
    # The p-th piece begins where the count of beginnings reaches p.
    wanted = torch.arange(1, pieces + 2, device=keys.device, dtype=torch.int32)
    starts = torch.searchsorted(begins.cumsum(0, dtype=torch.int32), wanted, out_int32=True)
    partial = torch.empty((2 * (cuts + 1), width), dtype=torch.float32, device=grad.device)
    block_d, blocks, num_warps = _columns(width, _BACKWARD["block_d"])
    meta = {"D": width, "CHUNK": _CHUNK, "BLOCK_D": block_d, "COMPACT": place is not None}
    options = {"num_warps": num_warps, "num_stages": 1, "enable_fp_fusion": True}
    place = keys if place is None else place
    with torch.cuda.device_of(grad):
        _sum_kernel[(pieces, blocks)](
            grad,
            grad if more is None else more.contiguous(),
            keys,
            source,
            starts,
            place,
            partial,
            out,
            count,
            n_rows,
            grad.shape[0],
            ROUND=_BACKWARD["round"],
            TWO=more is not None,
            **meta,
            **options,
        )
        if cuts:
            _join_kernel[(cuts, blocks)](keys, place, partial, out, count, n_rows, **meta, **options)
