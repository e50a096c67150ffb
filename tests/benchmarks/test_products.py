"""The counted matrix products of a step, and the rate at which the device multiplies them."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.common.products import Product, attention_flops, matmul_rate, products, step_flops
from benchmarks.compare.data import draw_recordings, pad_conversations
from csm_fast import CSM, CSMConfig
from csm_fast.model.loss import packed_loss
from csm_fast.packing.pack import pack_padded


class Multiplied(TorchDispatchMode):
    """FLOPs of the matrix products of linear layers and heads. Those of attention are batched, and none is as wide as
    the vocabulary."""

    def __init__(self, vocab):
        super().__init__()
        self.vocab, self.flops = vocab, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "bmm", "baddbmm"):
            a, b = args[-2:]
            if a.dim() == 2 or self.vocab in (*a.shape, *b.shape):
                self.flops += 2 * a.numel() * b.shape[-1]
        return func(*args, **(kwargs or {}))


@pytest.mark.slow
def test_the_count_of_products_is_that_of_a_step():
    config = CSMConfig.tiny()
    recordings = draw_recordings(5, config)
    torch.manual_seed(0)
    pack = pack_padded(*pad_conversations(recordings, [0, 1, 2]), 1 / 16)
    model = CSM(config).init_weights(0)
    with Multiplied(config.audio_vocab_size) as seen:
        packed_loss(model, pack, 0.5, 0.5)[0].backward()
    counted = sum(p.flops * n for p, n in products(config, pack).items())
    # Rows that fill the pack up are no work.
    assert counted <= seen.flops <= counted * pack.tokens.shape[0] / pack.rows
    assert step_flops(config, pack) == counted + attention_flops(config, pack)
    assert 0 < attention_flops(config, pack) < 0.2 * counted


def test_matmul_rate_multiplies_every_kind():
    found = Counter({Product(1, 8, 16, 24, kind): 2 for kind in ("forward", "input", "weight")})
    found[Product(3, 8, 16, 24, "weight")] = 1
    assert matmul_rate(found, torch.device("cpu"), torch.float32, repeats=1) > 0
    assert Product(3, 8, 16, 24, "weight").flops == 2 * 3 * 8 * 16 * 24
