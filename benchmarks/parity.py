"""Whether csm_fast computes what Sesame's own code computes. That code is cloned, not copied.

    git clone https://github.com/SesameAILabs/csm ../csm
    git clone https://github.com/knottwill/sesame-finetune ../sesame-finetune     # optional
    python -m benchmarks.parity --sesame-csm ../csm --sesame-finetune ../sesame-finetune

Needs torchtune (0.4.0, which Sesame pins, or 0.6.1). torchtune imports only with an older torchao, and needs more:

    pip install --no-deps torchtune==0.4.0 torchao==0.9.0
    pip install omegaconf datasets blobfile kagglehub psutil

Use an environment of its own: PEFT refuses to work with that torchao.

Compares ``csm_fast.forward`` bound to Sesame's ``Model`` with the blog's forward (in our words and, given
sesame-finetune, in its own), with our ``CSM`` and with transformers, on the same weights, batch and frames: losses, and
every parameter's gradient by name. Prints a table; the exit status is 1 if a line of it fails.
"""

from __future__ import annotations

import argparse
import ast
import copy
import dataclasses
import importlib.util
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import csm_fast
from benchmarks.common.baselines import blog_forward, transformers_gradients, transformers_loss, transformers_model
from benchmarks.common.models import random_batch
from csm_fast import CSM, CSMConfig, TransformerConfig
from csm_fast.model.stacks import model_config
from csm_fast.weights.config_json import sesame_config
from csm_fast.weights.save import save_model

LOSS, GRADIENT = 1e-6, 1e-5  # largest relative errors in float32
SEED = 7

Result = tuple[float, dict[str, Tensor]]


def sesame_models(directory: Path) -> types.ModuleType:
    """Sesame's ``models.py``, under another name than the common ``models``."""
    file = directory / "models.py"
    spec = importlib.util.spec_from_file_location("sesame_csm_models", file)
    if not file.is_file() or spec is None or spec.loader is None:
        raise SystemExit(f"{file}: no such file; give the directory of a clone of SesameAILabs/csm")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def finetune_forward(directory: Path, models: types.ModuleType) -> Callable[..., Tensor]:
    """sesame-finetune's ``utils.forward``, without the rest of the file, which imports codecs and reads variables."""
    tree = ast.parse((directory / "utils.py").read_text())
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "forward"]
    namespace = {"torch": torch, "F": F, "_create_causal_mask": models._create_causal_mask}
    exec(compile(tree, str(directory / "utils.py"), "exec"), namespace)  # noqa: S102 - the file the user named
    return namespace["forward"]


def patch_flavors(models: types.ModuleType, config: CSMConfig) -> None:
    """Register this shape in Sesame's code, under the names that our config.json gives it."""
    from torchtune.models import llama3_2

    def builder(c: TransformerConfig) -> Callable[[], nn.Module]:
        return lambda: llama3_2.llama3_2(
            vocab_size=8,  # of an embedding that Sesame's Model throws away
            num_layers=c.num_layers,
            num_heads=c.num_heads,
            num_kv_heads=c.num_kv_heads,
            embed_dim=c.embed_dim,
            max_seq_len=c.max_seq_len,
            intermediate_dim=c.intermediate_dim,
            attn_dropout=0.0,
            norm_eps=c.norm_eps,
            rope_base=int(c.rope_base),
            scale_factor=int(c.rope_scale_factor),
        )

    names = sesame_config(config)
    models.FLAVORS[names["backbone_flavor"]] = builder(config.backbone)
    models.FLAVORS[names["decoder_flavor"]] = builder(config.decoder)


def sesame_model(models: types.ModuleType, config: CSMConfig) -> Any:
    """Sesame's ``Model`` of any shape; ``audio_head`` is uninitialised, as there."""
    patch_flavors(models, config)
    names = sesame_config(config)
    return models.Model(models.ModelArgs(**{f.name: names[f.name] for f in dataclasses.fields(models.ModelArgs)}))


def make_batch(config: CSMConfig, conversations: list[list[tuple[int, int]]]) -> tuple[Tensor, Tensor]:
    """Random tokens and mask [B, S, K + 1]: conversations of turns of (text rows, audio frames), right-padded."""
    rows = ["".join("t" * text + "a" * frames + "e" for text, frames in turns) for turns in conversations]
    return random_batch(config, rows, seed=1)


def compute_gradients(model: Any, forward: Callable[..., Tensor], batch, autocast: bool = False) -> Result:
    """Loss and gradients of the model's parameters under a fixed seed."""
    model.zero_grad()
    torch.manual_seed(SEED)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = forward(model, *batch)
    loss.backward()
    return float(loss.detach()), {n: p.grad.double() for n, p in model.named_parameters()}


def relative_errors(got: Result, want: Result) -> tuple[float, float, str]:
    """Relative error of the loss, the worst one of a gradient, and whose."""
    if got[1].keys() != want[1].keys():
        raise SystemExit(f"parameters differ: {sorted(got[1].keys() ^ want[1].keys())[:4]}")
    each = {n: float((got[1][n] - want[1][n]).norm() / want[1][n].norm()) for n in want[1]}
    worst = max(each, key=lambda n: each[n])
    return abs(got[0] - want[0]) / abs(want[0]), each[worst], worst


class Table:
    """A line per comparison, printed at once; ``failed`` counts those outside of their limits."""

    def __init__(self) -> None:
        self.failed = 0
        print(f"{'comparison':80} {'loss':>10} {'rel. error':>10} {'gradient':>9}  worst parameter")

    def line(self, name: str, got: Result, want: Result, loss=LOSS, gradient=GRADIENT) -> None:
        loss_error, gradient_error, worst = relative_errors(got, want)
        good = loss_error <= loss and gradient_error <= gradient  # false for NaN
        self.failed += not good
        print(f"{name:80} {got[0]:10.6f} {loss_error:10.1e} {gradient_error:9.1e}  {worst}{'' if good else '  FAILED'}")

    def check(self, name: str, good: bool) -> None:
        self.failed += not good
        print(f"{name:80} {'yes' if good else 'NO, FAILED':>10}")


def compare_models(models: types.ModuleType, config: CSMConfig, finetune: Callable | None, table: Table) -> None:
    theirs = sesame_model(models, config)
    ours: Any = CSM(config).init_weights(seed=0)
    with torch.no_grad():
        for name, p in ours.named_parameters():
            if p.dim() == 1:
                p.copy_(1 + 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
    theirs.load_state_dict(ours.state_dict())
    theirs.decoder_loss_weight = ours.decoder_loss_weight = 0.5
    table.check("Sesame's Model has CSM's parameters, no more, no fewer", model_config(theirs) == config)

    batches = {
        "context turns": [[(11, 30), (7, 52)], [(9, 64)], [(5, 1), (4, 0), (8, 40), (6, 11)], [(3, 2)]],
        "600 rows": [[(20, 579)], [(4, 90)]],
    }
    bound = types.MethodType(csm_fast.forward, theirs)
    for label, conversations in batches.items():
        batch = make_batch(config, conversations)
        blog = compute_gradients(theirs, blog_forward, batch)
        drop_in = compute_gradients(theirs, lambda _, *args: bound(*args), batch)
        own = compute_gradients(ours, csm_fast.forward, batch)
        table.line(f"{label}: csm_fast on Sesame's Model / the blog's forward on it", drop_in, blog)
        if finetune is not None:
            halved = compute_gradients(theirs, lambda *args: finetune(*args) / 2, batch)
            table.line(f"{label}: csm_fast on Sesame's Model / sesame-finetune's forward, halved", drop_in, halved)
        table.line(f"{label}: CSM / Sesame's Model, both csm_fast", own, drop_in)
        table.line(f"{label}: CSM / the blog's forward on Sesame's Model", own, blog)
        peer = transformers_model(config, ours.state_dict())
        torch.manual_seed(SEED)
        loss = transformers_loss(peer, *batch) / 2  # it adds CE0 and CEd, the blog's formula averages them
        loss.backward()
        grads = {n: g.double() for n, g in transformers_gradients(peer, config).items()}
        table.line(f"{label}: csm_fast on Sesame's Model / transformers", drop_in, (float(loss.detach()), grads))
        del peer

        narrow = compute_gradients(theirs, blog_forward, batch, autocast=True)
        rounding = relative_errors(narrow, blog)
        limits = max(2 * rounding[0], 1e-3), max(2 * rounding[1], 1e-2)
        table.line(f"{label}: bf16 autocast, the blog's forward / float32 (its rounding)", narrow, blog, 1, 1)
        for name, model in (("csm_fast on Sesame's Model", theirs), ("CSM", ours)):
            got = compute_gradients(model, csm_fast.forward, batch, autocast=True)
            table.line(f"{label}: bf16 autocast, {name} / float32", got, blog, *limits)
        half = copy.deepcopy(theirs).bfloat16()
        rounding = relative_errors(compute_gradients(half, blog_forward, batch), blog)
        limits = max(2 * rounding[0], 1e-2), max(2 * rounding[1], 1e-2)
        got = compute_gradients(half, csm_fast.forward, batch)
        table.line(f"{label}: bf16 weights, csm_fast on Sesame's Model / float32", got, blog, *limits)

    with tempfile.TemporaryDirectory() as directory:
        save_model(ours, directory)
        loaded = models.Model.from_pretrained(directory)
        weights, saved = loaded.state_dict(), ours.state_dict()
        equal = weights.keys() == saved.keys() and all(torch.equal(t, weights[n]) for n, t in saved.items())
        table.check("Sesame's Model.from_pretrained(what save_model wrote): bit-identical", equal)
        save_model(theirs, directory)
        again = csm_fast.load_model(directory)
        same = all(torch.equal(p, weights[n]) for n, p in again.named_parameters()) and again.config == config
        table.check("load_model(what save_model wrote of Sesame's Model): bit-identical", same)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sesame-csm", type=Path, required=True, help="a clone of SesameAILabs/csm")
    parser.add_argument("--sesame-finetune", type=Path, help="a clone of knottwill/sesame-finetune")
    args = parser.parse_args()
    try:
        import torchtune  # noqa: F401 - Sesame's code imports it
    except ImportError as error:
        raise SystemExit(f"torchtune: {error}; see the top of benchmarks/parity.py") from None
    models = sesame_models(args.sesame_csm)
    finetune = finetune_forward(args.sesame_finetune, models) if args.sesame_finetune else None
    config = dataclasses.replace(CSMConfig.small(), text_vocab_size=4096)
    patch_flavors(models, config)
    table = Table()
    compare_models(models, config, finetune, table)
    print(f"{table.failed} failed" if table.failed else "all agree")
    return 1 if table.failed else 0


if __name__ == "__main__":
    sys.exit(main())
