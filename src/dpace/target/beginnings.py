"""Read texts that begin alike: each shared beginning once, and then what is left of each text.

Texts come in as token ids; keys and values of all of them, in the rows of one cache, and the hidden states of their
last tokens go out. The shared beginnings form a tree: all texts may share a system prompt, and some of them examples.
"""

from collections.abc import Sequence
from itertools import pairwise
from os.path import commonprefix
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dpace.fast.cache import RaggedCache
from dpace.target.target import MIN_SHARED, Target

MIN_SAVED_TOKENS = 128
"""Least number of tokens that reading a shared part on its own has to save: a pass has costs of its own."""
PASS_TOKENS = 1024
"""Most tokens, padding included, that one pass reads of several texts."""


class Shared(NamedTuple):
    """A part that several texts share, after the parts that they share with others too."""

    rows: list[int]
    start: int
    end: int


def find_shared(texts: Sequence[Any]) -> tuple[list[int], list[Shared]]:
    """Find the tree of shared beginnings.

    The last token of a text is never shared, so that each text has something left to read.

    Time: that of sorting, and of comparing each text with the next one.

    Returns:
        Numbers of the texts, in an order in which those that begin alike are neighbours, and short ones come first
        otherwise; and the parts that are worth a pass, each after the parts before it in the texts.
    """
    # In the order of a dictionary, texts that begin alike are neighbours.
    by_tokens = sorted(range(len(texts)), key=texts.__getitem__)
    # Number of first tokens that each text shares with the one before it in this order.
    num_alike: dict[int, int] = {}
    for before, row in pairwise(by_tokens):
        num_alike[row] = len(commonprefix([list(texts[before][:-1]), list(texts[row][:-1])]))
    order: list[int] = []
    shared = []
    # Texts that may share something after their first tokens, whose number is known to be shared.
    waiting = [(by_tokens, 0)]
    while waiting:
        rows, num_read = waiting.pop()
        if len(rows) < 2:
            order += rows
            continue
        depth = min(num_alike[row] for row in rows[1:])  # what all of them share
        num_new = depth - num_read
        if num_new >= MIN_SHARED and num_new * (len(rows) - 1) >= MIN_SAVED_TOKENS:
            shared.append(Shared(rows, num_read, depth))
            num_read = depth
        # Neighbours that share more than all do stay together.
        groups = [rows[:1]]
        for row in rows[1:]:
            if num_alike[row] < depth + MIN_SHARED:
                groups.append([])
            groups[-1].append(row)
        # The last group is taken first: the one of short texts.
        groups.sort(key=lambda group: max(len(texts[row]) for row in group), reverse=True)
        waiting += [(group, num_read) for group in groups]
    return order, shared


def passes(lengths: Sequence[int]) -> list[list[int]]:
    """Put texts that are about equally long into passes, each by its number, the short ones first."""
    together: list[list[int]] = [[]]
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        # Ascending, so this row is the longest of the pass, and all others are padded to it.
        if together[-1] and (len(together[-1]) + 1) * lengths[row] > PASS_TOKENS:
            together.append([])
        together[-1].append(row)
    return together


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
        The LM head's input for the last token of each text; and the features of all, 0 after a text's end.
    """
    device = target.device
    lengths = torch.tensor([len(text) for text in texts])
    last_hidden = torch.empty(len(texts), target.hidden_size, dtype=target.model.dtype, device=device)
    features = last_hidden.new_zeros(len(texts), int(lengths.max()), len(layer_ids) * target.hidden_size)
    starts = torch.zeros_like(lengths)  # up to where each text is read
    _, shared = find_shared(texts)
    capacity = cache.end
    for layer in cache.layers:
        layer.num_rows = len(texts)

    def read(rows: Sequence[int], end: int | None = None) -> None:
        """Read these rows from where they are read to, up to a place or to their ends."""
        tokens = [torch.tensor(texts[row][starts[row] : end]) for row in rows]
        padded = pad_sequence(tokens, batch_first=True).to(device)
        places = starts[rows, None] + torch.arange(padded.shape[1])  # (row, new)
        places = places.clamp(max=capacity - 1)  # padding's only, and no token of a prompt is there
        cache.end = int(places.max()) + 1
        positions = places.to(device)
        mask = None  # texts that are read from their first tokens on need none
        if starts[rows].any():
            mask = cache.place(positions, rows)
        else:
            cache.write_to(positions, rows)
        hidden, outputs = target.read(padded, cache, layer_ids, attention_mask=mask, position_ids=positions)
        for number, row in enumerate(rows):
            num_new = len(tokens[number])
            last_hidden[row] = hidden[number, num_new - 1]
            features[row, starts[row] :][:num_new] = outputs[number, :num_new]

    for part in shared:
        first, *others = part.rows
        read([first], part.end)
        cache.copy_columns(first, others, part.start, part.end)
        features[others, part.start : part.end] = features[first, part.start : part.end]
        starts[part.rows] = part.end
    for rows in passes((lengths - starts).tolist()):
        read(rows)
    cache.end = capacity
    return last_hidden, features
