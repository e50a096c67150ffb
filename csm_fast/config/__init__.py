"""What a user may set: shapes of models, settings of training and of the commands, and parsers of flags and YAML.

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
