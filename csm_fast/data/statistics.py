"""What is in a data set, as numbers and as a table: the end of every pretokenize run, and `tokens/report.json`."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from csm_fast.config.shape import FRAME_SECONDS
from csm_fast.data.token_store import TokenStore
from csm_fast.system.console import counted

if TYPE_CHECKING:
    from csm_fast.data.metadata import MetadataTurn

LONG_SILENCE = 0.5  # seconds of trailing silence that teach a model not to stop
OUTLIER_Z = 4.0
LISTED = 20  # rows listed of each kind; the counts are whole


def split_report(store: TokenStore, turns: Sequence[MetadataTurn]) -> dict[str, Any]:
    """The figures of one split.

    Args:
        store: the split's store, written by pretokenize (so with clip statistics).
        turns: the turns of its metadata file; the store's source_index points into them.
    """
    source = store.turn_array("source_index").tolist()
    stats = store.turn_array("clip_stats").astype(np.float64)
    seconds, leading, trailing = stats.T
    speakers = store.turn_array("speaker")
    characters = np.array([len(turns[i].text) for i in source])
    text, frames, _, _ = store.turn_lengths()
    # Of the frames, as the store and the trainer count them: a clip's last frame is filled up.
    hours = np.asarray(frames) * (FRAME_SECONDS / 3600)

    # Pauses at the ends say nothing about the pace, and one frame is the least speech there can be.
    rate = characters / np.maximum(seconds - leading - trailing, FRAME_SECONDS)
    spread = 1.4826 * np.median(np.abs(rate - np.median(rate)))  # the standard deviation, were it a normal law
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
        "seconds": _spread(seconds),
        "turn_rows": _spread(text + frames + 1),
        "leading_silence": _spread(leading),
        "trailing_silence": {
            **_spread(trailing),
            "threshold": LONG_SILENCE,
            "above": len(tails),
            "longest": [{**place(i), "seconds": round(float(trailing[i]), 2)} for i in longest.tolist()],
        },
        "silent_turns": int((leading >= seconds).sum()),
        "characters_per_second": {
            **_spread(rate),
            "outliers": len(outliers),
            "worst": [
                {**place(i), "characters_per_second": round(float(rate[i]), 1), "z": round(float(z[i]), 1)}
                for i in worst.tolist()
            ],
        },
        "codebooks": code_use(store),
    }


def code_use(store: TokenStore) -> list[dict[str, Any]]:
    """Per codebook: how many codes occur, and the entropy of their distribution in nats (a model that has learned
    anything is below it)."""
    size, count = store.codebook_size, store.num_codebooks
    uses = np.zeros(count * size, np.int64)
    shift = np.arange(count) * size
    for block in store.code_blocks():
        uses += np.bincount((block + shift).ravel(), minlength=count * size)
    share = uses.reshape(count, size) / store.num_frames
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = -np.where(share > 0, share * np.log(share), 0.0).sum(axis=1)
    return [
        {"codes": int(n), "entropy": round(float(h), 4)} for n, h in zip((share > 0).sum(axis=1), entropy, strict=True)
    ]


def render(report: Mapping[str, Any]) -> str:
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
        lines += _speakers(name, split["speakers"])
    for name, split in splits.items():
        if name == "train":
            lines += _codebooks(split["codebooks"], report["codec"]["codebook_size"])
    for name, split in splits.items():
        outliers = split["characters_per_second"]
        lines += _listed(
            f"speaking-rate outliers in {name} (transcript and recording may not belong together)",
            [f"{o['characters_per_second']:>8.1f} characters/s   {_where(o)}" for o in outliers["worst"]],
            outliers["outliers"],
        )
        tails = split["trailing_silence"]
        lines += _listed(
            f"longest trailing silence in {name} (a model learns to end late from these)",
            [f"{o['seconds']:>8.2f} s   {_where(o)}" for o in tails["longest"][:5]],
            tails["above"],
        )
    skipped = report["skipped"]
    lines += _listed(
        f"left out: {counted(skipped['turns'], 'turn')} in {counted(skipped['conversations'], 'conversation')}",
        [f"  {entry['reason']}" for entry in skipped["listed"]],
        skipped["clips"],
    )
    if report["warnings"]:
        lines += ["", *(f"warning: {warning}" for warning in report["warnings"])]
    return "\n".join(lines)


def _spread(values: np.ndarray) -> dict[str, float]:
    low, median, high, most = np.percentile(values, [0, 50, 95, 100]).tolist()
    return {"min": round(low, 3), "median": round(median, 3), "p95": round(high, 3), "max": round(most, 3)}


def _where(entry: Mapping[str, Any]) -> str:
    # Without folders, to keep lines short; report.json has the whole paths.
    return f"{os.path.basename(entry['file'])}, row {entry['row']}: {os.path.basename(entry['audio'])}"


def _listed(title: str, lines: list[str], count: int) -> list[str]:
    if not lines:
        return []
    more = [f"  ... and {count - len(lines):,} more (report.json)"] if count > len(lines) else []
    return ["", title, *(f"  {line.rstrip()}" for line in lines), *more]


def _speakers(name: str, speakers: Mapping[str, Any]) -> list[str]:
    if len(speakers) < 2:
        return []
    most = sorted(speakers.items(), key=lambda item: -item[1]["hours"])
    lines = [f"[{speaker}] {s['hours']:>10,.2f} h {s['turns']:>8,} turns" for speaker, s in most[:LISTED]]
    return _listed(f"speakers in {name}", lines, len(speakers))


def _codebooks(codebooks: Sequence[Mapping[str, Any]], size: int) -> list[str]:
    title = f"codes in use in train, of {size:,}, and their entropy in nats, at most {math.log(size):.2f}"
    lines = ["", title]
    for begin in range(0, len(codebooks), 8):
        block = codebooks[begin : begin + 8]
        lines.append("  codebook " + "".join(f"{begin + i:>8}" for i in range(len(block))))
        lines.append("  codes    " + "".join(f"{c['codes']:>8,}" for c in block))
        lines.append("  entropy  " + "".join(f"{c['entropy']:>8.2f}" for c in block))
    return lines


def unigram_entropy(store: Any, frames: int = 1_000_000) -> list[float]:
    """Entropy in nats of each codebook's distribution over the store's targets (end-of-speech rows included).

    What a model that ignores its input could reach at best. At most about ``frames`` frames are counted, from
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
    p = counts / counts.sum(1, keepdims=True)
    return (-(p * np.log(np.where(p > 0, p, 1))).sum(1)).tolist()
