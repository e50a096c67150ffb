"""AdamW in one pass over memory: the CPU's library and the Triton kernel against float64 and PyTorch's operators."""

from __future__ import annotations

import contextlib
import copy
import gc
import importlib.util
import itertools
import weakref

import pytest
import torch
from csm_kernels.cpu import adamw as cpu_adamw
from csm_kernels.cpu import native
from kernel_cases import assert_within_budget, gradients, interpreted, start

from csm_fast import ops
from csm_fast.train.optim import adamw
from csm_fast.train.optim.adamw import AdamW
from csm_fast.train.optim.rounding import TILE, RoundingBits, rounding_keys

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
SETTINGS = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
LIBRARY = pytest.param("library", marks=pytest.mark.skipif(not native.is_built(), reason=native.describe_library()))
KERNEL = ["interpreter", pytest.param("cuda", marks=GPU)]
FORMS = [LIBRARY, *KERNEL]
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="8-bit moments need bitsandbytes"
)


def ways() -> list:
    """Form, dtype of the weights, rounding, bits of the moments. The library has no moments in 8 bits."""
    in_32 = itertools.product(FORMS, [(F32, "nearest"), (BF16, "stochastic"), (BF16, "kahan"), (BF16, "nearest")], [32])
    in_8 = itertools.product(KERNEL, [(F32, "nearest"), (BF16, "stochastic"), (BF16, "kahan")], [8])
    found = []
    for form, (dtype, rounding), bits in (*in_32, *in_8):
        marks = [*getattr(form, "marks", []), *([needs_bitsandbytes] if bits == 8 else [])]
        found.append(pytest.param(*getattr(form, "values", [form]), dtype, rounding, bits, marks=marks))
    return found


each_way = pytest.mark.parametrize("form, dtype, rounding, bits", ways())


@pytest.fixture(autouse=True)
def nearest_codes(monkeypatch):
    """bitsandbytes takes the nearest code on CUDA; on a CPU it looks up a near one, and another in 3 of 100 cases."""

    def quantized(values, code, of_square):
        padded = torch.nn.functional.pad(values, (0, -len(values) % 256)).view(-1, 256)
        absmax = padded.abs().amax(1)
        scaled = values / absmax.repeat_interleave(256)[: len(values)].masked_fill_(values == 0, 1)
        codes = torch.cat([(x[:, None] - code).abs().argmin(1) for x in scaled.split(4096)])
        return codes.clamp(min=int(of_square)).to(torch.uint8), absmax

    monkeypatch.setattr(adamw, "_quantized", quantized)


@contextlib.contextmanager
def running(form: str):
    """Within it, updates go through ``form``; yields how often it ran, for what can be counted."""
    if form == "interpreter":
        with ops.using("triton"), interpreted() as launches:
            yield launches
    elif form == "PyTorch":
        with ops.using("torch"), native.left_out():
            yield None
    else:
        assert form != "cuda" or ops.choose("adamw", "cuda", F32).impl == "triton"
        yield None


def device_of(form: str) -> str:
    return "cuda" if form == "cuda" else "cpu"


def descend(form, grads, dtype=F32, found_inf=None, grad_scale=None, **options):
    """The weight and its state after an update per gradient."""
    device = device_of(form)
    p = torch.nn.Parameter(start(*grads[0].shape, dtype=dtype, device=device))
    optimizer = AdamW([p], **{**SETTINGS, **options})
    optimizer.found_inf, optimizer.grad_scale = found_inf, grad_scale
    with running(form) as launches:
        for grad in grads:
            p.grad = grad.to(device, dtype)
            optimizer.step()
    if launches is not None:
        assert launches["_adamw_kernel"] == len(grads) * bool(p.numel())
    return p.detach(), optimizer.state[p]


def truth(grads):
    """Weight and moments in float64, nothing rounded."""
    p = torch.nn.Parameter(start(*grads[0].shape, dtype=F64))
    optimizer = torch.optim.AdamW([p], **SETTINGS)
    for grad in grads:
        p.grad = grad.double()
        optimizer.step()
    return p.detach(), optimizer.state[p]


@pytest.mark.parametrize("numel", [1, 255, 1024, 5001])
@pytest.mark.parametrize("form", FORMS)
def test_float32_against_float64(form, numel):
    grads = gradients(numel)
    (weight, state), (plain, plain_state) = descend(form, grads), descend("PyTorch", grads)
    right, right_state = truth(grads)
    moved = start(numel, dtype=F64)
    assert_within_budget("the way", weight.cpu() - moved.float(), right - moved, plain - moved.float())
    for name in ("exp_avg", "exp_avg_sq"):
        assert_within_budget(name, state[name].cpu(), right_state[name], plain_state[name])
    assert state["step"] == 4


@pytest.mark.slow
@each_way
def test_the_same_as_pytorchs_operators(form, dtype, rounding, bits):
    """But where float32's last bit decides how a number is rounded: then it is the neighbour."""
    numel = 6001 if form == "interpreter" else 2 * TILE + 6001
    # Of a second step the update may differ by as much as it is where the first one's codes are neighbours.
    grads = gradients(numel, steps=1 if bits == 8 else 2)
    options = {"dtype": dtype, "rounding": rounding, "bits": bits}
    got, state = descend(form, grads, **options)
    want, other = descend("PyTorch", grads, **options)
    got = got.cpu()
    spacing = 2.0**-7 if dtype == BF16 else 2.0**-22
    assert ((got.float() - want.float()).abs() <= spacing * want.float().abs()).all()
    assert dtype == F32 or (got != want).float().mean() < 1e-3
    for name, value in state.items():
        value = value.cpu()
        if value.dtype == torch.uint8:
            assert (value != other[name]).float().mean() < 2e-3
            assert (value.int() - other[name].int()).abs().max() <= 1
        elif name == "compensation":  # of a weight that was rounded the other way it is as much larger
            assert ((got.float() + value.float()) - (want.float() + other[name].float())).abs().max() < 2e-5
        else:
            # A moment near zero is the difference of larger ones.
            torch.testing.assert_close(value, other[name], rtol=1e-5, atol=2.0**-22 * float(other[name].max()))


@pytest.mark.slow
@needs_bitsandbytes
@pytest.mark.parametrize("form", KERNEL)
def test_8_bits_stay_with_pytorchs_operators(form):
    grads = gradients(5000, steps=20)
    (got, _), (want, _) = descend(form, grads, bits=8), descend("PyTorch", grads, bits=8)
    assert (got.cpu() - want).norm() < 1e-3 * (want - start(5000)).norm()


@needs_bitsandbytes
@pytest.mark.parametrize("form", [*KERNEL, "PyTorch"])
def test_small_second_moments_in_8_bits_divide_by_no_eps(form):
    """Of a gradient that spans four orders of magnitude, the squares span eight, the codes seven."""
    grad = torch.logspace(-4, 0, 4096).view(256, 16).T.flatten() * 0.1  # in each block
    (before, _), (after, _) = (descend(form, [grad, grad * 0][:n], bits=8, weight_decay=0.0) for n in (1, 2))
    assert (after - before).abs().max() < SETTINGS["lr"]


@pytest.mark.parametrize("form", FORMS)
def test_draws_are_those_of_the_class(form):
    """Weights between two bf16 numbers: their rounding shows whether a draw was at least as large as what they lack."""
    rows, width = (3, 5) if form == "interpreter" else (3, TILE - 1000)  # borders of tiles anywhere
    numel = rows * width
    p = torch.nn.Parameter(torch.ones(rows, width, dtype=BF16, device=device_of(form)))
    optimizer = AdamW([p], lr=2.0**-9, betas=(0.0, 0.0), eps=0.0, weight_decay=0.0, seed=5)
    p.grad = torch.full_like(p, -1.0)  # 1 becomes 1 + 2^-9, a quarter of the way to the next bf16 number
    with running(form):
        optimizer.step()
    draws = RoundingBits(rounding_keys(5, 0), torch.tensor(1.0), numel).of(0, numel).view(rows, width)
    want = torch.where(draws >= 0x10000 - 0x4000, 1 + 2.0**-7, 1.0)
    assert 0.2 < (want > 1).float().mean() < 0.3 or numel < 100
    assert torch.equal(p.detach().cpu().float(), want)


@pytest.mark.slow
@each_way
def test_what_is_skipped_stays(form, dtype, rounding, bits):
    numel, device = 5000, device_of(form)
    p = torch.nn.Parameter(start(10, numel // 10, dtype=dtype, device=device))
    optimizer = AdamW([p], **{**SETTINGS, "weight_decay": 0.0}, rounding=rounding, bits=bits)
    with running(form):
        optimizer.found_inf = torch.tensor(1.0, device=device)
        p.grad = torch.full_like(p, torch.nan)
        optimizer.step()
        assert torch.equal(p.detach(), start(10, numel // 10, dtype=dtype, device=device))
        optimizer.found_inf.zero_()
        p.grad = gradients(10, numel // 10)[0].to(device, dtype)
        optimizer.step()
        before = [p.detach().clone(), *(x.clone() for x in optimizer.state[p].values())]
        optimizer.found_inf.fill_(1.0)
        p.grad = torch.full_like(p, torch.inf)
        optimizer.step()
    for a, b in zip([p.detach(), *optimizer.state[p].values()], before, strict=True):
        assert torch.equal(a, b)


def moments(optimizer, p):
    """The state of p, flat, with the values of codes in their place: those of a scale of 0 are all the same."""
    state = optimizer.state[p]
    for name, value in state.items():
        if value.dtype == torch.uint8:
            code = optimizer._code_maps(p.device)[int(name == "exp_avg_sq")]
            value = code[value.view(-1).long()] * state[f"{name}_absmax"].repeat_interleave(256)[: value.numel()]
        yield value.view(-1)


@pytest.mark.slow
@each_way
def test_rows_without_a_gradient_are_gone_past_exactly(form, dtype, rounding, bits):
    """A table that does not decay is updated as if it were a vector, of which every element is."""
    rows, width, device = 12, 100 if form == "library" else 1024, device_of(form)
    touched = [[1, 5], [5, 7], [], [0, 11], [1]]
    results = []
    for shape in ((rows, width), (rows * width,)):
        p = torch.nn.Parameter(start(rows, width, dtype=dtype, device=device).view(shape).clone())
        optimizer = AdamW([p], **{**SETTINGS, "weight_decay": 0.0}, rounding=rounding, bits=bits)
        generator = torch.Generator().manual_seed(0)
        with running(form):
            for step, some in enumerate(touched):
                grad = torch.zeros(rows, width)
                grad[some] = torch.randn(len(some), width, generator=generator)
                p.grad = grad.view(shape).to(device, dtype)
                if step == 3:  # a run goes on from what was saved
                    optimizer.load_state_dict(optimizer.state_dict())
                optimizer.step()
        assert (p.dim() == 2) == (p in optimizer._moving._known)
        results.append([p.detach().view(-1), *moments(optimizer, p)])
        if p.dim() == 2:
            marked = optimizer._moving._known[p][1].view(rows, -1).any(1).nonzero().flatten().tolist()
            assert marked == [0, 1, 5, 7, 11]
            assert torch.equal(p.detach()[[2, 3]], start(rows, width, dtype=dtype, device=device)[[2, 3]])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("form", FORMS)
def test_another_hand_in_the_state_is_seen(form):
    """Marks of live parts are made again where moments were overwritten, exchanged or resized."""

    def overwritten(optimizer, p):
        for name in ("exp_avg", "exp_avg_sq"):
            optimizer.state[p][name].fill_(0.1)

    def exchanged(optimizer, p):
        optimizer.state[p]["exp_avg"] = torch.full_like(p, 0.1)

    def one_row(optimizer, p):
        optimizer.state[p]["exp_avg_sq"][3] = 0.1

    def larger(optimizer, p):
        p.data = start(40, 1024, device=p.device)
        for name in ("exp_avg", "exp_avg_sq"):
            optimizer.state[p][name] = torch.full_like(p, 0.1)

    for change in (overwritten, exchanged, one_row, larger):
        results = []
        for way in (form, "PyTorch"):
            p = torch.nn.Parameter(start(4, 1024, device=device_of(form)))
            optimizer = AdamW([p], lr=1e-2, weight_decay=0.0)
            with running(way):
                for step in range(2):
                    p.grad = torch.zeros_like(p)
                    p.grad[step] = 1.0
                    optimizer.step()
                    if not step:
                        change(optimizer, p)
            results.append(p.detach())
        torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)
        assert change is one_row or not torch.equal(results[0][3], start(40, 1024, device=device_of(form))[3])


@pytest.mark.skipif(not native.is_built(), reason=native.describe_library())
def test_another_form_goes_on_with_the_same_state():
    results = []
    for forms in (("interpreter", "library", "interpreter"), ("PyTorch",) * 3):
        p = torch.nn.Parameter(start(70, 3))
        optimizer = AdamW([p], lr=1e-2, weight_decay=0.0)
        for row, form in enumerate(forms):
            with running(form):
                p.grad = torch.zeros_like(p)
                p.grad[row] = 1.0
                optimizer.step()
        results.append(p.detach())
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_what_kahan_took_off_while_weights_decayed_is_not_forgotten(form):
    results = []
    for shape in ((40, 1024), (40960,)):
        p = torch.nn.Parameter(start(40, 1024, dtype=BF16, device=device_of(form)).view(shape).clone())
        optimizer = AdamW([p], lr=1e-2, rounding="kahan")
        with running(form):
            for step in range(8):
                optimizer.param_groups[0]["weight_decay"] = 0.1 if step < 5 else 0.0
                p.grad = torch.zeros_like(p)
                optimizer.step()
        results.append(p.detach().view(-1))
    assert torch.equal(*results)


def test_an_optimizer_is_copied_and_let_go():
    p = torch.nn.Parameter(start(8, 4))
    optimizer = AdamW([p], lr=1e-2, weight_decay=0.0, rounding="kahan", seed=7)
    p.grad = gradients(8, 4)[0]
    optimizer.step()
    other = copy.deepcopy(optimizer)
    (q,) = other.param_groups[0]["params"]
    assert q is not p and other.rounding == "kahan" and other.seed == 7
    for x, o in ((p, optimizer), (q, other)):
        x.grad = gradients(8, 4)[1]
        o.step()
    assert torch.equal(p, q)
    seen = weakref.ref(p), weakref.ref(optimizer.state[p]["exp_avg"])
    optimizer.state.clear()
    optimizer.param_groups.clear()
    del p, x, o
    gc.collect()
    assert not any(ref() for ref in seen)


@pytest.mark.parametrize("form", FORMS)
def test_a_backward_pass_with_weights_of_before_is_refused(form):
    p = torch.nn.Parameter(start(4, 4, device=device_of(form)))
    y = (p * p).sum()
    with running(form):
        p.grad = torch.ones_like(p)
        AdamW([p]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.skipif(not native.is_built(), reason=native.describe_library())
def test_the_library_takes_only_what_it_can_read():
    weight = torch.ones(8, 4)
    zeros = [torch.zeros(8, 4) for _ in range(3)]
    step = torch.ones(())

    def run(grad=zeros[0], mean=zeros[1], square=zeros[2], live=None, step=step, found=None, scale=None):
        rest = (1e-3, 0.9, 0.99, 0.0, 1e-8, False, 0, 0, 0)
        cpu_adamw.adamw_(weight, grad, mean, square, None, live, step, found, scale, *rest)

    run(live=torch.zeros(8, dtype=torch.uint8))
    one = torch.ones((), dtype=F64)
    wrong = [
        {"grad": torch.zeros(4, 8)},
        {"grad": torch.zeros(8, 8)[:, ::2]},
        {"grad": zeros[0].bfloat16()},
        {"mean": torch.zeros(8, 3)},
        {"mean": torch.zeros(8, 4, dtype=torch.uint8)},
        {"square": zeros[2].double()},
        {"live": torch.zeros(7, dtype=torch.uint8)},
        {"step": one},
        {"found": one},
        {"scale": one},
        {"mean": torch.zeros(8, 4, device="meta")},
    ]
    for arguments in wrong:
        with pytest.raises(RuntimeError, match="there is no adamw_ for"):
            run(**arguments)
    with torch.device("meta"):  # results lie where the numbers do
        assert ops.sum_of_squares(weight) == 32


@needs_bitsandbytes
@pytest.mark.parametrize("form", KERNEL)
def test_moments_get_the_nearest_codes(form):
    """On both sides of every border, at the end of a parameter too; the gradients are the moments, their squares the
    second ones."""
    optimizer = AdamW([torch.nn.Parameter(torch.zeros(4096, device=device_of(form)))], bits=8)
    signed, unsigned = (values.cpu() for values in optimizer._code_maps(torch.device(device_of(form))))
    borders = (signed[:-1].double() + signed[1:].double()) / 2
    squared = ((unsigned[:-1].double() + unsigned[1:].double()) / 2).sqrt()
    numbers = torch.cat([x * y for x in (borders, squared) for y in (1 - 3e-7, 1 + 3e-7)]).float()
    numbers = torch.cat([numbers, torch.randn(4080, generator=torch.Generator().manual_seed(0)) / 5]).clamp(-1, 1)
    blocks = torch.cat([torch.ones(20, 1), numbers[: 20 * 255].view(20, 255)], 1).flatten()  # each has a scale of 1
    grad = torch.cat([blocks, torch.tensor([-1.0, 0.5, 1e-9])])
    p = torch.nn.Parameter(torch.zeros(len(grad), device=device_of(form)))
    optimizer = AdamW([p], lr=1e-3, betas=(0.0, 0.0), weight_decay=0.1, bits=8)
    p.grad = grad.to(p.device)
    with running(form):
        optimizer.step()
    state = {name: value.cpu() for name, value in optimizer.state[p].items()}
    for name, moment, code in (("exp_avg", grad, signed), ("exp_avg_sq", grad * grad, unsigned)):
        assert torch.equal(state[f"{name}_absmax"], torch.ones(21)), name
        got = code[state[name].long()]
        distances = (moment.double()[:, None] - code.double()[int(code[0] == 0) :]).abs()  # zero is no square's code
        assert torch.equal((moment.double() - got.double()).abs(), distances.amin(1)), name


@pytest.mark.parametrize("form", FORMS)
def test_a_table_that_begins_to_decay(form):
    """Then every row changes; and what got gradients meanwhile is known when it no longer does."""
    device = device_of(form)
    results = []
    for shape in ((4, 1024), (4096,)):
        p = torch.nn.Parameter(start(4, 1024, device=device).view(shape).clone())
        optimizer = AdamW([p], lr=1e-2, weight_decay=0.0)
        with running(form):
            for row, decay in enumerate((0.0, 0.5, 0.0)):
                optimizer.param_groups[0]["weight_decay"] = decay
                p.grad = torch.zeros_like(p)
                p.grad.view(4, 1024)[row] = 1.0
                optimizer.step()
        results.append(p.detach().view(-1))
    assert torch.equal(*results)
    assert not torch.equal(results[0].view(4, 1024)[3], start(4, 1024, device=device)[3])


@pytest.mark.slow
@pytest.mark.parametrize("form", [*FORMS, "PyTorch"])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_scale_divides_the_gradients(form, dtype):
    grads = gradients(5000)
    got, state = descend(form, [g * 8 for g in grads], dtype, grad_scale=torch.tensor(8.0, device=device_of(form)))
    want, other = descend(form, grads, dtype)
    assert torch.equal(got, want) and all(torch.equal(state[name], other[name]) for name in state)


def test_threads_change_nothing(all_threads):
    if not native.is_built():
        pytest.skip(native.describe_library())
    most = torch.get_num_threads()
    results = []
    for threads in {1, most, 3}:
        torch.set_num_threads(threads)
        x = torch.randn(300_001, generator=torch.Generator().manual_seed(0)).bfloat16()
        weight, state = descend("library", gradients(300, 111), BF16)
        table, _ = descend("library", gradients(300, 111), BF16, weight_decay=0.0)
        results.append([weight, table, *state.values(), cpu_adamw.sum_of_squares(x)])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
