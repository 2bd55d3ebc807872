"""Read the target's answers: a line of `responses.jsonl` is a conversation."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dpace.data.typed_json import from_json
from dpace.ledger import read_jsonl


@dataclass(frozen=True)
class Response:
    """One conversation with the target's answers: a line of `responses.jsonl`."""

    id: str
    set: str
    messages: list[dict[str, str]]
    token_ids: list[int]
    """The whole conversation as the target read and wrote it."""
    response_spans: list[list[int]]
    """Span [start, end) of each answer of the target, stop token included."""

    @property
    def is_response(self) -> list[bool]:
        """For each token, whether the target wrote it."""
        flags = [False] * len(self.token_ids)
        for start, end in self.response_spans:
            flags[start:end] = [True] * (end - start)
        return flags


def read_responses(path: str | Path) -> list[Response]:
    """Read `responses.jsonl`.

    A last line that a killed process left unfinished is left out; the file stays as it is.

    Raises:
        ValueError: a line that is no response, or an id that occurs twice.
    """
    return list(iterate_responses(path))


def iterate_responses(path: str | Path) -> Iterator[Response]:
    """Read `responses.jsonl` as `read_responses` does, one response at a time."""
    path, ids = Path(path), set()
    names = [entry.name for entry in fields(Response)]
    fix = "write the file again with `dpace respond`"
    for number, row in read_jsonl(path, is_growing=True):
        where = f"{path}:{number}"
        row = {name: row[name] for name in names if name in row}
        try:
            response = Response(**row) if _is_plain(row, names) else from_json(Response, row)
        except ValueError as error:
            raise ValueError(f"{where}: {error}; {fix}") from error
        spans, end = response.response_spans, 0
        for span in spans:
            if len(span) != 2 or not end <= span[0] <= span[1] <= len(response.token_ids):
                raise ValueError(
                    f"{where}: response_spans has {span}, expected a start and an end within "
                    f"{len(response.token_ids)} tokens, after the span before; {fix}"
                )
            end = span[1]
        if min(response.token_ids, default=0) < 0:
            raise ValueError(f"{where}: token_ids has {min(response.token_ids)}, expected 0 or more; {fix}")
        if response.id in ids:
            raise ValueError(f"{where}: the id {response.id!r} occurs twice, expected unique ids; {fix}")
        ids.add(response.id)
        yield response


def _is_plain(row: dict[str, Any], names: Sequence[str]) -> bool:
    """Say whether a row has the types of a response; quicker than `from_json`, which says what is wrong."""
    if len(row) < len(names) or type(row["id"]) is not str or type(row["set"]) is not str:
        return False
    messages, token_ids, spans = row["messages"], row["token_ids"], row["response_spans"]
    return (
        type(messages) is type(token_ids) is type(spans) is list
        and set(map(type, token_ids)) <= {int}
        and all(type(message) is dict and set(map(type, message.values())) <= {str} for message in messages)
        and all(type(span) is list and set(map(type, span)) <= {int} for span in spans)
    )
