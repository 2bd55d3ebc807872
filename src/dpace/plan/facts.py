"""Sizes and times in words, and the room on a disk; imports no torch."""

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from dpace.data.prompts import PromptParts

DRY_RUN = "--dry-run"
BYTES_PER_TOKEN = 12
"""Bytes of a token in `responses.jsonl`: its number, and its text."""


def take_dry_run(args: list[str]) -> tuple[list[str], bool]:
    """Take `--dry-run` out of a verb's arguments, and say whether it was there."""
    return [arg for arg in args if arg != DRY_RUN], DRY_RUN in args


def announce(lines: Sequence[str], *, is_dry: bool = False) -> None:
    """Print what will be done: as the result of a dry run, else as a message; by one process of several."""
    if os.environ.get("RANK", "0") == "0":
        print("\n".join(lines), file=sys.stdout if is_dry else sys.stderr, flush=True)


def size(num_bytes: int | float) -> str:
    """Write a number of bytes, such as 1.2 GiB."""
    for unit in ("bytes", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} GiB"


def duration(seconds: int | float) -> str:
    """Write a time in its largest unit that fits, such as 12 min."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.{1 if seconds < 10 * length else 0}f} {unit}"
    return f"{max(1, seconds):.0f} s"


def count(number: int, noun: str) -> str:
    """Write a number of things, such as 1 prompt or 2,000 prompts."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def prompts_line(parts: PromptParts) -> str:
    """Say how many prompts each part has."""
    numbers = (len(part) for part in (parts.train, parts.validation, parts.heldout))
    return "prompts: {:,} to train, {:,} to choose by, {:,} held out".format(*numbers)


def free_disk(folder: str | Path) -> int:
    """Give the free bytes of the disk that a folder is on or will be on."""
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def written_bytes(folder: str | Path) -> int:
    """Give the bytes of all files in a folder; 0 where it is missing."""
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def check_disk(folder: str | Path, needed: int, fix: str) -> str:
    """Refuse a folder whose disk has too little room, and say how much it takes and has.

    Args:
        folder: that will be written to.
        needed: bytes that it will have at most; what it has already counts.
        fix: what makes it smaller, for the message.

    Raises:
        ValueError: there is less room.
    """
    free = free_disk(folder)
    more = max(0, needed - written_bytes(folder))
    if more > free:
        raise ValueError(f"{folder} will take {size(more)} more, and its disk has {size(free)} free; {fix}")
    return f"disk: up to {size(needed)} in {folder}, {size(free)} free"
