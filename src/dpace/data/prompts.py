"""Read the prompts that the target answers, and split them into parts."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from dpace.config import PromptsConfig
from dpace.ledger import read_jsonl


@dataclass(frozen=True)
class Prompt:
    """One conversation to be answered."""

    id: str
    """Name of the prompt, unique within its file."""
    set: str
    """Name of the dataset that the prompt belongs to; results are reported by dataset."""
    turns: list[list[dict[str, str]]]
    """Messages of each turn; the target answers after each turn."""


def demo_path(part: str) -> Path:
    """Give the file of the demo's prompts, `train` or `heldout`."""
    return Path(str(files("dpace") / "demo" / f"{part}.jsonl"))


class PromptParts(NamedTuple):
    """Prompts by their purpose; no prompt is in two parts."""

    train: list[Prompt]
    validation: list[Prompt]
    """Prompts that choose the best checkpoint; may be empty."""
    heldout: list[Prompt]
    """Prompts that reported numbers are measured on; nothing is chosen by them."""


def split_prompts(config: PromptsConfig) -> PromptParts:
    """Read the prompts and split them into three parts.

    Without a file of held-out prompts, a fixed random tenth (at most `num_heldout`) is taken out of the training
    prompts. Then a tenth of the remaining ones (at most `num_validation`) is taken out for validation.

    Raises:
        ValueError: see `read_prompts`; also a held-out prompt that is in the training file too, or nothing left to
            train on.
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
            raise ValueError(
                f"{config.path} has {len(prompts)} prompts, too few to take held-out ones from; add prompts up to at "
                "least 10, or name a file of held-out prompts with --prompts.heldout-path"
            )
    validation, prompts = _take_out(prompts, config.num_validation, seed=1)
    return PromptParts(prompts[: config.limit], validation, heldout)


def _take_out(prompts: list[Prompt], limit: int, *, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """Split off a random tenth, at most `limit` prompts; give them and the rest."""
    chosen = set(random.Random(seed).sample(range(len(prompts)), min(limit, len(prompts) // 10)))
    return [p for i, p in enumerate(prompts) if i in chosen], [p for i, p in enumerate(prompts) if i not in chosen]


def first_of_each_set(prompts: Sequence[Prompt], limit: int | None) -> list[Prompt]:
    """Choose the first `limit` prompts of each dataset, in their order; all of them for None."""
    counts: dict[str, int] = {}
    chosen = []
    for prompt in prompts:
        counts[prompt.set] = counts.get(prompt.set, 0) + 1
        if limit is None or counts[prompt.set] <= limit:
            chosen.append(prompt)
    return chosen


def find_prompt(text: str) -> list[dict[str, str]]:
    """Find the messages that a text stands for.

    `FILE#ID` is a prompt of a file and `demo#ID` one of the demo's held-out prompts; other text is the user's message.

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
    raise ValueError(f"{name} has no prompt with the id {prompt_id!r}; name one that it has, such as {prompts[0].id!r}")


def read_heldout(name: str) -> list[Prompt]:
    """Read a file of prompts as `read_prompts` does, or for `demo` the demo's held-out prompts."""
    return read_prompts(demo_path("heldout") if name == "demo" else name)


def read_prompts(path: str | Path) -> list[Prompt]:
    """Read a file of prompts.

    A line holds `messages` (roles and contents, the last from the user), or `turns` (user texts, answered one after the
    other), or `prompt` (one user text). It may also hold `id` and `set`.

    Raises:
        ValueError: file and line of what cannot be read, an empty prompt, an id that occurs twice, or an empty file.
    """
    path = Path(path)
    prompts, ids = [], set()
    for number, row in read_jsonl(path):
        prompt = _parse(row, f"{path}:{number}", default_set=path.stem)
        if prompt.id in ids:
            raise ValueError(
                f"{path}:{number}: the id {prompt.id!r} occurs twice, expected unique ids; change one of them"
            )
        ids.add(prompt.id)
        prompts.append(prompt)
    if not prompts:
        raise ValueError(
            f"{path} holds no prompt; write one JSON object on each line with `messages`, `turns` or `prompt`"
        )
    return prompts


def _parse(row: dict, where: str, *, default_set: str) -> Prompt:
    """Turn one line of a file into a prompt."""
    if "messages" in row:
        turns = [row["messages"]]
    elif "turns" in row:
        turns = [[{"role": "user", "content": text}] for text in row["turns"]]
    elif "prompt" in row:
        turns = [[{"role": "user", "content": row["prompt"]}]]
    else:
        raise ValueError(
            f"{where}: expected `messages`, `turns` or `prompt`, found {', '.join(row) or 'nothing'}; fix the line"
        )
    for turn in turns:
        if not turn or not all(
            isinstance(m, dict) and isinstance(m.get("content"), str) and m.get("role") for m in turn
        ):
            raise ValueError(f"{where}: a message has no `role` or no text in `content`; fix the line")
        if turn[-1]["role"] != "user" or not turn[-1]["content"].strip():
            raise ValueError(
                f"{where}: a turn ends without a text of the user, expected one that is not empty; fix the line"
            )
    if not turns:
        raise ValueError(f"{where}: `turns` is empty, expected one or more texts; fix the line")
    return Prompt(str(row.get("id", where.rpartition(":")[2])), str(row.get("set", default_set)), turns)
