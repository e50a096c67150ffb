"""What a token store holds, as numbers (``report.json``) and as a table (the end of every pretokenize run)."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from csm_fast.config.shape import FRAME_SECONDS
from csm_fast.data.metadata import MetadataTurn
from csm_fast.data.token_store import TokenStore
from csm_fast.system.console import counted

LONG_SILENCE = 0.5  # seconds of trailing silence from which a model learns not to stop
OUTLIER_Z = 4.0  # standard deviations of the speaking rate
LISTED = 20  # rows that are listed of each kind; counts are of all


def report_split(store: TokenStore, turns: Sequence[MetadataTurn]) -> dict[str, Any]:
    """The figures of one split.

    Args:
        store: the split's store, written by pretokenize (so with clip statistics).
        turns: the turns of its metadata file, which the store's source_index refers to.
    """
    source = store.turn_array("source_index").tolist()
    stats = store.turn_array("clip_stats").astype(np.float64)
    seconds, leading, trailing = stats.T
    speakers = store.turn_array("speaker")
    characters = np.array([len(turns[i].text) for i in source])
    text, frames, _, _ = store.turn_lengths()
    # Hours of frames, as the store and the trainer count them: a clip's last frame is completed with silence.
    hours = np.asarray(frames) * (FRAME_SECONDS / 3600)

    # Silence at the ends does not count, and the shortest speech is one frame.
    rate = characters / np.maximum(seconds - leading - trailing, FRAME_SECONDS)
    spread = 1.4826 * np.median(np.abs(rate - np.median(rate)))  # the standard deviation, if normally distributed
    z = (rate - np.median(rate)) / spread if spread else np.zeros(len(rate))
    outliers = np.flatnonzero(np.abs(z) > OUTLIER_Z)
    worst = outliers[np.argsort(-np.abs(z[outliers]), kind="stable")][:LISTED]
    tails = np.flatnonzero(trailing > LONG_SILENCE)
    longest = tails[np.argsort(-trailing[tails], kind="stable")][:LISTED]

    def place(i: int) -> dict[str, Any]:
        turn = turns[source[i]]
        return {"file": turn.file, "row": turn.row, "audio": turn.audio_path}

    return {
        "hours": round(float(hours.sum()), 4),
        "conversations": store.num_conversations,
        "turns": store.num_turns,
        "frames": store.num_frames,
        "text_tokens": store.num_text_tokens,
        "rows": int(store.conversation_rows.sum(dtype=np.int64)),
        "speakers": {
            str(s): {
                "turns": int((speakers == s).sum()),
                "hours": round(float(hours[speakers == s].sum()), 4),
            }
            for s in np.unique(speakers).tolist()
        },
        "seconds": _describe_spread(seconds),
        "turn_rows": _describe_spread(text + frames + 1),
        "leading_silence": _describe_spread(leading),
        "trailing_silence": {
            **_describe_spread(trailing),
            "threshold": LONG_SILENCE,
            "above": len(tails),
            "longest": [{**place(i), "seconds": round(float(trailing[i]), 2)} for i in longest.tolist()],
        },
        "silent_turns": int((leading >= seconds).sum()),
        "characters_per_second": {
            **_describe_spread(rate),
            "outliers": len(outliers),
            "worst": [
                {**place(i), "characters_per_second": round(float(rate[i]), 1), "z": round(float(z[i]), 1)}
                for i in worst.tolist()
            ],
        },
        "codebooks": count_code_use(store),
    }


def count_code_use(store: TokenStore) -> list[dict[str, Any]]:
    """Per codebook: how many codes occur, and the entropy of their distribution in nats. The loss of a model that has
    learned anything is below it."""
    size, count = store.codebook_size, store.num_codebooks
    uses = np.zeros(count * size, np.int64)
    shift = np.arange(count) * size
    for block in store.code_blocks():
        uses += np.bincount((block + shift).ravel(), minlength=count * size)
    counts = uses.reshape(count, size)
    entropy = codebook_entropy(counts)
    return [{"codes": int(n), "entropy": round(h, 4)} for n, h in zip((counts > 0).sum(1), entropy, strict=True)]


def codebook_entropy(counts: np.ndarray) -> list[float]:
    """Entropy in nats of each codebook's distribution; ``counts`` int64 [K, V]."""
    p = counts / counts.sum(1, keepdims=True)
    return (-(p * np.log(np.where(p > 0, p, 1))).sum(1)).tolist()


def render_report(report: Mapping[str, Any]) -> str:
    """The report as a table of at most 100 columns, plain characters only."""
    splits: Mapping[str, Any] = report["splits"]
    lines = [
        f"codec      {report['codec']['name']}",
        f"codebooks  {report['codec']['num_codebooks']}",
        f"tokenizer  {report['text_tokenizer']['name']}",
        "",
        f"{'':<36}" + "".join(f"{name:>14}" for name in splits),
    ]

    def row(label: str, value, figure: str = "") -> None:
        lines.append(f"{label:<24}{figure:<12}" + "".join(f"{value(split):>14}" for split in splits.values()))

    row("hours", lambda s: f"{s['hours']:,.2f}")
    for name in ("conversations", "turns", "frames", "text_tokens", "rows"):
        row(name.replace("_", " "), lambda s, name=name: f"{s[name]:,}")
    row("speakers", lambda s: f"{len(s['speakers']):,}")
    for label, name, figures in (
        ("clip seconds", "seconds", ("min", "median", "p95", "max")),
        ("characters per second", "characters_per_second", ("min", "median", "p95", "max")),
        ("leading silence, s", "leading_silence", ("median", "max")),
        ("trailing silence, s", "trailing_silence", ("median", "max")),
    ):
        for figure in figures:
            row(label if figure == figures[0] else "", lambda s, n=name, f=figure: f"{s[n][f]:,.2f}", figure)
    row("", lambda s: f"{s['trailing_silence']['above']:,}", f"over {LONG_SILENCE} s")
    row("clips without any sound", lambda s: f"{s['silent_turns']:,}")
    row("speaking-rate outliers", lambda s: f"{s['characters_per_second']['outliers']:,}")

    for name, split in splits.items():
        lines += _list_speakers(name, split["speakers"])
    for name, split in splits.items():
        if name == "train":
            lines += _list_codebooks(split["codebooks"], report["codec"]["codebook_size"])
    for name, split in splits.items():
        outliers = split["characters_per_second"]
        lines += _list_rows(
            f"speaking-rate outliers in {name} (transcript and recording may not belong together)",
            [f"{o['characters_per_second']:>8.1f} characters/s   {_name_place(o)}" for o in outliers["worst"]],
            outliers["outliers"],
        )
        tails = split["trailing_silence"]
        lines += _list_rows(
            f"longest trailing silence in {name} (a model learns to end late from these)",
            [f"{o['seconds']:>8.2f} s   {_name_place(o)}" for o in tails["longest"][:5]],
            tails["above"],
        )
    skipped = report["skipped"]
    lines += _list_rows(
        f"left out: {counted(skipped['turns'], 'turn')} in {counted(skipped['conversations'], 'conversation')}",
        [f"  {entry['reason']}" for entry in skipped["listed"]],
        skipped["clips"],
    )
    if report["warnings"]:
        lines += ["", *(f"warning: {warning}" for warning in report["warnings"])]
    return "\n".join(lines)


def _describe_spread(values: np.ndarray) -> dict[str, float]:
    low, median, high, most = np.percentile(values, [0, 50, 95, 100]).tolist()
    return {"min": round(low, 3), "median": round(median, 3), "p95": round(high, 3), "max": round(most, 3)}


def _name_place(entry: Mapping[str, Any]) -> str:
    # Names without folders keep lines short; report.json has the whole paths.
    return f"{os.path.basename(entry['file'])}, row {entry['row']}: {os.path.basename(entry['audio'])}"


def _list_rows(title: str, lines: list[str], count: int) -> list[str]:
    if not lines:
        return []
    more = [f"  ... and {count - len(lines):,} more (report.json)"] if count > len(lines) else []
    return ["", title, *(f"  {line.rstrip()}" for line in lines), *more]


def _list_speakers(name: str, speakers: Mapping[str, Any]) -> list[str]:
    if len(speakers) < 2:
        return []
    most = sorted(speakers.items(), key=lambda item: -item[1]["hours"])
    lines = [f"[{speaker}] {s['hours']:>10,.2f} h {s['turns']:>8,} turns" for speaker, s in most[:LISTED]]
    return _list_rows(f"speakers in {name}", lines, len(speakers))


def _list_codebooks(codebooks: Sequence[Mapping[str, Any]], size: int) -> list[str]:
    title = f"codes in use in train, of {size:,}, and their entropy in nats, at most {math.log(size):.2f}"
    lines = ["", title]
    for begin in range(0, len(codebooks), 8):
        block = codebooks[begin : begin + 8]
        lines.append("  codebook " + "".join(f"{begin + i:>8}" for i in range(len(block))))
        lines.append("  codes    " + "".join(f"{c['codes']:>8,}" for c in block))
        lines.append("  entropy  " + "".join(f"{c['entropy']:>8.2f}" for c in block))
    return lines


def unigram_entropy(store: TokenStore, frames: int = 1_000_000) -> list[float]:
    """Entropy in nats of each codebook's distribution over the store's targets, end-of-speech rows included.

    It is the lowest loss of a model that ignores its input. At most about ``frames`` frames are counted, from
    conversations spread evenly over the store.
    """
    num_codebooks, size = store.num_codebooks, store.codebook_size
    counts = np.zeros((num_codebooks, size), dtype=np.int64)
    stride = max(1, math.ceil(store.num_frames / frames))
    for i in range(0, store.num_conversations, stride):
        for turn in store.conversation(i):
            offsets = turn.codes.astype(np.int64) + np.arange(num_codebooks) * size
            counts += np.bincount(offsets.ravel(), minlength=num_codebooks * size).reshape(num_codebooks, size)
            counts[:, 0] += 1
    return codebook_entropy(counts)
