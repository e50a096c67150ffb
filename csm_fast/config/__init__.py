"""What a user may set: model shapes, training settings, the commands' settings, and how flags and YAML become them.

Imports ``system`` only, and no torch.
"""

from csm_fast.config.train import CSMConfig, TrainConfig, TransformerConfig

__all__ = ["CSMConfig", "TrainConfig", "TransformerConfig"]
