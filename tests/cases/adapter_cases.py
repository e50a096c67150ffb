"""Micro models with adapters that do something."""

from __future__ import annotations

import torch
from model_cases import MICRO, padded, random_conversations, random_model

from csm_fast.config.train import AdapterSection
from csm_fast.model import adapters, loss
from csm_fast.packing.pack import pack_padded

EVERYWHERE = ["attn", "projection", "codebook0_head"]


CONVERSATIONS = random_conversations([[(5, 9, 0), (3, 6, 1)], [(4, 12, 0)]])


def make_pack(conversations=CONVERSATIONS, seed=0):
    torch.manual_seed(seed)
    return pack_padded(*padded(conversations), 0.5)


def attached(method="lora", dtype=torch.float32, stir=True, shape=MICRO, **settings):
    """A micro model with adapters; ``stir``: that do something."""
    model = random_model(shape, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    section = AdapterSection(method=method, **{"lora_rank": 4, **settings})
    adapters.attach(model, section, compute_dtype=dtype, base="micro")
    return stirred(model) if stir else model


@torch.no_grad()
def stirred(model):
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "lora_B" in name:
            parameter.copy_(0.1 * noise)
        elif "magnitude" in name:
            parameter.mul_(1 + 0.1 * noise)
    return model


def loss_of(model, pack=None):
    with model.adapter.autocast("cpu"):
        return loss.packed_loss(model, pack or make_pack(), 0.5, 0.5)[0]


def gradients(model, pack=None):
    model.zero_grad()
    loss_of(model, pack).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


KINDS = {
    "lora": {"method": "lora"},
    "dora": {"method": "dora"},
    "qlora": {"method": "qlora"},
    "rslora": {"method": "lora", "rslora": True, "lora_alpha": 7.0},
    "everywhere": {"method": "dora", "target_modules": EVERYWHERE},
    "few": {"method": "lora", "target_modules": ["backbone.layers.1.attn.q_proj", "decoder.layers.0.mlp.w2"]},
    "besides": {"method": "lora", "train_heads": True, "train_embeddings": "all"},
}


@torch.no_grad()
def stir_besides(model):
    for name in model.adapter.whole:
        model.get_parameter(name).mul_(1.5)
    return model
