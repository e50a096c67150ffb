"""What a user may set: model shapes, training settings, the commands' settings, and how flags and YAML become them.

Imports ``system`` only, and no torch.
"""

from csm_fast.config.shape import NAMED_SHAPES, CSMConfig, TransformerConfig
from csm_fast.config.train import (
    AdapterSection,
    DataSection,
    LossSection,
    ModelSection,
    OptimizerSection,
    RunSection,
    TrainConfig,
)

__all__ = [
    "NAMED_SHAPES",
    "AdapterSection",
    "CSMConfig",
    "DataSection",
    "LossSection",
    "ModelSection",
    "OptimizerSection",
    "RunSection",
    "TrainConfig",
    "TransformerConfig",
]
