"""``csm-fast generate``: a model, a text, a wav file."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from csm_fast.config.commands import GenerateConfig
from csm_fast.data.audio import read_audio, write_wav
from csm_fast.data.codec.load import load_codec
from csm_fast.data.metadata import load_metadata
from csm_fast.data.text import load_text_tokenizer
from csm_fast.generate.generator import Generator, Speech, Utterance
from csm_fast.model.stacks import vocabulary
from csm_fast.system.device import resolve_device
from csm_fast.system.errors import InputError
from csm_fast.weights.load import load_model
from csm_fast.weights.save import read_record

log = logging.getLogger("csm_fast")


def speak(config: GenerateConfig) -> Speech:
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
    record = read_record(config.model)
    known = record.get("codec", {})
    kind = known["kind"] if config.codec == "auto" and known.get("kind") == "offline" else config.codec
    codec = load_codec(kind, source=config.codec_source, num_codebooks=vocabulary(model)[0])
    if known and known.get("fingerprint") != codec.fingerprint:
        raise InputError(
            f"the model was trained with {known.get('name')}, this is {codec.name}",
            file=config.model,
            mend="give --codec and --codec-source as at pretokenize",
        )
    tokenizer = load_text_tokenizer(config.tokenizer)
    if tokenizer.fingerprint != record.get("text_tokenizer", {}).get("fingerprint", tokenizer.fingerprint):
        raise InputError(
            f"the model was trained with another text tokenizer than {tokenizer.name}",
            file=config.model,
            mend="give --tokenizer as at pretokenize",
        )
    ids = model.text_embeddings.num_embeddings
    if tokenizer.vocab_size > ids or codec.codebook_size > vocabulary(model)[1]:
        raise InputError(
            f"the model knows {ids:,} text ids and {vocabulary(model)[1]:,} codes; {tokenizer.name} has "
            f"{tokenizer.vocab_size:,} ids, {codec.name} {codec.codebook_size:,} codes",
            file=config.model,
            mend="give the --tokenizer and --codec that the model was trained with",
        )
    context = []
    if config.context:
        for turn in load_metadata(config.context, speaker_map=config.speaker_map)[0].turns:
            wave = read_audio(turn.audio_path, start=turn.start, end=turn.end, row=turn.row, metadata_file=turn.file)
            context.append(Utterance(tokenizer.encode(turn.text, turn.speaker), codec.encode([wave])[0]))
    wave, speech = Generator(model, tokenizer, codec).speak(
        config.text,
        config.speaker,
        context,
        max_frames=max(1, int(config.max_seconds / 0.08)),
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
    return speech
