"""Options of measuring and of proofs."""

from dataclasses import dataclass
from typing import Literal

from dpace.config.choices import DeviceMap, Width


@dataclass(frozen=True)
class BenchConfig:
    """What is measured, and how."""

    drafters: tuple[str, ...] = ()
    """Folders or Hub ids of the drafters to measure and compare; the drafter in the output folder by default."""
    sets: tuple[str, ...] = ()
    """Public datasets instead of the held-out prompts; the paper's are gsm8k math500 humaneval mbpp mt_bench alpaca.
    Others: speed_bench (by category), speed_bench_1k, _2k, _8k, _16k and _32k (long prompts), and redhat."""
    sets_dir: str | None = None
    """Folder with a NAME.jsonl for each of `sets`, which may then have any name; the Hugging Face Hub by default."""
    temperatures: tuple[float, ...] = (0.0, 1.0)
    """Sampling temperatures to measure at (the paper: 0 and 1)."""
    max_new_tokens: int = 2048
    """Longest response in tokens."""
    num_prompts: int | None = None
    """Most prompts to take from each dataset; all by default."""
    widths: tuple[Width, ...] = ("full", "auto")
    """Verification lengths to measure.
    full: whole drafts, as tau is defined. auto: as `dpace generate`, the number of drafted or copied tokens that is
    fastest on this machine. An integer: that number of tokens, the known one included."""
    predict: bool = False
    """Also predict the speedup at each verification length and concurrency, and check it on a few prompts."""
    compiled: Literal["auto", "always", "never"] = "auto"
    """Also compare with plain decoding whose steps torch.compile compiles, which takes a minute or more to begin.
    auto: on an accelerator only."""
    server: str | None = None
    """Address of a running server to measure instead, http://host:port: vLLM, SGLang or llama.cpp with a drafter."""
    plain_server: str | None = None
    """Address of a server of the same target without a drafter, as the baseline of --bench.server."""
    concurrencies: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of requests at the same time, for servers and predictions."""
    seed: int = 0
    """Seed for sampling at a temperature above 0."""


@dataclass(frozen=True)
class CheckConfig:
    """Prove that a drafter does not change the text; the exit code is 1 where it does.

    The baseline (decoding without a drafter) must equal `generate` of transformers. In fp32, texts must equal the
    baseline token for token: greedy, and sampled with the same seed; for several block sizes, verification lengths,
    verify rules and batches. Sampled tokens and pairs must have the target's distribution (chi-square). No block may
    see its future. A block in training must equal the block when serving, with the same accepted lengths.

    In bf16, every difference in the text is listed with the target's margin, which tells a tie from a bug.
    """

    target: str
    """Folder or Hub id of the target."""
    drafter: str
    """Folder or Hub id of the drafter."""
    prompts: str = "demo"
    """JSONL file of prompts; `demo` is the held-out dataset that comes with dpace."""
    num_prompts: int = 4
    """Prompts to take from each dataset of the file."""
    max_new_tokens: int = 64
    """Longest response in tokens."""
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32",)
    """Precisions of the weights to check in."""
    device_map: DeviceMap = None
    """auto: spread the target's layers over all GPUs, for targets that are larger than one."""
    seed: int = 0
    """Seed for sampling."""
    responses: str | None = None
    """File of responses to read again: greedy answers of `dpace respond` must be the target's own, token for token."""
