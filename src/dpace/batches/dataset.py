"""Make batches of conversations: these come in, padded batches with the blocks of an epoch go out.

The target's features are kept with them where they fit in memory. The order of an epoch is such that conversations of
a step are about equally long.
"""

import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dpace.blocks import build_blocks, sample_anchors
from dpace.drafter.views import Inputs
from dpace.respond.responses import Example, Response
from dpace.system.progress import track
from dpace.target import Target
from dpace.target.beginnings import find_shared
from dpace.target.target import Features

FEATURE_BATCH = 16
"""Number of conversations whose features are computed together, where all are kept."""
Compute = Callable[[Sequence[Tensor]], Sequence[Features]]
"""Computes the features of each of several texts."""


class ResponseDataset:
    """Conversations with their anchors, drawn anew each epoch from `(seed, epoch, id)`.

    Memory: 4 bytes a token, and the features where they are kept (tokens x feature x bytes of the target's dtype).
    """

    def __init__(self, responses: Sequence[Example | Response], *, max_length: int, num_anchors: int | None, seed: int):
        self.epoch = 0
        self.max_length = max_length
        self.num_anchors = num_anchors
        self.seed = seed
        self.features: Sequence[Features] | None = None
        self.kept_layer_ids: list[int] = []
        """Layers whose outputs are in the features."""
        self.has_head_input = False
        """Whether the LM head's input is in them."""
        self.examples: list[Example] = []
        """The conversations that have an anchor."""
        for response in responses:
            example = response if isinstance(response, Example) else Example.of(response)
            if example.num_anchors(max_length):
                self.examples.append(example)

    def with_seed(self, seed: int) -> "ResponseDataset":
        """Return the same conversations and features with other anchors."""
        other = copy.copy(self)
        other.seed = seed
        other.epoch = 0
        return other

    @property
    def ids(self) -> list[str]:
        """Ids of the conversations."""
        return [example.id for example in self.examples]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each conversation, prompt included."""
        return np.array([min(len(example.token_ids), self.max_length) for example in self.examples], dtype=np.int64)

    @property
    def seen_tokens(self) -> Int[Tensor, " token"]:
        """The different tokens of all conversations, ascending."""
        # Of each conversation first, since all tokens at once take more memory.
        token_ids = [self.token_ids(index).unique() for index in range(len(self))]
        # There may be no conversation.
        return torch.cat([torch.zeros(0, dtype=torch.long), *token_ids]).unique()

    def token_ids(self, index: int) -> Int[Tensor, " seq"]:
        """Return the tokens of a conversation."""
        return torch.from_numpy(np.array(self.examples[index].token_ids[: self.max_length], dtype=np.int64))

    def is_response(self, index: int) -> Bool[Tensor, " seq"]:
        """Return which tokens of a conversation the target wrote."""
        example = self.examples[index]
        flags = torch.zeros(min(len(example.token_ids), self.max_length), dtype=torch.bool)
        for start, end in example.spans:
            flags[start:end] = True  # a span past the end is cut
        return flags

    def lacks(self, layer_ids: Sequence[int], *, with_head_input: bool = False) -> bool:
        """Return whether no features of these layers are kept, or only without the LM head's input."""
        lacks_input = with_head_input and not self.has_head_input
        return self.features is None or self.kept_layer_ids != [*layer_ids] or lacks_input

    def keep_features(
        self, target: Target, layer_ids: Sequence[int], *, limit_bytes: float, with_head_input: bool = False
    ) -> None:
        """Compute the features of every conversation once, where they fit in memory; see `Target.read_features`."""
        token_bytes = bytes_of_token(target, len(layer_ids), with_head_input=with_head_input)
        self.features = None  # frees features of other layers before these are computed
        if token_bytes * int(self.lengths.sum()) > limit_bytes:
            return
        compute = partial(compute_features, target, layer_ids, with_head_input=with_head_input)
        rows = self.compute_rows(compute, self.batches_that_begin_alike(range(len(self))), "reading hidden states")
        # Copied, because a view would keep the padding of its batch.
        features = {number: row.change(torch.clone) for number, row in rows}
        self.use_features([features[number] for number in range(len(self))], layer_ids, with_head_input)

    def use_features(self, features: Sequence[Features], layer_ids: Sequence[int], has_head_input: bool) -> None:
        """Take the features of every conversation from elsewhere."""
        self.features = features
        self.kept_layer_ids = [*layer_ids]
        self.has_head_input = has_head_input

    def batches_that_begin_alike(self, numbers: Iterable[int]) -> list[list[int]]:
        """Put conversations into batches that begin alike or are about equally long, to compute features together."""
        numbers = list(numbers)
        texts = [self.examples[number].token_ids[: self.max_length] for number in numbers]
        places, _ = find_shared(texts)
        order = [numbers[place] for place in places]
        return [order[start : start + FEATURE_BATCH] for start in range(0, len(order), FEATURE_BATCH)]

    def compute_rows(
        self, compute: Compute, batches: Sequence[Sequence[int]], title: str
    ) -> Iterator[tuple[int, Features]]:
        """Compute features batch by batch, and yield each conversation's number and features."""
        for batch in track(batches, title, size=len):
            yield from zip(batch, compute([self.token_ids(number) for number in batch]), strict=True)

    def steps(self, step_size: int, *, seed: int, is_grouped: bool) -> list[list[int]]:
        """Choose the conversations of each step of the epoch, by number; the last step may have fewer.

        Args:
            step_size: conversations of an optimizer step, over all ranks and micro-batches; the order depends on no
                other split of a step.
            seed: of the order, which changes with the epoch.
            is_grouped: take them in `grouped_order` and not at random.
        """
        if is_grouped and step_size > 1:
            order = grouped_order(self.lengths, step_size, seed=(seed, self.epoch))
        else:
            generator = torch.Generator().manual_seed(seed + self.epoch)
            order = torch.randperm(len(self), generator=generator).numpy()
        return [order[start : start + step_size].tolist() for start in range(0, len(order), step_size)]

    def __len__(self):
        """Count the conversations."""
        return len(self.examples)

    def __getitem__(self, index: int) -> Inputs:
        """Return one conversation with its anchors of this epoch, and `draw`, the seed of other ones."""
        is_response = self.is_response(index)
        seed = (self.seed, self.epoch, self.examples[index].id)
        layers, head_input = (None, None) if self.features is None else self.features[index]
        return {
            "token_ids": self.token_ids(index),
            "is_response": is_response,
            "anchors": sample_anchors(is_response, num_anchors=self.num_anchors, seed=seed),
            "features": layers,
            "head_input": head_input,
            # Not by `hash`, which differs from process to process.
            "draw": int.from_bytes(hashlib.sha256(repr(seed).encode()).digest()[:7]),
        }


def pad(rows: Sequence[Tensor]) -> Tensor:
    """Stack rows of different lengths, padded with 0 on the right."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)


def bytes_of_token(target: Target, num_layers: int, *, with_head_input: bool) -> int:
    """Return the bytes of a token's features."""
    return (num_layers + with_head_input) * target.hidden_size * target.head.weight.element_size()


def compute_features(
    target: Target, layer_ids: Sequence[int], texts: Sequence[Tensor], *, with_head_input: bool = False
) -> list[Features]:
    """Compute the features of each of several texts, on the CPU; see `Target.read_features`."""
    padded = target.read_features(pad(texts), layer_ids, with_head_input=with_head_input).change(Tensor.cpu)
    features = []
    for row, text in enumerate(texts):
        head_input = None if padded.head_input is None else padded.head_input[row, : len(text)]
        features.append(Features(padded.layers[row, : len(text)], head_input))
    return features


def redraw(row: Inputs, num_anchors: int) -> Inputs:
    """Draw the anchors of a conversation anew, for blocks of another size.

    Each conversation's draw has a seed of its own, so a resumed run draws the same anchors.
    """
    return row | {"anchors": sample_anchors(row["is_response"], num_anchors=num_anchors, seed=("growing", row["draw"]))}


def collate(rows: Sequence[Inputs], block_size: int) -> Inputs:
    """Pad conversations on the right and cut their blocks."""
    token_ids = pad([row["token_ids"] for row in rows])
    is_response = pad([row["is_response"] for row in rows])
    blocks = build_blocks(token_ids, is_response, [row["anchors"] for row in rows], block_size)
    batch = {"token_ids": token_ids, "is_response": is_response, "features": None, **vars(blocks)}
    for name in ("features", "head_input"):
        if rows[0][name] is not None:
            batch[name] = pad([row[name] for row in rows])
    return batch


WINDOW_STEPS = 64
"""Steps whose conversations are sorted together: 2 to 5 % of a batch of 8 is then padding, and half of it without."""
SPREAD = 0.03
"""Lengths are changed at random by at most this share before sorting, so that steps differ from epoch to epoch."""


def grouped_order(lengths: np.ndarray, step_size: int, *, seed: tuple[int, int]) -> np.ndarray:
    """Order conversations so that a step has conversations of about equal length, and steps at random.

    Conversations are shuffled, sorted by length within windows of `WINDOW_STEPS` steps, and cut into steps, which are
    shuffled. Conversations that fill no step come last.

    Args:
        lengths: tokens of each conversation.
        step_size: conversations of an optimizer step, over all ranks and micro-batches; the order depends on no other
            split of a step.
        seed: of the run, and the epoch.
    """
    generator = np.random.default_rng(seed)
    shuffled = generator.permutation(len(lengths))
    keys = lengths * generator.uniform(1 - SPREAD, 1 + SPREAD, len(lengths))
    windows = np.arange(len(lengths)) // (WINDOW_STEPS * step_size)
    # By window, and within one by length: the last key of `lexsort` counts first.
    order = shuffled[np.lexsort((keys[shuffled], windows))]
    num_steps = len(order) // step_size
    # Drawn at random: the last ones would always be long.
    left_over = np.sort(generator.choice(len(order), len(order) - num_steps * step_size, replace=False))
    steps = np.delete(order, left_over).reshape(num_steps, step_size)
    return np.concatenate([steps[generator.permutation(num_steps)].ravel(), order[left_over]])
