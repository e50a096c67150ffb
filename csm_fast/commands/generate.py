"""``csm-fast generate``: a model, a text, a wav file."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from csm_fast.config.commands import GenerateConfig
from csm_fast.config.shape import FRAME_SECONDS
from csm_fast.data.audio import read_audio, write_wav
from csm_fast.data.metadata import load_metadata
from csm_fast.generate.generator import Generator, Utterance
from csm_fast.generate.voice import load_voice
from csm_fast.system.device import resolve_device
from csm_fast.system.errors import InputError
from csm_fast.weights.load import load_model
from csm_fast.weights.save import read_record

log = logging.getLogger("csm_fast")


def run(config: GenerateConfig) -> None:
    """Write ``config.out`` and say how long it is and whether the model ended it.

    Raises:
        InputError: a file, model or codec that is missing or does not belong.
    """
    out = Path(config.out).expanduser()
    if out.is_dir() or not out.parent.is_dir():  # better now than after a minute of speech
        raise InputError("cannot be written", file=out, mend="name a file in a folder that exists")
    if out.suffix.lower() != ".wav":
        raise InputError("speech is written as WAV", file=out, mend=f"name it {out.stem}.wav")
    if config.threads:
        torch.set_num_threads(config.threads)
    device = resolve_device(config.device)
    model = load_model(config.model).to(device)
    voice = load_voice(
        model,
        read_record(config.model),
        codec=config.codec,
        codec_source=config.codec_source,
        tokenizer=config.tokenizer,
        file=config.model,
    )
    tokenizer, codec = voice.tokenizer, voice.codec
    context = []
    if config.context:
        for turn in load_metadata(config.context, speaker_map=config.speaker_map)[0].turns:
            wave = read_audio(turn.audio_path, start=turn.start, end=turn.end, row=turn.row, metadata_file=turn.file)
            context.append(Utterance(tokenizer.encode(turn.text, turn.speaker), codec.encode([wave])[0]))
    wave, speech = Generator(model, tokenizer, codec).speak(
        config.text,
        config.speaker,
        context,
        max_frames=max(1, int(config.max_seconds / FRAME_SECONDS)),
        temperature=0.0 if config.greedy else config.temperature,
        top_k=config.top_k,
        seed=config.seed,
    )
    if not len(wave):
        raise InputError(
            "the model ended at once: there is no speech to write",
            file=config.model,
            mend="try another --seed, or train longer",
        )
    write_wav(out, wave, codec.sample_rate)
    ended = "ended by EOS" if speech.ended else "cut at --max-seconds"
    log.info("%s: %.1f s, %s, through %s", config.out, len(wave) / codec.sample_rate, ended, codec.name)
