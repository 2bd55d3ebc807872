"""The values of options that are one of a few names."""

from typing import Literal

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
TokenLoss = Literal["nll", "kl", "lk"]
Confidence = Literal["token", "overlap"]
Reduction = Literal["anchors", "batch", "slots", "weights"]
VerifyRule = Literal["equality", "speculative"]
Width = Literal["auto", "full"] | int
Device = Literal["auto", "cpu", "cuda", "mps", "xpu"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Engine = Literal["vllm", "sglang", "llamacpp", "transformers", "zlab"]
Format = Literal["zlab", "sglang", "vllm", "speculators", "gguf"]
