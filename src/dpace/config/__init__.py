"""Every option, with its default and where the default comes from.

Imports no torch, so that `--help` answers at once.
"""

from dpace.config.choices import (
    Confidence,
    Device,
    Dtype,
    Engine,
    Format,
    Objective,
    Reduction,
    TokenLoss,
    VerifyRule,
    Width,
)
from dpace.config.data import PromptsConfig, RespondConfig, SamplingConfig
from dpace.config.measuring import BenchConfig, CheckConfig
from dpace.config.recipe import CompareConfig, Recipe
from dpace.config.training import DrafterConfig, LossConfig, TrainConfig

__all__ = [
    "BenchConfig",
    "CheckConfig",
    "CompareConfig",
    "Confidence",
    "Device",
    "DrafterConfig",
    "Dtype",
    "Engine",
    "Format",
    "LossConfig",
    "Objective",
    "PromptsConfig",
    "Recipe",
    "Reduction",
    "RespondConfig",
    "SamplingConfig",
    "TokenLoss",
    "TrainConfig",
    "VerifyRule",
    "Width",
]
