"""What a user may set: model shapes, training settings, the commands' settings, and how flags and YAML become them.

Imports ``system`` only, and no torch.
"""

from csm_fast.config.shape import CSMConfig, TransformerConfig
from csm_fast.config.train import TrainConfig

__all__ = ["CSMConfig", "TrainConfig", "TransformerConfig"]
