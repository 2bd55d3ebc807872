"""Read public datasets of prompts in the formats that published tables use."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from dpace.prompts.formats import Prompt, load_from_hub, read_prompts
from dpace.system.ledger import JsonObject, read_jsonl
from dpace.system.progress import note

MATH_SUFFIX = "\nPlease reason step by step, and put your final answer within \\boxed{}."
SHUFFLE_SEED = 0
WAY_OUT = "name a folder of JSONL files with --bench.sets-dir, or a file of its prompts in --prompts.decontaminate"
NOT_THERE = "FULL BENCHMARK DATA SHOULD BE FETCHED FROM THE SOURCE"
"""How SPEED-Bench's rows begin whose text lies in another dataset."""


class PublicSet(NamedTuple):
    """A public dataset of prompts, as published tables use it."""

    path: str
    """Repository on the Hugging Face Hub."""
    name: str | None
    """Configuration in the repository."""
    split: str
    turns: Callable[[JsonObject], list[str]]
    """Turns a row into the user's texts."""
    num_prompts: int | None
    """Number of prompts that published tables use; all for None."""
    files: tuple[str, ...] = ()
    """Files of the rows as their authors write them, of sets whose results are listed by `NAME/CATEGORY`.
    Where rows have no `category`, it is the file's name."""


def _speed_bench(name: str) -> PublicSet:
    """Describe a configuration of SPEED-Bench, also as NVIDIA's script writes it: `messages` for `turns`."""
    return PublicSet(
        "nvidia/SPEED-Bench",
        name,
        "test",
        lambda row: list(row["turns"]) if "turns" in row else [message["content"] for message in row["messages"]],
        None,
        files=(f"{name}.jsonl",),
    )


REDHAT_SUBSETS = "HumanEval math_reasoning qa question rag summarization tool_call translation writing".split()
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
    "speed_bench": _speed_bench("qualitative"),
    **{f"speed_bench_{size}": _speed_bench(f"throughput_{size}") for size in ("1k", "2k", "8k", "16k", "32k")},
    "redhat": PublicSet(
        "RedHatAI/speculator_benchmarks",
        None,
        "train",
        lambda row: [row["prompt"]] if isinstance(row["prompt"], str) else list(row["prompt"]),
        None,
        files=tuple(f"{name}.jsonl" for name in REDHAT_SUBSETS),
    ),
}
"""The paper's six datasets, SPEED-Bench and the sets of Red Hat's speculators.

Source: `dflash/benchmark.py` of z-lab/dflash; alpaca: its `model/utils.py` before commit 6e61414. SPEED-Bench
(arXiv 2604.09557): the card of nvidia/SPEED-Bench. Red Hat's: `scripts/evaluate` of vllm-project/speculators.
"""


def read_sets(names: Sequence[str], folder: str | Path | None = None, *, is_whole: bool = False) -> list[Prompt]:
    """Read public datasets, shuffled with a fixed seed and cut to the published number of prompts.

    Args:
        names: keys of `SETS`, or with a folder the names of its files.
        folder: has `NAME.jsonl` with prompts as `read_prompts` takes them; the Hugging Face Hub by default. For sets
            with categories it may also have the files that their authors publish or write.
        is_whole: all prompts, not the published number of them.

    Raises:
        ValueError: an unknown name, a file that cannot be read, no answer from the Hub, or a set without any text.
    """
    prompts = []
    for name in names:
        known = SETS.get(name)
        if known is None and folder is None:
            raise ValueError(
                f"there is no public dataset {name!r}; choose from {', '.join(SETS)}, or name a folder with "
                "--bench.sets-dir"
            )
        own = Path(folder or "") / f"{name}.jsonl"
        rows = _read_rows(known, folder) if known and (folder is None or not own.exists()) else []
        if rows:
            found = _with_text(name, [_to_prompt(name, i, row) for i, row in enumerate(rows)])
        else:
            begin = f"{name}/"  # ids are unique in a file only
            found = [
                replace(p, set=name + " (tools)" * ("tools" in p.turns[0][0]), id=begin + p.id.removeprefix(begin))
                for p in read_prompts(own)
            ]
        random.Random(SHUFFLE_SEED).shuffle(found)
        prompts += found[: known.num_prompts if known and not is_whole else None]
    return prompts


def _read_rows(known: PublicSet, folder: str | Path | None) -> Sequence[JsonObject]:
    """Read the rows of a set from the Hub, or from those files of its authors that a folder has.

    From the Hub they come file by file where it has no configurations but files.
    """
    if folder is None and (known.name or not known.files):
        return load_from_hub(known.path, known.name, known.split, WAY_OUT)
    rows: list[JsonObject] = []
    for file in known.files:
        if folder is None:
            of_file = load_from_hub(known.path, None, known.split, WAY_OUT, file)
        else:
            path = Path(folder) / file
            of_file = (row for _, row in read_jsonl(path)) if path.exists() else ()
        rows += ({"category": Path(file).stem, **row} for row in of_file)
    return rows


def _with_text(name: str, prompts: Sequence[Prompt]) -> list[Prompt]:
    """Leave out the rows whose text is not in the dataset, and say how many those are."""
    kept = [p for p in prompts if not any(NOT_THERE in m["content"] for turn in p.turns for m in turn)]
    if len(kept) < len(prompts):
        fix = "NVIDIA's prepare.py for SPEED-Bench fetches them; name its folder with --bench.sets-dir"
        lost = f"{len(prompts) - len(kept)} of the {len(prompts)} rows of {name} have their text in other datasets"
        if not kept:
            raise ValueError(f"{lost}, so none is left; {fix}")
        note(f"{lost} and are left out; {fix}")
    return kept


def _to_prompt(name: str, number: int, row: Any) -> Prompt:
    """Turn a row of a dataset into a prompt."""
    known = SETS[name]
    try:
        turns = [[{"role": "user", "content": text}] for text in known.turns(row) if text.strip()]
        if not turns:
            raise ValueError("the text is empty")
        return Prompt(f"{name}/{number}", f"{name}/{row['category']}" if known.files else name, turns)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"row {number} of {known.path} has no text where {name} has its prompts ({type(error).__name__}: {error}); "
            f"the dataset has changed: {WAY_OUT}"
        ) from error
