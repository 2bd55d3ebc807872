"""Tell whether weights are still those that copies were made of."""

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

NUM_SAMPLES = 32
"""Values of each weight that are compared to find changes that torch does not count, as those through `.data`."""

_version = operator.attrgetter("_version")


class Snapshot:
    """Weights at a moment.

    torch counts changes of a tensor, and `is_same` asks it at each product. Changes through `.data` are not counted:
    `look_again` compares some of the values, once a request.

    Args:
        weights: what copies are made of, or what is read itself (`is_copied` False): nothing is compared then.
        parts: further snapshots to include, as they were.
    """

    def __init__(self, weights: Iterable[Tensor], parts: Iterable["Snapshot"] = (), *, is_copied: bool = True):
        self.weights = list(weights)
        self.versions, self.pointers = self._state()
        self.samples = list(map(_sample, self.weights)) if is_copied else []
        for part in parts:
            for name in ("weights", "versions", "pointers", "samples"):
                getattr(self, name).extend(getattr(part, name))

    def _state(self) -> tuple[list[int], list[int]]:
        """Give versions and addresses of the weights, which change with their values."""
        return list(map(_version, self.weights)), list(map(Tensor.data_ptr, self.weights))

    def is_same(self) -> bool:
        """Say whether no change was counted or seen."""
        return self._state() == (self.versions, self.pointers)

    def look_again(self) -> None:
        """Compare sampled values; from a difference on, the weights are not the same any more."""
        if self.samples and not all(map(torch.equal, map(_sample, self.weights), self.samples)):
            self.versions = []


def _sample(weight: Tensor) -> Tensor:
    """Take values that are spread over a weight."""
    values = weight.detach().flatten()
    return values[:: max(1, len(values) // NUM_SAMPLES)].clone()


def look_again(*owners: Any) -> None:
    """Compare the weights of models with those that their fast copies were made of, where they have any."""
    for owner in owners:
        modules = owner.modules() if isinstance(owner, nn.Module) else (owner,)
        for module in modules:
            snapshot = vars(module).get("snapshot")
            if snapshot is not None:
                snapshot.look_again()
