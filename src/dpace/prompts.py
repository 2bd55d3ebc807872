"""JSONL in, conversations out: the prompts that the target answers."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from dpace.config import PromptsConfig


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
    return Path(str(files("dpace") / "data" / f"demo_{part}.jsonl"))


def read_prompts(config: PromptsConfig, *, part: str = "train") -> list[Prompt]:
    """Read prompts.

    A line holds `messages` (roles and contents, the last from the user), or `turns` (user texts, answered one after the
    other), or `prompt` (one user text); and, if it likes, `id` and `set`.

    Args:
        config: where from and how many.
        part: `train` or `heldout`, of the demo's own prompts.

    Raises:
        ValueError: file and line of what cannot be read, an empty prompt, an id that occurs twice, or an empty file.
    """
    path = demo_path(part) if config.path == "demo" else Path(config.path)
    prompts, seen = [], set()
    for number, row in read_jsonl(path):
        if config.limit is not None and len(prompts) == config.limit:
            break
        prompt = _parse(row, f"{path}:{number}", default_set=path.stem)
        if prompt.id in seen:
            raise ValueError(f"{path}:{number}: the id {prompt.id!r} occurs twice; ids must be unique")
        seen.add(prompt.id)
        prompts.append(prompt)
    if not prompts:
        raise ValueError(f"{path} holds no prompt; write one JSON object a line with `messages`, `turns` or `prompt`")
    return prompts


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict]]:
    """Yield line numbers and objects; blank lines are skipped.

    Raises:
        ValueError: the file is missing, or a line is not a JSON object.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not JSON ({error}); mend or remove the line") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number}: expected a JSON object, found {type(row).__name__}")
        yield number, row


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
        if not turn or not all(isinstance(m, dict) and isinstance(m.get("content"), str) and m.get("role") for m in turn):
            raise ValueError(f"{where}: messages must be objects with `role` and a text `content`")
        if turn[-1]["role"] != "user" or not turn[-1]["content"].strip():
            raise ValueError(f"{where}: a turn must end with a user message that is not empty")
    if not turns:
        raise ValueError(f"{where}: `turns` is empty")
    return Prompt(str(row.get("id", where.rpartition(":")[2])), str(row.get("set", default_set)), turns)
