"""Keep finished responses on disk, so that an interrupted benchmark goes on after them."""

import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Generic, TypeVar

from dpace.config import Width
from dpace.data.prompts import Prompt
from dpace.data.typed_json import from_json, to_json
from dpace.ledger import cut_unfinished, read_jsonl
from dpace.measure.results import BenchSetup, ServerSetup
from dpace.measure.rows import GroupRecord, ResponseRecord
from dpace.provenance import hash_json

Record = TypeVar("Record", ResponseRecord, GroupRecord)


class Records(Generic[Record]):
    """Finished responses or groups of them, kept in a file whose first line says what was measured.

    A file of another measurement is begun again.

    Args:
        path: of the file.
        setup: what was measured.
        prompts: their hash is kept with the setup.
        kind: of the records.

    Raises:
        ValueError: a line that holds no record; names it.
    """

    rows: list[Record]

    def __init__(self, path: Path, setup: BenchSetup | ServerSetup, prompts: Iterable[Prompt], kind: type[Record]):
        self.path, self.rows = path, []
        first = to_json(setup) | {"prompts_sha256": hash_json([asdict(prompt) for prompt in prompts])}
        if path.exists():
            cut_unfinished(path)
            lines = list(read_jsonl(path))
            if lines and lines[0][1] == first:
                self.rows = [self._read(kind, number, line) for number, line in lines[1:]]
                return
        path.write_text(json.dumps(first) + "\n")

    def _read(self, kind: type[Record], number: int, line: dict) -> Record:
        try:
            return from_json(kind, line)
        except ValueError as error:
            raise ValueError(f"{self.path}:{number}: {error}; remove the line, and it is measured again") from error

    def add(self, record: Record) -> None:
        """Keep one, on disk at once."""
        self.rows.append(record)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(to_json(record)) + "\n")


class ResponseRecords(Records[ResponseRecord]):
    """Responses of a benchmark; of one that was measured twice, after an interruption, the last counts."""

    def __init__(self, path: Path, setup: BenchSetup, prompts: Iterable[Prompt]):
        super().__init__(path, setup, prompts, ResponseRecord)

    def of(self, temperatures: Collection[float], prompts: Sequence[Prompt]) -> list[ResponseRecord]:
        """Those of these temperatures and prompts."""
        ids = {prompt.id for prompt in prompts}
        chosen = (r for r in self.rows if r.temperature in temperatures and r.id in ids)
        return list({(r.drafter, r.width, r.temperature, r.id, r.turn): r for r in chosen}.values())

    def has(self, ways: Iterable[tuple[str, Width | None]], temperature: float, prompt: Prompt) -> bool:
        """Whether a prompt is done in all ways, by the drafter's name and the width."""
        found = {(r.drafter, r.width, r.turn) for r in self.of([temperature], [prompt])}
        return all((*way, turn) in found for way in ways for turn in range(len(prompt.turns)))
