"""Choose the order of an epoch's conversations, so that those of a step are about equally long."""

from collections.abc import Iterator

import numpy as np
import torch

from dpace.data.dataset import ResponseDataset

WINDOW_STEPS = 64
"""Steps whose conversations are sorted together: 2 to 5 % of a batch of 8 is then padding, and half of it without."""
SPREAD = 0.03
"""Lengths are changed at random by at most this share before sorting, so that steps differ from epoch to epoch."""


def grouped_order(lengths: np.ndarray, step_size: int, *, seed: tuple[int, int]) -> np.ndarray:
    """Order conversations so that those of a step are about equally long, and steps at random.

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
    window = WINDOW_STEPS * step_size
    parts = [shuffled[start : start + window] for start in range(0, len(lengths), window)]
    order = np.concatenate([np.zeros(0, np.int64), *(part[np.argsort(keys[part])] for part in parts)])
    num_steps = len(order) // step_size
    left_over = np.sort(generator.choice(len(order), len(order) - num_steps * step_size, replace=False))
    steps = np.delete(order, left_over).reshape(num_steps, step_size)
    return np.concatenate([steps[generator.permutation(num_steps)].ravel(), order[left_over]])


class GroupedSampler(torch.utils.data.Sampler[int]):
    """Gives a dataset's conversations in `grouped_order`, another one each epoch."""

    def __init__(self, dataset: ResponseDataset, step_size: int):
        self.dataset, self.step_size = dataset, step_size

    def __len__(self):
        """Count the conversations."""
        return len(self.dataset)

    def __iter__(self) -> Iterator[int]:
        """Yield the numbers of the conversations in the order of the dataset's epoch."""
        seed = (self.dataset.seed, self.dataset.epoch)
        return iter(grouped_order(self.dataset.lengths, self.step_size, seed=seed).tolist())


def padding(lengths: np.ndarray, order: np.ndarray, batch_size: int) -> float:
    """Compute the share of padding in batches of conversations taken in an order, 0 to 1."""
    batches = [lengths[order[start : start + batch_size]] for start in range(0, len(order), batch_size)]
    read = sum(int(batch.max()) * len(batch) for batch in batches)
    return 1 - sum(int(batch.sum()) for batch in batches) / max(1, read)
