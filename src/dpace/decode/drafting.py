"""How drafts are made and verified: settings, the choice of a step, and what the target is to verify."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from dpace.config import VerifyRule, Width
from dpace.decode.pace import Pace, Paces
from dpace.drafter import Drafter
from dpace.fast.snapshot import look_again
from dpace.target import Target


@dataclass(frozen=True)
class Drafting:
    """Settings of drafting and verification, resolved from the options of `generate` for one drafter."""

    block_size: int
    """Number of slots to draft, the anchor included."""
    max_width: int
    """Largest number of tokens that the target verifies at once, the last token included."""
    verify_rule: VerifyRule
    pace: Pace | None
    """Chooses at each step the verification length, and between drafts and copies; None always verifies `max_width`."""


def make_drafting(
    target: Target,
    drafter: Drafter,
    temperature: float,
    *,
    width: Width = "auto",
    block_size: int | None = None,
    verify_rule: VerifyRule = "equality",
    paces: Paces | None = None,
) -> Drafting:
    """Check the options of `generate`, and find the pace for width `auto`.

    Arguments as in `generate`.

    Raises:
        ValueError: a drafter for another target, or a block size or width outside its range.
    """
    drafter.check_target(target)
    look_again(drafter)
    block_size = block_size or drafter.block_size
    if not 2 <= block_size <= drafter.block_size:
        raise ValueError(f"block_size is {block_size}; this drafter drafts blocks of 2 to {drafter.block_size} slots")
    max_width = width if isinstance(width, int) else block_size
    if not 2 <= max_width <= block_size:
        raise ValueError(
            f"width is {width}; a block of {block_size} has 2 to {block_size} tokens to verify: "
            "give such a number, 'full' or 'auto'"
        )
    pace = (paces or Paces()).get(target, drafter, temperature) if width == "auto" else None
    return Drafting(block_size, max_width, verify_rule, pace)


class Plan(NamedTuple):
    """The choice of a step between a draft, copied tokens and a plain step."""

    is_drafted: bool
    """Whether the drafter drafts a block; otherwise the first tokens of `copied` are verified, or none."""
    match: int = 0
    """Length of the prompt lookup's match; 0 for none."""
    copied: Sequence[int] = ()
    """Tokens that followed the match."""
    width: int = 1
    """Number of tokens to verify where nothing is drafted: the last token of the text, then those of `copied`."""


class Proposal(NamedTuple):
    """The tokens that the target verifies in a step."""

    block: Int[Tensor, "1 width"]
    """The last token of the text, then the proposed tokens."""
    num_read: int = 0
    """Number of tokens whose features the drafter read before it drafted."""
    draft_probs: Float[Tensor, "draft vocab"] | None = None
    """Distributions that the draft tokens were drawn from; None where they are not draws."""

    @property
    def width(self) -> int:
        """Number of tokens that the target reads."""
        return self.block.shape[1]
