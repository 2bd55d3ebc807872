"""Read the prompts that the target answers, and split them into parts."""

import json
import math
import random
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from dpace.config import PromptsConfig
from dpace.ledger import read_jsonl

MAX_SHOWN = 60
"""Characters of a wrong value that a message shows."""


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
    prompts. Then a tenth of the remaining ones (at most `num_validation`) is taken out for validation. Prompts that
    begin with the same turn count as one, since the target's answer to it is the same.

    Raises:
        ValueError: see `read_prompts`; also a held-out prompt that is in the training file too, or nothing left to
            train on.
    """
    is_demo = config.path == "demo"
    prompts = read_prompts(demo_path("train") if is_demo else config.path)
    heldout_path = config.heldout_path or (demo_path("heldout") if is_demo else None)
    if heldout_path:
        heldout, copies = _without_copies(read_prompts(heldout_path))
        texts = {canonical(prompt): prompt.id for prompt in prompts}
        shared = next((prompt for prompt in heldout if canonical(prompt) in texts), None)
        if shared:
            raise ValueError(
                f"the held-out prompt {shared.id!r} of {heldout_path} is also a training prompt, "
                f"{texts[canonical(shared)]!r} of {config.path}; remove it from one of the files"
            )
        heldout = _rename(heldout, {prompt.id for prompt in prompts})
    else:
        num_found = len(prompts)
        heldout, copies, prompts = _take_out(prompts, config.num_heldout, seed=0)
        if not heldout:
            raise ValueError(
                f"--prompts.num-heldout {config.num_heldout} and {config.path} with {num_found} prompts give no "
                "held-out ones, expected 1 or more and at least 10 different prompts; add prompts, or name a file of "
                "held-out prompts with --prompts.heldout-path"
            )
    validation, more_copies, prompts = _take_out(prompts, config.num_validation, seed=1)
    if copies + more_copies:
        print(
            f"{copies + more_copies} prompts are copies of held-out or validation prompts and are left out",
            file=sys.stderr,
        )
    return PromptParts(prompts[: config.limit], validation, heldout)


def canonical(prompt: Prompt) -> str:
    """Give the same text for prompts whose first turn says the same.

    The order of keys, white space around a text, and Unicode's ways of writing one character do not count.
    """
    messages = [{key: unicodedata.normalize("NFC", m[key]).strip() for key in m} for m in prompt.turns[0]]
    return json.dumps(messages, sort_keys=True)


def _take_out(prompts: list[Prompt], limit: int, *, seed: int) -> tuple[list[Prompt], int, list[Prompt]]:
    """Split off a random tenth of the different prompts, at most `limit`.

    Returns:
        The chosen prompts, the number of their copies, which are left out, and the rest.
    """
    keys = list(dict.fromkeys(map(canonical, prompts)))
    chosen = {keys[i] for i in random.Random(seed).sample(range(len(keys)), min(limit, len(keys) // 10))}
    taken, copies = _without_copies([prompt for prompt in prompts if canonical(prompt) in chosen])
    return taken, copies, [prompt for prompt in prompts if canonical(prompt) not in chosen]


def _without_copies(prompts: Sequence[Prompt]) -> tuple[list[Prompt], int]:
    """Keep the first of prompts that say the same; give them and the number of copies."""
    kept: dict[str, Prompt] = {}
    for prompt in prompts:
        kept.setdefault(canonical(prompt), prompt)
    return list(kept.values()), len(prompts) - len(kept)


def _rename(heldout: Sequence[Prompt], taken: set[str]) -> list[Prompt]:
    """Give held-out prompts ids that no training prompt has."""
    names = {prompt.id: prompt.id for prompt in heldout}
    others = taken | set(names)
    for name in taken & set(names):
        while names[name] in others:
            names[name] = f"heldout/{names[name]}"
        others.add(names[name])
    return [replace(prompt, id=names[prompt.id]) for prompt in heldout]


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
    kinds = [key for key in ("messages", "turns", "prompt") if key in row]
    if len(kinds) != 1:
        found = " and ".join(f"`{key}`" for key in kinds) or ", ".join(row) or "nothing"
        raise ValueError(f"{where}: expected `messages`, `turns` or `prompt`, found {found}; fix the line")
    (kind,) = kinds
    value = row[kind]
    if kind != "prompt" and not isinstance(value, list):
        raise ValueError(f"{where}: `{kind}` is {_shown(value)}, expected a list; fix the line")
    if not value and kind != "prompt":
        raise ValueError(f"{where}: `{kind}` is empty, expected one or more texts; fix the line")
    if kind == "messages":
        turns = [[_check_message(message, where) for message in value]]
    else:
        texts = value if kind == "turns" else [value]
        turns = [[{"role": "user", "content": _check_text(text, f"{where}: `{kind}`")}] for text in texts]
    for turn in turns:
        if turn[-1]["role"] != "user" or not turn[-1]["content"].strip():
            raise ValueError(
                f"{where}: a turn ends without a text of the user, expected one that is not empty; fix the line"
            )
    default_id = where.rpartition(":")[2]
    name, group = _check_name(row, "id", default_id, where), _check_name(row, "set", default_set, where)
    return Prompt(name, group, turns)


def _check_message(message: Any, where: str) -> dict[str, str]:
    """Check that a message has a role and a text, and other texts only."""
    if not isinstance(message, dict) or not message.get("role") or "content" not in message:
        raise ValueError(f"{where}: a message has no `role` or no text in `content`; fix the line")
    return {key: _check_text(value, f"{where}: `{key}` of a message") for key, value in message.items()}


def _check_text(value: Any, where: str) -> str:
    """Check that a value is a text that can be written as UTF-8."""
    if not isinstance(value, str):
        raise ValueError(f"{where} is {_shown(value)}, expected a text; fix the line")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} has half a character, {value[error.start]!a}; fix the line") from error
    return value


def _check_name(row: dict, key: str, default: str, where: str) -> str:
    """Read an id or the name of a set: a text or a number."""
    value = row.get(key, default)
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not isinstance(value, str) and not is_number or value == "":
        raise ValueError(f"{where}: `{key}` is {_shown(value)}, expected a text or a number; fix the line")
    return _check_text(str(value), f"{where}: `{key}`")


def _shown(value: Any) -> str:
    """Write a value for a message."""
    text = json.dumps(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
