"""4-bit weights: their values and gradients, and the traps of bitsandbytes on a CPU."""

import dataclasses
import logging
import subprocess
import sys
import warnings

import pytest
import torch
from adapter_cases import attached, gradients, loss_of, make_pack
from model_cases import MICRO, random_model, relative
from paths import ROOT
from torch import nn
from train_cases import environment

from csm_fast import TransformerConfig
from csm_fast.evaluate import validation as evaluate
from csm_fast.model import nf4 as quantize
from csm_fast.model.linear import dense_weight, is_quantized
from csm_fast.system.errors import InputError
from csm_fast.system.optional import quiet_import

# Widths that bitsandbytes' packed layout takes: multiples of its blocks of 64.
WIDE = dataclasses.replace(
    MICRO, backbone=TransformerConfig(2, 4, 2, 128, 192), decoder=TransformerConfig(2, 2, 1, 128, 192)
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_quantised_layer_is_a_layer_of_the_dequantised_weight(dtype):
    torch.manual_seed(0)
    linear = nn.Linear(96, 160, bias=False)
    quantised = quantize.quantize_linear(linear, dtype)
    plain = nn.Linear(96, 160, bias=False)
    plain.weight = nn.Parameter(dense_weight(quantised).clone())
    assert plain.weight.dtype == dtype and plain.weight.shape == (160, 96)
    assert 0.05 < relative(plain.weight.detach().float(), linear.weight.detach()) < 0.12  # four bits are that coarse
    x = torch.randn(3, 7, 96, dtype=dtype)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [layer(y) for layer, y in zip((quantised, plain), inputs, strict=True)]
    for output in outputs:
        output.float().square().sum().backward()
    assert outputs[0].dtype == dtype
    bound = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    assert relative(*(output.detach().float() for output in outputs)) < bound
    assert relative(inputs[0].grad.float(), inputs[1].grad.float()) < bound


@pytest.mark.slow
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_it_is_the_same_layer(kept, compute):
    """By an operator of ours, whatever the dtype of the weight's values and of the product."""
    torch.manual_seed(0)
    layer = quantize.quantize_linear(nn.Linear(96, 160, bias=False), kept)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 7, 96)
    inputs, grad = [x.clone().requires_grad_() for _ in range(2)], torch.randn(3, 7, 160)
    with torch.autocast("cpu", compute, enabled=compute == torch.bfloat16):
        outputs = [form(y) for form, y in zip((layer, compiled), inputs, strict=True)]
    for output in outputs:
        output.backward(grad.to(output.dtype))
    assert outputs[0].dtype == outputs[1].dtype
    bound = 1e-5 if kept == compute == torch.float32 else 1e-2
    assert relative(*(output.detach().float() for output in outputs)) < bound
    assert relative(inputs[0].grad, inputs[1].grad) < bound


@pytest.mark.slow
def test_the_operator_of_compiled_layers_is_whole():
    layer = quantize.quantize_linear(nn.Linear(128, 192, bias=False), torch.float32)
    state = layer.weight.quant_state
    tensors = state.code, state.absmax, state.state2.code, state.state2.absmax, state.offset
    for transposed, width in ((False, 128), (True, 192)):
        x = torch.randn(5, width, requires_grad=True)
        given = (x, layer.weight.data, *tensors, [192, 128], torch.float32, transposed)
        torch.library.opcheck(quantize._nf4_product, given)


def test_under_autocast_it_returns_what_a_linear_layer_returns():
    layer = quantize.quantize_linear(nn.Linear(64, 64, bias=False), torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 64)).dtype == torch.bfloat16


def test_weights_take_four_bits():
    model = random_model()
    before = sum(p.numel() for n, p in model.named_parameters() if ".layers." in n and p.dim() == 2)
    quantize.quantize_stacks(model, torch.bfloat16)
    bits = sum(p.numel() for n, p in model.named_parameters() if ".layers." in n and p.dim() == 2)
    assert bits * 2 == before
    assert not is_quantized(model.codebook0_head) and not is_quantized(model.projection)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_after_a_validation_pass_are_those_of_a_fresh_model(dtype):
    """bitsandbytes repacks weights in eval mode on some CPUs, and gradients through them vanish in silence."""
    want = gradients(attached("qlora", dtype, shape=WIDE))
    model, pack = attached("qlora", dtype, shape=WIDE).eval(), make_pack()
    with torch.inference_mode(), model.adapter.autocast("cpu"):
        evaluate.predictor_states(model, pack)
        seen = loss_of(model, pack)
    model.train()
    got = gradients(model)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert all(g.any() for name, g in got.items() if "lora_B" in name)
    assert torch.equal(seen, loss_of(model, pack).detach())


def test_a_model_that_starts_in_eval_mode_trains_the_same():
    want = gradients(attached("qlora", torch.bfloat16, shape=WIDE))
    got = gradients(attached("qlora", torch.bfloat16, shape=WIDE).eval())
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_gradients_are_those_of_bf16_layers_with_the_dequantised_weights():
    model = attached("qlora", torch.bfloat16)
    want = gradients(model)
    for layer in [m for m in model.modules() if hasattr(m, "lora_A")]:
        plain = nn.Linear(layer.base_layer.in_features, layer.base_layer.out_features, bias=False)
        plain.weight = nn.Parameter(dense_weight(layer.base_layer).clone(), requires_grad=False)
        layer.base_layer = plain
    got = gradients(model)
    assert all(relative(got[name], want[name]) < 2e-2 for name in want)


def test_moving_a_quantised_model_keeps_its_weights():
    model = attached("qlora", torch.bfloat16)
    want = loss_of(model).detach()
    assert torch.equal(loss_of(model.to("cpu")).detach(), want)


def run(code):
    done = subprocess.run([sys.executable, "-c", code], env=environment(), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_importing_fetches_nothing_and_says_nothing():
    """A package named kernels would be asked for code from the hub; here it is a trap."""
    code = """
import sys, types, warnings
warnings.simplefilter("always")
trap = types.ModuleType("kernels")
def get_kernel(*a, **k): print("FETCHED")
trap.get_kernel = get_kernel
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "kernels": print("ASKED")
sys.meta_path.insert(0, Finder())
from csm_fast.model.adapters import load_peft
from csm_fast.system.optional import load_bitsandbytes
load_peft(); load_bitsandbytes()
assert "kernels" not in sys.modules
"""
    said = run(code)
    assert "FETCHED" not in said and "ASKED" not in said
    assert "kernels" not in said and "DeprecationWarning" not in said


@pytest.mark.slow
def test_importing_the_package_imports_neither():
    code = "import sys, csm_fast.train.loop, csm_fast.commands.merge\n"
    code += "print([m for m in ('peft', 'bitsandbytes') if m in sys.modules])"
    assert run(code).strip() == "[]"


def test_other_records_of_the_logger_pass(caplog):
    with quiet_import(), caplog.at_level(logging.WARNING):
        logging.getLogger("bitsandbytes.backends.cpu.ops").warning("something else")
    assert "something else" in caplog.text


def test_without_bitsandbytes_the_error_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    quantize._nf4_linear.cache_clear()
    with pytest.raises(InputError, match="pip install"):
        quantize.quantize_linear(nn.Linear(4, 4, bias=False), torch.float32)


def test_a_step_warns_of_nothing():
    model = attached("qlora", torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradients(model)
