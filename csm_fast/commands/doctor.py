"""``csm-fast doctor``: what is on this machine, what csm_fast chose for it and why, and what to type next."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import textwrap
from pathlib import Path
from typing import Any

OPTIONAL = {
    "triton": "the kernels (CUDA)",
    "flash_attn": "packed attention (CUDA); otherwise torch's own",
    "transformers": "Mimi, the codec",
    "moshi": "Mimi through moshi",
    "bitsandbytes": "4-bit weights and 8-bit optimizers",
    "peft": "adapters",
    "liger_kernel": "fused layers (CUDA)",
    "torchaudio": "not used by csm_fast itself",
    "llama_models": "the Llama-3 tokenizer without a hub",
}


def run() -> None:
    """Print the findings."""
    print("\n".join(report(examine())))


def examine() -> dict[str, Any]:
    """Everything that ``report`` prints; can be written as JSON."""
    import torch

    from csm_fast import __version__, ops
    from csm_fast.system.device import compute_dtype, processor, resolve_device, resolve_precision

    device = resolve_device("auto")
    precision = resolve_precision("auto", device)
    # The optimizer works on float32 weights and gradients, all others in the dtype of the products.
    dtypes = {"adamw": torch.float32, "sum_of_squares": torch.float32}
    chosen = {op: ops.choose(op, device, dtypes.get(op, compute_dtype(precision))) for op in ops.OPERATORS}
    gpu = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        gpu = {
            "name": properties.name,
            "capability": f"sm_{properties.major}{properties.minor}",
            "memory_gib": properties.total_memory / 2**30,
        }
    return {
        "csm_fast": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "device": str(device),
        "precision": precision,
        "kernels": "triton" if chosen["frame_embed"].impl == "triton" else "torch",
        "kernels_why": chosen["frame_embed"].why,
        "attention": chosen["packed_attention"].why,
        "cpu_passes": ops.describe_cpu_library() if device.type == "cpu" else None,
        "optional": {name: version(name) for name in OPTIONAL},
        "operators": {op: choice._asdict() for op, choice in chosen.items()},
    }


def version(module: str) -> str | None:
    """The installed version of a package, found without importing it; None if it is not installed."""
    if importlib.util.find_spec(module) is None:
        return None
    try:
        return importlib.metadata.version(module)
    except importlib.metadata.PackageNotFoundError:
        return "installed"


def report(found: dict[str, Any]) -> list[str]:
    """``examine``'s findings as aligned lines."""
    gpu = found["gpu"]
    shown = f"{gpu['name']}, {gpu['capability']}, {gpu['memory_gib']:.0f} GiB" if gpu else "none that torch can use"
    rows = [
        ("csm_fast", f"{found['csm_fast']} on Python {found['python']}, {found['system']}"),
        ("torch", f"{found['torch']} (CUDA {found['cuda']})" if found["cuda"] else f"{found['torch']} (CPU build)"),
        ("processor", f"{found['processor']}, {found['threads']} threads"),
        ("gpu", shown),
        ("", ""),
        ("device", found["device"]),
        ("precision", f"{found['precision']}: " + _precision_reason(found)),
        ("kernels", f"{found['kernels']}: {found['kernels_why']}"),
        ("attention", found["attention"]),
    ]
    if found["cpu_passes"]:
        rows.append(("cpu passes", found["cpu_passes"]))
    rows.append(("", ""))
    lines = [f"{name:11}{text}".rstrip() for name, text in rows]
    for name, use in OPTIONAL.items():
        lines.append(f"{name:14} {found['optional'][name] or 'not installed':14} {use}")
    lines += ["", f"{'operator':22}{'runs as':12}why"]
    for op, choice in found["operators"].items():
        row = f"{op:22}{choice['impl']:12}{choice['why']}"
        lines += textwrap.wrap(row, 100, subsequent_indent=" " * 34, drop_whitespace=True)
    return [*lines, "", f"next: {next_command()}"]


def _precision_reason(found: dict[str, Any]) -> str:
    if found["precision"] == "bf16":
        return "float32 master weights under bf16 autocast, which this machine multiplies fast"
    if found["precision"] == "fp16":
        return "float32 master weights under fp16 autocast, with loss scaling: this GPU's tensor cores lack bf16"
    return "this machine has no fast bf16"


def next_command() -> str:
    """The command that comes next in the current directory."""
    if Path("run").is_dir():
        return "csm-fast-train --data tokens --output-dir run   (continues the run)"
    if Path("tokens/train").is_dir():
        return "csm-fast-train --data tokens --output-dir run"
    return "csm-fast pretokenize --train-data metadata.json --val-fraction 0.05 --output tokens"
