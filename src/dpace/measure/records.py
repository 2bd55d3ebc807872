"""Keep finished responses on disk, so that an interrupted benchmark goes on after them."""

import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, TypeVar

from dpace import ranks
from dpace.config import Width
from dpace.data.prompts import Prompt
from dpace.data.typed_json import from_json, to_json
from dpace.ledger import claim, cut_unfinished, read_jsonl, write_text
from dpace.measure.results import Provenance, ServerSetup
from dpace.measure.rows import GroupRecord, ResponseRecord
from dpace.provenance import hash_json

Record = TypeVar("Record", ResponseRecord, GroupRecord)


class Records(Generic[Record]):
    """Finished responses or groups of them, kept in a file whose first line says all that changes them.

    Each way to measure has a file of its own, which its name tells by a hash of that line. So records of other weights,
    servers or settings are neither taken for new ones nor lost. Each rank of a command adds to a file of its own until
    `collect`.

    Args:
        path: of the files, without the hash.
        setup: what is measured, and how.
        prompts: their hash is kept with the setup.
        kind: of the records.

    Raises:
        ValueError: a line that holds no record; names it.
    """

    rows: list[Record]

    def __init__(self, path: Path, setup: Provenance | ServerSetup, prompts: Iterable[Prompt], kind: type[Record]):
        first = to_json(setup) | {"prompts_sha256": hash_json([asdict(prompt) for prompt in prompts])}
        self.path, self.kind = path.with_stem(f"{path.stem}-{hash_json(first)[:8]}"), kind
        self.own = self.path.with_suffix(f".rank-{ranks.rank()}.jsonl") if ranks.num_ranks() > 1 else self.path
        ranks.from_first(lambda: self._open(first))
        self.rows = self._read_all()

    def _open(self, first: dict[str, Any]) -> None:
        """Begin the file, or take it up with what several ranks have left."""
        claim(self.path.parent, self.path.name)
        cut_unfinished(self.path)
        lines = list(read_jsonl(self.path)) if self.path.exists() else []
        if not lines:
            write_text(self.path, json.dumps(first) + "\n")
        elif lines[0][1] != first:
            raise ValueError(f"{self.path}:1: it is of another measurement; move the file away")
        self._collect_parts()

    def _collect_parts(self) -> None:
        """Append what ranks have measured; a kill in between leaves lines twice, of which the last count."""
        for part in sorted(self.path.parent.glob(f"{self.path.stem}.rank-*.jsonl")):
            cut_unfinished(part)
            with self.path.open("ab") as file:
                file.write(part.read_bytes())
            part.unlink()

    def collect(self) -> None:
        """Let all ranks have the records of all of them, in one file."""
        if ranks.num_ranks() > 1:
            ranks.barrier()
            ranks.from_first(self._collect_parts)
            self.rows = self._read_all()

    def _read_all(self) -> list[Record]:
        return [self._read(self.kind, number, line) for number, line in list(read_jsonl(self.path))[1:]]

    def _read(self, kind: type[Record], number: int, line: dict) -> Record:
        try:
            return from_json(kind, line)
        except ValueError as error:
            raise ValueError(f"{self.path}:{number}: {error}; remove the line, and it is measured again") from error

    def add(self, record: Record) -> None:
        """Keep one, on disk at once."""
        self.rows.append(record)
        with self.own.open("a", encoding="utf-8") as file:
            file.write(json.dumps(to_json(record), allow_nan=False) + "\n")


class ResponseRecords(Records[ResponseRecord]):
    """Responses of a benchmark; of one that was measured twice, after an interruption, the last counts."""

    def __init__(self, path: Path, setup: Provenance, prompts: Iterable[Prompt]):
        super().__init__(path, setup, prompts, ResponseRecord)

    def of(self, temperatures: Collection[float], prompts: Sequence[Prompt]) -> list[ResponseRecord]:
        """Those of these temperatures and prompts, in the order of the prompts, whoever measured them."""
        place = {prompt.id: number for number, prompt in enumerate(prompts)}
        chosen = (r for r in self.rows if r.temperature in temperatures and r.id in place)
        last = {(r.drafter, r.width, r.temperature, r.id, r.turn): r for r in chosen}
        return sorted(last.values(), key=lambda r: place[r.id])

    def has(self, ways: Iterable[tuple[str, Width | None]], temperature: float, prompt: Prompt) -> bool:
        """Whether a prompt is done in all ways, by the drafter's name and the width."""
        found = {(r.drafter, r.width, r.turn) for r in self.of([temperature], [prompt])}
        return all((*way, turn) in found for way in ways for turn in range(len(prompt.turns)))
