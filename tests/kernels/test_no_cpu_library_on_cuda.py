"""What runs on CUDA imports, builds and asks nothing of the CPU library.

A new process has a compiler that fails and leaves a mark. There a step of a model runs on meta tensors: in the forms
for CUDA with Triton, whose registered operators know their results without data, and in those without.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

STEP = """
import sys
import torch
from csm_fast import CSM, ops
from csm_fast.config.train import DataSection, LossSection
from csm_fast.model.loss import packed_loss
from csm_fast.packing.loader import Packer
from csm_fast.train.optim.adamw import AdamW
from csm_fast.train.optim.clipping import gradient_norm
from model_cases import MICRO_32, MemoryStore, random_conversations


def moved(value):
    return value.to(device) if torch.is_tensor(value) else value


device, store = sys.argv[1], MemoryStore(random_conversations([[(4, 9, 0)], [(3, 5, 1), (2, 7, 0)]]))
packer = Packer(store, DataSection(batch_size=4, pack_rows=64), LossSection(amortization_fraction=0.5))
pack = packer.step(0, 0).packs[0]
segments = pack.segments._replace(cu_seqlens=moved(pack.segments.cu_seqlens))
pack = pack._replace(**{name: moved(value) for name, value in pack._asdict().items()} | {"segments": segments})
for impl in ("auto", "torch", "triton") if device == "meta" else ("auto",):
    for dtype in (torch.bfloat16, torch.float32):
        with ops.using(impl):
            for op in ops.OPERATORS:
                assert ops.choose(op, "cuda", dtype).impl != "cpu", op
            with torch.device(device):
                model = CSM(MICRO_32).to(dtype)
            packed_loss(model, pack, 0.5, 0.5)[0].backward()
            gradients = [p.grad for p in model.parameters()]
            assert all(grad.device.type == device for grad in gradients)
            norm = gradient_norm(model.parameters())
        with ops.using("torch"):
            AdamW(model.parameters()).step()
used = sorted(name for name in sys.modules if name.startswith("csm_kernels.cpu"))
assert bool(used) == (device == "cpu"), used
"""


@pytest.mark.slow
@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_a_step_on_cuda_leaves_the_cpu_library_alone(device, tmp_path):
    """The same step on a CPU calls the compiler: the mark is one that would be seen."""
    pytest.importorskip("triton")
    mark, compiler = tmp_path / "called", tmp_path / "compiler"
    compiler.write_text(f"#!/bin/sh\n: > {mark}\nexit 1\n")
    compiler.chmod(0o755)
    path = os.pathsep.join(entry for entry in sys.path if entry)
    given = {"CXX": str(compiler), "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": path, "PATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", STEP, device], env={**os.environ, **given}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert mark.exists() == (device == "cpu" and sys.platform == "linux")
