"""JSONL in, conversations out: the prompts that the target answers."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from dpace.config import PromptsConfig
from dpace.data.ledger import read_jsonl


@dataclass(frozen=True)
class Prompt:
    """One conversation to be answered."""

    id: str
    """Unique within a file."""
    set: str
    """Name of the group it is reported under."""
    turns: list[list[dict[str, str]]]
    """Messages to add, turn by turn; the target answers after each turn."""


def demo_path(part: str) -> Path:
    """The demo's prompts, `train` or `heldout`."""
    return Path(str(files("dpace") / "demo" / f"{part}.jsonl"))


class PromptParts(NamedTuple):
    """Prompts by what they are for; no prompt is in two parts."""

    train: list[Prompt]
    validation: list[Prompt]
    """Chooses the checkpoint; may be empty."""
    heldout: list[Prompt]
    """What is reported is measured on these, and nothing is chosen by them."""


def split_prompts(config: PromptsConfig) -> PromptParts:
    """Read the prompts and split them in three parts.

    Without a file of held-out prompts, a fixed random tenth (at most `num_heldout`) is taken out of the training prompts; then a
    tenth of what is left (at most `num_validation`) for validation.

    Raises:
        ValueError: see `read_prompts`; also a held-out prompt that is in the training file too, or nothing left to train on.
    """
    is_demo = config.path == "demo"
    prompts = read_prompts(demo_path("train") if is_demo else config.path)
    heldout_path = config.heldout_path or (demo_path("heldout") if is_demo else None)
    if heldout_path:
        heldout = read_prompts(heldout_path)
        texts = {json.dumps(prompt.turns) for prompt in prompts}
        shared = next((prompt.id for prompt in heldout if json.dumps(prompt.turns) in texts), None)
        if shared:
            raise ValueError(
                f"the held-out prompt {shared!r} is also a training prompt; remove it from one of the files"
            )
        ids = {prompt.id for prompt in prompts}
        heldout = [replace(p, id=f"heldout/{p.id}") if p.id in ids else p for p in heldout]
    else:
        heldout, prompts = _take_out(prompts, config.num_heldout, seed=0)
        if not heldout:
            raise ValueError(f"{config.path} has {len(prompts)} prompts; give at least 10, or --prompts.heldout-path")
    validation, prompts = _take_out(prompts, config.num_validation, seed=1)
    return PromptParts(prompts[: config.limit], validation, heldout)


def _take_out(prompts: list[Prompt], limit: int, *, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """A random tenth, at most `limit`, and the rest."""
    chosen = set(random.Random(seed).sample(range(len(prompts)), min(limit, len(prompts) // 10)))
    return [p for i, p in enumerate(prompts) if i in chosen], [p for i, p in enumerate(prompts) if i not in chosen]


def first_of_each_set(prompts: Sequence[Prompt], limit: int | None) -> list[Prompt]:
    """The first `limit` prompts of each set, all of them for None, in their order."""
    counts: dict[str, int] = {}
    chosen = []
    for prompt in prompts:
        counts[prompt.set] = counts.get(prompt.set, 0) + 1
        if limit is None or counts[prompt.set] <= limit:
            chosen.append(prompt)
    return chosen


def find_prompt(text: str) -> list[dict[str, str]]:
    """The messages of `FILE#ID`, one of a file's prompts (`demo#ID`: of the demo's held-out ones), or of a plain text.

    Raises:
        ValueError: the file has no prompt of that id; the message names one that it has.
    """
    name, _, prompt_id = text.partition("#")
    if name != "demo" and not name.endswith(".jsonl"):
        return [{"role": "user", "content": text}]
    prompts = read_heldout(name)
    for prompt in prompts:
        if prompt.id == prompt_id:
            return prompt.turns[0]
    raise ValueError(f"{name} has no prompt with the id {prompt_id!r}; one that it has is {prompts[0].id!r}")


def read_heldout(name: str) -> list[Prompt]:
    """Read a file of prompts, or for `demo` those that the demo measures on; see `read_prompts`."""
    return read_prompts(demo_path("heldout") if name == "demo" else name)


def read_prompts(path: str | Path) -> list[Prompt]:
    """Read a file of prompts.

    A line holds `messages` (roles and contents, the last from the user), or `turns` (user texts, answered one after the
    other), or `prompt` (one user text); and, if it likes, `id` and `set`.

    Raises:
        ValueError: file and line of what cannot be read, an empty prompt, an id that occurs twice, or an empty file.
    """
    path = Path(path)
    prompts, seen = [], set()
    for number, row in read_jsonl(path):
        prompt = _parse(row, f"{path}:{number}", default_set=path.stem)
        if prompt.id in seen:
            raise ValueError(f"{path}:{number}: the id {prompt.id!r} occurs twice; ids must be unique")
        seen.add(prompt.id)
        prompts.append(prompt)
    if not prompts:
        raise ValueError(f"{path} holds no prompt; write one JSON object a line with `messages`, `turns` or `prompt`")
    return prompts


def _parse(row: dict, where: str, *, default_set: str) -> Prompt:
    if "messages" in row:
        turns = [row["messages"]]
    elif "turns" in row:
        turns = [[{"role": "user", "content": text}] for text in row["turns"]]
    elif "prompt" in row:
        turns = [[{"role": "user", "content": row["prompt"]}]]
    else:
        raise ValueError(f"{where}: none of `messages`, `turns` and `prompt`; found {', '.join(row) or 'nothing'}")
    for turn in turns:
        if not turn or not all(
            isinstance(m, dict) and isinstance(m.get("content"), str) and m.get("role") for m in turn
        ):
            raise ValueError(f"{where}: messages must be objects with `role` and a text `content`")
        if turn[-1]["role"] != "user" or not turn[-1]["content"].strip():
            raise ValueError(f"{where}: a turn must end with a user message that is not empty")
    if not turns:
        raise ValueError(f"{where}: `turns` is empty")
    return Prompt(str(row.get("id", where.rpartition(":")[2])), str(row.get("set", default_set)), turns)
