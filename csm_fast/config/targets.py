"""Names of a model's parts, and what the words of ``--target-modules`` mean. The model and the planner use them."""

from __future__ import annotations

from collections.abc import Sequence

STACKS = ("backbone", "decoder")
LAYER_LINEARS = ("q_proj", "k_proj", "v_proj", "output_proj", "w1", "w2", "w3")  # of every layer of both stacks
SYNONYMS = {"o_proj": "output_proj", "gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}  # other tools' names
HEADS = ("codebook0_head.weight", "audio_head")
TABLES = ("text_embeddings.weight", "audio_embeddings.weight")


def match_target(word: str, linears: Sequence[str]) -> list[str]:
    """Those of some linear layers that one word of ``--target-modules`` means, in their order.

    Args:
        word: ``attn`` (all linear layers of both stacks), or a suffix or full name of linear layers, also as
            transformers and csm-mlx call them (o_proj, gate_proj, self_attn, ...).
        linears: full names such as backbone.layers.0.attn.q_proj.
    """
    if word == "attn":
        return [n for n in linears if n.partition(".")[0] in STACKS and n.rpartition(".")[2] in LAYER_LINEARS]
    front, _, leaf = word.replace("self_attn.", "attn.").rpartition(".")
    suffix = f"{front}.{SYNONYMS.get(leaf, leaf)}".lstrip(".")
    return [n for n in linears if n == suffix or n.endswith("." + suffix)]
