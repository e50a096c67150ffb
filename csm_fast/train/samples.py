"""Speech generated during training."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from csm_fast.config.shape import FRAME_SECONDS
from csm_fast.config.train import RunSection
from csm_fast.data.audio import write_wav
from csm_fast.data.token_store import TokenSource
from csm_fast.generate.generator import Generator
from csm_fast.generate.voice import load_voice
from csm_fast.model.csm import CSM
from csm_fast.model.stacks import stack_limit
from csm_fast.system.errors import InputError


class Sampler:
    """Speech samples during training: the same sentences with the same seed each time, disturbing nothing."""

    def __init__(self, model: CSM, run: RunSection, directory: Path, store: TokenSource):
        self.config, self.directory = run, directory
        sentences = self.config.gen_sentences
        if sentences.endswith(".txt"):
            try:
                sentences = Path(sentences).expanduser().read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise InputError(f"cannot be read ({error})", file=sentences, mend="check --gen-sentences") from None
        self.sentences = [line.strip() for line in sentences.splitlines() if line.strip()]
        if not self.sentences:
            raise InputError("--gen-sentences has no sentence", mend="give a text or a .txt file with one per line")
        voice = load_voice(
            model,
            {"codec": store.codec},
            codec=self.config.codec,
            codec_source=self.config.codec_source,
            tokenizer=self.config.tokenizer,
            made="no samples can be generated: the data was made",
        )
        self.codec, self.generator = voice.codec, Generator(model, voice.tokenizer, voice.codec)
        # Now, not after the first gen_every steps.
        self.max_frames = max(1, int(self.config.gen_seconds / FRAME_SECONDS))
        limit = stack_limit(model.backbone)
        for text in self.sentences:
            rows = len(voice.tokenizer.encode(text, self.config.gen_speaker))
            if rows + self.max_frames > limit:
                raise InputError(
                    f"--gen-sentences: {rows:,} rows of text and {self.max_frames} frames exceed the model's {limit:,}",
                    mend="shorten the text, or lower --gen-seconds",
                )

    def __call__(self, step: int, say: Callable[[str], None]) -> float:
        """Write ``samples/step-N-i.wav``; returns the seconds it took."""
        started = time.monotonic()
        for i, text in enumerate(self.sentences):
            wave, speech = self.generator.speak(text, self.config.gen_speaker, max_frames=self.max_frames, seed=i)
            if not len(wave):
                say(f"step {step}: sample {i} is empty (the model ended at once)")
                continue
            path = self.directory / f"step-{step:06d}-{i}.wav"
            self.directory.mkdir(parents=True, exist_ok=True)
            write_wav(path, wave, self.codec.sample_rate)
            end = "ended by EOS" if speech.ended else "cut at the limit"
            say(f"step {step}: sample {path} ({len(speech.codes) * FRAME_SECONDS:.1f} s, {end})")
        return time.monotonic() - started
