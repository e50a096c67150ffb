"""frame_embed against the sum it stands for: PyTorch's forms, and the kernels in Triton's interpreter."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch
from csm_kernels import frame_embed as module
from csm_kernels.choice import Choice
from csm_kernels.cpu import frame_embed as cpu_frame_embed
from csm_kernels.frame_embed import frame_embed, frame_embed_with_codes
from csm_kernels.gpu import frame_embed as kernels
from csm_kernels.gpu import jit
from kernel_cases import DTYPES, assert_within_budget, interpreted, poisoned

TEXT, VOCAB, CODEBOOKS, WIDTH = 23, 11, 5, 12


def naive(tokens, is_audio, text_table, audio_table):
    """Every row by itself, from the definition."""
    rows = []
    for row, audio in zip(tokens.tolist(), is_audio.tolist(), strict=True):
        if audio:
            rows.append(sum(audio_table[code + k * VOCAB] for k, code in enumerate(row[:-1])))
        else:
            rows.append(text_table[row[-1]])
    return torch.stack(rows)


def case(rows: int, share: float, dtype=torch.float64, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCAB, (rows, CODEBOOKS + 1), generator=generator)
    tokens[::3] = 0  # end-of-speech rows: the same embeddings again and again
    is_audio = torch.rand(rows, generator=generator) < share
    text = torch.randn(TEXT, WIDTH, generator=generator).to(dtype).requires_grad_()
    audio = torch.randn(CODEBOOKS * VOCAB, WIDTH, generator=generator).to(dtype).requires_grad_()
    grad = torch.randn(rows, WIDTH, generator=generator).to(dtype)
    return tokens, is_audio, text, audio, grad


@pytest.fixture(params=["CPU", "reference"])
def form(request, monkeypatch):
    """Both PyTorch forms: that of CPUs, and that of devices whose host must not wait."""
    if request.param == "reference":
        monkeypatch.setattr(module, "resolve", lambda *_: Choice("reference", "as asked"))


both_forms = pytest.mark.usefixtures("form")


@both_forms
@pytest.mark.parametrize("share", [0.0, 0.6, 1.0], ids=["text only", "mixed", "audio only"])
@pytest.mark.parametrize("rows", [1, 2, 37])
@pytest.mark.parametrize("ids", [torch.int64, torch.int32])
def test_forward_and_gradients(rows, share, ids):
    tokens, is_audio, text, audio, grad = case(rows, share)
    want = naive(tokens, is_audio, text, audio)
    want_grads = torch.autograd.grad(want, (text, audio), grad, allow_unused=True)
    got = frame_embed(tokens.to(ids), is_audio, text, audio)
    got_grads = torch.autograd.grad(got, (text, audio), grad)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)
    for g, w in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(g, torch.zeros_like(g) if w is None else w, rtol=1e-13, atol=1e-13)


@both_forms
def test_dead_columns_do_not_matter():
    """Codes of text rows and the text id of audio rows are not embedded."""
    tokens, is_audio, text, audio, _ = case(37, 0.5)
    changed = tokens.clone()
    changed[is_audio, -1] = TEXT - 1
    changed[~is_audio, :-1] = VOCAB - 1
    assert torch.equal(frame_embed(tokens, is_audio, text, audio), frame_embed(changed, is_audio, text, audio))


@both_forms
@pytest.mark.parametrize("wanted", ["text", "audio", "neither"])
def test_one_gradient_at_a_time(wanted):
    tokens, is_audio, text, audio, grad = case(37, 0.5)
    text.requires_grad_(wanted == "text")
    audio.requires_grad_(wanted == "audio")
    out = frame_embed(tokens, is_audio, text, audio)
    assert out.requires_grad == (wanted != "neither")
    if out.requires_grad:
        out.backward(grad)
    assert (text.grad is not None) == (wanted == "text")
    assert (audio.grad is not None) == (wanted == "audio")


@both_forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_dtypes_round_once(dtype):
    tokens, is_audio, text, audio, _ = case(37, 0.8, dtype)
    got = frame_embed(tokens, is_audio, text, audio)
    assert got.dtype == dtype
    exact = naive(tokens, is_audio, text.double(), audio.double())
    # Half a unit in the last place for the rounding of the result; float32's own sums err a little more.
    bound = exact.abs() * torch.finfo(dtype).eps * (0.5 if dtype == torch.bfloat16 else CODEBOOKS) + 1e-5
    assert ((got.double() - exact).abs() <= bound).all()


@both_forms
def test_gradcheck():
    tokens, is_audio, text, audio, _ = case(9, 0.6)
    assert torch.autograd.gradcheck(lambda t, a: frame_embed(tokens, is_audio, t, a), (text, audio))


@both_forms
def test_sparse_gradients_are_the_dense_ones():
    tokens, is_audio, text, audio, grad = case(37, 0.6)
    dense = torch.autograd.grad(frame_embed(tokens, is_audio, text, audio), (text, audio), grad)
    sparse = torch.autograd.grad(frame_embed(tokens, is_audio, text, audio, sparse=True), (text, audio), grad)
    for d, s in zip(dense, sparse, strict=True):
        assert s.is_sparse
        torch.testing.assert_close(s.to_dense(), d)


# --- with the depth decoder's codes -------------------------------------------------------------------------------


def evaluate_with_codes(impl, tokens, is_audio, text, audio, grad, frames, grad_codes, sparse=False):
    """Both outputs and both gradients, by name."""
    out = frame_embed_with_codes(tokens, is_audio, frames, text, audio, impl=impl, sparse=sparse)
    text_grad, audio_grad = torch.autograd.grad(out, (text, audio), (grad, grad_codes))
    rows, codes = (x.detach() for x in out)
    return {"rows": rows, "codes": codes, "text gradient": text_grad, "audio gradient": audio_grad}


def codes_case(case, share=0.5, seed=3):
    """What a case lacks: some of its audio rows, one of them twice, and a gradient for their codes."""
    tokens, is_audio, _, audio, grad = case
    generator = torch.Generator().manual_seed(seed)
    frames = is_audio.nonzero().squeeze(1)
    frames = frames[torch.rand(len(frames), generator=generator) < share].int()
    frames = torch.cat([frames, frames[:1]])
    shape = len(frames), tokens.shape[1] - 2, grad.shape[1]
    return frames, torch.randn(shape, generator=generator, dtype=torch.float64).to(grad.dtype)


@both_forms
@pytest.mark.parametrize("share", [0.0, 0.6, 1.0], ids=["text only", "mixed", "audio only"])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_codes_and_rows_share_one_gradient(share, sparse):
    tokens, is_audio, text, audio, grad = case(37, share)
    frames, grad_codes = codes_case((tokens, is_audio, text, audio, grad))
    offsets = torch.arange(CODEBOOKS - 1) * VOCAB
    want_codes = audio[tokens[frames.long()][:, :-2] + offsets]
    want = naive(tokens, is_audio, text, audio)
    want_grads = torch.autograd.grad((want, want_codes), (text, audio), (grad, grad_codes), allow_unused=True)
    got = evaluate_with_codes("torch", tokens, is_audio, text, audio, grad, frames, grad_codes, sparse)
    torch.testing.assert_close(got["rows"], want.detach(), rtol=1e-13, atol=1e-13)
    assert torch.equal(got["codes"], want_codes)
    for name, w in zip(("text gradient", "audio gradient"), want_grads, strict=True):
        g = got[name].to_dense() if sparse else got[name]
        torch.testing.assert_close(g, torch.zeros_like(g) if w is None else w, rtol=1e-13, atol=1e-13)


@pytest.mark.slow
def test_gradcheck_with_codes():
    tokens, is_audio, text, audio, grad = case(7, 0.6)
    frames, _ = codes_case((tokens, is_audio, text, audio, grad))
    assert torch.autograd.gradcheck(lambda t, a: frame_embed_with_codes(tokens, is_audio, frames, t, a), (text, audio))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_big_tables_on_a_cpu(dtype):
    """Their gradients are fresh memory, which autograd takes over without a copy, and sums come in several pieces."""
    rows, codebooks, vocab, width = 300, 4, 2051, 512
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, vocab, (rows, codebooks + 1), generator=generator)
    is_audio = torch.rand(rows, generator=generator) < 0.8
    text, audio = (
        torch.randn(n, width, generator=generator).to(dtype).requires_grad_() for n in (9000, codebooks * vocab)
    )
    grad = torch.randn(rows, width, generator=generator).to(dtype)
    frames = is_audio.nonzero().squeeze(1)[:40]
    grad_codes = torch.randn(40, codebooks - 1, width, generator=generator).to(dtype)
    assert audio.nbytes > 2**22 and text.nbytes > 2**22
    made = []
    zeros = cpu_frame_embed.zeros

    def remember(*args):
        out = zeros(*args)
        made.append(out.data_ptr())
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_frame_embed, "zeros", remember)
        patch.setattr(cpu_frame_embed, "PIECE_BYTES", 2**17)
        torch.autograd.backward(frame_embed_with_codes(tokens, is_audio, frames, text, audio), (grad, grad_codes))
    assert {text.grad.data_ptr(), audio.grad.data_ptr()} == {*made}
    wide = [x.detach().double().requires_grad_() for x in (text, audio)]
    want_codes = wide[1][tokens[frames][:, :-2] + torch.arange(codebooks - 1) * vocab]
    keys = tokens[:, :-1] + torch.arange(codebooks) * vocab
    want = torch.where(is_audio.unsqueeze(1), wide[1][keys].sum(1), wide[0][tokens[:, -1]])
    torch.autograd.backward((want, want_codes), (grad.double(), grad_codes.double()))
    for got, reference in zip((text, audio), wide, strict=True):
        assert torch.equal(got.grad == 0, reference.grad == 0)
        error = (got.grad.double() - reference.grad).norm() / reference.grad.norm()
        assert error < torch.finfo(dtype).eps / 2
    # An optimizer may write into every row of it.
    untouched = int((wide[0].grad.abs().sum(1) == 0).nonzero()[0])
    text.grad.add_(1)
    assert (text.grad[untouched] == 1).all()


# --- the kernels, interpreted -------------------------------------------------------------------------------------


@pytest.fixture
def launches(monkeypatch):
    """Kernels run on the CPU with poisoned memory, and runs of equal keys are cut every 8 occurrences."""
    monkeypatch.setattr(kernels, "_CHUNK", 8)
    with interpreted() as counts, poisoned():
        yield counts


def kernel_case(rows, codebooks, width, dtype, kind="mixed", vocab=VOCAB, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocab, (rows, codebooks + 1), generator=generator)
    is_audio = torch.rand(rows, generator=generator) < {"text": 0, "audio": 1, "EOS": 1, "mixed": 0.6}[kind]
    if kind == "EOS":
        tokens[:] = 0
    text = torch.randn(TEXT, width, generator=generator).to(dtype).requires_grad_()
    audio = torch.randn(codebooks * vocab, width, generator=generator).to(dtype).requires_grad_()
    grad = torch.randn(rows, width, generator=generator).to(dtype)
    return tokens, is_audio, text, audio, grad


def evaluate(impl, tokens, is_audio, text, audio, grad, sparse=False):
    """Output and both gradients, by name."""
    out = frame_embed(tokens, is_audio, text, audio, impl=impl, sparse=sparse)
    text_grad, audio_grad = torch.autograd.grad(out, (text, audio), grad)
    return {"output": out.detach(), "text gradient": text_grad, "audio gradient": audio_grad}


def assert_kernels_match(tokens, is_audio, text, audio, grad):
    got = evaluate("triton", tokens, is_audio, text, audio, grad)
    same_dtype = evaluate("torch", tokens, is_audio, text, audio, grad)
    wide = [x.detach().double() for x in (text, audio, grad)]
    reference = evaluate("torch", tokens, is_audio, *(x.requires_grad_() for x in wide[:2]), wide[2])
    for name in got:
        assert_within_budget(name, got[name], reference[name], same_dtype[name])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "rows, codebooks, width",
    [(0, 7, 96), (1, 7, 96), (33, 1, 96), (33, 7, 96), (5, 32, 96), (9, 7, 512), (3, 32, 2048)],
)
def test_kernels(rows, codebooks, width, dtype, launches):
    assert torch.empty(1).isnan()
    assert_kernels_match(*kernel_case(rows, codebooks, width, dtype))
    assert launches["_forward_kernel"] == (rows > 0)
    assert launches["_sum_kernel"] == 2 * (rows > 0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rows, codebooks, width", [(1, 7, 96), (33, 1, 96), (33, 7, 96), (5, 32, 512)])
@pytest.mark.parametrize("kind", ["mixed", "EOS"])
def test_kernels_with_codes(rows, codebooks, width, kind, dtype, launches):
    inputs = kernel_case(rows, codebooks, width, dtype, kind)
    frames, grad_codes = codes_case(inputs)
    got, same_dtype = (evaluate_with_codes(impl, *inputs, frames, grad_codes) for impl in ("triton", "torch"))
    wide = [x.detach().double() for x in inputs[2:]]
    wide[0].requires_grad_(), wide[1].requires_grad_()
    reference = evaluate_with_codes("torch", *inputs[:2], *wide, frames, grad_codes.double())
    assert torch.equal(got.pop("codes"), same_dtype["codes"])
    for name in got:
        assert_within_budget(name, got[name], reference[name], same_dtype[name])
    sparse = evaluate_with_codes("triton", *inputs, frames, grad_codes, sparse=True)
    assert torch.equal(sparse["audio gradient"].to_dense(), got["audio gradient"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["text", "audio", "EOS"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kernels_with_rows_of_one_kind(kind, dtype, launches):
    assert_kernels_match(*kernel_case(33, 3, 96, dtype, kind))
    assert launches["_join_kernel"]


def assert_text_gradient_matches(tokens, width, n_rows):
    """The kernels of one table's gradient, every row text."""
    grad = torch.randn(len(tokens), width, generator=torch.Generator().manual_seed(1))
    is_audio = torch.zeros(len(tokens), dtype=torch.bool)
    none = torch.empty(0, dtype=torch.int32), grad.new_empty(0, 0, width)
    got = module._table_gradient(grad, none[1], tokens.unsqueeze(1), is_audio, none[0], False, n_rows, grad.dtype)
    plain, exact = torch.zeros(n_rows, width), torch.zeros(n_rows, width, dtype=torch.float64)
    assert_within_budget("gradient", got, exact.index_add(0, tokens, grad.double()), plain.index_add(0, tokens, grad))


@pytest.mark.parametrize("vocab", [1, 2, 3])
def test_runs_cut_in_every_way(vocab, launches):
    """Runs that begin or end with a chunk, lie inside one, and span several."""
    generator = torch.Generator().manual_seed(vocab)
    for rows in (7, 8, 9, 15, 16, 17, 24, 33):
        assert_text_gradient_matches(torch.randint(0, vocab, (rows,), generator=generator), 5, 3)


@pytest.mark.parametrize("head", [1, 7, 8, 9, 15, 16])
def test_two_runs_that_meet_around_a_cut(head, launches):
    tokens = torch.ones(33, dtype=torch.long)
    tokens[:head] = 0
    assert_text_gradient_matches(tokens, 5, 3)


def test_kernels_with_the_shipped_chunk():
    """A long run and many short ones at the real size of a piece."""
    assert kernels._CHUNK == 256
    tokens = torch.randint(0, 60, (700,), generator=torch.Generator().manual_seed(0))
    tokens[100:] = 0
    with interpreted() as launches, poisoned():
        assert_text_gradient_matches(tokens, 4, 60)
    assert launches == {"_sum_kernel": 1, "_join_kernel": 1}


@pytest.mark.parametrize("wanted", ["text", "audio", "neither"])
def test_kernels_do_no_work_for_a_frozen_table(wanted, launches):
    tokens, is_audio, text, audio, grad = kernel_case(9, 3, 16, torch.float32)
    expected = evaluate("torch", tokens, is_audio, text, audio, grad)
    text.requires_grad_(wanted == "text")
    audio.requires_grad_(wanted == "audio")
    out = frame_embed(tokens, is_audio, text, audio, impl="triton")
    assert out.requires_grad == (wanted != "neither")
    if wanted != "neither":
        out.backward(grad)
        table = text if wanted == "text" else audio
        torch.testing.assert_close(table.grad, expected[f"{wanted} gradient"])
    assert launches["_sum_kernel"] == (wanted != "neither")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kernels_sparse_gradients(dtype, launches):
    case = kernel_case(20, 3, 96, dtype)
    dense, sparse = evaluate("triton", *case), evaluate("triton", *case, sparse=True)
    for name in ("text gradient", "audio gradient"):
        assert sparse[name].is_coalesced()
        indices = sparse[name].indices()[0]
        assert torch.equal(indices, dense[name].abs().sum(1).nonzero().squeeze(1))
        assert torch.equal(sparse[name].to_dense(), dense[name])


@pytest.mark.parametrize("kind", ["text", "audio"])
def test_kernels_sparse_gradient_of_an_unused_table(kind, launches):
    got = evaluate("triton", *kernel_case(3, 2, 8, torch.float32, kind), sparse=True)
    unused = got["audio gradient" if kind == "text" else "text gradient"]
    assert unused.indices().shape == (1, 0) and unused.values().shape == (0, 8)


def test_kernels_give_the_same_bits_again(launches):
    """Also for other integers, other strides, and a gradient that is one number seen as a matrix."""
    tokens, is_audio, text, audio, grad = kernel_case(20, 3, 16, torch.float16, vocab=3)
    first = evaluate("triton", tokens, is_audio, text, audio, grad)
    strided = torch.stack([tokens.int(), tokens.int()], -1)[..., 0]
    again = evaluate("triton", strided, is_audio, text, audio, grad.t().contiguous().t())
    assert all(torch.equal(first[name], again[name]) for name in first)
    ones = evaluate("triton", tokens, is_audio, text, audio, torch.ones_like(grad))
    expanded = evaluate("triton", tokens, is_audio, text, audio, torch.ones((), dtype=grad.dtype).expand_as(grad))
    assert all(torch.equal(ones[name], expanded[name]) for name in ones)


def test_kernels_mark_an_id_outside_its_table(launches):
    tokens, is_audio, text, audio, grad = kernel_case(9, 3, 16, torch.float32)
    is_audio[:4], is_audio[4:] = True, False
    good = evaluate("triton", tokens, is_audio, text, audio, grad)
    assert not good["output"].isnan().any()
    tokens[0, 1], tokens[1, 0], tokens[5, -1], tokens[6, -1] = VOCAB, -1, TEXT, -1
    got = evaluate("triton", tokens, is_audio, text, audio, grad)
    bad = torch.zeros(9, dtype=torch.bool)
    bad[[0, 1, 5, 6]] = True
    assert torch.equal(got["output"].isnan().all(1), bad) and torch.equal(got["output"][~bad], good["output"][~bad])
    without = grad.where(~bad.unsqueeze(1), 0)
    expected = torch.autograd.grad(frame_embed(tokens.clamp(0, VOCAB - 1), is_audio, text, audio), text, without)[0]
    torch.testing.assert_close(got["text gradient"], expected)
    # A bad code is left out alone: every other code of its row has its gradient.
    codes = torch.where(is_audio.unsqueeze(1) & (tokens[:, :-1] >= 0) & (tokens[:, :-1] < VOCAB), 1.0, 0.0)
    assert got["audio gradient"].sum().item() == pytest.approx((codes.sum(1) * grad.sum(1)).sum().item(), rel=1e-4)


def test_text_table_in_another_dtype(launches):
    tokens, is_audio, text, audio, grad = kernel_case(9, 3, 16, torch.float16)
    text = text.detach().float().requires_grad_()
    got, want = (evaluate(impl, tokens, is_audio, text, audio, grad) for impl in ("triton", "torch"))
    assert got["text gradient"].dtype == torch.float32
    for name in got:
        torch.testing.assert_close(got[name], want[name])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_kernels_on_a_gpu(dtype):
    """csm-1b's shape with a long run: right, the same bits twice, and the host never waits."""
    tokens, is_audio, text, audio, grad = kernel_case(4096, 32, 2048, dtype, vocab=2051)
    tokens[:, -1] %= TEXT
    tokens[::3] = 0
    case = [x.detach().cuda() for x in (tokens, is_audio, text, audio, grad)]
    case[2].requires_grad_(), case[3].requires_grad_()
    assert_kernels_match(*case)
    first = evaluate("triton", *case)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = evaluate("auto", *case)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(first[name], again[name]) for name in first)
    sparse = evaluate("triton", *case, sparse=True)
    assert all(torch.equal(sparse[name].to_dense(), first[name]) for name in first if "gradient" in name)
    frames, grad_codes = (x.cuda() for x in codes_case([x.detach().cpu() for x in case], share=1 / 16))
    got, same_dtype = (evaluate_with_codes(impl, *case, frames, grad_codes) for impl in ("triton", "torch"))
    wide = [x.detach().double() for x in case[2:]]
    wide[0].requires_grad_(), wide[1].requires_grad_()
    reference = evaluate_with_codes("torch", *case[:2], *wide, frames, grad_codes.double())
    for name in got:
        assert_within_budget(name, got[name], reference[name], same_dtype[name])


# --- registration -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_triton", [True, False], ids=["triton", "torch"])
def test_opcheck(use_triton, launches):
    tokens, is_audio, text, audio, grad = kernel_case(4, 2, 8, torch.float32)
    frames = is_audio.nonzero().squeeze(1).int()
    grad_codes = torch.randn(len(frames), 1, 8)
    torch.library.opcheck(module._frame_embed, (tokens, is_audio, frames, text, audio, False, use_triton))
    for of_audio, table in [(True, audio), (False, text)]:
        inputs = (grad, grad_codes, tokens, is_audio, frames, of_audio, len(table), table.dtype, use_triton)
        torch.library.opcheck(module._table_gradient, inputs)


def test_compiles_as_one_op(launches):
    """Forward and backward of ragged packs: no graph break, one compilation for all row counts."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    step = torch.compile(
        lambda *inputs: frame_embed(*inputs, impl="triton") * 2, fullgraph=True, dynamic=True, backend=backend
    )
    for rows in (5, 6, 9):
        tokens, is_audio, text, audio, grad = kernel_case(rows, 2, 8, torch.float32)
        got = torch.autograd.grad(step(tokens, is_audio, text, audio), (text, audio), grad)
        want = evaluate("torch", tokens, is_audio, text, audio, 2 * grad)
        torch.testing.assert_close(got, (want["text gradient"], want["audio gradient"]))
    assert len(graphs) == 1
    assert sum("frame_embed" in str(node.target) for node in graphs[0].graph.nodes) == 1


def test_refusals(monkeypatch):
    pytest.importorskip("triton")
    tokens, is_audio, text, audio, _ = case(3, 0.5)
    with pytest.raises(ValueError, match="impl must be one of auto, triton, torch, not 'cuda'"):
        frame_embed(tokens, is_audio, text, audio, impl="cuda")
    with interpreted(), pytest.raises(ValueError, match="not torch.float64"):
        frame_embed(tokens, is_audio, text, audio, impl="triton")
    monkeypatch.setattr(kernels.triton.knobs.runtime, "interpret", False)
    with pytest.raises(ValueError, match="CUDA"):
        frame_embed(tokens, is_audio, text.float(), audio.float(), impl="triton")
    monkeypatch.setattr(jit, "triton", None)
    with pytest.raises(ImportError, match="needs the package triton"):
        frame_embed(tokens, is_audio, text.float(), audio.float(), impl="triton")


@pytest.mark.slow
def test_imports_and_runs_without_triton():
    code = """
import sys
sys.modules["triton"] = None
import torch
from csm_kernels.frame_embed import frame_embed
out = frame_embed(torch.zeros(2, 3, dtype=torch.long), torch.tensor([True, False]), torch.ones(4, 8), torch.ones(6, 8))
assert out.sum() == 24, out
"""
    path = [entry for entry in sys.path if entry]
    subprocess.run([sys.executable, "-c", f"import sys; sys.path[:] = {path!r}\n{code}"], check=True)


@pytest.mark.parametrize("name", ["_forward_kernel", "_sum_kernel", "_join_kernel"])
def test_addresses_are_64_bit(name):
    """Wherever a pointer to something [.., D] moves by a row, the step is 64 bits wide: tables pass 2**31 elements."""
    from aot_registry.frame_embed import cases

    case = next(case for case in cases(DTYPES[90][0], 90) if case.kernel.fn.__name__ == name)
    ir = case.compile(90).asm["ttir"]
    wide = {"p_text_table", "p_audio_table", "p_grad", "p_partial", "p_out"} & {*case.signature}
    assert wide
    for pointer in wide:
        steps = re.findall(rf"tt\.addptr %{pointer}(?:_\d+)?, %\S+ : (.*?) loc", ir)
        splats = re.findall(rf"(%\S+) = tt\.splat %{pointer} ", ir)
        for splat in splats:
            steps += re.findall(rf"tt\.addptr {re.escape(splat)}, %\S+ : (.*?) loc", ir)
        assert steps and all("i64" in step for step in steps), (pointer, steps)
