"""Speech from text, sampled frame by frame with caches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from csm_fast import ops
from csm_fast.data.codec.base import Codec
from csm_fast.data.text import TextTokenizer
from csm_fast.model.rope import apply_rope
from csm_fast.model.run_options import run_options_of
from csm_fast.model.stacks import call_stack, stack_limit, vocabulary
from csm_fast.system.errors import InputError

Choose = Callable[[int, Tensor], Tensor]


class KVCache:
    """Keys and values of one stack for one sequence; ``attend`` is that of ``run_stack``."""

    def __init__(self) -> None:
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """q, k, v: [n, heads, d] for the next n positions, before rotation -> [n, heads, d]."""
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        prompt = layer not in self.keys
        if not prompt:
            k, v = torch.cat([self.keys[layer], k]), torch.cat([self.values[layer], v])
        self.keys[layer], self.values[layer] = k, v
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        # Later calls bring one position, which attends to everything in the cache.
        out = F.scaled_dot_product_attention(q, k, v, is_causal=prompt, enable_gqa=q.shape[1] != k.shape[1])
        return out.squeeze(0).transpose(0, 1)


@dataclass
class Utterance:
    """What was spoken before, with its codes, or what is to be spoken, without.

    Attributes:
        text_ids: ids of the templated text.
        codes: [frames, K], or None.
    """

    text_ids: Sequence[int]
    codes: np.ndarray | None = None


def prompt_rows(turns: Sequence[Utterance], num_codebooks: int) -> tuple[Tensor, Tensor]:
    """Rows of a prompt: for each utterance its text, its frames and the EOS row; for the last one only its text.

    Returns:
        tokens [T, K + 1] int64 and is_audio [T] bool.
    """
    blocks, kinds = [], []
    for turn in turns:
        text = torch.zeros(len(turn.text_ids), num_codebooks + 1, dtype=torch.long)
        text[:, -1] = torch.as_tensor(list(turn.text_ids))
        blocks.append(text)
        kinds.append(torch.zeros(len(text), dtype=torch.bool))
        if turn.codes is not None:
            audio = torch.zeros(len(turn.codes) + 1, num_codebooks + 1, dtype=torch.long)
            audio[:-1, :-1] = torch.from_numpy(np.asarray(turn.codes).astype(np.int64))
            blocks.append(audio)
            kinds.append(torch.ones(len(audio), dtype=torch.bool))
    return torch.cat(blocks), torch.cat(kinds)


class Stepper:
    """One sequence, frame by frame: the arithmetic of generation, without the choice of codes."""

    def __init__(self, model: Any):
        self.model = model
        self.num_codebooks, self.vocab = vocabulary(model)
        self.limit = stack_limit(model.backbone)
        self.cache, self.position = KVCache(), 0

    def feed(self, tokens: Tensor, is_audio: Tensor) -> Tensor:
        """Append rows [n, K + 1] (the prompt, then one frame at a time); returns the last row's state [D]."""
        device = self.model.text_embeddings.weight.device
        tokens, is_audio = tokens.to(device), is_audio.to(device)
        x = ops.frame_embed(tokens, is_audio, self.model.text_embeddings.weight, self.model.audio_embeddings.weight)
        positions = torch.arange(self.position, self.position + len(tokens), device=device)
        self.position += len(tokens)
        return call_stack(self.model.backbone, x, positions, self.limit, self.cache.attend)[-1]

    def frame(self, hidden: Tensor, choose: Choose) -> Tensor:
        """One frame [K] from the state that predicts it: ``choose(codebook, logits [V])`` picks each code."""
        model = self.model
        codes = [choose(0, model.codebook0_head(hidden))]
        cache = KVCache()
        x = torch.stack([hidden, self._embed(0, codes[0])])
        positions = torch.arange(self.num_codebooks, device=hidden.device)
        for k in range(1, self.num_codebooks):
            first = 0 if k == 1 else k
            x = model.projection(x)
            state = call_stack(model.decoder, x, positions[first : k + 1], self.num_codebooks, cache.attend)[-1]
            codes.append(choose(k, state @ model.audio_head[k - 1]))
            x = self._embed(k, codes[k]).unsqueeze(0)
        return torch.stack(codes)

    def _embed(self, codebook: int, code: Tensor) -> Tensor:
        return self.model.audio_embeddings.weight[code + codebook * self.vocab]


@dataclass
class Speech:
    """Generated frames [n, K] int64 on the CPU, without the EOS row, and whether the model itself ended them."""

    codes: np.ndarray
    ended: bool


class Generator:
    """Samples speech from a model.

    Args:
        model: a ``CSM``.
        tokenizer: from ``load_text_tokenizer``; not needed for ``generate_codes``.
        codec: from ``load_codec``; not needed for ``generate_codes``.
    """

    def __init__(self, model: Any, tokenizer: TextTokenizer | None = None, codec: Codec | None = None):
        self.model, self.tokenizer, self.codec = model, tokenizer, codec

    def generate_codes(
        self,
        turns: Sequence[Utterance],
        *,
        max_frames: int = 125,
        temperature: float = 0.9,
        top_k: int = 50,
        seed: int = 0,
    ) -> Speech:
        """Speak the last of ``turns`` after the others.

        Args:
            turns: the context with codes, then one utterance without.
            max_frames: most frames (80 ms each).
            temperature: 0 is greedy.
            top_k: sample among the k most likely codes; 0 means all codes.
            seed: of this call's own random numbers; torch's global generators are not used.

        Raises:
            InputError: the prompt leaves no room for ``max_frames``.
        """
        stepper, adapter = Stepper(self.model), run_options_of(self.model).adapter
        tokens, is_audio = prompt_rows(turns, stepper.num_codebooks)
        room = stepper.limit - len(tokens)
        if room < max_frames:
            raise InputError(
                f"the prompt takes {len(tokens):,} of {stepper.limit:,} rows; {max_frames} frames do not fit",
                mend="give less context, a shorter text, or a smaller --max-seconds",
            )
        random = torch.Generator().manual_seed(seed)
        was_training = self.model.training
        self.model.eval()

        def choose(_: int, logits: Tensor) -> Tensor:
            return sample_code(logits, temperature, top_k, random)

        frames: list[Tensor] = []
        ended = False
        # Adapters have a wider dtype than the frozen weights, so products need autocast.
        device = self.model.text_embeddings.weight.device.type
        try:
            with torch.inference_mode(), adapter.autocast(device) if adapter else nullcontext():
                hidden = stepper.feed(tokens, is_audio)
                while len(frames) < max_frames:
                    codes = stepper.frame(hidden, choose)
                    if not codes.any():
                        ended = True
                        break
                    frames.append(codes.cpu())
                    row = torch.cat([codes, codes.new_zeros(1)]).unsqueeze(0)
                    hidden = stepper.feed(row, torch.ones(1, dtype=torch.bool))
        finally:
            self.model.train(was_training)
        empty = np.zeros((0, stepper.num_codebooks), dtype=np.int64)
        return Speech(torch.stack(frames).numpy() if frames else empty, ended)

    def speak(
        self, text: str, speaker: int, context: Sequence[Utterance] = (), **options: Any
    ) -> tuple[np.ndarray, Speech]:
        """(waveform float32 [samples] at the codec's rate, frames) of ``text`` in the voice of ``speaker``."""
        if self.tokenizer is None or self.codec is None:
            raise ValueError("to speak a text, a Generator needs a tokenizer and a codec")
        turn = Utterance(self.tokenizer.encode(text, speaker))
        speech = self.generate_codes([*context, turn], **options)
        if not len(speech.codes):
            return np.zeros(0, dtype=np.float32), speech
        # Sesame's vocabulary has three codes that the codec does not have; a model in training may still choose them.
        codes = np.minimum(speech.codes, self.codec.codebook_size - 1)
        return self.codec.decode(codes), speech


def sample_code(logits: Tensor, temperature: float, top_k: int, random: torch.Generator) -> Tensor:
    """One code from logits [V], sampled in float32 with random numbers of the CPU; greedy at temperature 0."""
    if temperature <= 0:
        return logits.argmax()
    logits = logits.float() / temperature
    if 0 < top_k < logits.numel():
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    # argmax(p / Exponential(1)) is a draw from p.
    noise = torch.empty(logits.shape).exponential_(1, generator=random).to(logits.device)
    return (logits.softmax(-1) / noise).argmax()
