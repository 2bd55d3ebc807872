"""Keep responses ready to train on in an Arrow file, which all ranks map into memory.

`responses.jsonl` is what `dpace respond` writes and people read. `corpus.arrow` beside it is made from it and from the
prompts, and is made again where these changed.
"""

import json
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pyarrow

from dpace.config import PromptsConfig
from dpace.prompts.prompts import prompt_files, split_ids
from dpace.respond.responses import Response, iterate_responses
from dpace.system.ledger import naming_file, register_files, writing
from dpace.system.provenance import hash_file

NAME, LOCK = "corpus.arrow", ".dpace.corpus.lock"
FORMAT = 1
"""Version of the file; another one is made again."""
BATCH_ROWS = 1000
"""Conversations that are in memory together while the file is written."""
MADE_FROM = b"dpace"
"""Key of the file's metadata that tells what it was made from."""
SCHEMA = pyarrow.schema(
    {
        "id": pyarrow.string(),
        "part": pyarrow.int8(),
        "place": pyarrow.int32(),
        "token_ids": pyarrow.list_(pyarrow.int32()),
        "response_spans": pyarrow.list_(pyarrow.int32()),
        "length": pyarrow.int32(),
    }
)
"""Columns: `part` and `place` are those of the prompt, `response_spans` has start and end in turn."""


class Corpus:
    """Conversations as token ids with the spans that the target wrote.

    Memory: 12 bytes a conversation where the table is mapped from a file.

    Args:
        table: of `SCHEMA`.
        order: numbers of the rows to give, in their order; all by default.
    """

    def __init__(self, table: pyarrow.Table, order: np.ndarray | None = None):
        self._table = table
        self._order = np.arange(len(table)) if order is None else order
        self.lengths = table["length"].to_numpy()[self._order]
        """Tokens of each conversation."""

    @classmethod
    def of(cls, responses: Iterable[Response]) -> "Corpus":
        """Make a corpus in memory."""
        return cls(pyarrow.Table.from_batches([_batch([(response, 0, i) for i, response in enumerate(responses)])]))

    def __len__(self):
        """Count the conversations."""
        return len(self._order)

    def _column(self, name: str, number: int) -> Any:
        """Return what a column has for a conversation."""
        return self._table[name][int(self._order[number])]

    def id(self, number: int) -> str:
        """Return the id of a conversation."""
        return self._column("id", number).as_py()

    def token_ids(self, number: int) -> np.ndarray:
        """Return the tokens of a conversation, without a copy."""
        return self._column("token_ids", number).values.to_numpy()

    def spans(self, number: int) -> np.ndarray:
        """Return the spans [start, end) of a conversation, "span 2", without a copy."""
        return self._column("response_spans", number).values.to_numpy().reshape(-1, 2)

    def num_anchors(self, max_length: int) -> np.ndarray:
        """Count for each conversation the places in its first tokens that a block can start from."""
        counts = [np.zeros(0, np.int64)]
        for column in self._table["response_spans"].chunks:
            offsets, values = column.offsets.to_numpy(), column.values.to_numpy()
            start, end = values[offsets[0] : offsets[-1]].reshape(-1, 2).astype(np.int64).T
            row = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets) // 2)
            of_span = np.maximum(np.minimum(end, max_length) - start - 1, 0)
            counts.append(np.bincount(row, of_span, len(offsets) - 1).astype(np.int64))
        return np.concatenate(counts)[self._order]


def _batch(rows: Sequence[tuple[Response, int, int]]) -> pyarrow.RecordBatch:
    """Put responses with the part and the place of their prompts into columns."""
    responses = [response for response, _, _ in rows]
    columns = [
        pyarrow.array([response.id for response in responses], pyarrow.string()),
        pyarrow.array([part for _, part, _ in rows], pyarrow.int8()),
        pyarrow.array([position for _, _, position in rows], pyarrow.int32()),
        _list_column([response.token_ids for response in responses]),
        _list_column([_merge(response.response_spans) for response in responses]),
        pyarrow.array([len(response.token_ids) for response in responses], pyarrow.int32()),
    ]
    return pyarrow.record_batch(columns, schema=SCHEMA)


def _list_column(lists: Sequence[list[int]]) -> pyarrow.ListArray:
    """Make a column of lists; an `array` takes a list of integers ten times as fast as Arrow does."""
    values = array("i")
    for integers in lists:
        values.fromlist(integers)
    offsets = np.cumsum([0, *map(len, lists)], dtype=np.int32)
    return pyarrow.ListArray.from_arrays(pyarrow.array(offsets), pyarrow.array(np.frombuffer(values, np.int32)))


def _merge(spans: Sequence[Sequence[int]]) -> list[int]:
    """Join spans that touch, leave out empty ones, and flatten them."""
    merged: list[int] = []
    for start, end in sorted(map(tuple, spans)):
        if end <= start:
            continue
        if merged and start <= merged[-1]:
            merged[-1] = max(merged[-1], end)
        else:
            merged += [start, end]
    return merged


def load_corpus(responses: Path, prompts: PromptsConfig) -> tuple[Corpus, Corpus]:
    """Map the responses to the prompts of training and of validation, in the order of the prompts.

    The first process to come makes the file where there is none of this kind; others wait for it.

    Args:
        responses: `responses.jsonl`.
        prompts: what was answered.

    Raises:
        ValueError: prompts or responses that cannot be read, or a `corpus.arrow` that dpace did not write.
        OSError: the disk is full.
    """
    path = responses.with_name(NAME)
    made_from = {
        "format": FORMAT,
        "responses": hash_file(responses),
        "prompts": json.loads(json.dumps(asdict(prompts))),
        "files": {str(file): hash_file(file) for file in prompt_files(prompts)},
    }
    with naming_file(path), filelock.FileLock(path.with_name(LOCK)):
        table = _map_file(path, made_from)
        if table is None:
            register_files(path.parent, path.name)
            _write_corpus(path, responses, prompts, made_from)
            table = _map_file(path, made_from)
    assert table is not None
    parts, places = table["part"].to_numpy(), table["place"].to_numpy()
    rows_of_parts = [np.flatnonzero(parts == part) for part in range(2)]
    train, validation = (Corpus(table, rows[np.argsort(places[rows])]) for rows in rows_of_parts)
    return train, validation


def _map_file(path: Path, made_from: dict[str, Any]) -> pyarrow.Table | None:
    """Map a file into memory; None where it was made from something else."""
    if not path.is_file():
        return None
    try:
        file = pyarrow.ipc.open_file(pyarrow.memory_map(str(path)))
        if json.loads((file.schema.metadata or {}).get(MADE_FROM, b"0")) != made_from:
            return None
        return file.read_all()
    except (pyarrow.ArrowException, OSError, ValueError):  # cut or damaged: it is made again
        return None


def _write_corpus(path: Path, responses: Path, prompts: PromptsConfig, made_from: dict[str, Any]) -> None:
    """Write the file, all or nothing, a batch at a time."""
    known = {
        name: (part, position)
        for part, names in enumerate(split_ids(prompts)[:2])
        for position, name in enumerate(names)
    }
    rows = ((r, *known[r.id]) for r in iterate_responses(responses) if r.id in known)
    schema = SCHEMA.with_metadata({MADE_FROM: json.dumps(made_from)})
    with writing(path) as unfinished, pyarrow.ipc.new_file(unfinished, schema) as file:
        while batch := list(islice(rows, BATCH_ROWS)):
            file.write_batch(_batch(batch))
