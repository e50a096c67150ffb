"""Cached, step-by-step generation computes what training computes, and disturbs nothing."""

import numpy as np
import pytest
import torch

from csm_fast import CSM, CSMConfig, InputError, TransformerConfig
from csm_fast.generate.generator import Generator, Stepper, Utterance, prompt_rows, sample_code
from csm_fast.model.stacks import run_backbone, run_decoder
from csm_fast.ops import frame_embed
from csm_fast.packing.pack import Segments

CONFIG = CSMConfig(
    TransformerConfig(3, 4, 2, 64, 96),
    TransformerConfig(2, 4, 1, 48, 64),
    text_vocab_size=60,
    audio_vocab_size=40,
    num_codebooks=32,
)


@pytest.fixture(scope="module")
def model() -> CSM:
    model = CSM(CONFIG).init_weights(1)
    with torch.no_grad():  # sharp enough for a wrong position or mask to show
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(4)
    return model


def turns(seed=0, frames=(7, 5)):
    rng = np.random.default_rng(seed)
    return [Utterance(rng.integers(0, 60, 6), rng.integers(1, 40, (n, 32))) for n in frames]


def test_teacher_forced_logits_equal_cached_logits_for_all_codebooks(model):
    conversation = turns()
    tokens, is_audio = prompt_rows(conversation, 32)
    table = (model.text_embeddings.weight, model.audio_embeddings.weight)
    with torch.inference_mode():
        x = frame_embed(tokens, is_audio, *table)
        hidden = run_backbone(model, x, torch.arange(len(tokens)), Segments.of([len(tokens)]))
        targets = is_audio.nonzero().squeeze(1)[8:]  # the second turn, its EOS row included
        codes = tokens[targets, :-1]
        expected = [model.codebook0_head(hidden[targets - 1])]
        states = run_decoder(model, hidden[targets - 1], codes, 40)
        expected += [states[:, k] @ model.audio_head[k] for k in range(31)]

        stepper = Stepper(model)
        first = int(targets[0])
        state = stepper.feed(tokens[:first], is_audio[:first])
        for i, row in enumerate(targets.tolist()):
            seen = {}

            def choose(k, logits, row=row, seen=seen):
                seen[k] = logits
                return tokens[row, k]

            stepper.frame(state, choose)
            assert sorted(seen) == list(range(32))
            for k, logits in seen.items():
                torch.testing.assert_close(logits, expected[k][i], atol=1e-4, rtol=0, msg=f"frame {i}, codebook {k}")
            state = stepper.feed(tokens[row : row + 1], is_audio[row : row + 1])


def test_generation_is_a_function_of_its_seed_and_leaves_random_state_mode_and_weights_alone(model):
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    prompt = [*turns(), Utterance([1, 2, 3])]
    a = Generator(model).generate_codes(prompt, max_frames=4, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    b = Generator(model).generate_codes(prompt, max_frames=4, seed=3)
    c = Generator(model).generate_codes(prompt, max_frames=4, seed=4)
    np.testing.assert_array_equal(a.codes, b.codes)
    assert not np.array_equal(a.codes, c.codes)
    assert a.codes.shape == (4, 32) and not a.ended


def test_training_still_works_after_generation_came_first():
    # A rotary table made under inference_mode must not be one that autograd refuses.
    config = CSMConfig(TransformerConfig(1, 2, 1, 20, 8), TransformerConfig(1, 2, 1, 12, 8), 10, 9, 4)
    model = CSM(config).init_weights(0)
    Generator(model).generate_codes([Utterance([1])], max_frames=2)
    tokens = torch.ones(1, 5, 5, dtype=torch.long)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    mask[:, :2, -1], mask[:, 2:, :-1] = True, True
    model(tokens, mask).backward()


def test_a_model_that_says_only_zeros_ends_at_once(model):
    quiet = CSM(CONFIG).init_weights(0)
    with torch.no_grad():
        for p in (quiet.codebook0_head.weight, quiet.audio_head):
            p.zero_()
    speech = Generator(quiet).generate_codes([Utterance([1, 2])], max_frames=5, temperature=0)
    assert speech.ended and speech.codes.shape == (0, 32)


def test_a_prompt_without_room_is_refused(model):
    with pytest.raises(InputError, match="2,040 of 2,048 rows; 20 frames do not fit.*less context"):
        Generator(model).generate_codes([Utterance([1] * 2040)], max_frames=20)


def test_top_k_and_temperature():
    logits = torch.tensor([0.0, 1.0, 5.0, 4.0])
    random = torch.Generator().manual_seed(0)
    assert int(sample_code(logits, 0.0, 50, random)) == 2
    draws = [int(sample_code(logits, 1.0, 2, random)) for _ in range(4000)]
    assert set(draws) == {2, 3}
    expected = 1 / (1 + np.exp(-1.0))
    assert abs(np.mean(np.array(draws) == 2) - expected) < 4 * np.sqrt(expected * (1 - expected) / 4000)
    cold = [int(sample_code(logits, 0.1, 0, random)) for _ in range(500)]
    assert np.mean(np.array(cold) == 2) > 0.99
