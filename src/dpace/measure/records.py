"""Keep finished responses on disk, so that an interrupted benchmark goes on after them."""

import json
from collections.abc import Sequence
from pathlib import Path

from dpace.data.ledger import cut_unfinished, read_jsonl
from dpace.data.prompts import Prompt
from dpace.measure.results import Engines


class Records:
    """Finished responses or groups of them, kept in a file whose first line says what was measured."""

    def __init__(self, path: Path, meta: dict):
        self.path, self.is_warm, self.rows = path, False, []
        if path.exists():
            cut_unfinished(path)
            lines = [row for _, row in read_jsonl(path)]
            if lines and lines[0] == meta:
                self.rows = lines[1:]
                return
        path.write_text(json.dumps(meta) + "\n")

    def of(self, temperatures: Sequence[float], prompts: Sequence[Prompt]) -> list[dict]:
        """Those of these temperatures and prompts."""
        ids = {prompt.id for prompt in prompts}
        return [row for row in self.rows if row["temperature"] in temperatures and row["id"] in ids]

    def add(self, record: dict) -> None:
        """Keep one, on disk at once."""
        self.rows.append(record)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def has(self, engines: Engines, temperature: float, prompt: Prompt) -> bool:
        """Whether a prompt is done with all engines; what there is of one that is not is dropped."""
        found = [r for r in self.rows if r["temperature"] == temperature and r["id"] == prompt.id]
        if len(found) == len(engines) * len(prompt.turns):
            return True
        self.rows = [r for r in self.rows if r not in found]
        return False
