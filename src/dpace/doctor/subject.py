"""A drafter's folder with its target, and what a check of them is made of."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from dpace.batches.dataset import ResponseDataset
from dpace.config import Engine
from dpace.drafter import Drafter, load_drafter
from dpace.engines.folder import DrafterFolder, mapping
from dpace.measure.heldout import heldout_acceptance
from dpace.metrics import Acceptance
from dpace.respond.responses import Response
from dpace.target import Target
from dpace.target.chat import tokenizer_hashes

MAX_RESPONSES = 8
"""Number of responses that tau is measured on where training has not recorded which."""


class Observation(NamedTuple):
    """The result of looking at one thing."""

    is_right: bool | None
    """None where it cannot be decided; `found` then says why."""
    found: object
    expected: object = ""


@dataclass
class Subject(DrafterFolder):
    """A drafter's folder, and what it is compared with."""

    target: Target
    engine: Engine | None
    responses: list[Response]

    @cached_property
    def facts(self) -> dict[str, object]:
        """What training would record today about the target."""
        return {
            "target": self.target.short_name,
            "dtype": str(self.target.model.dtype).removeprefix("torch."),
            "thinking": self.target.thinking,
            **tokenizer_hashes(self.target),
        }

    @cached_property
    def drafter(self) -> Drafter:
        """The drafter, loaded as for decoding."""
        try:
            return load_drafter(self.path, self.target)
        except Exception as error:  # transformers and torch share no narrower class for a folder that they refuse
            raise ValueError(str(error)) from error

    @cached_property
    def acceptance(self) -> Acceptance | None:
        """Accepted lengths on the recorded responses, or on the first ones; None without responses."""
        chosen = [r for r in self.responses if r.id in self.record.get("tau_responses", ())]
        longest = mapping(self.recipe.get("train")).get("max_length", 10**9)
        chosen = chosen or self.responses[:MAX_RESPONSES]
        dataset = ResponseDataset(chosen, max_length=longest, num_anchors=None, seed=0)
        return heldout_acceptance(self.drafter, self.target, dataset) if len(dataset) else None


Probe = Callable[[Subject], Observation | None]
"""Looks at a subject; None where the check does not apply to this folder, and is not listed."""


class Check(NamedTuple):
    """A named check: what it looks at, and what to do where that is wrong."""

    name: str
    severity: Literal["fails", "warns"]
    look: Probe
    fix: str


def some(names: Sequence[str]) -> str:
    """Name the first three, and count the others."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def none_of(names: Sequence[str]) -> Observation:
    """Expect that no name is in the list."""
    return Observation(not names, some(names) or "none", "none")
