"""The loss step of whole models on a GPU: against float64 on the CPU, compiled, on the kernels, without waiting, small.

As in ``test_gpu_ops``, each check runs on the CPU too, as a rehearsal.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from gpu_cases import DEVICES, kernels, no_waiting
from model_cases import TINY, MemoryStore, one_layer, padded, quick_model, random_conversations, random_model
from torch import Tensor
from torch._dynamo.utils import counters

from benchmarks.common.baselines import blog_forward
from benchmarks.common.tracked import Tracked
from csm_fast import CSM, CSMConfig, TransformerConfig, ops
from csm_fast.config.train import DataSection, LossSection
from csm_fast.model.compile import compile_layers
from csm_fast.model.loss import packed_loss
from csm_fast.packing.loader import Packer
from csm_fast.packing.pack import Pack, pack_padded

# Heads of 64 and 32: every attention kernel knows them.
SMALL = CSMConfig(
    TransformerConfig(2, 4, 2, 256, 384),
    TransformerConfig(2, 4, 2, 128, 192),
    text_vocab_size=300,
    audio_vocab_size=131,
    num_codebooks=8,
)
HALF_AND_FULL = [torch.bfloat16, torch.float32]

Result = tuple[Tensor, dict[str, Tensor]]


def ragged_packs(config: CSMConfig = SMALL, conversations: int = 20, pad: str = "") -> list[Pack]:
    rng = np.random.default_rng(0)
    spec = [[(int(rng.integers(1, 12)), int(rng.integers(1, 40)), 0)] for _ in range(conversations)]
    store = MemoryStore(random_conversations(spec, config), config.num_codebooks)
    data, loss = DataSection(batch_size=3, pack_rows=160), LossSection(amortization_fraction=0.5)
    packer = Packer(store, data, loss, pad=pad)
    return [pack for i in range(packer.steps_in_epoch(0)) for pack in packer.step(0, i).packs]


def model_on(device: str, dtype: torch.dtype, config: CSMConfig = SMALL) -> CSM:
    return random_model(config, dtype, scale=0.5).to(device)


def step(model: CSM, pack: Pack) -> Result:
    """Loss and gradients, on the model's device."""
    model.zero_grad(set_to_none=True)
    loss, _ = packed_loss(model, pack, 0.5, 0.5)
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def rounded_truth(dtype: torch.dtype, pack: Pack, config: CSMConfig = SMALL) -> Result:
    """In float64 on the CPU, for the weights that ``dtype`` rounds to."""
    return step(random_model(config, dtype, scale=0.5).double(), pack)


def errors(got: Result, truth: Result) -> dict[str, float]:
    """Relative to no less than 1e-4 of the whole gradient's norm: what is smaller is zero but for rounding."""
    (loss, grads), (true_loss, true_grads) = got, truth
    assert grads.keys() == true_grads.keys()
    floor = 1e-4 * sum(float(g.norm()) ** 2 for g in true_grads.values()) ** 0.5
    found = {
        name: float((grads[name].cpu().double() - true).norm()) / max(float(true.norm()), floor)
        for name, true in true_grads.items()
    }
    return found | {"loss": abs(float(loss) - float(true_loss)) / abs(float(true_loss))}


def assert_no_worse(got: Result, plain: Result, truth: Result, dtype: torch.dtype) -> None:
    """At most three times the error of the plain form in the same dtype, or a few roundings (TF32's are 1e-4)."""
    plain_errors, few = errors(plain, truth), 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    for name, error in errors(got, truth).items():
        bound = max(3 * plain_errors[name], few)
        assert error <= bound, f"{name}: relative error {error:.3g}, at most {bound:.3g}"


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    counters.clear()


# --- right --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("pad", ["", "cuda"], ids=["exact", "padded packs"])
@pytest.mark.parametrize("dtype", HALF_AND_FULL, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_loss_and_gradients_are_those_of_float64(device, dtype, pad):
    plain, model = model_on("cpu", dtype), model_on(device, dtype)
    for pack in ragged_packs(pad=pad)[:3]:
        assert_no_worse(step(model, pack.to(device)), step(plain, pack), rounded_truth(dtype, pack), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALF_AND_FULL, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_on_the_kernels_as_without(device, dtype):
    if device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter multiplies bfloat16 as integers")
    config = SMALL if device == "cuda" else TINY
    packs = ragged_packs(config, conversations=3 if device == "cpu" else 12)
    for pack in packs[:3]:
        truth, model = rounded_truth(dtype, pack, config), model_on(device, dtype, config)
        with ops.using("torch"):
            plain = step(model, pack.to(device))
        with kernels(device), ops.using("triton"):
            forced = step(model, pack.to(device))
        assert_no_worse(forced, plain, truth, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALF_AND_FULL, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_compiled_layers_compute_the_same_and_recompile_nothing(fresh_compiler, device, dtype):
    eager, compiled = model_on(device, dtype), model_on(device, dtype)
    assert compile_layers(compiled, backend="inductor" if device == "cuda" else "aot_eager")
    packs = ragged_packs(conversations=30 if device == "cuda" else 12)
    assert len({len(p.tokens) for p in packs}) > 2 and len({p.segments.max_seqlen for p in packs[:3]}) > 1
    graphs = []
    for pack in packs:
        moved = pack.to(device)
        got, plain = step(compiled, moved), step(eager, moved)
        assert_no_worse(got, plain, rounded_truth(dtype, pack), dtype)
        graphs.append(counters["stats"]["unique_graphs"])
    # Two graphs of the backbone, whose last layer goes on with the rows that predict, and one of the depth decoder.
    assert set(graphs) == {3} and not counters["graph_break"], graphs


# csm-1b's widths, which Inductor's bounds on sizes are about, in two layers.
WIDE = CSMConfig(
    TransformerConfig(2, 32, 8, 2048, 2048),
    TransformerConfig(2, 8, 2, 1024, 1024),
    text_vocab_size=300,
    audio_vocab_size=131,
    num_codebooks=32,
)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_no_size_of_a_pack_compiles_layers_anew(fresh_compiler, device):
    """From a pack that lies in the caches to one that does not, with frames of the depth decoder likewise."""
    config, dtype = (WIDE, torch.bfloat16) if device == "cuda" else (SMALL, torch.float32)
    model = quick_model(config, dtype).to(device)
    model.amortization_fraction = 1 / 4
    compile_layers(model, backend="inductor" if device == "cuda" else "aot_eager")
    rng = np.random.default_rng(0)
    for clips in (40, 3, 90, 12, 30) if device == "cuda" else (6, 1, 9):
        frames = rng.integers(40, 160, clips)
        pack = pack_padded(*padded(random_conversations([[(5, int(n), 0)] for n in frames], config)), 1 / 4)
        step(model, pack.to(device))
        assert counters["stats"]["unique_graphs"] == 3, f"compiled anew for {len(pack.tokens):,} rows"


# --- lean ---------------------------------------------------------------------------------------------------------


def wide_case(device: str, clips: int) -> tuple[CSM, tuple[Tensor, Tensor], Pack]:
    """csm-1b's widths, one layer of each stack, in bf16; tiny in rehearsals. Clips of 1 to 20 seconds."""
    config = one_layer(CSMConfig.csm_1b()) if device == "cuda" else TINY
    longest = 250 if device == "cuda" else 30
    frames = np.random.default_rng(0).integers(longest // 12, longest, clips)
    batch = padded(random_conversations([[(longest // 10, int(n), 0)] for n in frames], config))
    torch.manual_seed(0)
    model = quick_model(config, torch.bfloat16).to(device)
    model.amortization_fraction = 1 / 16
    return model, tuple(x.to(device) for x in batch), pack_padded(*batch, 1 / 16).to(device)


@pytest.mark.parametrize("device", DEVICES)
def test_the_host_never_waits(device):
    """Once warm: kernels compiled, workspaces and memory there."""
    if device == "cuda" and ops.choose("packed_attention", device, torch.bfloat16).impl == "reference":
        pytest.skip("without a variable-length kernel, attention reads the pack's layout on the host")
    model, _, pack = wide_case(device, 8)
    for _ in range(2):
        want = step(model, pack)[0]
    model.zero_grad(set_to_none=True)
    with no_waiting(device):
        loss, _ = packed_loss(model, pack, 0.5, 0.5)
        loss.backward()
    assert float(loss.detach()) == pytest.approx(float(want), rel=1e-3)


def peak_bytes(device: str, model: CSM, run: Callable[[], Tensor]) -> int:
    """Most bytes that a forward and a backward pass ask for at once, beyond what was there."""
    with contextlib.ExitStack() as stack:
        if device == "cuda":
            run().backward()  # libraries take their workspaces from the same memory
            model.zero_grad(set_to_none=True)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        else:
            tracked = stack.enter_context(Tracked())
        run().backward()
        model.zero_grad(set_to_none=True)
    return torch.cuda.max_memory_allocated() - before if device == "cuda" else tracked.peak


@pytest.mark.parametrize("device", DEVICES)
def test_peak_memory_is_below_the_padded_forms(device):
    """Both owe a gradient of every parameter; the padded form holds [B, S, K + 1, D] besides, more than once."""
    model, batch, pack = wide_case(device, 16)
    ours = peak_bytes(device, model, lambda: packed_loss(model, pack, 0.5, 0.5)[0])
    theirs = peak_bytes(device, model, lambda: blog_forward(model, *batch))
    embedded = batch[0].numel() * model.config.backbone.embed_dim * model.audio_head.element_size()
    print(f"\n{len(pack.tokens)} rows, {list(batch[0].shape)} padded: {ours:,} bytes, padded {theirs:,}")
    assert theirs - ours > embedded


@pytest.mark.parametrize("device", DEVICES)
def test_tracked_sees_what_the_allocator_is_asked_for(device):
    """Equal where no library takes a workspace, the backward pass on its own thread included."""
    x = torch.ones(1024, 1024, device=device, requires_grad=True)

    def run() -> Tensor:
        y = torch.cat([x.sin(), x.cos()])
        return (y * y.exp()).sum()

    run().backward()
    x.grad = None
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    with Tracked() as t:
        run().backward()
    assert t.current == 4 * 2**20 and t.peak >= 5 * 4 * 2**20
    if device == "cuda":
        stats = torch.cuda.memory_stats()
        assert stats["requested_bytes.all.current"] - before == t.current
        assert stats["requested_bytes.all.peak"] - before == pytest.approx(t.peak, abs=2**16)
