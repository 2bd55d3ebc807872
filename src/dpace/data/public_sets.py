"""Read public datasets of prompts in the formats that published tables use."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dpace.data.formats import Prompt, load_from_hub, read_prompts

MATH_SUFFIX = "\nPlease reason step by step, and put your final answer within \\boxed{}."
SHUFFLE_SEED = 0
WAY_OUT = "name a folder of JSONL files with --bench.sets-dir"


@dataclass(frozen=True)
class PublicSet:
    """A public dataset of prompts, as published tables use it."""

    path: str
    """Repository on the Hugging Face Hub."""
    name: str | None
    """Configuration in the repository."""
    split: str
    turns: Callable[[dict[str, Any]], list[str]]
    """Turns a row into the user's texts."""
    num_prompts: int
    """Number of prompts that published tables use."""


SETS = {
    "gsm8k": PublicSet("openai/gsm8k", "main", "test", lambda row: [row["question"] + MATH_SUFFIX], 128),
    "math500": PublicSet("HuggingFaceH4/MATH-500", None, "test", lambda row: [row["problem"] + MATH_SUFFIX], 128),
    "humaneval": PublicSet(
        "openai/openai_humaneval",
        None,
        "test",
        lambda row: [
            "Write a solution to the following problem and make sure that it passes the tests:\n"
            f"```python\n{row['prompt']}\n```"
        ],
        164,
    ),
    "mbpp": PublicSet("google-research-datasets/mbpp", "sanitized", "test", lambda row: [row["prompt"]], 128),
    "mt_bench": PublicSet("HuggingFaceH4/mt_bench_prompts", None, "train", lambda row: list(row["prompt"]), 80),
    "alpaca": PublicSet(
        "tatsu-lab/alpaca",
        None,
        "train",
        lambda row: [row["instruction"] + (f"\n\nInput:\n{row['input']}" if row["input"] else "")],
        128,
    ),
}
"""The paper's six datasets.

Source: `dflash/benchmark.py` of z-lab/dflash; alpaca: its `model/utils.py` before commit 6e61414.
"""


def read_sets(names: Sequence[str], folder: str | Path | None = None, *, is_whole: bool = False) -> list[Prompt]:
    """Read public datasets, shuffled with a fixed seed and cut to the published number of prompts.

    Args:
        names: keys of `SETS`, or with a folder the names of its files.
        folder: has `NAME.jsonl` with prompts as `read_prompts` takes them; the Hugging Face Hub by default.
        is_whole: all prompts, not the published number of them.

    Raises:
        ValueError: an unknown name, a file that cannot be read, or no answer from the Hub.
    """
    prompts = []
    for name in names:
        known = SETS.get(name)
        if folder is not None:
            rows = [replace(prompt, set=name) for prompt in read_prompts(Path(folder) / f"{name}.jsonl")]
        elif known is None:
            raise ValueError(
                f"there is no public dataset {name!r}; choose from {', '.join(SETS)}, or name a folder with "
                "--bench.sets-dir"
            )
        else:
            rows = [
                _read_row(name, i, row)
                for i, row in enumerate(load_from_hub(known.path, known.name, known.split, WAY_OUT))
            ]
        random.Random(SHUFFLE_SEED).shuffle(rows)
        prompts += rows[: known.num_prompts if known and not is_whole else None]
    return prompts


def _read_row(name: str, number: int, row: Any) -> Prompt:
    """Turn a row of a dataset into a prompt."""
    try:
        texts = SETS[name].turns(row)
        turns = [[{"role": "user", "content": text}] for text in texts if text.strip()]
    except (KeyError, TypeError, AttributeError) as error:
        turns = []
        reason = f" ({type(error).__name__}: {error})"
    else:
        reason = ""
    if not turns:
        raise ValueError(
            f"row {number} of {SETS[name].path} has no text where {name} has its prompts{reason}; the dataset has "
            "changed: name a folder of JSONL files with --bench.sets-dir"
        )
    return Prompt(f"{name}/{number}", name, turns)
