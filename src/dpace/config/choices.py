"""The values of options that are one of a few names."""

import re
from typing import Literal, get_args

Objective = Literal[
    "dpace",
    "dpace-confidence-only",
    "dpace-continuation-only",
    "dpace-exact",
    "chain-reward",
    "vat",
    "spec-auf",
    "dflash",
    "uniform",
    "medusa",
]
ObjectiveName = Objective | str
"""An objective of dpace, or `package.module:function` for one's own."""
TokenLoss = Literal["nll", "kl", "lk", "mix"]
Confidence = Literal["token", "overlap"]
Reduction = Literal["anchors", "batch", "slots", "weights"]
VerifyRule = Literal["equality", "speculative"]
Width = Literal["auto", "full"] | int
Device = Literal["auto", "cpu", "cuda", "mps", "xpu"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
DeviceMap = Literal["auto"] | None
TargetShard = Literal["none", "fsdp", "tp"]
Engine = Literal["vllm", "sglang", "llamacpp", "transformers", "zlab"]
Format = Literal["zlab", "sglang", "vllm", "speculators", "gguf"]


def is_own(objective: str) -> bool:
    """Say whether an objective's name is of the form `package.module:function`."""
    return re.fullmatch(r"[^\W\d][\w.]*:[\w.<>]+", objective) is not None


def is_objective(value: object) -> bool:
    """Say whether a value names an objective of dpace or has the form of one's own."""
    return isinstance(value, str) and (value in get_args(Objective) or is_own(value))
