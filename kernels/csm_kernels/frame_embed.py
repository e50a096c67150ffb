"""Sum of a row's live embeddings, without the [rows, K + 1, width] tensor.

An audio row is a sum of K table rows, a text row is one table row. The depth decoder looks up codes of the same audio
table one by one. Both look-ups are one operator here, so that they share one gradient. A table's gradient is the sum of
each touched row's occurrences, which are found by sorting the keys.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from csm_kernels.choice import resolve
from csm_kernels.gpu.frame_embed import launch_backward, launch_forward

# --- PyTorch's operators ----------------------------------------------------------------------------------------------


def _keys(codes: Tensor, vocab: int) -> Tensor:
    """[.., k] codes of codebooks 0, 1, .. -> rows of the audio table."""
    return codes + torch.arange(codes.shape[-1], device=codes.device, dtype=codes.dtype) * vocab


def _reference(
    tokens: Tensor, is_audio: Tensor, frames: Tensor, text_table: Tensor, audio_table: Tensor, sparse: bool
) -> tuple[Tensor, Tensor]:
    """Every row looks up both kinds and keeps one, so that no shape depends on the data."""
    vocab = audio_table.shape[0] // (tokens.shape[1] - 1)
    keys = _keys(tokens[:, :-1], vocab)
    audio = F.embedding_bag(keys.where(is_audio.unsqueeze(1), 0), audio_table, mode="sum", sparse=sparse)
    words = F.embedding(tokens[:, -1].where(~is_audio, 0), text_table, sparse=sparse)
    rows = torch.where(is_audio.unsqueeze(1), audio, words.to(audio.dtype))
    return rows, F.embedding(keys.index_select(0, frames)[:, :-1], audio_table, sparse=sparse)


# --- registered operators ---------------------------------------------------------------------------------------------


def _embed(
    tokens: Tensor,
    is_audio: Tensor,
    frames: Tensor,
    text_table: Tensor,
    audio_table: Tensor,
    sparse: bool = False,
    use_triton: bool = True,
) -> tuple[Tensor, Tensor]:
    """The rows [N, D], and the codes of ``frames`` one by one [M, K - 1, D]. Without ``use_triton``: on a CPU."""
    vocab = audio_table.shape[0] // (tokens.shape[1] - 1)
    if use_triton:
        rows = launch_forward(tokens, is_audio, text_table, audio_table)
    else:
        from csm_kernels.cpu.frame_embed import embed_rows

        rows = embed_rows(_keys(tokens[:, :-1], vocab), tokens[:, -1], is_audio, text_table, audio_table)
    return rows, F.embedding(_keys(tokens.index_select(0, frames)[:, :-2], vocab), audio_table)


_frame_embed = torch.library.custom_op("csm_kernels::frame_embed", _embed, mutates_args=())


@_frame_embed.register_fake
def _(tokens, is_audio, frames, text_table, audio_table, sparse=False, use_triton=True):
    width = audio_table.shape[1]
    codes = audio_table.new_empty((frames.shape[0], tokens.shape[1] - 2, width))
    return audio_table.new_empty((tokens.shape[0], width)), codes


def _sorted_keys(
    tokens: Tensor, is_audio: Tensor, frames: Tensor, of_audio: bool, n_rows: int
) -> tuple[Tensor, Tensor]:
    """(keys, source), both int32: the table rows that were read, ascending, n_rows for none; and the gradient of each,
    as an index into the gradients of rows, followed by those of the codes of ``frames``."""
    rows, num_codebooks = tokens.shape[0], tokens.shape[1] - 1
    vocab = n_rows // num_codebooks if of_audio else n_rows
    ids = tokens[:, :-1] if of_audio else tokens[:, -1:]
    live = is_audio.unsqueeze(1) == of_audio

    def keys_of(ids: Tensor, live: Tensor | bool) -> Tensor:
        return torch.where((ids >= 0) & (ids < vocab) & live, _keys(ids.to(torch.int32), vocab), n_rows).flatten()

    keys = keys_of(ids, live)
    of_rows = keys.numel()
    if of_audio:
        keys = torch.cat([keys, keys_of(tokens.index_select(0, frames)[:, :-2], True)])
    # Stable, so that the occurrences of a row are always in the same order.
    keys, order = torch.sort(keys, stable=True)
    order = order.to(torch.int32)
    if not of_audio:
        return keys, order
    return keys, torch.where(order < of_rows, order // num_codebooks, order - (of_rows - rows))


@torch.library.custom_op("csm_kernels::frame_embed_table_gradient", mutates_args=())
def _table_gradient(
    grad: Tensor,
    grad_codes: Tensor,
    tokens: Tensor,
    is_audio: Tensor,
    frames: Tensor,
    of_audio: bool,
    n_rows: int,
    dtype: torch.dtype,
    use_triton: bool = True,
) -> Tensor:
    """The gradient of the audio table, or else of the text table."""
    more = grad_codes.flatten(0, 1) if of_audio and grad_codes.numel() else None
    keys, source = _sorted_keys(tokens, is_audio, frames, of_audio, n_rows)
    if use_triton:
        out = torch.zeros((n_rows, grad.shape[1]), dtype=dtype, device=grad.device)
        launch_backward(grad, more, keys, source, n_rows, out, None)
    else:
        from csm_kernels.cpu import frame_embed as cpu

        out = cpu.zeros((n_rows, grad.shape[1]), dtype)
        cpu.write_gradient(grad, more, keys, source, n_rows, out)
    return out


@_table_gradient.register_fake
def _(grad, grad_codes, tokens, is_audio, frames, of_audio, n_rows, dtype, use_triton=True):
    return grad.new_empty((n_rows, grad.shape[1]), dtype=dtype)


def _sparse_table_gradient(
    grad: Tensor,
    grad_codes: Tensor,
    tokens: Tensor,
    is_audio: Tensor,
    frames: Tensor,
    of_audio: bool,
    n_rows: int,
    dtype: torch.dtype,
    use_triton: bool,
) -> Tensor:
    """The same as a sparse tensor of the touched rows, ascending. Their number is a shape, so the host waits for it."""
    more = grad_codes.flatten(0, 1) if of_audio and grad_codes.numel() else None
    keys, source = _sorted_keys(tokens, is_audio, frames, of_audio, n_rows)
    touched = torch.unique_consecutive(keys)
    touched = touched[touched < n_rows].long()
    place = torch.empty(n_rows, dtype=torch.int32, device=grad.device)
    place[touched] = torch.arange(touched.numel(), dtype=torch.int32, device=grad.device)
    values = torch.empty((touched.numel(), grad.shape[1]), dtype=dtype, device=grad.device)
    if use_triton:
        launch_backward(grad, more, keys, source, n_rows, values, place)
    else:
        from csm_kernels.cpu.frame_embed import write_gradient

        live = keys < n_rows  # a prefix
        write_gradient(grad, more, place[keys[live].long()], source[live], touched.numel(), values)
    size = (n_rows, grad.shape[1])
    return torch.sparse_coo_tensor(touched.unsqueeze(0), values, size, is_coalesced=True, check_invariants=False)


def _setup_context(ctx, inputs, output):
    tokens, is_audio, frames, text_table, audio_table, ctx.sparse, ctx.use_triton = inputs
    ctx.save_for_backward(tokens, is_audio, frames)
    ctx.text = (False, text_table.shape[0], text_table.dtype)
    ctx.audio = (True, audio_table.shape[0], audio_table.dtype)


def _backward(ctx, grad, grad_codes):
    gradient: Callable[..., Tensor] = _sparse_table_gradient if ctx.sparse else _table_gradient
    text = audio = None
    tokens, is_audio, frames = ctx.saved_tensors
    if ctx.needs_input_grad[3]:
        text = gradient(grad, grad_codes, tokens, is_audio, frames, *ctx.text, ctx.use_triton)
    if ctx.needs_input_grad[4]:
        audio = gradient(grad, grad_codes, tokens, is_audio, frames, *ctx.audio, ctx.use_triton)
    return None, None, None, text, audio, None, None


_frame_embed.register_autograd(_backward, setup_context=_setup_context)


# --- public functions -------------------------------------------------------------------------------------------------


def frame_embed(
    tokens: Tensor,
    is_audio: Tensor,
    text_table: Tensor,
    audio_table: Tensor,
    impl: str = "auto",
    sparse: bool = False,
) -> Tensor:
    """Embed packed rows.

    An audio row is the sum over codebooks k of ``audio_table[tokens[:, k] + k * V]``; a text row is
    ``text_table[tokens[:, K]]`` (Sesame's ``_embed_tokens`` followed by its masked sum).

    Args:
        tokens: [N, K + 1] integers; columns 0..K-1 are codes in [0, V), column K is the text token. Ids that a row does
            not embed are ignored. The kernel embeds an id outside its table as NaN, without a gradient.
        is_audio: [N] bool.
        text_table: [text vocabulary, D].
        audio_table: [K * V, D].
        impl: "triton": the kernels, for bfloat16, float16 and float32 on CUDA; "torch": PyTorch's operators; "auto":
            the kernels where they run; or an answer of ``csm_kernels.choice.resolve``.
        sparse: return the tables' gradients as sparse tensors of the touched rows. With the kernels and on a CPU they
            are coalesced, and the host waits for the number of rows.

    Returns:
        [N, D] in the audio table's dtype, accumulated in float32 if the tables are narrower. Gradients are
        deterministic with the kernels and on a CPU.

    Raises:
        ValueError: an unknown ``impl``, or ``impl="triton"`` with tables that the kernels do not support.
        ImportError: ``impl="triton"`` without Triton.
    """
    frames = torch.empty(0, dtype=torch.int32, device=tokens.device)
    return frame_embed_with_codes(tokens, is_audio, frames, text_table, audio_table, impl, sparse)[0]


def frame_embed_with_codes(
    tokens: Tensor,
    is_audio: Tensor,
    frames: Tensor,
    text_table: Tensor,
    audio_table: Tensor,
    impl: str = "auto",
    sparse: bool = False,
) -> tuple[Tensor, Tensor]:
    """``frame_embed``, and the embeddings of some rows' codes one by one, as the depth decoder reads them.

    Both read the audio table. As one operator they give it one gradient, instead of two that have to be added.

    Args:
        frames: [M] int32 or int64, rows of ``tokens`` that are audio.
        The others as in ``frame_embed``.

    Returns:
        [N, D] as of ``frame_embed``, and [M, K - 1, D]: ``audio_table[tokens[frames, k] + k * V]`` for k < K - 1.
    """
    dtype = torch.promote_types(text_table.dtype, audio_table.dtype)
    impl = resolve(impl, audio_table.device, dtype).impl
    if impl == "reference":
        return _reference(tokens, is_audio, frames, text_table, audio_table, sparse)
    return _frame_embed(tokens, is_audio, frames, text_table, audio_table, sparse, impl == "triton")
