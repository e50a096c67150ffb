"""What the loss step allocates: every storage is explained, or it fails the test. And ``Tracked``, which sees them.

The rule, for T packed rows, M frames in the depth decoder, K codebooks, and widths F (feed-forward) and D (model):

- a parameter's gradient: the shape of the parameter, or of some heads of the audio head;
- an activation: at most ``4 max(T F_backbone, M K max(F_decoder, D_backbone))`` bytes, the widest one in float32;
- logits, which is whatever has a dimension of the audio vocabulary: at most the byte budget of
  ``linear_cross_entropy``, beside one head's weight or gradient in float32, padded to whole loads;
- nothing of rows by rows.

So there is no [T, K + 1, D] (rows by codebooks by width), no [T, T], no [M, K - 1, V].
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from csm_kernels import head_chunks
from csm_kernels import linear_cross_entropy as linear_cross_entropy_module
from csm_kernels.constants import HEAD_COLUMNS, LOGITS_BUDGET
from csm_kernels.cpu import folded_attention, native
from csm_kernels.cpu import frame_embed as cpu_frame_embed
from csm_kernels.linear_cross_entropy import linear_cross_entropy
from kernel_cases import interpreted
from model_cases import TINY, one_layer, padded, quick_model, random_conversations
from torch import Tensor

from benchmarks.common.baselines import blog_forward, causal
from benchmarks.common.tracked import Allocation, Tracked
from csm_fast import CSM, CSMConfig, ops
from csm_fast.model.loss import packed_loss, predictor_states
from csm_fast.model.stacks import run_decoder
from csm_fast.packing.pack import Pack, pack_padded
from csm_fast.system.device import compute_dtype, resolve_precision

TINY_CLIPS = [(6, 20), (4, 25), (2, 9), (8, 22), (5, 26), (3, 17), (6, 24), (2, 6)]
CLIPS_1B = [(20, 60), (12, 50), (18, 80), (15, 70), (25, 90), (10, 44)]  # 500 rows, their EOS rows included


# --- the rule -----------------------------------------------------------------------------------------------------


@dataclass
class Rule:
    """Explains an allocation of the loss step of ``model`` on ``pack``, or gives an empty string."""

    model: CSM
    pack: Pack
    byte_budget: int = LOGITS_BUDGET

    def __post_init__(self) -> None:
        config = self.model.config
        backbone, decoder = config.backbone, config.decoder
        frames = self.pack.decoder_index.numel() * config.num_codebooks
        self.rows = len(self.pack.tokens)
        self.largest_activation = 4 * max(
            self.rows * backbone.intermediate_dim, frames * max(decoder.intermediate_dim, backbone.embed_dim)
        )
        vocab = config.audio_vocab_size
        self.vocab = {vocab, -(-vocab // HEAD_COLUMNS) * HEAD_COLUMNS}
        # Of the library, per thread: a head's logits twice and its weight; or copies of a segment's rows of one head,
        # and blocks of scores; or 96 columns of a product's rows. All threads share the smaller matrix of a weight's
        # gradient.
        rows = max(self.rows, frames)
        heads = len(self.pack.decoder_index) * vocab * 4 + decoder.embed_dim * vocab * 2
        attention = 48 * max(self.pack.segments.lengths) * max(backbone.head_dim, decoder.head_dim)
        own = torch.get_num_threads() * (int(1.25 * max(heads, attention, 2 * 96 * rows)) + 2**17)
        self.most_scratch = own + 2 * max(self.rows * backbone.embed_dim, frames * decoder.embed_dim)
        self.head_widths = (backbone.embed_dim, decoder.embed_dim)
        self.dtype = self.model.audio_head.dtype
        self.shapes = {tuple(p.shape) for p in self.model.parameters()}
        # A product may come out transposed.
        self.shapes |= {shape[::-1] for shape in self.shapes if len(shape) == 2}
        self.widths = {size for shape in self.shapes for size in shape}

    def is_gradient(self, a: Allocation) -> bool:
        heads, *head = self.model.audio_head.shape
        shape = a.shape[1:] if a.shape[:1] == (1,) else a.shape
        some_heads = len(a.shape) == 3 and a.shape[0] <= heads and list(a.shape[1:]) == head
        return a.dtype == self.dtype and (shape in self.shapes or some_heads)

    def explain(self, a: Allocation) -> str:
        if self.is_gradient(a):
            return "gradient"
        if a.dtype == torch.uint8:
            return "scratch" if a.bytes <= self.most_scratch else ""
        if self.vocab & {*a.shape}:
            if a.bytes <= self.byte_budget:
                return "logits"
            shape = a.shape[1:] if a.shape[:1] == (1,) else a.shape
            is_head = len(shape) == 2 and shape[0] in self.head_widths
            return "one head" if is_head and a.dtype in (self.dtype, torch.float32) else ""
        if sum(size >= self.rows and size not in self.widths for size in a.shape) > 1:
            return ""
        return "activation" if a.bytes <= self.largest_activation else ""

    def check(self, t: Tracked) -> None:
        strange = [a for a in t.allocations if not self.explain(a)]
        limits = f"activations may have {self.largest_activation:,} bytes, logits {self.byte_budget:,}"
        assert not strange, "\n".join(["", *sorted({str(a).replace("\n", " ") for a in strange}), limits])


def batch_and_pack(config: CSMConfig, clips: list[tuple[int, int]], fraction: float = 1 / 16):
    batch = padded(random_conversations([[(text, frames, 0)] for text, frames in clips], config))
    torch.manual_seed(0)
    return batch, pack_padded(*batch, fraction)


def tracked(model: CSM, step: Callable[[], Tensor]) -> Tracked:
    """Forward and backward of ``step``, from no gradients to none."""
    model.zero_grad(set_to_none=True)
    with Tracked() as t:
        step().backward()
    model.zero_grad(set_to_none=True)
    return t


def with_budget(monkeypatch: pytest.MonkeyPatch, byte_budget: int) -> None:
    small = partial(linear_cross_entropy, byte_budget=byte_budget)
    monkeypatch.setattr(linear_cross_entropy_module, "linear_cross_entropy", small)


def materialised(model: CSM, pack: Pack) -> Tensor:
    """``packed_loss`` with all logits at once."""
    hidden = predictor_states(model, pack)
    targets = pack.tokens.index_select(0, pack.target_rows)[:, :-1].long()
    codes = targets.index_select(0, pack.decoder_index)
    states = run_decoder(model, hidden.index_select(0, pack.decoder_index), codes, model.config.audio_vocab_size)
    logits = torch.einsum("mkd,kdv->mkv", states, model.audio_head).float()
    ce0 = F.cross_entropy(model.codebook0_head(hidden).float(), targets[:, 0])
    return (ce0 + F.cross_entropy(logits.flatten(0, 1), codes[:, 1:].flatten())) / 2


def rows_by_rows(model: CSM, pack: Pack) -> Tensor:
    """``packed_loss``, and a mask as for one attention over the whole pack."""
    mask = torch.zeros(1, len(pack.tokens), len(pack.tokens)).masked_fill_(~causal(len(pack.tokens)), float("-inf"))
    return packed_loss(model, pack, 0.5, 0.5)[0] + mask[0, 0, 0]


# --- the loss step ------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_tiles(monkeypatch):
    """Scores, wide logits and sums of embeddings come in pieces of a size for true widths: of these, one is a pack."""
    monkeypatch.setattr(folded_attention, "FOLDED_SCORES", 2**12)
    monkeypatch.setattr(cpu_frame_embed, "PIECE_BYTES", 2**14)
    monkeypatch.setattr(head_chunks, "SOFTMAX_BUDGET", 2**11)


@pytest.mark.slow
@pytest.mark.parametrize("byte_budget", [2**12, LOGITS_BUDGET], ids=["4 KiB", "default"])
@pytest.mark.parametrize(
    ("form", "fraction"),
    [("bf16", 1 / 16), ("bf16", 1), ("fp32", 1 / 16), ("fp32", 1), ("kernels", 1 / 16)],  # interpreted ones are slow
)
def test_every_allocation_is_explained(monkeypatch, tiny_tiles, form, fraction, byte_budget):
    with_budget(monkeypatch, byte_budget)
    model = quick_model(TINY, torch.bfloat16 if form == "bf16" else torch.float32)
    _, pack = batch_and_pack(TINY, TINY_CLIPS, fraction)
    if form == "kernels":
        with interpreted() as launches, ops.using("triton"):
            t = tracked(model, lambda: packed_loss(model, pack, 0.5, 0.5)[0])
        assert launches["_softmax_cross_entropy_kernel"] and launches["_sum_kernel"]
    else:
        t = tracked(model, lambda: packed_loss(model, pack, 0.5, 0.5)[0])
    rule = Rule(model, pack, byte_budget)
    rule.check(t)
    kinds = {rule.explain(a) for a in t.allocations}
    assert {"gradient", "activation", "logits"} <= kinds, "the step was not watched in full"
    assert any(a.op.startswith("csm_kernels::frame_embed > ") for a in t.allocations)


@pytest.mark.parametrize(
    ("step", "found"),
    [
        (materialised, rf"\[\d+, 5, {TINY.audio_vocab_size}\] float32"),
        (rows_by_rows, r"\[1, (\d+), \1\] float32"),
        (blog_forward, r"\[8, 32, 7, 48\] float32"),
    ],
    ids=["all logits at once", "rows by rows", "the published forward"],
)
def test_the_rule_catches(tiny_tiles, step, found):
    model = quick_model(TINY, torch.float32)
    batch, pack = batch_and_pack(TINY, TINY_CLIPS)
    t = tracked(model, lambda: step(model, *batch) if step is blog_forward else step(model, pack))
    with pytest.raises(AssertionError, match=found):
        Rule(model, pack, 2**11).check(t)


def test_beside_the_padded_form(tiny_tiles):
    model = quick_model(TINY, torch.float32)
    assert_leaner_than_the_padded_form("tiny, float32", model, *batch_and_pack(TINY, TINY_CLIPS))


def assert_leaner_than_the_padded_form(name: str, model: CSM, batch: tuple[Tensor, Tensor], pack: Pack) -> None:
    """Explains every allocation of ours, and compares what is no gradient of a parameter (those are owed anyway).

    The published form holds ``embedded`` [B, S, K + 1, D] from the beginning to the end of its backward pass. So its
    largest tensor is at least B S (K + 1) D and its peak that much above ours. Ours is at most T F or M K F large: for
    csm-1b, with S B >= T >= 16 M, that is a factor of (K + 1) D / 2 F = 4.
    """
    rule, model.amortization_fraction = Rule(model, pack), 1 / 16
    ours = tracked(model, lambda: packed_loss(model, pack, 0.5, 0.5)[0])
    theirs = tracked(model, lambda: blog_forward(model, *batch))
    rule.check(ours)
    beside = [[a for a in t.allocations if not rule.is_gradient(a)] for t in (ours, theirs)]
    largest = [max(some) for some in beside]
    peaks = [t.peak_of(lambda a: not rule.is_gradient(a))[0] for t in (ours, theirs)]
    print(f"\n{name}: {rule.rows} rows, {batch[0].shape[0]} x {batch[0].shape[1]} when padded")
    print(f"{'':18} {'csm_fast':>14} {'padded':>14}  bytes")
    figures = {"largest": [a.bytes for a in largest], "peak": peaks, "with gradients": [ours.peak, theirs.peak]}
    for what, (here, there) in figures.items():
        print(f"{what:18} {here:14,} {there:14,}")
    print(f"largest of csm_fast: {largest[0]}\nlargest of padded:   {largest[1]}")
    embedded = batch[0].numel() * model.config.backbone.embed_dim * model.audio_head.element_size()
    assert largest[1].bytes >= embedded
    assert largest[0].bytes * 3 < largest[1].bytes
    assert peaks[1] - peaks[0] > embedded and ours.peak < theirs.peak


@pytest.fixture(scope="module")
def wide_model():
    return quick_model(one_layer(CSMConfig.csm_1b()), torch.bfloat16)


@pytest.mark.slow
def test_csm_1b_beside_the_padded_form(all_threads, wide_model):
    # A processor without bf16 products would take minutes for the padded form's.
    dtype = compute_dtype(resolve_precision("auto", torch.device("cpu")))
    model = wide_model if dtype == torch.bfloat16 else quick_model(wide_model.config, dtype)
    case = batch_and_pack(model.config, CLIPS_1B)
    assert case[1].rows == 500
    assert_leaner_than_the_padded_form(f"csm-1b, one layer of each stack, {dtype}", model, *case)


def heads_alone(model: CSM, pack: Pack) -> Tensor:
    """The part of the loss that the byte budget is for, on made-up states."""
    targets = pack.tokens.index_select(0, pack.target_rows)[:, :-1].long()
    codes = targets.index_select(0, pack.decoder_index)
    hidden_width, width = model.config.backbone.embed_dim, model.config.decoder.embed_dim
    hidden, states = (
        torch.randn(shape, dtype=model.audio_head.dtype, requires_grad=True)
        for shape in (
            (len(targets), 1, hidden_width),
            (*codes[:, 1:].shape, width),
        )
    )
    head = model.codebook0_head.weight.t().unsqueeze(0)
    ce0, _ = ops.linear_cross_entropy(hidden, head, targets[:, :1], pack.target_weights.unsqueeze(1))
    ced, _ = ops.linear_cross_entropy(states, model.audio_head, codes[:, 1:], pack.decoder_weights.unsqueeze(1))
    return ce0 + ced


@pytest.mark.slow
@pytest.mark.parametrize("byte_budget", [2**20, LOGITS_BUDGET], ids=["1 MiB", "default"])
@pytest.mark.parametrize("impl", ["library", "torch", "triton"])
def test_csm_1b_heads_within_the_budget(monkeypatch, all_threads, wide_model, impl, byte_budget):
    with_budget(monkeypatch, byte_budget)
    _, pack = batch_and_pack(wide_model.config, CLIPS_1B)
    if impl == "library" and not native.is_built():
        pytest.skip(native.describe_library())
    form = native.left_out() if impl == "torch" else contextlib.nullcontext()
    with form, interpreted() as launches, ops.using("triton" if impl == "triton" else "torch"):
        t = tracked(wide_model, lambda: heads_alone(wide_model, pack))
    assert bool(launches) == (impl == "triton")
    rule = Rule(wide_model, pack, byte_budget)
    rule.check(t)
    if byte_budget == 2**20:  # it binds: the rows of codebook 0 alone would be three times as many bytes
        # The library makes no copies of the logits, and has those of the other codebooks in its scratch: codebook 0's
        # pieces are left.
        found = [a for a in t.allocations if rule.explain(a) == "logits"]
        assert len(found) > (5 if impl == "library" else 20)


# --- the tool ------------------------------------------------------------------------------------------------------


def test_nothing_changes_and_the_peak_is_the_allocators(tiny_tiles):
    """Bit for bit the same step, and the memory that PyTorch's profiler sees the allocator give out."""
    from torch._C._profiler import _EventType
    from torch.profiler import ProfilerActivity, profile

    model = quick_model(TINY, torch.float32)
    _, pack = batch_and_pack(TINY, TINY_CLIPS)

    def step() -> list[Tensor]:
        model.zero_grad(set_to_none=True)
        loss = packed_loss(model, pack, 0.5, 0.5)[0]
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters())]

    plain = step()
    model.zero_grad(set_to_none=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    changes, waiting = [], list(profiled.profiler.kineto_results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.tag == _EventType.Allocation:
            changes.append((event.start_time_ns, event.extra_fields.alloc_size))
    allocated = list(accumulate(size for _, size in sorted(changes)))
    model.zero_grad(set_to_none=True)
    with Tracked() as t:
        followed = step()
    assert all(torch.equal(a, b) for a, b in zip(followed, plain, strict=True))
    assert t.peak == pytest.approx(max(allocated), rel=0.01) and t.current == pytest.approx(allocated[-1], rel=0.01)
