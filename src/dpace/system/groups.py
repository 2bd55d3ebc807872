"""Group items that belong together, and choose some of many."""

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import numpy as np

Item = TypeVar("Item")
Key = TypeVar("Key")


def group_by(items: Iterable[Item], key: Callable[[Item], Key]) -> dict[Key, list[Item]]:
    """Group items that have the same key, in the order in which they come."""
    groups: dict[Key, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def spread_evenly(items: Sequence[Item], most: int) -> list[Item]:
    """Choose some of many items, with the first and the last one."""
    # Both ends are among them, and no place comes twice: the steps are 1 or more.
    places = np.linspace(0, len(items) - 1, min(len(items), most)).round().astype(int)
    return [items[place] for place in places]
