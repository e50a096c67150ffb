"""Bytes allocated by component during the walk through a step, and the most at once."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

WEIGHTS, COPIES, ADAPTERS, GRADIENTS = "weights", "copies", "adapters", "gradients"
OPTIMIZER, ACTIVATIONS, WORKSPACE = "optimizer", "activations", "workspace"
COMPONENTS = (WEIGHTS, ADAPTERS, GRADIENTS, OPTIMIZER, COPIES, ACTIVATIONS, WORKSPACE)


@dataclass
class Ledger:
    """Bytes allocated by component, and the most at once.

    Attributes:
        now, peak: bytes by component, now and at the peak.
        moment: the phase with the peak.
        phases: the most bytes in each phase.
        phase: the part of the step that the walk is in.
    """

    now: Counter = field(default_factory=Counter)
    peak: Counter = field(default_factory=Counter)
    moment: str = ""
    phases: dict[str, int] = field(default_factory=dict)
    phase: str = ""

    def hold(self, component: str, size: float) -> int:
        """Allocate ``size`` bytes; returns them, for ``drop``."""
        self.now[component] += int(size)
        total = self.now.total()
        if total > self.peak.total():
            self.peak, self.moment = Counter(self.now), self.phase
        self.phases[self.phase] = max(self.phases.get(self.phase, 0), total)
        return int(size)

    def drop(self, component: str, size: float) -> int:
        """Free ``size`` bytes; returns them."""
        self.now[component] -= int(size)
        return int(size)

    def touch(self, size: float) -> None:
        """Allocate workspace and free it at once."""
        self.drop(WORKSPACE, self.hold(WORKSPACE, size))
