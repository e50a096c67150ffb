"""Adapters on disk: PEFT's own loader takes them, csm-mlx' and transformers' are read and written, a wrong base is
refused, and what is loaded is what was saved, bit for bit."""

import json
import re
import warnings

import pytest
import torch
from adapter_cases import EVERYWHERE, KINDS, attached, loss_of, make_pack, stir_besides
from model_cases import MICRO, fill, padded, random_conversations, random_model, relative
from safetensors.torch import load_file, save_file

from benchmarks.common.baselines import transformers_loss, transformers_model
from csm_fast.config.train import AdapterSection
from csm_fast.model import adapters, loss
from csm_fast.model.embedding_rows import EmbeddingRows
from csm_fast.model.linear import is_quantized
from csm_fast.system.errors import InputError
from csm_fast.weights import adapter_files
from csm_fast.weights.adapter_formats import read_adapter
from csm_fast.weights.export import to_csm_mlx, to_transformers
from csm_fast.weights.merge import add_adapters, replace_whole
from csm_fast.weights.names import interleave_rows


def trained(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_loaded_is_what_was_saved(kind, dtype, tmp_path):
    model = stir_besides(attached(dtype=dtype, **KINDS[kind]))
    adapter_files.save_adapter(model, tmp_path)
    want, value = trained(model), loss_of(model).detach()

    again = attached(dtype=dtype, stir=False, **KINDS[kind])
    assert not torch.equal(loss_of(again).detach(), value)
    adapter_files.load_into(again, tmp_path)
    assert all(torch.equal(tensor, want[name]) for name, tensor in trained(again).items())

    fresh = random_model()
    found = adapter_files.load_adapters(fresh, tmp_path)
    assert found == model.adapter
    assert all(torch.equal(tensor, want[name]) for name, tensor in trained(fresh).items())
    assert torch.equal(loss_of(fresh).detach(), value)


def test_the_files_hold_only_what_was_trained(tmp_path):
    model = attached(method="dora", train_heads=True)
    adapter_files.save_adapter(model, tmp_path)
    sizes = adapter_files.adapter_size(tmp_path)
    assert sizes.keys() == {"adapter_model.safetensors", "adapter_config.json", "config.json", "trained.safetensors"}
    weights = load_file(tmp_path / "adapter_model.safetensors")
    assert len(weights) == 28 * 3
    assert all(re.search(r"\.lora_(A\.weight|B\.weight|magnitude_vector)$", name) for name in weights)
    assert load_file(tmp_path / "trained.safetensors").keys() == {"codebook0_head.weight", "audio_head"}
    numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert 4 * numbers < sizes["adapter_model.safetensors"] + sizes["trained.safetensors"] < 4 * numbers + 20_000
    adapter_files.save_adapter(attached(), tmp_path)  # nothing is left of the other one
    assert not (tmp_path / "trained.safetensors").exists()


def test_the_configuration_is_pefts_and_says_what_it_belongs_to(tmp_path):
    import peft

    adapter_files.save_adapter(attached(method="dora", lora_dropout=0.25), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = peft.PeftConfig.from_pretrained(str(tmp_path))
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_dora) == (4, 8.0, 0.25, True)
    assert config.base_model_name_or_path == "micro"
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    assert values["target_modules"] == ["k_proj", "output_proj", "q_proj", "v_proj", "w1", "w2", "w3"]
    ours = values["auto_mapping"]["csm_fast"]
    assert ours["base_hash"] == adapters.weights_hash(random_model())
    assert ours["target_modules"] == ["attn"]


def merged(directory):
    """The micro model with the adapter in ``directory`` added."""
    model, saved = random_model(), read_adapter(directory, MICRO)
    replace_whole(model, saved)
    add_adapters(model, saved)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "dora", "rslora", "everywhere", "few"])
def test_peft_loads_it_onto_the_plain_model(kind, tmp_path):
    import peft

    model = attached(**KINDS[kind])
    adapter_files.save_adapter(model, tmp_path)
    plain = random_model()
    del plain.config  # PEFT would take it for transformers'
    theirs = peft.PeftModel.from_pretrained(plain, str(tmp_path))
    got = loss.packed_loss(theirs.base_model.model, make_pack(), 0.5, 0.5)[0]
    assert relative(got, loss_of(model).detach()) < 1e-6


# ------------------------------------------------------------------------------------------------------- refusals


def test_a_wrong_base_is_refused(tmp_path):
    adapter_files.save_adapter(attached(), tmp_path)
    other = fill(random_model(), seed=1)
    with pytest.raises(InputError, match=r"belongs to the base micro \(weights \w{16}\), not to the given model"):
        adapter_files.load_adapters(other, tmp_path)
    assert other.adapter is None
    adapters.attach(other, AdapterSection(method="lora", lora_rank=4), compute_dtype=torch.float32, base="other")
    with pytest.raises(InputError, match="not to other"):
        adapter_files.load_into(other, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lora_rank": 8}, "instead of"),
        ({"target_modules": ["q_proj"]}, "is not trained here"),
        ({"target_modules": EVERYWHERE}, "is missing"),
        ({"method": "dora"}, "magnitude is missing"),
        ({"train_heads": True}, "audio_head is missing"),
    ],
)
def test_other_settings_are_refused(settings, words, tmp_path):
    adapter_files.save_adapter(attached(), tmp_path)
    model = attached(stir=False, **settings)
    before = trained(model)
    with pytest.raises(InputError, match=words):
        adapter_files.load_into(model, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trained(model).items())


def change_config(directory, **changes):
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "LOHA"}, "peft_type LOHA"),
        ({"bias": "all"}, "trained biases"),
        ({"rank_pattern": {"q_proj": 2}}, "several ranks"),
        ({"init_lora_weights": "pissa"}, "changes the base"),
        ({"r": "four"}, "adapter_config.json"),
    ],
)
def test_what_is_no_plain_lora_is_refused(changes, words, tmp_path):
    adapter_files.save_adapter(attached(), tmp_path)
    change_config(tmp_path, **changes)
    with pytest.raises(InputError, match=words):
        adapter_files.load_adapters(random_model(), tmp_path)


def test_every_tensor_must_have_its_place(tmp_path):
    adapter_files.save_adapter(attached(), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.backbone.layers.0.attn.q_proj.lora_A.weight"
    for changed, words in (
        ({n: t for n, t in tensors.items() if n != name}, "lora_A is missing"),
        ({**tensors, name: tensors[name][:, :-1].contiguous()}, "instead of"),
        ({**tensors, "base_model.model.extra.weight": torch.zeros(2)}, "extra.weight is unexpected"),
        ({**tensors, "base_model.model.backbone.layers.9.attn.q_proj.lora_A.weight": torch.zeros(4, 64)}, "layers.9"),
    ):
        save_file(changed, file)
        with pytest.raises(InputError, match=words):
            adapter_files.load_adapters(random_model(), tmp_path)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match="not a whole safetensors file"):
        adapter_files.load_adapters(random_model(), tmp_path)


def test_a_directory_without_an_adapter(tmp_path):
    with pytest.raises(InputError, match="holds no adapter"):
        adapter_files.load_adapters(random_model(), tmp_path)


# ----------------------------------------------------------------------------------------------------------- rows


def with_rows():
    model = attached(train_embeddings="rows", dtype=torch.bfloat16)
    rows = EmbeddingRows(model, torch.tensor([1, 4, 7]), torch.tensor([0, 30]))
    with torch.no_grad():
        rows.text_embeddings.mul_(1.01)
        rows.audio_embeddings.mul_(0.99)
    rows.push()
    return model


def test_rows_are_saved_alone_and_come_back(tmp_path):
    model = with_rows()
    adapter_files.save_adapter(model, tmp_path)
    saved = load_file(tmp_path / "trained.safetensors")
    assert {name: list(t.shape) for name, t in saved.items()} == {
        "text_embeddings.weight.rows": [3, 64],
        "text_embeddings.weight.index": [3],
        "audio_embeddings.weight.rows": [2, 64],
        "audio_embeddings.weight.index": [2],
    }
    fresh = random_model()
    adapter_files.load_adapters(fresh, tmp_path)
    for name in ("text_embeddings", "audio_embeddings"):
        assert torch.equal(getattr(fresh.embedding_rows, name), getattr(model.embedding_rows, name))
        assert torch.equal(getattr(fresh, name).weight, getattr(model, name).weight)
    assert torch.equal(loss_of(fresh), loss_of(model))
    other = attached(train_embeddings="rows", dtype=torch.bfloat16)
    EmbeddingRows(other, torch.tensor([1, 4, 8]), torch.tensor([0, 30]))
    with pytest.raises(InputError, match="other rows were trained then"):
        adapter_files.load_into(other, tmp_path)


# -------------------------------------------------------------------------------------------------------- csm-mlx


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "dora", "rslora", "everywhere", "few"])
def test_csm_mlx_files_there_and_back(kind, tmp_path):
    model = attached(**KINDS[kind])
    adapter_files.save_adapter(model, tmp_path / "ours")
    to_csm_mlx(tmp_path / "ours", tmp_path / "mlx")
    fresh = random_model()
    adapter_files.load_adapters(fresh, tmp_path / "mlx")
    assert torch.equal(loss_of(fresh), loss_of(model))


@torch.no_grad()
def test_csm_mlx_files_mean_what_csm_mlx_means(tmp_path):
    """y + scale (x a) b, over names of csm-mlx, from a file that holds the frozen base as well."""
    model = attached(target_modules=["q_proj", "w2", "projection"], lora_alpha=6.0)
    adapter_files.save_adapter(model, tmp_path / "ours")
    to_csm_mlx(tmp_path / "ours", tmp_path / "mlx")
    config = json.loads((tmp_path / "mlx/adapter_config.json").read_text())
    assert config["fine_tune_type"] == "lora"
    keys = ["mlp.down_proj", "projection", "self_attn.q_proj"]
    assert config["lora_parameters"] == {"rank": 4, "scale": 1.5, "dropout": 0.0, "keys": keys}
    tensors = load_file(tmp_path / "mlx/adapters.safetensors")
    x = torch.randn(3, 96)
    layer = model.backbone.layers[1].mlp.w2
    a, b = (tensors[f"backbone.layers.1.mlp.down_proj.lora_{part}"] for part in "ab")
    assert a.shape == (96, 4) and b.shape == (4, 64)
    assert relative(layer.base_layer(x) + 1.5 * (x @ a) @ b, layer(x)) < 1e-6
    tensors["backbone.layers.1.mlp.down_proj.linear.weight"] = layer.base_layer.weight.detach()
    tensors["text_embeddings.weight"] = model.text_embeddings.weight.detach()
    save_file(tensors, tmp_path / "mlx/adapters.safetensors")
    adapter_files.load_adapters(random_model(), tmp_path / "mlx")
    save_file(tensors | {"bridge.weight": x}, tmp_path / "mlx/adapters.safetensors")
    with pytest.raises(InputError, match="bridge.weight is unexpected"):
        adapter_files.load_adapters(random_model(), tmp_path / "mlx")


def test_heads_have_no_form_in_csm_mlx(tmp_path):
    adapter_files.save_adapter(attached(train_heads=True), tmp_path / "ours")
    with pytest.raises(InputError, match="csm-fast merge"):
        to_csm_mlx(tmp_path / "ours", tmp_path / "mlx")


@pytest.mark.parametrize("scale", [{"scale": 2.0}, {"alpha": 16.0}])
def test_linear_to_lora_layers(scale):
    model = random_model()
    keys = ["self_attn.q_proj", "mlp.gate_proj", "codebook0_head"]
    found = adapter_files.linear_to_lora_layers(model, {"rank": 8, "dropout": 0.1, "keys": keys, **scale})
    assert len(found.targets) == 9 and found.compute_dtype == torch.float32
    layer = model.decoder.layers[0].mlp.w1
    assert layer.scaling["default"] == 2.0 and layer.lora_dropout["default"].p == 0.1
    with pytest.raises(InputError, match="either scale or alpha"):
        adapter_files.linear_to_lora_layers(random_model(), {"rank": 8})
    dora = random_model()
    adapter_files.linear_to_lora_layers(dora, {"rank": 2, **scale}, use_dora=True)
    assert "default" in dora.backbone.layers[0].attn.k_proj.lora_magnitude_vector


# --------------------------------------------------------------------------------------------------- transformers


def peer_loss(model, seed=0):
    """transformers' loss on the micro conversations, in eval mode, on frames that depend on ``seed``."""
    torch.manual_seed(seed)
    model.eval()
    with torch.no_grad():
        return transformers_loss(model, *padded(random_conversations([[(5, 9, 0)], [(4, 12, 0)]])), fraction=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "dora", "rslora", "everywhere", "few", "besides"])
def test_peft_loads_it_onto_transformers_csm(kind, tmp_path):
    """The loss of our model with the adapter merged, in transformers' form, is that of PEFT's on the base."""
    import peft

    plain = random_model()
    model = stir_besides(attached(**KINDS[kind]))
    adapter_files.save_adapter(model, tmp_path / "ours")
    to_transformers(tmp_path / "ours", tmp_path / "theirs")
    base = transformers_model(MICRO, plain.state_dict())
    before = peer_loss(base)
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "theirs"))
    got = peer_loss(theirs.base_model.model)
    want = peer_loss(transformers_model(MICRO, merged(tmp_path / "ours").state_dict()))
    assert abs(before - want) > 1e-3
    assert abs(got - want) < 1e-5 * abs(want)

    fresh = random_model()
    adapter_files.load_adapters(fresh, tmp_path / "theirs")
    again = attached(stir=False, **KINDS[kind])
    adapter_files.load_into(again, tmp_path / "ours")
    assert torch.equal(loss_of(fresh), loss_of(again))


@pytest.mark.parametrize("dora", [False, True])
def test_we_load_what_peft_made_on_transformers_csm(dora, tmp_path):
    """An adapter made and trained there; its keys for the codec are passed over."""
    import peft

    plain = random_model()
    names = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|inputs_embeds_projector|lm_head"
    config = peft.LoraConfig(r=4, lora_alpha=6, use_dora=dora, target_modules=rf"(?!codec_model).*\.?({names})")
    theirs = peft.get_peft_model(transformers_model(MICRO, plain.state_dict()), config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    theirs.save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_model.safetensors"
    codec = "base_model.model.codec_model.encoder_transformer.layers.0.self_attn.q_proj.lora_A.weight"
    save_file(load_file(file) | {codec: torch.zeros(4, 8)}, file)
    want = peer_loss(theirs.base_model.model)

    model = random_model()
    attached_now = adapter_files.load_adapters(model, tmp_path)
    assert len(attached_now.targets) == 28 + 2
    layer = model.backbone.layers[0].attn.q_proj
    b = load_file(file)["base_model.model.backbone_model.layers.0.self_attn.q_proj.lora_B.weight"]
    assert torch.equal(layer.lora_B["default"].weight, interleave_rows(b, MICRO.backbone.num_heads))
    got = peer_loss(transformers_model(MICRO, merged(tmp_path).state_dict()))
    assert abs(got - peer_loss(transformers_model(MICRO, plain.state_dict()))) > 1e-3
    assert abs(got - want) < 1e-5 * abs(want)


def test_rows_have_no_form_in_transformers(tmp_path):
    adapter_files.save_adapter(with_rows(), tmp_path / "ours")
    with pytest.raises(InputError, match="csm-fast merge"):
        to_transformers(tmp_path / "ours", tmp_path / "theirs")


def test_a_quantised_base_is_known_by_its_original_weights():
    model = attached("qlora", torch.bfloat16)
    assert model.adapter.base_hash == adapters.weights_hash(random_model())
    assert is_quantized(model.backbone.layers[0].attn.q_proj.base_layer)
