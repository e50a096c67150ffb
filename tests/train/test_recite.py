"""A tiny model over-fitted on a few real utterances gives back their exact codes, and stops where they end."""

from pathlib import Path

import numpy as np
import pytest
import torch
from paths import GOLDEN
from safetensors.numpy import load_file

from csm_fast import CSM, CSMConfig, TransformerConfig
from csm_fast.config.train import DataSection, LossSection
from csm_fast.data.store_writer import TokenStoreWriter
from csm_fast.data.token_store import TokenStore, TurnTokens
from csm_fast.generate.generator import Generator, Utterance
from csm_fast.model.loss import packed_loss
from csm_fast.packing.loader import Packer

GOLDEN = GOLDEN / "four_turns.safetensors"  # real speech; see tests/golden/README.md
MOST_STEPS = 200


def write_store(path: Path) -> TokenStore:
    golden = load_file(GOLDEN)
    identity = {"name": "offline", "fingerprint": "0" * 64, "num_codebooks": 32, "codebook_size": 2048}
    tokenizer = {"name": "Llama-3", "fingerprint": "0" * 64, "vocab_size": 128_256}
    text, codes = (
        np.split(golden[name], golden[offsets][1:-1])
        for name, offsets in (("text", "text_offsets"), ("codes", "code_offsets"))
    )
    with TokenStoreWriter(path, codec=identity, text_tokenizer=tokenizer, resampler="soxr-HQ") as writer:
        for conversation in range(3):
            turns = np.nonzero(golden["conversation"] == conversation)[0]
            writer.add_conversation([TurnTokens(text[i], codes[i], 0, int(i)) for i in turns])
    return TokenStore.open(path)


@pytest.mark.slow
def test_four_real_turns_are_recited_by_greedy_generation_from_text_alone(tmp_path, all_threads):
    store = write_store(tmp_path / "train")
    assert [len(store.conversation(i)) for i in range(3)] == [2, 1, 1]
    stack = TransformerConfig(num_layers=2, num_heads=4, num_kv_heads=2, embed_dim=128, intermediate_dim=256)
    model = CSM(CSMConfig(stack, stack)).init_weights(0)
    model.text_embeddings.weight.requires_grad_(False)
    packer = Packer(store, DataSection(batch_size=8), LossSection(amortization_fraction=1.0))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-3, weight_decay=0.0, betas=(0.9, 0.95), fused=True)
    for step in range(MOST_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 10) * (1 - 0.9 * step / MOST_STEPS)
        (pack,) = packer.step(step, 0).packs
        loss, _ = packed_loss(model, pack, 0.5, 0.5)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if loss < 0.012:
            break

    generator = Generator(model)
    for i in range(3):
        context: list[Utterance] = []
        for turn in store.conversation(i):
            speech = generator.generate_codes([*context, Utterance(turn.text)], max_frames=40, temperature=0)
            assert speech.ended, "the model must end the turn itself"
            np.testing.assert_array_equal(speech.codes, turn.codes)
            # The context is what the model itself said, not what it should have said.
            context.append(Utterance(turn.text, speech.codes))
