"""``csm-fast profile``: where the time of a training step goes, operator by operator.

The trainer builds the model, the packs and the optimizer. The same packs run four times: as the loader delivers them,
without any instrument, under ``torch.profiler`` (times and shapes) and under ``FlopCounterMode`` (FLOPs). The floor of
an operator is the time of its FLOPs and bytes at the rates of large matrix products and copies on the same machine.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import platform
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch.profiler import profile, record_function
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from csm_fast import ops
from csm_fast.commands.train import set_up_training
from csm_fast.config.commands import ProfileConfig
from csm_fast.config.train import TrainConfig
from csm_fast.model.compile import compile_layers
from csm_fast.packing.layout import StepBatch
from csm_fast.packing.loader import read_ahead
from csm_fast.system.device import compute_dtype, processor
from csm_fast.system.errors import InputError, is_out_of_memory
from csm_fast.system.files import write_file
from csm_fast.system.version import __version__
from csm_fast.train.announce import explain_out_of_memory
from csm_fast.train.loop import Trainer
from csm_fast.train.run_folder import list_checkpoints
from csm_fast.train.setup import prepare

STEP = "csm_fast step"  # the profiler's name for one step
SQUARES = {"cpu": (512, 1024, 2048), "cuda": (2048, 4096, 8192)}  # sizes of the products whose rate is measured
COPY_BYTES = 256 << 20  # per buffer: more than the caches of common CPUs and GPUs
ITEMS = {"float": ("fp32", 4), "double": ("fp64", 8), "c10::BFloat16": ("bf16", 2), "c10::Half": ("fp16", 2)}
ITEMS |= {"long": ("int64", 8), "long int": ("int64", 8), "int": ("int32", 4), "bool": ("bool", 1)}
ITEMS |= {"unsigned char": ("uint8", 1)}  # the profiler's names for types: our names, and bytes per element
COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd  # operators that only call others
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
OURS = ("csm_kernels::", "csm_fast::")
PARTIAL = ("index", "gather", "scatter", "embed", "take", "empty", "resize")  # they touch a part of their inputs


def run(config: ProfileConfig) -> None:
    """Profile, print, and write ``trace.json.gz`` and ``ops.jsonl`` into ``config.output``; nothing else is written.

    Raises:
        InputError: what the trainer refuses; an output that holds a run or cannot be written; neither CPU nor CUDA.
    """
    set_up_training(config.run)
    training = training_config(config)
    try:
        rows, step = profile_steps(Trainer(prepare(training)), config.warmup, config.steps)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise explain_out_of_memory(error, training) from error
    text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in [*rows, step])
    write(Path(training.run.output_dir, "ops.jsonl"), lambda path: write_file(path, text))
    print("\n".join([*table(rows, shutil.get_terminal_size((100, 24)).columns), "", *step_lines(step)]))


def training_config(config: ProfileConfig) -> TrainConfig:
    """A copy of the training settings that continues no run and makes no samples."""
    output = Path(config.output).expanduser()
    write(output, lambda path: path.mkdir(parents=True, exist_ok=True))
    if list_checkpoints(output):
        raise InputError("holds a training run", file=output, mend="choose another --output")
    sections = {field.name: replace(getattr(config, field.name)) for field in fields(TrainConfig)}
    sections["run"] = replace(sections["run"], output_dir=str(output), resume=False, gen_every=0)
    return TrainConfig(**sections)


def write(path: Path, work: Callable[[Path], Any]) -> None:
    """Call what writes to ``path``; errors of the disk become the user's error."""
    try:
        work(path)
    except (OSError, RuntimeError) as error:
        what = f"the profile could not be written ({getattr(error, 'strerror', None) or error})"
        raise InputError(what, file=path, mend="choose another --output") from None


def profile_steps(trainer: Trainer, warmup: int, steps: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Run the steps and write the trace; no other function here knows the trainer's attributes. The operators, the
    costliest first, and the step as a whole: without the profiler ``step_ms`` = ``operators_ms`` + ``host_ms`` +
    ``loader_ms``; ``first_ms`` is a step of packs that come for the first time."""
    device, config, run = trainer.device, trainer.config, trainer.prepared
    if device.type not in SQUARES:
        raise InputError(f"--device {device.type} cannot be profiled", mend="use cpu or cuda")
    logging.getLogger("csm_fast").info("%d warm-up steps, then %d, four times; to %s", warmup, steps, trainer.run_dir)
    batches: list[StepBatch] = []
    waits: list[float] = []
    loader = read_ahead(trainer.packer.blocks(0, 0))

    def load(count: int) -> Iterator[StepBatch]:
        for _ in range(count):
            started = time.perf_counter()
            batches.append(next(loader))
            waits.append(1000 * (time.perf_counter() - started))
            yield batches[-1]

    def milliseconds(some: Iterable[StepBatch]) -> float:
        """Of one step, from an idle device to an idle device."""
        started = time.perf_counter()
        for number, batch in enumerate(some, 1):
            with record_function(STEP):
                result = trainer.runner.run(batch, number % run.total_steps)  # past its end the schedule begins again
                trainer.window.add(number, result, batch)
        float(trainer.window.loss)  # waits for the device
        return 1000 * (time.perf_counter() - started) / steps

    try:
        milliseconds(load(warmup))
        del batches[:], waits[:]
        first_ms = milliseconds(load(steps))
    finally:
        loader.close()
    plain_ms, loader_ms = milliseconds(batches), sum(waits) / steps
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler's library reports its start and stop on stderr
    with profile(record_shapes=True) as profiler:
        profiled_ms = milliseconds(batches)
    write(trainer.run_dir / "trace.json.gz", lambda path: profiler.export_chrome_trace(str(path)))
    compile_layers(trainer.model, "off")  # PyTorch refuses to compile under the counter
    with FlopCounterMode(display=False) as counter:
        milliseconds(batches)
    flops = {str(k).replace(".", "::", 1): n / steps for k, n in counter.get_flop_counts().get("Global", {}).items()}
    sizes = {n for parameter in trainer.model.parameters() for n in parameter.shape}
    rows = operator_rows(profiler.events() or [], device.type, flops, sizes, steps)
    # On a CPU the profiler slows operators and Python alike; it leaves a GPU's own times as they are.
    whole = profiled_ms if device.type == "cpu" else sum(row["ms"] for row in rows)
    types = {row["dtypes"].split()[0] for row in rows if row["flops"]} & {"fp32", "bf16", "fp16"}
    rates, copies = machine_rates(device, types or {run.precision})
    for row in rows:
        row["ms"] *= min(1.0, plain_ms / whole)
        row["share"] = row["ms"] / (plain_ms + loader_ms)
        rate = rates.get(row["dtypes"].split(" ")[0], max(rates.values()))
        row["floor_ms"] = 1000 * max(row["flops"] / rate, row["bytes"] / copies)
    step: dict[str, Any] = {"row": "step", "steps": steps, "rows": sum(batch.rows for batch in batches) / steps}
    for kind, some in ("operators_", rows), ("products_", [row for row in rows if row["kind"] == "product"]):
        step[f"{kind}ms"] = sum(row["ms"] for row in some)
        step[f"{kind}floor_ms"] = sum(min(row["ms"], row["floor_ms"]) for row in some)  # none above its operator's time
    step |= {"floor_ms": step.pop("operators_floor_ms"), "host_ms": max(0.0, plain_ms - step["operators_ms"])}
    step |= {"step_ms": plain_ms + loader_ms, "first_ms": first_ms, "profiled_ms": profiled_ms, "loader_ms": loader_ms}
    step |= {"matmul_flops_per_s": rates, "copy_bytes_per_s": copies, "threads": torch.get_num_threads()}
    host = "GPU idle" if device.type == "cuda" else "Python and dispatch" + ", compiled loops" * run.compiled
    step |= {"device": processor() if device.type == "cpu" else torch.cuda.get_device_name(device), "host": host}
    step |= {"python": platform.python_version(), "torch": torch.__version__, "csm_fast": __version__}
    step |= {
        "date": time.strftime("%Y-%m-%d"),
        "precision": run.precision,
        "compiled": run.compiled,
    }
    settings = [config.model, config.data, config.loss, config.adapter, config.optimizer]
    return rows, {k: v for x in settings for k, v in vars(x).items()} | {"data": Path(config.data.data).name} | step


def operator_rows(
    events: Iterable[Any], device_type: str, flops: dict[str, float], sizes: set[int], steps: int
) -> list[dict[str, Any]]:
    """The operators per step, the costliest first; those of ours include all that they call. Times are the GPU's for a
    ``device_type`` of "cuda". ``flops`` are per step by operator. Calls whose shapes differ only in other dimensions
    than the model's, which are ``sizes``, make one row."""
    kind, weights, rows = "cpu" if device_type == "cpu" else "device", Counter[str](), []
    groups: dict[tuple[str, str, str], list[tuple[float, int, int, list[list[int]]]]] = defaultdict(list)
    inner: set[int] = set()  # what an operator of ours calls; the profiler lists it after that operator
    for e in events:
        if e.cpu_parent is not None and (id(e.cpu_parent) in inner or e.cpu_parent.name.startswith(OURS)):
            inner.add(id(e))
            continue
        names = arguments(e.name)
        ms = getattr(e, f"{kind}_time_total" if e.name.startswith(OURS) else f"self_{kind}_time_total") / 1000
        if e.device_type != torch.autograd.DeviceType.CPU or ms <= 0 or (kind == "cpu" and names is None):
            continue
        given = getattr(e, "structured_input_shapes", None) or e.input_shapes or []  # torch 2.11 has the second alone
        # Numbers and tensors of one element have no shape here. A list of tensors counts as one flat tensor.
        inputs = [
            ([sum(map(math.prod, shape))] if isinstance(shape[0], list) else shape, *ITEMS.get(item, ("fp32", 4)))
            for shape, item, name in zip_longest(given, getattr(e, "input_dtypes", None) or [], names or [])
            if shape and name != "scratch"
        ]
        shapes, dtypes = [shape for shape, _, _ in inputs], " ".join(dict.fromkeys(dtype for _, dtype, _ in inputs))
        a, b = ([*shapes, [], []][e.name.endswith("addmm") :])[:2]
        weight = math.prod(a) * (b[-1] if b else 1)  # half the FLOPs of a product, a call's share of other FLOPs
        key = e.name, dtypes, str([[n if n in sizes else "" for n in shape] for shape in shapes])
        moved = [math.prod(shape) * size for shape, _, size in inputs]
        # An estimate: every input is read once, and a result as large as the largest input is written.
        moved.append(0 if e.name.endswith(("copy_", "fill_", "zero_")) else max(moved, default=0))
        groups[key].append((ms, 0 if any(part in e.name for part in PARTIAL) else sum(moved), weight, shapes))
        weights[e.name] += weight
    for (name, dtypes, _), calls in groups.items():
        times, bytes_moved, parts, shapes_of = zip(*calls, strict=True)
        inputs_of = [zip(*shapes, strict=True) for shapes in zip(*shapes_of, strict=True)]
        ranges = [[n[0] if len(set(n)) == 1 else [min(n), max(n)] for n in sizes_of] for sizes_of in inputs_of]
        computed = sum(parts) * (2 / steps if name in PRODUCTS else flops.get(name, 0.0) / (weights[name] or 1))
        row: dict[str, Any] = {"row": "operator", "name": name, "kind": "product" if computed else "memory"}
        row |= {"shapes": ranges, "dtypes": dtypes, "calls": len(calls) / steps, "ms": sum(times) / steps}
        rows.append(row | {"flops": computed, "bytes": sum(bytes_moved) / steps})
    return sorted(rows, key=lambda row: -row["ms"])


@functools.cache
def arguments(name: str) -> list[str] | None:
    """Names of an operator's arguments; None for a view, for what only calls other operators, and for no operator."""
    space, _, short = name.partition("::")
    packet = getattr(getattr(torch.ops, space), short, None) if short else None
    function = getattr(packet, packet.overloads()[0]) if packet else None
    if function is None or function.is_view or function.has_kernel_for_dispatch_key(COMPOSITE):
        return None
    return [argument.name for argument in function._schema.arguments]


def machine_rates(device: torch.device, types: Iterable[str]) -> tuple[dict[str, float], float]:
    """FLOP/s by type, of the fastest large square product; bytes per second, read and written, of a large copy."""

    def fastest(work: Callable[..., Any], *args: torch.Tensor) -> float:
        timer = Timer("work(*args)", globals={"work": work, "args": args}, num_threads=torch.get_num_threads())
        return min(timer.blocked_autorange().times)  # it waits for the GPU

    rates = {}
    for name in sorted(types):
        multiply = ops.linear if ops.choose("linear", device, compute_dtype(name)).impl == "cpu" else torch.mm
        squares = [torch.randn(n, n, device=device).to(compute_dtype(name)) for n in SQUARES[device.type]]
        rates[name] = max(2 * len(x) ** 3 / fastest(multiply, x, x.clone()) for x in squares)
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)
    return rates, 2 * COPY_BYTES / fastest(torch.empty_like(source).copy_, source)


def table(rows: list[dict[str, Any]], width: int) -> list[str]:
    """The ten costliest operators, inputs cut to lines of ``width`` characters."""
    cells = [("operator", "inputs", "calls", "ms", "share", "reached", "floor ms")]
    for row in rows[:10]:
        amount, unit = (row["flops"], "GFLOP/s") if row["kind"] == "product" else (row["bytes"], "GB/s")
        name = f"{row['name'].split('::')[-1]} {row['dtypes'].split(' ')[0]}"
        inputs = " ".join(str(shape).replace(" ", "") for shape in row["shapes"])
        reached = f"{amount / row['ms'] / 1e6:,.1f} {unit}" if amount else ""
        numbers = f"{row['calls']:.4g}", f"{row['ms']:.2f}", f"{row['share']:.1%}"
        cells.append((name, inputs, *numbers, reached, f"{row['floor_ms']:.2f}" if amount else ""))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    widths[1] = max(6, min(widths[1], width - sum(widths) + widths[1] - 12))
    aligned = [f"{{:{side}{w}.{w}}}" for side, w in zip("<<>>>>>", widths, strict=True)]
    return ["  ".join(aligned).format(*line).rstrip() for line in cells]


def step_lines(step: dict[str, Any]) -> list[str]:
    """The step as a whole, its parts, its floors."""
    share = {name: f"{value / step['step_ms']:.1%}" for name, value in step.items() if name.endswith("_ms")}
    rates = ", ".join(f"{rate / 1e9:,.0f} GFLOP/s in {name}" for name, rate in step["matmul_flops_per_s"].items())
    return [
        f"Step     {step['step_ms']:.1f} ms of {step['rows']:,.0f} rows, mean of {step['steps']} steps; "
        f"{step['profiled_ms']:.1f} ms under the profiler, {step['first_ms']:.1f} ms for new packs",
        f"Of it    matrix products {share['products_ms']} (floor {share['products_floor_ms']}), {step['host']} "
        f"{share['host_ms']}, waiting for the loader {share['loader_ms']}",
        f"Floors   {step['floor_ms']:.1f} ms ({share['floor_ms']}), at this machine's products ({rates}) and "
        f"copies ({step['copy_bytes_per_s'] / 1e9:,.1f} GB/s)",
    ]
