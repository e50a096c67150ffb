"""Recordings to codes: csm_fast's pretokenize against moshi's and transformers' Mimi one by one, end to end.

    python -m csm_fast.data.demo corpus --sounds
    python -m benchmarks.pretokenize_speed --data corpus/metadata.json --results benchmarks/results/pretokenize.jsonl

All systems take the same files and weights (the offline codec's unless ``--codec-source`` names others) and keep all
codebooks. "moshi" and "transformers" are what a user's script does: read a file (soundfile), resample it (soxr, HQ),
encode it under no_grad, collect, save. moshi's own compilation is turned off: it takes minutes for clips of many
lengths. "csm_fast" is ``csm-fast pretokenize`` into a new folder: text, statistics, hashes and checks included. Each
run is a process of its own, and the systems take turns. The parts are times within the process; ``process_s`` is the
time that its caller waits, imports included.

Then the codes are compared with moshi's. Where a frame's codes differ, the first level that differs decides: in float64
the distances of its two centroids from the residual of moshi's latent. If the distances are within ``NEAR_TIE`` of each
other, rounding chose the code, and all later levels of the frame follow from it. The semantic level and the acoustic
ones are two chains. Exits with 1 if csm_fast's codes differ elsewhere than in near ties, or in more than ``DIFFERING``
of all codes. (transformers, one by one, pads a clip's last frame with zeros in every layer, moshi and csm_fast with
silence; last frames may differ.)
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.processes import run_worker
from benchmarks.common.record import Row, append_row
from benchmarks.common.tables import MIB, format_text

SYSTEMS = ("moshi", "transformers", "csm_fast")
PARTS = ("imports_s", "load_s", "decode_s", "encode_s", "write_s", "rest_s")
NEAR_TIE = 1e-4  # of the distance: float32 latents of width 256 differ by some 1e-6 between implementations
DIFFERING = 0.005


class Clock:
    """Sums of seconds by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def follow(self, owner: Any, method: str, name: str) -> None:
        """Time every call of a method in this process."""
        setattr(owner, method, self(name)(getattr(owner, method)))


def mark_silence(codes: np.ndarray) -> np.ndarray:
    """Codes as csm_fast stores them: all zeros is CSM's end of speech, so such a frame gets a 1 at its end."""
    codes = codes.astype(np.int64)
    codes[~codes.any(axis=1), -1] = 1
    return codes


def load_moshi(source: Path) -> Any:
    """moshi's Mimi with a file's weights and all codebooks, without an import of transformers, as its users have it."""
    from csm_fast.data.codec.backends import _make_moshi
    from csm_fast.data.codec.mimi_shape import complete_sizes
    from csm_fast.data.codec.mimi_weights import load_module, read_sizes, read_weights

    state, _ = read_weights(source)
    sizes = complete_sizes(read_sizes(state))
    model = _make_moshi(sizes)
    load_module(state, model)
    model.set_num_codebooks(sizes.num_quantizers)
    return model.eval()


def encode_one_by_one(clock: Clock, system: str, rows: Sequence[dict[str, Any]], source: Path, output: Path) -> None:
    """What a user's script does with either library."""
    with clock("imports_s"):
        import soundfile
        import soxr
        import torch

        if system == "moshi":
            from moshi.models import loaders  # noqa: F401 - so that it counts here
            from moshi.utils.compile import no_compile
        else:
            from transformers import EncodecFeatureExtractor, MimiModel  # noqa: F401 - so that it counts here
    with clock("load_s"):
        if system == "moshi":
            model = load_moshi(source)
        else:
            from csm_fast.data.codec.load import load_codec

            model = load_codec(system, source=source).model
            extractor = EncodecFeatureExtractor(feature_size=1, sampling_rate=24_000)
    collected = []
    with torch.no_grad():
        for row in rows:
            with clock("decode_s"):
                wave, rate = soundfile.read(row["path"], dtype="float32", always_2d=True)
                wave = wave.mean(axis=1)
                if rate != 24_000:
                    wave = soxr.resample(wave, rate, 24_000, quality="HQ")
            with clock("encode_s"):
                if system == "moshi":
                    with no_compile():
                        codes = model.encode(torch.from_numpy(wave)[None, None])
                else:
                    inputs = extractor(raw_audio=wave, sampling_rate=24_000, return_tensors="pt")
                    codes = model.encode(inputs["input_values"], inputs["padding_mask"]).audio_codes
            collected.append(codes[0].T.to(torch.int16))
    with clock("write_s"):
        torch.save(collected, output / "codes.pt")


def run_pretokenize(clock: Clock, metadata: Path, source: Path, output: Path) -> None:
    """``csm-fast pretokenize``, with its parts timed."""
    with clock("imports_s"):
        import torch  # noqa: F401

        from csm_fast import cli
        from csm_fast.data import pretokenize
        from csm_fast.data.codec.base import Codec
    clock.follow(pretokenize, "load_codec", "load_s")
    clock.follow(Codec, "encode", "encode_s")
    clock.follow(pretokenize._Run, "_write", "write_s")
    clock.follow(pretokenize._Run, "_hash_files", "hash_s")
    clock.follow(pretokenize._Run, "_encode", "_loop")
    clock.follow(pretokenize._Run, "_encode_window", "_windows")
    arguments = ["--train-data", str(metadata), "--output", str(output), "--codec", "offline", "--codec-source"]
    if status := cli.main(["pretokenize", *arguments, str(source)]):
        raise SystemExit(status)
    # Other processes decode; this is the time in which the encoder waited for them.
    clock.seconds["decode_s"] = clock.seconds.pop("_loop") - clock.seconds.pop("_windows")


def run_system(args: argparse.Namespace) -> None:
    """One run of one system; prints its times."""
    clock, started = Clock(), time.perf_counter()
    answers, sys.stdout = sys.stdout, sys.stderr
    output = args.folder / args.worker
    if args.worker == "csm_fast":
        run_pretokenize(clock, args.data, args.codec_source, output)
    else:
        output.mkdir(exist_ok=True)
        encode_one_by_one(clock, args.worker, json.loads(args.data.read_text()), args.codec_source, output)
    seconds = {"total_s": time.perf_counter() - started, **clock.seconds}
    seconds["rest_s"] = seconds["total_s"] - sum(seconds.get(name, 0.0) for name in PARTS)
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    cpu = own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime
    memory = {"peak_rss": own.ru_maxrss * 1024, "child_peak_rss": children.ru_maxrss * 1024}
    print(json.dumps({**seconds, "cpu_s": cpu, **memory}), file=answers)


def compare_codes(args: argparse.Namespace) -> dict[str, Any]:
    """How the codes of csm_fast and of transformers differ from moshi's."""
    import torch

    from csm_fast.data.audio import read_audio
    from csm_fast.data.token_store import TokenStore

    rows = json.loads(args.data.read_text())
    kept = {name: torch.load(args.folder / name / "codes.pt") for name in ("moshi", "transformers")}
    theirs = {name: [mark_silence(codes.numpy()) for codes in clips] for name, clips in kept.items()}
    store = TokenStore.open(args.folder / "csm_fast" / "train")
    mine = [mark_silence(np.asarray(store.conversation(i)[0].codes)) for i in range(len(rows))]
    model = load_moshi(args.codec_source)

    def latents(clip: int) -> np.ndarray:
        with torch.no_grad():
            wave = torch.from_numpy(read_audio(rows[clip]["path"]))
            return model._encode_to_unquantized_latent(wave[None, None])[0].T.double().numpy()

    chains = []
    for quantizer in (model.quantizer.rvq_first, model.quantizer.rvq_rest):
        tables = [layer._codebook.embedding.double().numpy() for layer in quantizer.vq.layers]
        chains.append((quantizer.input_proj.weight[..., 0].detach().double().numpy(), tables))
    others = {"csm_fast": mine, "transformers": theirs["transformers"]}
    return {name: count_differences(theirs["moshi"], codes, latents, chains) for name, codes in others.items()}


def count_differences(
    reference: Sequence[np.ndarray],
    codes: Sequence[np.ndarray],
    latents: Callable[[int], np.ndarray],
    chains: Sequence[tuple[np.ndarray, Sequence[np.ndarray]]],
) -> Row:
    """Compare the codes [frames, K] of clips with the reference's.

    Args:
        latents: returns a clip's latents, [frames, D] float64; called where something differs.
        chains: (projection [d, D], tables [V, d] of its levels) of each quantizer; together K levels.

    Returns:
        ``codes``, ``differ`` and their ``share``; ``first`` differing levels, the ``near_ties`` among them, and the
        ``worst`` distance between two centroids' distances, as a share of the nearer one's. ``share`` is 1 where the
        clips' lengths differ.
    """
    total = sum(table.size for table in reference)
    if [len(c) for c in reference] != [len(c) for c in codes]:
        return {"codes": total, "differ": total, "share": 1.0, "first": 0, "near_ties": 0, "worst": 0.0}
    differ, gaps = 0, []
    for clip, (wanted, found) in enumerate(zip(reference, codes, strict=True)):
        wrong = wanted != found
        if not wrong.any():
            continue
        differ += int(wrong.sum())
        hidden, level = latents(clip), 0
        for projection, tables in chains:
            part = slice(level, level + len(tables))
            level += len(tables)
            for frame in np.flatnonzero(wrong[:, part].any(axis=1)):
                left = projection @ hidden[frame]
                for table, a, b in zip(tables, wanted[frame, part], found[frame, part], strict=True):
                    if a != b:
                        near, far = sorted(float(np.linalg.norm(left - table[code])) for code in (a, b))
                        gaps.append((far - near) / near)
                        break
                    left = left - table[a]
    near_ties, share = sum(gap <= NEAR_TIE for gap in gaps), differ / max(1, total)
    counts = {"codes": total, "differ": differ, "share": share}
    return {**counts, "first": len(gaps), "near_ties": near_ties, "worst": max(gaps, default=0.0)}


def choose_recordings(path: Path, share: float) -> tuple[list[dict[str, Any]], float]:
    """Rows of a metadata file with absolute paths, evenly over their lengths, in its order; and their seconds."""
    from csm_fast.data.audio import audio_info

    if not path.is_file():
        raise SystemExit(f"error: {path}: no such file; python -m csm_fast.data.demo corpus --sounds makes corpus")
    rows = json.loads(path.read_text())
    for row in rows:
        row["path"] = str((path.parent / row["path"]).resolve())
    seconds = [frames / rate for rate, frames, _ in (audio_info(row["path"]) for row in rows)]
    order = sorted(range(len(rows)), key=lambda i: seconds[i])
    count = max(1, round(share * len(rows)))
    kept = sorted(order[(2 * j + 1) * len(rows) // (2 * count)] for j in range(count))
    return [rows[i] for i in kept], sum(seconds[i] for i in kept)


def run_systems(args: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Runs of every system, in turns."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in SYSTEMS}
    options = ["--folder", str(args.folder), "--data", str(args.data), "--codec-source", str(args.codec_source)]
    for repeat in range(args.repeats):
        for name in SYSTEMS if repeat % 2 == 0 else SYSTEMS[::-1]:
            shutil.rmtree(args.folder / name, ignore_errors=True)
            started = time.perf_counter()
            # csm_fast's command sets the variables before it imports PyTorch, which this worker has imported before.
            own = name == "csm_fast"
            done = run_worker("benchmarks.pretokenize_speed", "--worker", name, *options, keep_memory=own, quiet=True)
            runs[name].append({"process_s": time.perf_counter() - started, **done})
            print(f"{repeat + 1}. {name}: {runs[name][-1]['process_s']:.1f} s", file=sys.stderr, flush=True)
    return runs


def summarize_runs(runs: Sequence[dict[str, float]], audio_s: float) -> Row:
    """Medians of a system's runs, the range of their process times, and rates."""
    names = sorted({name for run in runs for name in run})
    figures: Row = {name: statistics.median(run.get(name, 0.0) for run in runs) for name in names}
    figures["process_range_s"] = [min(r["process_s"] for r in runs), max(r["process_s"] for r in runs)]
    figures["work_s"] = statistics.median(run["total_s"] - run["imports_s"] for run in runs)
    figures["audio_s_per_s"] = audio_s / figures["process_s"]
    figures["audio_s_per_s_without_imports"] = audio_s / figures["work_s"]
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("corpus/metadata.json"))
    parser.add_argument("--share", type=float, default=1.0, help="share of the recordings, evenly over their lengths")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--codec-source", type=Path, help="an offline codec's file; default: the one in the cache")
    parser.add_argument("--results", type=Path, help="append the figures to this .jsonl")
    parser.add_argument("--worker", choices=SYSTEMS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        run_system(args)
        return 0
    if args.codec_source is None:
        from csm_fast.data.codec.offline import offline_file

        args.codec_source = offline_file()
    with tempfile.TemporaryDirectory() as temporary:
        args.folder = Path(temporary)
        rows, audio_s = choose_recordings(args.data, args.share)
        args.data = args.folder / "metadata.json"
        args.data.write_text(json.dumps(rows))
        runs = run_systems(args)
        codes = compare_codes(args)
    figures = {name: summarize_runs(runs[name], audio_s) for name in SYSTEMS}
    print(f"{len(rows)} recordings, {audio_s:,.0f} s; medians of {args.repeats}, seconds")
    parts = ("process_s", *PARTS, "cpu_s")
    head = ["", "audio s/s", *(part.removesuffix("_s") for part in parts), "MiB"]
    lines = []
    for name, f in figures.items():
        times = [f"{f.get(part, 0.0):.2f}" for part in parts]
        lines.append([name, f"{f['audio_s_per_s']:.1f}", *times, f"{f['peak_rss'] / MIB:.0f}"])
    print(format_text(head, lines, left=1))
    for name, f in codes.items():
        print(
            f"{name}: {f['differ']:,} of {f['codes']:,} codes differ from moshi's ({f['share']:.4%}); first levels "
            f"{f['first']}, near ties {f['near_ties']}, the widest {f['worst']:.1e} of the distance"
        )
    for other in ("moshi", "transformers"):
        ratios = [figures[other][key] / figures["csm_fast"][key] for key in ("process_s", "work_s")]
        print(f"csm_fast against {other}: {ratios[0]:.2f}x, without imports {ratios[1]:.2f}x")
    common = {"recordings": len(rows), "audio_s": audio_s, "repeats": args.repeats, "share": args.share}
    for name in SYSTEMS:
        row = {"system": name, **common, **figures[name], "against_moshi": codes.get(name)}
        append_row(args.results, "pretokenize", row)
    ours = codes["csm_fast"]
    return 0 if ours["share"] <= DIFFERING and ours["near_ties"] == ours["first"] else 1


if __name__ == "__main__":
    sys.exit(main())
