"""Read texts that begin alike: each shared beginning once, and then what is left of each text.

Texts come in as token ids; keys and values of all of them, in the rows of one cache, and the hidden states of their
last tokens go out. The shared beginnings form a tree: all texts may share a system prompt, and some of them examples.
"""

from array import array
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from dpace.fast.cache import RaggedCache
from dpace.target.target import MIN_SHARED, Target

MIN_SAVED_TOKENS = 128
"""Least number of tokens that reading a shared part on its own has to save: a pass has costs of its own."""
PASS_TOKENS = 1024
"""Most tokens, padding included, that one pass reads of several texts."""


class Shared(NamedTuple):
    """A part that several texts share, behind the parts that they share with others too."""

    rows: list[int]
    start: int
    end: int


def find_shared(texts: Sequence[list[int]] | Sequence[array]) -> tuple[list[int], list[Shared]]:
    """Find the tree of shared beginnings.

    The last token of a text is never shared, so that each text has something left to read.

    Time: that of sorting, and of comparing each text with the next one.

    Args:
        texts: token ids, all lists or all arrays.

    Returns:
        Numbers of the texts, in an order in which those that begin alike are neighbours, and short ones come first
        otherwise; and the parts that are worth a pass, each behind those before it in the texts.
    """
    order = sorted(range(len(texts)), key=lambda row: texts[row])
    alike = [_count_alike(texts[one], texts[other]) for one, other in pairwise(order)]
    placed: list[int] = []
    shared = []
    waiting = [(0, len(order), 0, 0)] if order else []
    while waiting:
        first, last, depth, num_read = waiting.pop()
        if last - first == 1:
            placed.append(order[first])
            continue
        depth = min(alike[first : last - 1])
        if depth - num_read >= MIN_SHARED and (depth - num_read) * (last - first - 1) >= MIN_SAVED_TOKENS:
            shared.append(Shared(order[first:last], num_read, depth))
            num_read = depth
        cuts = [number + 1 for number in range(first, last - 1) if alike[number] < depth + MIN_SHARED]
        parts = list(pairwise([first, *cuts, last]))
        parts.sort(key=lambda part: max(len(texts[row]) for row in order[slice(*part)]), reverse=True)
        waiting += [(*part, depth, num_read) for part in parts]
    return placed, shared


def _count_alike(one: Sequence[int], other: Sequence[int]) -> int:
    """Count the first tokens of two texts that are the same, without the last one of either."""
    most = min(len(one), len(other)) - 1
    return next((i for i in range(most) if one[i] != other[i]), most)


def read_texts(
    target: Target, texts: Sequence[list[int]], cache: RaggedCache, layer_ids: Sequence[int] = ()
) -> tuple[Float[Tensor, "row hidden"], Float[Tensor, "row seq feature"]]:
    """Read texts of different lengths into the rows of a cache.

    Beginnings that texts share are read once, and copied to the rows of all. What is left is read in passes of texts
    that are about equally long, padded on the right, where no token sees it.

    Memory: activations of `PASS_TOKENS` tokens, or of the longest text; and the features.

    Args:
        target: reads.
        texts: token ids, at least one of each.
        cache: with room for the longest text and one token more; it gets as many rows as there are texts.
        layer_ids: layers whose outputs are the features.

    Returns:
        The LM head's input for the last token of each text; and the features of all, 0 behind a text's end.
    """
    device = target.device
    last = torch.empty(len(texts), target.hidden_size, dtype=target.model.dtype, device=device)
    features = last.new_zeros(len(texts), max(map(len, texts)), len(layer_ids) * target.hidden_size)
    starts = [0] * len(texts)
    capacity = cache.end
    for layer in cache.layers:
        layer.num_rows = len(texts)
        layer.num_shared = 0

    def read(rows: Sequence[int], ends: Sequence[int]) -> None:
        """Read a part of each of these rows."""
        parts = [texts[row][starts[row] : end] for row, end in zip(rows, ends, strict=True)]
        longest = max(map(len, parts))
        padded = torch.tensor([[*part, *[part[-1]] * (longest - len(part))] for part in parts], device=device)
        firsts = torch.tensor([starts[row] for row in rows], device=device)
        positions = firsts[:, None] + torch.arange(longest, device=device)
        positions = positions.clamp(max=capacity - 1)  # padding's only, and no token of a prompt is there
        cache.end = min(capacity, longest + max(starts[row] for row in rows))
        mask = cache.place(positions, rows) if any(starts[row] for row in rows) else cache.write_to(positions, rows)
        hidden, outputs = target.read(padded, cache, layer_ids, attention_mask=mask, position_ids=positions)
        for number, (row, end) in enumerate(zip(rows, ends, strict=True)):
            last[row] = hidden[number, len(parts[number]) - 1]
            features[row, starts[row] : end] = outputs[number, : len(parts[number])]

    for part in find_shared(texts)[1]:
        first, *others = part.rows
        read([first], [part.end])
        cache.copy_columns(first, others, part.start, part.end)
        features[others, part.start : part.end] = features[first, part.start : part.end]
        for row in part.rows:
            starts[row] = part.end
        for layer in cache.layers if len(part.rows) == len(texts) else ():
            layer.num_shared = part.end
    passes: list[list[int]] = []
    for row in sorted(range(len(texts)), key=lambda row: len(texts[row]) - starts[row]):
        if not passes or (len(passes[-1]) + 1) * (len(texts[row]) - starts[row]) > PASS_TOKENS:
            passes.append([])
        passes[-1].append(row)
    for rows in passes:
        read(rows, [len(texts[row]) for row in rows])
    cache.end = capacity
    return last, features
