"""Keep responses ready to train on in an Arrow file, which all ranks map into memory.

`responses.jsonl` is what `dpace respond` writes and people read. `corpus.arrow` beside it is made from it and from the
prompts, and is made again where these changed.
"""

import json
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow

from dpace.config import PromptsConfig, Recipe
from dpace.prompts.formats import iterate_prompts
from dpace.prompts.prompts import prompt_files, sources_of, split_ids
from dpace.recipes.validation import to_json
from dpace.respond.conversation import own_messages
from dpace.respond.responses import Response, iterate_responses, read_meta
from dpace.system.ledger import lock_file, naming_file, register_files, writing
from dpace.system.progress import count, note
from dpace.system.provenance import hash_file, hash_json, same_run

NAME = "corpus.arrow"
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
        return cls(_table((response, 0, i) for i, response in enumerate(responses)))

    def take(self, numbers: np.ndarray) -> "Corpus":
        """Return some of the conversations, without a copy."""
        return Corpus(self._table, self._order[numbers])

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
        spans = self._table["response_spans"].combine_chunks()
        start, end = spans.flatten().to_numpy().reshape(-1, 2).T
        row = np.repeat(np.arange(len(spans)), np.diff(spans.offsets.to_numpy()) // 2)
        of_span = np.maximum(np.minimum(end, max_length) - start - 1, 0)
        return np.bincount(row, of_span, len(spans)).astype(np.int64)[self._order]


def _batches(rows: Iterator[tuple[Response, int, int]]) -> Iterator[pyarrow.RecordBatch]:
    """Put responses with the part and the place of their prompts into columns, some at a time."""
    while some := list(islice(rows, BATCH_ROWS)):
        filled = [
            {
                "id": response.id,
                "part": part,
                "place": place,
                "token_ids": np.array(array("i", response.token_ids)),  # several times as fast as a list
                "response_spans": list(chain(*response.response_spans)),
                "length": len(response.token_ids),
            }
            for response, part, place in some
        ]
        yield pyarrow.RecordBatch.from_pylist(filled, SCHEMA)


def _table(rows: Iterator[tuple[Response, int, int]]) -> pyarrow.Table:
    """Put rows into columns in memory."""
    return pyarrow.Table.from_batches(_batches(rows), SCHEMA)


def read_corpora(path: Path, parts: Sequence[Sequence[str]]) -> list[Corpus]:
    """Read what is trained on of the answers to the prompts of each part, in their order, into memory.

    Args:
        path: of `responses.jsonl`.
        parts: ids of prompts; those without an answer are left out.
    """
    known = _places(parts)
    found = ((row, *known[row.id]) for row in iterate_responses(path) if row.id in known)
    return _divide(_table(found), len(parts))


def _places(parts: Sequence[Sequence[str]]) -> dict[str, tuple[int, int]]:
    """Return the part and the place in it of each id."""
    return {name: (part, place) for part, names in enumerate(parts) for place, name in enumerate(names)}


def _divide(table: pyarrow.Table, num_parts: int) -> list[Corpus]:
    """Divide a table into its parts, each in the order of its prompts."""
    order = np.argsort(table["place"].to_numpy())
    parts = table["part"].to_numpy()[order]
    return [Corpus(table, order[parts == part]) for part in range(num_parts)]


class Answers:
    """The answers in a recipe's folder, and what made them.

    Args:
        recipe: names the folder and the prompts.
        respond: the command that writes the answers.

    Raises:
        ValueError: there are none, not all prompts are answered, it is not known what made the answers, they were
            changed, or they were made with another `thinking`.
    """

    def __init__(self, recipe: Recipe, respond: str):
        self.prompts = recipe.prompts
        self.respond = respond
        self.path = recipe.responses_path
        prompt_files(recipe.prompts)  # refuses a missing file before the advice to answer it
        if not self.path.exists():
            raise ValueError(self._none())
        self.meta = read_meta(self.path)
        fault = None
        if self.meta.get("complete") is False:
            fault = "holds the answers of an interrupted `dpace respond`"
        elif "target" not in self.meta:
            fault = "has no meta file beside it that says which target made the answers"
        elif self.meta.get("responses_sha256") not in (None, hash_file(self.path)):
            fault = "was changed after `dpace respond` wrote it"
        if fault:
            raise ValueError(f"{self.path} {fault}; run `{respond}`, which goes on with it or says what to do")
        self.refuse_others({"thinking": recipe.thinking})

    def _none(self) -> str:
        return f"{self.path} has no answers to these prompts; write them first with `{self.respond}`"

    def load(self) -> tuple[Corpus, Corpus]:
        """Map those to train on and those of validation; see `load_corpus`.

        Raises:
            ValueError: none to train on.
        """
        parts = load_corpus(self.path, self.prompts)
        if not len(parts[0]):
            raise ValueError(self._none())
        return parts

    def refuse_others(self, known: Mapping[str, Any]) -> None:
        """Refuse answers that another target gave, or that were made in another way.

        Raises:
            ValueError: names the first thing that differs, with both values.
        """
        answered = {**self.meta, "dtype": str(self.meta.get("dtype")).removeprefix("torch.")}
        compared = {name: value for name, value in known.items() if name in self.meta}
        way_out = (
            "train on the target's own answers: set --target, --dtype and --thinking as they were, or write new "
            f"answers into another folder with `{self.respond}`"
        )
        same_run(answered, compared, f"the answers in {self.path} were made", way_out)


def load_corpus(responses: Path, prompts: PromptsConfig) -> tuple[Corpus, Corpus]:
    """Map the responses to the prompts of training and of validation, in the order of the prompts.

    The first process to come makes the file where there is none of this kind; others wait for it.

    Raises:
        ValueError: prompts or responses that cannot be read, or a `corpus.arrow` that dpace did not write.
        OSError: the disk is full.
    """
    path = responses.with_name(NAME)
    made_from = {
        "format": FORMAT,
        "responses": hash_file(responses),
        "prompts": to_json(prompts),
        "files": {str(file): hash_file(file) for file in prompt_files(prompts)},
    }
    with naming_file(path), lock_file(path):
        table = _map_file(path, made_from)
        if table is None:
            register_files(path.parent, path.name)
            known = _places(split_ids(prompts)[:2])
            schema = SCHEMA.with_metadata({MADE_FROM: json.dumps(made_from)})
            part = path.with_name(f".{path.stem}.part")  # whoever locks the folder meanwhile leaves it there
            with writing(path, part), pyarrow.ipc.new_file(part, schema) as file:
                for batch in _batches(_find_answers(responses, prompts, known)):
                    file.write_batch(batch)
            table = _map_file(path, made_from)
            assert table is not None
            if missing := len(known) - len(table):
                note(f"{count(missing, 'prompt')} left out: no answer; `dpace respond` asks for them")
    train, validation = _divide(table, 2)
    return train, validation


def _find_answers(
    responses: Path, prompts: PromptsConfig, known: Mapping[str, tuple[int, int]]
) -> Iterator[tuple[Response, int, int]]:
    """Yield the responses to known prompts, and refuse those to other texts: hashes of all texts are in memory."""
    is_own = read_meta(responses).get("source") == "own"
    asked: dict[str, Any] = {}
    for prompt in iterate_prompts(sources_of(prompts)[0]):
        if prompt.id in known:
            turns = [own_messages(prompt)] if is_own else prompt.turns
            asked[prompt.id] = [*map(len, turns)], hash_json(turns)
    for response in iterate_responses(responses):
        if response.id in known:
            lengths, sha256 = asked[response.id]
            if hash_json(response.turns(lengths)) != sha256:
                raise ValueError(
                    f"{responses} has an answer with the id {response.id!r}, but to another text; put the prompts back "
                    "as they were, or name another folder with --output"
                )
            yield response, *known[response.id]


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
