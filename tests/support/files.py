"""Prompts and JSON files as many tests write them."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dpace.prompts.prompts import Prompt


def make_prompts(texts: Iterable[str], name: str = "s") -> list[Prompt]:
    """Prompts of one turn each, numbered from 0."""
    return [Prompt(str(i), name, [[{"role": "user", "content": text}]]) for i, text in enumerate(texts)]


def write_rows(path: Path, rows: Iterable[dict]) -> str:
    """A line of JSON for each row; gives the file's name."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_prompts(path: Path, texts: Iterable[str]) -> str:
    return write_rows(path, ({"prompt": text} for text in texts))


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def change_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(read_json(path) | changes))
