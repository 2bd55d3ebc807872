"""Read and write JSON files that survive a killed process."""

import json
from collections.abc import Iterator
from pathlib import Path


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict]]:
    """Yield line numbers and objects; blank lines are skipped.

    Raises:
        ValueError: the file is missing, or a line is not a JSON object.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not JSON ({error}); mend or remove the line") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number}: expected a JSON object, found {type(row).__name__}")
        yield number, row


def write_json(path: Path, value: dict) -> None:
    """Write results, all or nothing: a full disk or a killed process leaves the file that was there."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")
    unfinished.replace(path)


def cut_unfinished(path: Path) -> None:
    """Cut off a last line that a killed process left unfinished; one that only lacks its line end gets it."""
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
