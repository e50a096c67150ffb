"""The learning rate over a run: warm-up, peak, decay."""

from __future__ import annotations

import math

from csm_fast.config.train import OptimizerSection


def peak_learning_rate(section: OptimizerSection, method: str = "full") -> float:
    """The given one, or the method's default: adapters start at zero and take larger steps."""
    if section.learning_rate is not None:
        return section.learning_rate
    return 3e-5 if method == "full" else 2e-4


def warmup_steps(section: OptimizerSection, total_steps: int) -> int:
    """Warmup in optimizer steps, from steps or a ratio (default 0.05), at most the whole run."""
    if section.warmup_steps is not None:
        return min(section.warmup_steps, total_steps)
    ratio = 0.05 if section.warmup_ratio is None else section.warmup_ratio
    return min(total_steps, math.ceil(ratio * total_steps))


def learning_rate(section: OptimizerSection, step: int, total_steps: int) -> float:
    """Learning rate of the update number ``step`` (from 0) of ``total_steps``.

    Linear warmup reaches the peak at its last step (its first step is not 0); then linear to 0, a half cosine to 0,
    exponential to a tenth, or constant.
    """
    warmup, peak = warmup_steps(section, total_steps), peak_learning_rate(section)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    factor = {
        "linear": 1 - progress,
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "exponential": 0.1**progress,
        "constant": 1.0,
    }[section.lr_decay]
    return peak * max(0.0, factor)
