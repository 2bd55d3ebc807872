"""Read the responses that a drafter was trained on, and leave their file as it is."""

from pathlib import Path

from dpace.data.responses import Response
from dpace.data.typed_json import from_json
from dpace.ledger import read_jsonl

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
