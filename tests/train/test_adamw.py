"""AdamW with 8-bit moments and bf16 weights: its mathematics, rounding, skipped updates, chunks and memory."""

import copy
import importlib.util

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.common.tracked import Tracked
from csm_fast.system.optional import load_bitsandbytes
from csm_fast.train.optim.adamw import AdamW
from csm_fast.train.optim.in_backward import UpdateInBackward
from csm_fast.train.optim.rounding import TILE, RoundingBits, round_stochastically, rounding_keys

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
SETTINGS = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
COMBINATIONS = [  # of our own class: bits, rounding, dtype of the weights
    (8, "stochastic", F32),
    (32, "stochastic", BF16),
    (32, "kahan", BF16),
    (32, "nearest", BF16),
    (8, "stochastic", BF16),
    (8, "kahan", BF16),
]
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="8-bit moments need bitsandbytes"
)
MODES = [
    pytest.param(
        *(bits, rounding, dtype),
        id=f"{bits} {rounding} {str(dtype)[6:]}",
        marks=[needs_bitsandbytes] if bits == 8 else [],
    )
    for bits, rounding, dtype in COMBINATIONS
]


@pytest.fixture(autouse=True)
def form(cpu_form):
    return cpu_form


def start(numel=5000, dtype=F32, seed=0):
    """Weights around 0.5 in magnitude, all representable in bf16."""
    x = torch.randn(numel, generator=torch.Generator().manual_seed(seed))
    return (x + x.sign() * 0.1).to(BF16).to(dtype)


def gradients(numel=5000, steps=20, dtype=F32, seed=1):
    """Uneven in size over places and steps, all representable in bf16."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.rand(numel, generator=generator) * 1e-2
    return [(torch.randn(numel, generator=generator) * sizes).to(BF16).to(dtype) for _ in range(steps)]


def descend(optimizer, parameter, grads):
    for grad in grads:
        parameter.grad = grad.to(parameter.dtype)
        optimizer.step()
    return parameter.detach()


def run(grads, numel=5000, dtype=F32, **options):
    p = torch.nn.Parameter(start(numel, dtype))
    optimizer = AdamW([p], **{**SETTINGS, **options})
    return descend(optimizer, p, grads), optimizer.state[p]


def truth(grads, numel=5000):
    p = torch.nn.Parameter(start(numel, F64))
    return descend(torch.optim.AdamW([p], **SETTINGS), p, grads)


# ------------------------------------------------------------------------------------------------- the mathematics


def test_float32_is_pytorchs_adamw_bit_for_bit(form):
    grads = gradients()
    p = torch.nn.Parameter(start())
    want = descend(torch.optim.AdamW([p], **SETTINGS, fused=True), p, grads)
    got, _ = run(grads)
    assert torch.equal(got, want) or form == "library"  # whose sums of products round once less
    # One rounding of the weight per step, and one of the update, which is 1/1000 of it.
    bound = 20 * 2**-23 * start().abs().clamp(min=0.1)
    assert bool(((got - truth(grads)).abs() <= bound).all())


def test_nearest_rounds_each_float32_update_to_bf16(form):
    grads = gradients()
    p = torch.nn.Parameter(start())
    reference = torch.optim.AdamW([p], **SETTINGS, fused=True)
    for grad in grads:
        descend(reference, p, [grad])
        p.data.copy_(p.data.bfloat16())
    got = run(grads, dtype=BF16, rounding="nearest")[0].float()
    if form == "library":  # the last bit of float32 may send a number that lies in the middle the other way
        assert (got != p.data).float().mean() < 1e-3 and (got - p.data).abs().max() < 2**-7 * p.data.abs().max()
    else:
        assert torch.equal(got, p.data)


def test_kahan_stays_at_the_true_weights():
    grads = gradients(steps=200)
    got, state = run(grads, dtype=BF16, rounding="kahan")
    want = truth(grads)
    # The sum of both keeps 16 bits: a rounding of at most 2^-17 of the weight per step. At worst they all point one
    # way, on average they go to and fro.
    error = (got.double() + state["compensation"].double() - want).abs()
    assert bool((error <= 200 * 2**-17 * want.abs().clamp(min=0.1)).all())
    assert error.mean() < 200**0.5 * 2**-17 * want.abs().mean()
    assert bool(((got.double() - want).abs() <= error + 2**-8 * want.abs()).all())  # the weight alone: half a spacing


def test_stochastic_rounding_follows_the_true_weights_on_average():
    numel, steps = 200_000, 30
    grads = gradients(numel, steps)
    error = run(grads, numel, BF16, rounding="stochastic")[0].double() - truth(grads, numel)
    # A draw's variance is at most a quarter of a squared spacing, which is at most 2^-7 of the weight.
    deviation = steps**0.5 * 2**-8 * start(numel).square().mean().sqrt()
    assert error.square().mean().sqrt() < deviation
    assert error.mean().abs() < 4 * deviation / numel**0.5
    # A bias towards zero, as truncation has, would show as a mean along the sign.
    assert (error * start(numel).sign()).mean().abs() < 4 * deviation / numel**0.5


@needs_bitsandbytes
@pytest.mark.parametrize("numel", [5000, 4000], ids=["in blocks, the last one cut", "small: float32 moments"])
def test_8_bits_are_those_of_bitsandbytes(form, numel):
    bnb = load_bitsandbytes()
    grads = gradients(numel)
    p = torch.nn.Parameter(start(numel))
    theirs = bnb.optim.AdamW8bit([p], **SETTINGS)
    want = descend(theirs, p, grads)
    got, state = run(grads, numel, bits=8)
    other = theirs.state[p]
    assert (state["exp_avg"].dtype == torch.uint8) == (numel == 5000) == ("exp_avg_absmax" in state)
    if numel == 5000:
        # The same codes but where a moment lies on the border of two and the last bit of float32 decides.
        for name, theirs in (("exp_avg", "state1"), ("exp_avg_sq", "state2")):
            assert (state[name] != other[theirs]).float().mean() < 2e-3
            assert (state[name].int() - other[theirs].int()).abs().max() <= 1
        torch.testing.assert_close(state["exp_avg_absmax"], other["absmax1"], rtol=1e-5, atol=0)
    assert (got - want).norm() < 1e-3 * (want - start(numel)).norm()
    # Quantisation itself costs a hundred times as much, and not more than a tenth of the way.
    assert numel != 5000 or 1e-3 < (got - truth(grads)).norm() / (truth(grads) - start()).norm() < 0.1


def test_updates_far_below_a_spacing_are_lost_to_nearest_only():
    moved = {}
    for rounding in ("nearest", "kahan", "stochastic"):
        p = torch.nn.Parameter(torch.ones(4096, dtype=BF16))
        optimizer = AdamW([p], lr=3e-5, weight_decay=0.0, rounding=rounding)
        for _ in range(1000):  # a constant gradient moves Adam by the learning rate: 0.03 in all
            p.grad = torch.full_like(p, 0.25)
            optimizer.step()
        moved[rounding] = 1 - p.detach().double().mean().item()
    assert moved["nearest"] == 0
    assert moved["kahan"] == pytest.approx(0.03, rel=0.2)  # the spacing of bf16 below 1 is 0.004
    # Per weight 0.03 / 0.0039 moves of 0.0039: a deviation of 0.011, of the mean 1/64 of that.
    assert moved["stochastic"] == pytest.approx(0.03, abs=4 * 0.011 / 64)


# --------------------------------------------------------------------------------------------- stochastic rounding


def test_rounding_gives_a_neighbour_and_the_right_mean():
    x = torch.tensor([1 + 2**-9, -1 - 3 * 2**-9, 1e-3, -7.7e-20, 0.999, 65504.0, 0.0, 3.0])
    draws = torch.stack([x] * 40_000)
    got = round_stochastically(
        draws.flatten().clone(), 0, RoundingBits(rounding_keys(0, 0), torch.tensor(1.0), draws.numel())
    )
    got = got.view(draws.shape).double()
    below = (x.view(torch.int32) & -65536).view(F32).double()  # towards zero
    above = (x.view(torch.int32) + 65536 & -65536).view(F32).double()
    assert bool(((got == below) | (got == above)).all())
    share = (x.double() - below) / (above - below)
    seen = (got == above).double().mean(0)
    assert bool(((seen - share).abs() <= 4.5 * (share * (1 - share) / 40_000).sqrt()).all()), (seen, share)
    assert bool((got[:, share == 0] == x[share == 0].double()).all())


def test_draws_are_uniform_and_unlike_those_of_other_places_steps_and_parameters():
    n = TILE * 8

    def draws(seed=0, index=0, step=1):
        return RoundingBits(rounding_keys(seed, index), torch.tensor(float(step)), n).of(0, n).double()

    base = draws()
    for tile in (base[:TILE], base[-TILE:]):  # as it was hashed, and with bits flipped
        counts = torch.bincount(tile.long(), minlength=65536).double()
        chi = ((counts - 2).square() / 2).sum()
        assert abs(chi - 65535) < 5 * (2 * 65535) ** 0.5
    others = [draws(step=s) for s in (2, 3, 1000)] + [draws(index=1), draws(seed=1)]
    others += [base.roll(shift) for shift in (1, 2, 3, 256)]
    for other in others:
        correlation = torch.corrcoef(torch.stack([base, other]))[0, 1]
        assert correlation.abs() < 5 / (n / 8) ** 0.5


@pytest.mark.slow
def test_draws_a_tile_apart_agree_no_more_than_by_chance():
    """Over the steps, which is where their sum would show it: each step flips other bits."""
    steps, places = 1000, slice(0, 4)
    seen = torch.stack(
        [
            RoundingBits(rounding_keys(0, 0), torch.tensor(float(step)), 3 * TILE)
            .of(0, 3 * TILE)
            .view(3, TILE)[:, places]
            for step in range(steps)
        ]
    ).double()  # [steps, tiles, places]
    table = torch.corrcoef(seen.flatten(1).T)
    assert (table - torch.eye(len(table))).abs().max() < 4.5 / steps**0.5
    halves = (seen > 32767.5).double()  # by the top bit, where xor could show as always or never
    table = torch.corrcoef(halves.flatten(1).T)
    assert (table - torch.eye(len(table))).abs().max() < 4.5 / steps**0.5


@pytest.mark.parametrize(
    "first, count", [(0, 1), (5, 100), (TILE - 3, 7), (TILE, TILE), (TILE + 256, TILE + 9), (3 * TILE, 17)]
)
def test_draws_of_a_piece_are_those_of_the_whole(first, count):
    draws = RoundingBits(rounding_keys(3, 1), torch.tensor(7.0), 3 * TILE + 17)
    whole = draws.of(0, 3 * TILE + 17)
    assert whole.dtype == torch.int32 and torch.equal(draws.of(first, count), whole[first : first + count])


# ------------------------------------------------------------------------------------ skipping, chunks, order, memory


@pytest.mark.parametrize("bits, rounding, dtype", MODES)
def test_a_skipped_update_touches_nothing(bits, rounding, dtype):
    p = torch.nn.Parameter(start(dtype=dtype))
    optimizer = AdamW([p], **SETTINGS, bits=bits, rounding=rounding)
    grads = gradients(steps=6)
    descend(optimizer, p, grads[:3])
    before = [p.detach().clone(), *(t.clone() for t in optimizer.state[p].values())]
    optimizer.found_inf = torch.tensor(1.0)
    descend(optimizer, p, [grads[3], torch.full_like(grads[3], float("nan"))])
    for a, b in zip([p.detach(), *optimizer.state[p].values()], before, strict=True):
        assert torch.equal(a, b)
    optimizer.found_inf = torch.tensor(0.0)
    descend(optimizer, p, grads[4:])
    want, state = run([*grads[:3], *grads[4:]], dtype=dtype, bits=bits, rounding=rounding)
    assert torch.equal(p.detach(), want)
    assert all(torch.equal(optimizer.state[p][name], state[name]) for name in state)


@pytest.mark.parametrize("bits, rounding, dtype", MODES)
def test_the_first_update_can_be_skipped(bits, rounding, dtype):
    p = torch.nn.Parameter(start(dtype=dtype))
    optimizer = AdamW([p], **SETTINGS, bits=bits, rounding=rounding)
    optimizer.found_inf = torch.tensor(1.0)
    descend(optimizer, p, [torch.full((5000,), float("inf"))])
    assert torch.equal(p.detach(), start(dtype=dtype))
    assert not any(t.any() for t in optimizer.state[p].values())


@pytest.mark.parametrize("bits, rounding, dtype", MODES)
def test_chunks_change_nothing(bits, rounding, dtype):
    grads = gradients(steps=4)
    whole, state = run(grads, dtype=dtype, bits=bits, rounding=rounding)
    parts, other = run(grads, dtype=dtype, bits=bits, rounding=rounding, chunk=768)  # 6 of them and 392 elements
    assert torch.equal(whole, parts)
    assert all(torch.equal(state[name], other[name]) for name in state)


@needs_bitsandbytes
def test_shapes_and_layouts():
    """Matrices, a scalar, an empty parameter, and a gradient that lies transposed."""
    shapes = [(70, 80), (), (0, 3), (5,)]
    params = [torch.nn.Parameter(start(max(1, torch.Size(s).numel()))[: torch.Size(s).numel()].view(s)) for s in shapes]
    flat = [torch.nn.Parameter(p.detach().flatten().clone()) for p in params]
    optimizer, other = AdamW(params, bits=8), AdamW(flat, bits=8)
    for p, f in zip(params, flat, strict=True):
        p.grad = torch.randn(p.shape).to(F32)
        f.grad = p.grad.flatten()
    params[0].grad = params[0].grad.T.contiguous().T
    optimizer.step()
    other.step()
    assert all(torch.equal(p.flatten(), f) for p, f in zip(params, flat, strict=True))


@pytest.mark.parametrize("bits, rounding, dtype", MODES)
def test_any_order_of_updates_gives_the_same(bits, rounding, dtype):
    results = []
    for reverse in (False, True):
        params = [torch.nn.Parameter(start(dtype=dtype, seed=s)) for s in range(3)]
        optimizer = AdamW([{"params": params[:1], "lr": 1e-2}, {"params": params[1:]}], bits=bits, rounding=rounding)
        for step in range(3):
            for p, grad in zip(params, gradients(steps=3, seed=step), strict=True):
                p.grad = grad.to(dtype)
            if reverse:
                for p in reversed(params):
                    optimizer.step_parameter(p)
            else:
                optimizer.step()
        results.append([p.detach() for p in params])
    assert all(map(torch.equal, *results))
    if dtype == BF16 and rounding == "stochastic":  # parameters do not share their draws
        same = [torch.nn.Parameter(start(dtype=dtype)) for _ in range(2)]
        optimizer = AdamW(same, rounding=rounding)
        for p in same:
            p.grad = gradients()[0].to(dtype)
        optimizer.step()
        assert not torch.equal(*same)
    with pytest.raises(ValueError, match="no such parameter"):
        optimizer.step_parameter(torch.nn.Parameter(start()))


@pytest.mark.slow
@pytest.mark.parametrize("bits, rounding, dtype", MODES)
def test_scratch_memory_is_bounded_whatever_the_size(form, bits, rounding, dtype):
    chunk, peaks = TILE, []
    for numel in (chunk * 4 + 13, chunk * 40 + 13):
        p = torch.nn.Parameter(torch.ones(numel, dtype=dtype))
        p.grad = torch.ones_like(p)
        optimizer = AdamW([p], bits=bits, rounding=rounding, chunk=chunk)
        optimizer.found_inf = torch.tensor(0.0)
        optimizer.step()  # makes the state
        with Tracked() as tracked:
            optimizer.step()
        peaks.append(tracked.peak)
    if form == "library" and bits == 32:
        assert not any(peaks)
        return
    # Weight, gradient and two moments in float32, codes; stochastic rounding has its hashed tile, and a key per tile.
    drawn = dtype == BF16 and rounding == "stochastic"
    assert 0 <= peaks[1] - peaks[0] <= (8 * 36 if drawn else 0)
    assert peaks[1] <= 19.1 * chunk + (4 * TILE if drawn else 0)


class Asked(TorchDispatchMode):
    """Counts what would make the host wait for a device."""

    waits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.waits += func.name() in (
            "aten::_local_scalar_dense",
            "aten::nonzero",
            "aten::equal",
            "aten::masked_select",
        )
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("bits, rounding, dtype", MODES)
def test_nothing_asks_the_device_for_a_value(bits, rounding, dtype):
    p = torch.nn.Parameter(start(dtype=dtype))
    optimizer = AdamW([p], bits=bits, rounding=rounding)
    with Asked() as asked:
        assert float(torch.ones(())) == 1 and asked.waits == 1
        optimizer.found_inf = torch.tensor(0.0)
        descend(optimizer, p, gradients(steps=2))
        at_once = UpdateInBackward(optimizer, torch.tensor(False))
        with at_once:
            p.sum().backward()
        at_once.norm()
    assert asked.waits == 1 and at_once.updated[0] is p


@needs_bitsandbytes
def test_pytorchs_own_state_dict_keeps_dtypes():
    p, q = (torch.nn.Parameter(start(dtype=BF16)) for _ in range(2))
    a, b = (AdamW([x], bits=8, rounding="kahan") for x in (p, q))
    grads = gradients(steps=4)
    descend(a, p, grads[:2])
    q.data.copy_(p.data)
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    descend(a, p, grads[2:])
    descend(b, q, grads[2:])
    assert torch.equal(p, q)
    assert {k: t.dtype for k, t in b.state[q].items()} == {k: d for k, (_, d) in b.state_form(q).items()}


def test_wrong_arguments_are_told():
    p = torch.nn.Parameter(start())
    with pytest.raises(ValueError, match="multiple of 256"):
        AdamW([p], chunk=1000)
    for wrong in (p.detach().double(), p.detach().view(50, 100).T):
        with pytest.raises(ValueError, match="is torch.float"):
            AdamW([torch.nn.Parameter(wrong)])
