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


def _alpaca_turns(row: JsonObject) -> list[str]:
    """Put the input of an instruction after it, where there is one."""
    text = row["instruction"]
    if row["input"]:
        text += f"\n\nInput:\n{row['input']}"
    return [text]


def _texts(row: JsonObject) -> list[str]:
    """Take `messages`, as NVIDIA's script writes them, else `turns` or `prompt`: one text or a list of them."""
    if "messages" in row:
        return [message["content"] for message in row["messages"]]
    texts = row["turns"] if "turns" in row else row["prompt"]
    return [texts] if isinstance(texts, str) else list(texts)


def _speed_bench(name: str) -> PublicSet:
    """Describe a configuration of SPEED-Bench."""
    return PublicSet("nvidia/SPEED-Bench", name, "test", _texts, None, files=(f"{name}.jsonl",))


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
    "mbpp": PublicSet("google-research-datasets/mbpp", "sanitized", "test", _texts, 128),
    "mt_bench": PublicSet("HuggingFaceH4/mt_bench_prompts", None, "train", _texts, 80),
    "alpaca": PublicSet("tatsu-lab/alpaca", None, "train", _alpaca_turns, 128),
    "speed_bench": _speed_bench("qualitative"),
    "speed_bench_1k": _speed_bench("throughput_1k"),
    "speed_bench_2k": _speed_bench("throughput_2k"),
    "speed_bench_8k": _speed_bench("throughput_8k"),
    "speed_bench_16k": _speed_bench("throughput_16k"),
    "speed_bench_32k": _speed_bench("throughput_32k"),
    "redhat": PublicSet(
        "RedHatAI/speculator_benchmarks",
        None,
        "train",
        _texts,
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
        path = Path(folder or "") / f"{name}.jsonl"
        has_file = folder is not None and path.exists()
        rows = []
        if known and not has_file:
            rows = _read_rows(known, folder)
        if rows:
            of_set = _with_text(name, [_to_prompt(name, number, row) for number, row in enumerate(rows)])
        else:
            # Where the folder has no file of the set at all, this names the one that it may have.
            of_set = []
            for prompt in read_prompts(path):
                prompt_id = prompt.id.removeprefix(f"{name}/")  # ids are unique in a file only
                of_set.append(replace(prompt, set=name, id=f"{name}/{prompt_id}"))
        # As the published benchmark does: shuffled first and then cut, so that the same prompts are measured.
        random.Random(SHUFFLE_SEED).shuffle(of_set)
        if known and not is_whole:
            of_set = of_set[: known.num_prompts]
        prompts += of_set
    return prompts


def _read_rows(known: PublicSet, folder: str | Path | None) -> Sequence[JsonObject]:
    """Read the rows of a set from the Hub, or from those files of its authors that a folder has.

    From the Hub they come file by file where it has no configurations but files.
    """
    if folder is None and (known.name or not known.files):
        return load_from_hub(known.path, known.name, known.split, WAY_OUT)
    rows: list[JsonObject] = []
    for file in known.files:
        of_file = []  # of files that a folder lacks
        if folder is None:
            of_file = load_from_hub(known.path, None, known.split, WAY_OUT, file)
        elif (Path(folder) / file).exists():
            of_file = [row for _, row in read_jsonl(Path(folder) / file)]
        for row in of_file:
            rows.append({"category": Path(file).stem} | row)
    return rows


def _with_text(name: str, prompts: Sequence[Prompt]) -> list[Prompt]:
    """Leave out the rows whose text is not in the dataset, and say how many there are of them."""
    complete = []
    for prompt in prompts:
        texts = [message["content"] for turn in prompt.turns for message in turn]
        if not any(NOT_THERE in text for text in texts):
            complete.append(prompt)
    if len(complete) < len(prompts):
        fix = "NVIDIA's prepare.py for SPEED-Bench fetches them; name its folder with --bench.sets-dir"
        lost = f"{len(prompts) - len(complete)} of the {len(prompts)} rows of {name} have their text in other datasets"
        if not complete:
            raise ValueError(f"{lost}, so none is left; {fix}")
        note(f"{lost} and are left out; {fix}")
    return complete


def _to_prompt(name: str, number: int, row: Any) -> Prompt:
    """Turn a row of a dataset into a prompt."""
    known = SETS[name]
    try:
        turns = [[{"role": "user", "content": text}] for text in known.turns(row) if text.strip()]
        if not turns:
            raise ValueError("the text is empty")
        set_name = name
        if known.files:  # each category is a set of its own in the results
            set_name += f"/{row['category']}"
        return Prompt(f"{name}/{number}", set_name, turns)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"row {number} of {known.path} has no text where {name} has its prompts ({type(error).__name__}: {error}); "
            f"the dataset has changed: {WAY_OUT}"
        ) from error
