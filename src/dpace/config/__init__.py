"""Every option, with its default and where the default comes from.

Imports no torch, so that `--help` answers at once.
"""

from dpace.config.choices import (
    Confidence,
    Device,
    DeviceMap,
    Dtype,
    Engine,
    Format,
    Objective,
    ObjectiveName,
    Reduction,
    TargetShard,
    TokenLoss,
    VerifyRule,
    Width,
    is_objective,
    is_own,
)
from dpace.config.options import (
    BenchConfig,
    CheckConfig,
    CompareConfig,
    DrafterConfig,
    LossConfig,
    PromptsConfig,
    Recipe,
    RespondConfig,
    SamplingConfig,
    TrainConfig,
)

__all__ = [
    "BenchConfig",
    "CheckConfig",
    "CompareConfig",
    "Confidence",
    "Device",
    "DeviceMap",
    "DrafterConfig",
    "Dtype",
    "Engine",
    "Format",
    "LossConfig",
    "Objective",
    "ObjectiveName",
    "PromptsConfig",
    "Recipe",
    "Reduction",
    "RespondConfig",
    "SamplingConfig",
    "TargetShard",
    "TokenLoss",
    "TrainConfig",
    "VerifyRule",
    "Width",
    "is_objective",
    "is_own",
]
