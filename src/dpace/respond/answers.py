"""Read the target's answers: a line of `responses.jsonl` is a conversation.

Read the responses that a drafter was trained on, and leave their file as it is.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dpace.recipes.validation import from_json
from dpace.system.ledger import read_jsonl


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


FIX = "write the file again with `dpace respond`"


def read_recorded(path: str | Path, num_tokens: int) -> list[Response]:
    """Read `responses.jsonl`, which may still be written: an unfinished last line is left out.

    Args:
        path: of the file.
        num_tokens: tokens that the target has.

    Raises:
        ValueError: a file or a line that cannot be read, or an answer with tokens that the target does not have.
    """
    path, responses = Path(path), []
    if not path.is_file():
        raise ValueError(f"there is no file {path}; name a responses.jsonl that `dpace respond` wrote")
    *whole, last = path.read_bytes().split(b"\n")
    num_whole = sum(bool(line.strip()) for line in whole)
    lines = read_jsonl(path)
    while True:
        try:
            number, row = next(lines)
        except StopIteration:
            return responses
        except ValueError:
            if last and len(responses) == num_whole:
                return responses
            raise
        responses.append(_read(path, number, row, num_tokens))


def _read(path: Path, number: int, row: dict, num_tokens: int) -> Response:
    try:
        response = from_json(Response, {name: row[name] for name in Response.__dataclass_fields__ if name in row})
    except ValueError as error:
        raise ValueError(f"{path}:{number}: {error}; {FIX}") from error
    for token in response.token_ids:
        if not 0 <= token < num_tokens:
            raise ValueError(f"{path}:{number}: token {token}, expected one in 0 .. {num_tokens - 1}; {FIX}")
    length = len(response.token_ids)
    for span in response.response_spans:
        if len(span) != 2 or not 0 <= span[0] <= span[1] <= length:
            raise ValueError(f"{path}:{number}: span {span}, expected [start, end) within {length} tokens; {FIX}")
    return response
