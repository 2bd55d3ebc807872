"""Read and write JSON files that survive a killed process."""

import json
from collections.abc import Iterator
from pathlib import Path


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict]]:
    """Yield the number and the object of each line that is not blank.

    Raises:
        ValueError: the file is missing, or a line is not a JSON object.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}; name a JSONL file in UTF-8") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: the line is not JSON ({error}); fix or remove it") from error
        if not isinstance(row, dict):
            raise ValueError(
                f"{path}:{number}: expected a JSON object, found {type(row).__name__}; fix or remove the line"
            )
        yield number, row


def write_json(path: Path, value: dict) -> None:
    """Write results, all or nothing.

    A full disk or a killed process leaves the file as it was before.
    """
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")
    unfinished.replace(path)


def cut_unfinished(path: Path) -> None:
    """Cut off a last line that a killed process left unfinished.

    A last line that lacks only its line end gets it.
    """
    data = path.read_bytes() if path.exists() else b""
    if not data or data.endswith(b"\n"):
        return
    start = data.rfind(b"\n") + 1
    try:
        json.loads(data[start:])
    except ValueError:
        path.write_bytes(data[:start])
    else:
        path.write_bytes(data + b"\n")
