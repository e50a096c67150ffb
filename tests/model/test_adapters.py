"""Adapters on CSM: what is trained, in which dtype, and that heads, dropout, compilation and generation see them."""

import pytest
import torch
import torch.nn.functional as F
from adapter_cases import EVERYWHERE, attached, gradients, loss_of, make_pack
from model_cases import MICRO, random_conversations, random_model, relative

from csm_fast.config.train import AdapterSection
from csm_fast.data.token_store import open_split
from csm_fast.generate.generator import Generator, Utterance
from csm_fast.model import adapters, layer_cpu, loss
from csm_fast.model.compile import compile_layers
from csm_fast.model.embedding_rows import EmbeddingRows, rows_in
from csm_fast.model.linear import is_quantized
from csm_fast.system.errors import InputError


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "dora", "qlora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_what_is_trained(method, dtype):
    model = attached(method, dtype, train_heads=True, train_embeddings="all", stir=False)
    whole = {"codebook0_head.weight", "audio_head", "text_embeddings.weight", "audio_embeddings.weight"}
    for name, parameter in model.named_parameters():
        adapter = "lora_" in name
        assert parameter.requires_grad == (adapter or name in whole), name
        if adapter or name in whole or name.endswith(".scale"):
            assert parameter.dtype == torch.float32, name
        elif method == "qlora" and ".layers." in name:
            assert parameter.dtype == torch.uint8, name
        else:
            assert parameter.dtype == dtype, name
    assert all(g.isfinite().all() for g in gradients(model).values())
    assert len(model.adapter.targets) == 4 * 7


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_adapter_changes_nothing(monkeypatch, method, dtype):
    monkeypatch.setattr(layer_cpu, "supports", lambda *_: False)  # a plain layer in one node rounds less often
    plain = random_model()
    for name, parameter in plain.named_parameters():
        parameter.data = parameter.data if name.endswith(".scale") else parameter.data.to(dtype)
    model = attached(method, dtype, target_modules=EVERYWHERE, stir=False)
    with model.adapter.autocast("cpu"):
        want = loss.packed_loss(plain, make_pack(), 0.5, 0.5)[0]
    assert torch.equal(loss_of(model), want)


def test_a_values_depend_on_the_seed_alone():
    def first(seed, dtype):
        model = random_model()
        torch.manual_seed(int(torch.randint(1000, ())))
        adapters.attach(model, AdapterSection(method="lora"), compute_dtype=dtype, seed=seed)
        return model.backbone.layers[0].mlp.w1.lora_A["default"].weight

    assert torch.equal(first(3, torch.float32), first(3, torch.bfloat16))
    assert not torch.equal(first(3, torch.float32), first(4, torch.float32))


def test_attach_leaves_the_random_state_alone():
    torch.manual_seed(5)
    want = torch.rand(3)
    model = random_model()
    torch.manual_seed(5)
    adapters.attach(model, AdapterSection(method="dora"), compute_dtype=torch.float32)
    assert torch.equal(torch.rand(3), want)


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("rslora", [False, True])
def test_loss_and_gradients_are_those_of_the_adapted_weights(method, rslora):
    """Against a plain model whose weights are W + s B A, made by hand, in float64."""
    model = attached(method, torch.float64, target_modules=EVERYWHERE, rslora=rslora, lora_alpha=6.0)
    scale = 6.0 / (2.0 if rslora else 4.0)
    plain, made = random_model(dtype=torch.float64), {}
    for name in model.adapter.targets:
        layer = model.get_submodule(name)
        a, b = (p["default"].weight.detach().requires_grad_() for p in (layer.lora_A, layer.lora_B))
        weight = layer.base_layer.weight + scale * (b @ a)
        made[name] = (a, b)
        if method == "dora":
            m = layer.lora_magnitude_vector["default"].weight.detach().requires_grad_()
            weight = weight * (m / weight.detach().norm(dim=1)).unsqueeze(1)
            made[name] += (m,)
        parent, _, leaf = f"{name}.weight".rpartition(".")
        module = plain.get_submodule(parent)
        del module._parameters[leaf]
        setattr(module, leaf, weight)
    want = loss.packed_loss(plain, make_pack(), 0.5, 0.5)[0]
    want.backward()
    got = gradients(model)
    assert relative(loss_of(model).detach(), want.detach()) < 1e-12
    for name, tensors in made.items():
        for part, tensor in zip(("lora_A", "lora_B", "lora_magnitude_vector"), tensors, strict=False):
            assert relative(got[f"{name}.{part}.default.weight"], tensor.grad) < 1e-9, (name, part)


@pytest.mark.parametrize("method", ["lora", "dora"])
@torch.no_grad()
def test_the_head_as_a_matrix_is_the_head_as_a_layer(method):
    """The loss reads a matrix, evaluation and generation call the layer."""
    x = torch.randn(5, MICRO.backbone.embed_dim)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2e-2)):
        model = attached(method, dtype, target_modules=["codebook0_head"])
        with model.adapter.autocast("cpu"):
            matrix = loss._linear_weight(model.codebook0_head)
            assert matrix.dtype == torch.float32
            want = model.codebook0_head(x)
            assert relative(F.linear(x, matrix).float(), want.float()) < tolerance


def test_dropout_is_on_the_adapters_of_the_stacks_only():
    model = attached(lora_dropout=0.5, target_modules=EVERYWHERE).train()
    x = torch.randn(7, MICRO.backbone.embed_dim)
    assert torch.equal(model.codebook0_head(x), model.codebook0_head(x))
    layer = model.backbone.layers[0].attn.q_proj
    assert not torch.equal(layer(x), layer(x))
    model.eval()
    assert torch.equal(layer(x), layer(x))
    assert gradients(model.train()).keys() == gradients(attached(target_modules=EVERYWHERE)).keys()


@pytest.mark.parametrize(
    ("words", "count"),
    [
        (["attn"], 28),
        (["attn", "q_proj"], 28),
        (["projection", "codebook0_head"], 2),
        (["q_proj", "o_proj"], 8),
        (["gate_proj"], 4),
        (["self_attn.k_proj", "mlp.up_proj"], 8),
        (["backbone.layers.1.attn.q_proj"], 1),
        (["decoder.layers.0.self_attn.o_proj"], 1),
    ],
)
def test_target_words(words, count):
    assert len(adapters.resolve_targets(random_model(), words)) == count


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"target_modules": ["attn", "attention"]}, "attention matches no linear layer; choose among attn, codebook0"),
        ({"target_modules": ["proj"]}, "matches no linear layer"),
        ({"target_modules": ["audio_head"]}, "--train-heads"),
        ({"target_modules": ["text_embeddings"]}, "--train-embeddings"),
        ({"target_modules": EVERYWHERE, "train_heads": True}, "leave out --train-heads"),
    ],
)
def test_impossible_targets(settings, words):
    model = random_model()
    with pytest.raises(InputError, match=words):
        adapters.attach(model, AdapterSection(method="lora", **settings), compute_dtype=torch.float32)
    assert all(p.requires_grad for p in model.parameters())


def test_without_peft_the_error_names_the_command(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match="pip install"):
        adapters.attach(random_model(), AdapterSection(method="lora"), compute_dtype=torch.float32)


@pytest.mark.parametrize("method", ["lora", "dora", "qlora"])
@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_recomputing_changes_nothing(method, checkpointing):
    model = attached(method, torch.bfloat16)
    want = gradients(model)
    model.activation_checkpointing = checkpointing
    got = gradients(model)
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.slow
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-4), (torch.bfloat16, 0.1)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("method", ["lora", "dora", "qlora"])
def test_a_layer_compiles_into_one_graph(method, dtype, bound):
    """``compile_layers`` asks for whole graphs; other segments compile nothing anew."""
    model = attached(method, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_cpu, "supports", lambda *_: False)  # the form that is compiled
        if (
            dtype == torch.bfloat16
        ):  # with its roundings: in so small a model others move gradients by more than a tenth
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
        want = gradients(model)
    torch._dynamo.reset()
    compile_layers(model, "on", backend="eager")
    got = gradients(model)
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    gradients(model, make_pack(random_conversations([[(6, 8, 0), (3, 7, 1)], [(4, 11, 0)], [(2, 5, 0)]])))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled
    assert all(relative(got[name], want[name]) < bound for name in want)
    torch._dynamo.reset()


@pytest.mark.parametrize("method", ["lora", "dora", "qlora"])
@pytest.mark.parametrize("settings", [{"target_modules": EVERYWHERE}, {"train_heads": True, "train_embeddings": "all"}])
def test_generation_computes_in_the_adapters_type(method, settings):
    model = attached(method, torch.bfloat16, **settings)
    speech = Generator(model).generate_codes([Utterance([1, 2, 3])], max_frames=3, temperature=0)
    assert speech.codes.shape == (3, MICRO.num_codebooks) or speech.ended
    assert model.training


def test_a_tree_that_is_not_ours():
    """Sesame's own model has the same names and other modules: here, without our ``config``."""
    model, plain = random_model(), random_model()
    del model.config
    plain.to(torch.bfloat16)
    section = AdapterSection(method="lora", target_modules=EVERYWHERE)
    found = adapters.attach(model, section, compute_dtype=torch.float32)
    assert found.shape == MICRO and found.base_hash == adapters.weights_hash(plain)


# ----------------------------------------------------------------------------------------------------- identity


def test_the_hash_is_of_names_shapes_and_bf16_values(monkeypatch):
    model = random_model()
    want = adapters.weights_hash(model)
    assert adapters.weights_hash(random_model().to(torch.bfloat16)) == want
    monkeypatch.setattr(adapters, "_HASH_PIECE", 1 << 10)
    pieces = adapters.weights_hash(model)
    with torch.no_grad():
        model.decoder.norm.scale[-1] += 0.5
    assert adapters.weights_hash(model) != pieces
    # A base kept in fp16 has the hash of its fp16 values, whatever it is loaded in later.
    half = adapters.weights_hash(random_model(), adapters.hash_dtype(torch.float16))
    assert half == adapters.weights_hash(random_model().half(), torch.float16) != want


# ---------------------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embedding_rows_learn_as_the_whole_table_does(dtype):
    """Masters of the rows that occur take the steps that a whole float32 table takes; all other rows stay."""
    pack = make_pack()
    text = pack.tokens[~pack.is_audio, -1].unique().long()
    books = torch.arange(MICRO.num_codebooks) * MICRO.audio_vocab_size
    audio = (pack.tokens[pack.is_audio, :-1].long() + books).unique()
    model = attached(train_embeddings="rows", dtype=dtype)
    before = {n: t.weight.detach().clone() for n, t in (("t", model.text_embeddings), ("a", model.audio_embeddings))}
    rows = EmbeddingRows(model, text, audio)
    trained = [p for p in model.parameters() if p.requires_grad and not rows.owns(p)]
    assert rows.text_embeddings.shape == (len(text), MICRO.backbone.embed_dim)
    optimizer = torch.optim.SGD(trained, lr=0.5)
    loss_of(model, pack).backward()
    table = model.text_embeddings.weight.grad.float()
    rows.pull()
    assert model.text_embeddings.weight.grad is None
    optimizer.step()
    rows.push()
    want = before["t"].float().index_add(0, text, -0.5 * table[text])
    assert torch.equal(rows.text_embeddings.detach(), want[text])
    assert torch.equal(model.text_embeddings.weight, want.to(dtype))
    untouched = torch.ones(len(before["a"]), dtype=torch.bool).index_fill(0, audio, False)
    assert torch.equal(model.audio_embeddings.weight[untouched], before["a"][untouched])
    assert not torch.equal(model.audio_embeddings.weight[audio], before["a"][audio])
    assert {n for n, _ in rows.named_parameters()} == {"text_embeddings", "audio_embeddings"}


def test_rows_of_a_store(tmp_path):
    from train_cases import SIZE, K, conversations_of, write_store

    from csm_fast import CSM, CSMConfig

    conversations = conversations_of(5, seed=0)
    write_store(tmp_path / "train", conversations)
    model = CSM(CSMConfig(MICRO.backbone, MICRO.decoder, 50, SIZE + 3, K))
    text, audio = rows_in([open_split(str(tmp_path), "train")], model)
    turns = [turn for conversation in conversations for turn in conversation]
    assert text.tolist() == sorted({int(i) for turn in turns for i in turn.text})
    codes = {k * (SIZE + 3) + int(frame[k]) for turn in turns for frame in turn.codes for k in range(K)}
    assert audio.tolist() == sorted(codes | {k * (SIZE + 3) for k in range(K)})


def test_quantised_layers_are_those_of_the_stacks():
    model = attached("qlora", target_modules=EVERYWHERE)
    quantised = {n.removesuffix(".base_layer") for n, m in model.named_modules() if is_quantized(m)}
    inside = set(adapters.resolve_targets(random_model(), ["attn"]))
    assert {n for n in quantised if n in inside} == inside
    assert not is_quantized(model.projection.base_layer) and not is_quantized(model.codebook0_head.base_layer)
