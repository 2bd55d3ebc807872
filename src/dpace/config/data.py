"""Options of prompts, answers and sampling."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the tokens of a response are chosen, and how many there are at most."""

    max_new_tokens: int = 256
    """Length of the response in tokens; it is shorter only where a stop token comes first."""
    temperature: float = 0.0
    """Sampling temperature, 0 or more; 0 always takes the most likely token (greedy)."""
    top_k: int = 0
    """Sample only from this number of most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Sample only from the most likely tokens whose probabilities sum to this value, above 0 to 1; 1 keeps all."""
    min_p: float = 0.0
    """Sample only from tokens with at least this fraction of the highest probability, 0 to 1; 0 keeps all."""
    seed: int | None = None
    """Seed for sampling at a temperature above 0; torch's global random generator by default."""


@dataclass(frozen=True)
class PromptsConfig:
    """Where the prompts come from, and which of them are kept for measuring."""

    path: str = "demo"
    """JSONL, JSON or parquet file, or a dataset on the Hub as OWNER/NAME:SPLIT; `demo` comes with dpace.
    docs/data.md lists the keys that a row may have."""
    heldout_path: str | None = None
    """JSONL file of prompts to measure on, none of which may be a training prompt.
    By default `demo` has its own file; for other prompts, a random part is taken out of `path` before training."""
    num_heldout: int = 64
    """Prompts taken out of `path` to measure on, at most a tenth of them; unused where held-out prompts have a file."""
    num_validation: int = 32
    """Prompts taken out of training, at most a tenth of them, to choose the best checkpoint by."""
    limit: int | None = None
    """Number of prompts to train on, from the start of the file; all of them by default."""
    decontaminate: tuple[str, ...] = ()
    """Public datasets (see --bench.sets), or files of prompts, that no training prompt may repeat.
    A prompt is left out where it shares 13 words in a row with one of theirs."""
    near_duplicates: float | None = None
    """Leave out training prompts that nearly repeat an earlier or a held-out one; needs the package datasketch.
    The value is the least share of common word runs, above 0 to 1; 0.8 is usual. By default only copies of held-out
    prompts are left out."""


@dataclass(frozen=True)
class RespondConfig:
    """How the target answers the prompts that a drafter is trained and measured on."""

    source: Literal["target", "own"] = "target"
    """Where the answers come from.
    target: the target writes them. own: the prompts' file has them, as a reply at the end of each conversation."""
    max_new_tokens: int = 2048
    """Longest response in tokens (2048 in DFlash's benchmark)."""
    temperature: float = 0.0
    """Sampling temperature; 0 (greedy) gives the text that speculative decoding reproduces."""
    batch_size: int = 32
    """Number of prompts that are answered together, in this process or by each server; lower it where memory is short.
    """
    seed: int = 0
    """Seed for sampling at a temperature above 0; each prompt draws with a seed of its own that follows from it."""
    server: tuple[str, ...] = ()
    """Addresses of running servers of the target that answer instead, http://host:port: vLLM, SGLang or llama.cpp.
    The environment variable DPACE_API_KEY has the key where they want one."""
    retry_seconds: float = 600.0
    """Time in which a server that fails or is busy is asked again, with growing waits, before it is given up."""
