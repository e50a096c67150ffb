"""``csm-fast profile``: where the time of a training step goes, and how far each operator is from what the machine can.

The steps are the trainer's: its model, packs, optimizer and update, in a process set up as its own. Each is run several
times: as it comes from the loader, again, with every operator timed (on a GPU not), and under ``torch.profiler``.
Operators are timed apart from the profiler where that can be done (on a CPU, with eager layers), since its own
allocations make large operators slower than they are; elsewhere its self times count.
"""

from __future__ import annotations

import datetime
import logging
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from csm_fast import ops
from csm_fast.commands.profile_ops import STEP, OperatorClock, Step, from_profiler, is_operator, own_functions
from csm_fast.commands.profile_report import (
    Rates,
    Row,
    Summary,
    lines,
    not_written,
    operator_rows,
    product_type,
    python_rows,
    write_rows,
)
from csm_fast.config.commands import ProfileConfig
from csm_fast.config.train import TrainConfig
from csm_fast.packing.layout import StepBatch
from csm_fast.packing.loader import read_ahead
from csm_fast.system.device import processor
from csm_fast.system.errors import InputError, is_out_of_memory
from csm_fast.system.version import __version__
from csm_fast.train import checkpoint as ckpt
from csm_fast.train.announce import out_of_memory
from csm_fast.train.loop import Trainer

log = logging.getLogger("csm_fast")

COPY_BYTES = 256 << 20  # per buffer: more than the caches of common processors and of GPUs
SQUARES = {"cpu": (512, 1024, 2048), "cuda": (2048, 4096, 8192)}
ENOUGH_SECONDS = 0.3  # of repetitions of one measurement of a rate
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
Way = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # to multiply two matrices


def run(config: ProfileConfig) -> Summary:
    """Profile, print, and write ``trace.json.gz`` and ``ops.jsonl`` into ``config.output``; nothing else is written.

    Raises:
        InputError: whatever the trainer refuses; an output directory that holds a training run; a device that is
            neither a CPU nor CUDA.
    """
    training = training_config(config)
    try:
        summary, rows, rest = _run(config, Trainer(training))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(error, training) from error
    print("\n".join(lines(summary, rows, rest)))
    return summary


def training_config(config: ProfileConfig) -> TrainConfig:
    """The run that is profiled: nothing is continued, and there are no samples.

    Raises:
        InputError: the output directory cannot be made, or holds a training run.
    """
    output = Path(config.output).expanduser()
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise not_written(error, output) from None
    if ckpt.list_checkpoints(output):
        raise InputError("holds a training run", file=output, mend="choose another --output")
    config.run.output_dir, config.run.resume, config.run.gen_every = str(output), False, 0
    sections = {name: getattr(config, name) for name in ("model", "data", "loss", "adapter", "optimizer", "run")}
    return TrainConfig(**sections)


def _run(config: ProfileConfig, trainer: Trainer) -> tuple[Summary, list[Row], str]:
    device, output = trainer.device, trainer.run_dir
    if device.type not in SQUARES:
        raise InputError(f"--device {device.type} tells no operator's time", mend="use cpu or cuda")
    log.info(
        "%s, %s, %s on %s: %d steps to warm up, then %d, several times over; to %s",
        config.model.model,
        config.adapter.method,
        trainer.precision + ", compiled" * trainer.compiled,
        device,
        config.warmup,
        config.steps,
        output,
    )
    batches, first, loader = stream(trainer, config.warmup, config.steps)
    clock = OperatorClock() if device.type == "cpu" and not trainer.compiled else None
    plain, clocked = repeat(trainer, batches, clock)
    events, profiled = trace(trainer, batches, output / "trace.json.gz")
    default = next((name, t.itemsize) for name, t in TYPES.items() if t == trainer.update.dtype)
    steps = clock.steps if clock is not None else from_profiler(events, device.type, default)
    # What measuring cost beside the operators must not make them longer than the step.
    operators = sum(seen.seconds for step in steps for seen in step.values()) / len(steps)
    scale = min(1.0, plain / operators) if operators else 1.0
    if clock is None and device.type == "cpu":
        scale = min(scale, plain / profiled)
    rates = measure_rates(device, steps, default[0])
    step_ms = 1000 * (plain + loader)
    rows = operator_rows(steps, step_ms, scale, rates, "profiler" if clock is None else "clock")
    products = [row for row in rows if row.kind == "product"]
    operators_ms = sum(row.ms for row in rows)
    summary = Summary(
        steps=len(batches),
        rows=statistics.fmean(batch.rows for batch in batches),
        step_ms=step_ms,
        first_ms=1000 * (first + loader),
        profiled_ms=1000 * profiled,
        clocked_ms=1000 * clocked if clock is not None else None,
        loader_ms=1000 * loader,
        operators_ms=operators_ms,
        products_ms=sum(row.ms for row in products),
        host_ms=max(0.0, 1000 * plain - operators_ms),
        floor_ms=sum(min(row.ms, row.floor_ms) for row in rows),
        products_floor_ms=sum(min(row.ms, row.floor_ms) for row in products),
        scale=scale,
        matmul_flops_per_s=rates.products,
        copy_bytes_per_s=rates.copy,
    )
    if device.type == "cpu":
        functions, in_operators = host_times(events, len(batches))
        rows += python_rows(functions, profiled - in_operators, summary.host_ms, step_ms)
        rows.sort(key=lambda row: -row.ms)
    write_rows(output / "ops.jsonl", rows, about(trainer), summary)
    if device.type != "cpu":
        return summary, rows, "the device idle"
    # Layers that are compiled for a CPU are functions of which the profiler sees only what they call.
    return summary, rows, "Python, dispatch and compiled loops" if trainer.compiled else "Python and dispatch"


# --------------------------------------------------------------------------------------------------------------- steps


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(device: torch.device, work: Callable[[], Any]) -> float:
    """Seconds of ``work``, from an idle device to an idle device."""
    wait(device)
    started = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - started


def one_step(trainer: Trainer, batch: StepBatch, number: int) -> None:
    """What the trainer does for each step. Past the end of the schedule it begins again."""
    outcome = trainer.update(batch, number % trainer.total_steps)
    trainer.window.add(number + 1, outcome, batch)


def stream(trainer: Trainer, warmup: int, steps: int) -> tuple[list[StepBatch], float, float]:
    """Run steps as they come from the loader.

    Returns:
        The batches after the warm-up; seconds per step over them; seconds per step of waiting for the loader.
    """
    kept: list[StepBatch] = []
    waited = 0.0
    batches = read_ahead(trainer.packer.blocks(0, 0))

    def some(first: int, count: int) -> None:
        nonlocal waited
        for number in range(first, first + count):
            asked = time.perf_counter()
            kept.append(next(batches))
            waited += time.perf_counter() - asked
            one_step(trainer, kept[-1], number)

    try:
        some(0, warmup)
        kept.clear()
        waited = 0.0
        seconds = timed(trainer.device, lambda: some(warmup, steps))
    finally:
        batches.close()
    return kept, (seconds - waited) / steps, waited / steps


def repeat(trainer: Trainer, batches: list[StepBatch], clock: OperatorClock | None) -> tuple[float, float]:
    """Seconds per step, as it is and under the clock: each batch the one way, then the other, so that both see the same
    machine. Without a clock nothing waits for the device between steps."""

    def straight() -> None:
        for i, batch in enumerate(batches, 1):
            one_step(trainer, batch, i)

    if clock is None:
        return timed(trainer.device, straight) / len(batches), 0.0
    plain = clocked = 0.0
    for i, batch in enumerate(batches, 1):
        started = time.perf_counter()
        one_step(trainer, batch, i)
        between = time.perf_counter()
        clock.begin()
        with clock:
            one_step(trainer, batch, i)
        plain += between - started
        clocked += time.perf_counter() - between
    return plain / len(batches), clocked / len(batches)


def trace(trainer: Trainer, batches: list[StepBatch], path: Path) -> tuple[list[Any], float]:
    """Run the steps under the profiler and write its trace.

    Returns:
        The events; seconds per step.

    Raises:
        InputError: the trace cannot be written.
    """
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (trainer.device.type == "cuda")

    def steps() -> None:
        for i, batch in enumerate(batches, 1):
            with record_function(STEP):
                one_step(trainer, batch, i)

    # Its library says on stderr that it starts and stops, in the middle of the table.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profile(activities=activities, record_shapes=True, with_flops=True) as profiler:
        seconds = timed(trainer.device, steps)
    path.unlink(missing_ok=True)
    try:
        profiler.export_chrome_trace(str(path))
    except (OSError, RuntimeError) as error:
        raise not_written(error, path) from None
    return list(profiler.events() or []), seconds / len(batches)


def host_times(events: list[Any], steps: int) -> tuple[dict[str, tuple[float, float]], float]:
    """Per step, from the profiler: calls and seconds of our autograd functions, outside of what they call; seconds in
    operators."""
    own, functions, operators = own_functions(), dict[str, tuple[int, float]](), 0.0
    for event in events:
        if event.name in own:
            calls, micros = functions.get(event.name, (0, 0.0))
            functions[event.name] = calls + 1, micros + event.self_cpu_time_total
        elif is_operator(event.name):
            operators += event.self_cpu_time_total
    per_step = {name: (calls / steps, micros * 1e-6 / steps) for name, (calls, micros) in functions.items()}
    return per_step, operators * 1e-6 / steps


# --------------------------------------------------------------------------------------------------------------- rates


def measure_rates(device: torch.device, steps: list[Step], default: str) -> Rates:
    """What the machine multiplies and copies, for the types of the products among ``steps``."""
    found = {product_type(key[2]) for step in steps for key, seen in step.items() if seen.flops}
    types = sorted(found & TYPES.keys()) or [default]
    return Rates({name: matmul_rate(device, TYPES[name]) for name in types}, copy_rate(device))


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of a few large square products, PyTorch's or the library's own."""
    sizes = SQUARES.get(device.type, SQUARES["cpu"])
    ways: list[Way] = [torch.mm]
    if device.type == "cpu" and ops.multiplies(dtype):
        ways.append(lambda a, b: ops.linear(a, b.t()))
        # The larger sizes would take PyTorch minutes where the processor has no products of this type.
        rates = [_square_rate(device, dtype, sizes[0], way) for way in ways]
        ways = [way for way, rate in zip(ways, rates, strict=True) if rate > max(rates) / 2]
    return max(_square_rate(device, dtype, n, way) for n in sizes for way in ways)


def _square_rate(device: torch.device, dtype: torch.dtype, n: int, way: Way) -> float:
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / _fastest(device, lambda: way(a, b))


def copy_rate(device: torch.device) -> float:
    """Bytes read and written per second by a copy between two large buffers."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / _fastest(device, lambda: target.copy_(source))


def _fastest(device: torch.device, work: Callable[[], Any]) -> float:
    """Seconds: the least of at least three runs after one to warm up."""
    timed(device, work)
    runs: list[float] = []
    while len(runs) < 3 or sum(runs) < ENOUGH_SECONDS:
        runs.append(timed(device, work))
    return min(runs)


# --------------------------------------------------------------------------------------------------------------- about


def about(trainer: Trainer) -> dict[str, Any]:
    """What was profiled, and on what."""
    config, device = trainer.config, trainer.device
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "csm_fast": __version__,
        "date": datetime.date.today().isoformat(),
        "model": config.model.model,
        "data": Path(config.data.data).name,
        "method": config.adapter.method,
        "precision": trainer.precision,
        "weights": config.optimizer.weights,
        "optimizer": config.optimizer.optimizer,
        "activation_checkpointing": config.model.activation_checkpointing,
        "compiled": trainer.compiled,
        "batch_size": config.data.batch_size,
        "batch_rows": config.data.batch_rows,
        "gradient_accumulation": config.data.gradient_accumulation,
        "pack_rows": config.data.pack_rows,
        "amortization_fraction": config.loss.amortization_fraction,
        "seed": config.data.seed,
    }
