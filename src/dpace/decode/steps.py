"""One decoding step of any number of texts: draft a block after each text, and let the target verify it.

`loop` takes these steps for one text, `batch` for several at once, as they are or compiled. A row is a text. Token ids
and where each text ends come in. The tokens that the target is to verify, its logits, and the features that the drafter
reads next go out.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dpace.drafter import Drafter
from dpace.drafter.selector import Draft
from dpace.drafter.views import draft_block, to_predicted
from dpace.fast.cache import RaggedCache, TextCache
from dpace.target import Target
from dpace.target.draft_rows import DraftRows


class State(NamedTuple):
    """Where each text ends, and what its next step starts from, on the target's device."""

    last_ids: Int[Tensor, "batch 1"]
    """Last token of each text: the anchor of its next block."""
    starts: Int[Tensor, "batch 1"]
    """Its position."""
    limits: Int[Tensor, "batch 1"]
    """Position of the last token that may be emitted."""
    features: Float[Tensor, "batch new feature"]
    """Features of the tokens that the target has read and the drafter has not."""
    positions: Int[Tensor, "batch new"]
    """Positions of these tokens."""


def draft_step(
    drafter: Drafter, rows: DraftRows, cache: TextCache | RaggedCache, state: State, width: int
) -> tuple[Int[Tensor, "batch width"], Draft]:
    """Let the drafter read the features that it has not read, and draft a block after each text.

    Args:
        drafter: drafts all slots of a block in one pass.
        rows: of the tokens that may be drafted.
        cache: the drafter's.
        state: where the texts end, and what the drafter reads.
        width: number of tokens that may be verified, the anchor included; 2 to the drafter's block size.

    Returns:
        The last tokens, each followed by the draft; and the draft.
    """
    slots = torch.arange(drafter.num_slots, device=state.starts.device)
    # The network reads the anchor, whose token is known, and a mask token in each further slot.
    masks = slots.new_full((len(state.starts), drafter.num_slots - 1), drafter.mask_token_id)
    drafted = draft_block(
        drafter,
        rows.target,
        torch.cat([state.last_ids, masks], dim=1),
        state.features,
        position_ids=torch.cat([state.positions, state.starts + slots], dim=1),
        attention_mask=cache.place_block(state.positions, state.starts),
        cache=cache,
    )
    # The slots are drafted anew in the next step, with the features that the target computes for their tokens.
    cache.crop(-drafter.num_slots)

    # What the drafter read of the token before each anchor, which rows of a batch have at different places.
    places = (state.positions == state.starts - 1).int().argmax(-1)
    before = drafted.context[torch.arange(len(places), device=places.device), places]
    hidden = to_predicted(drafted.hidden, drafter.first_slot)
    draft = drafter.selector.propose(rows, hidden, state.last_ids[:, 0], before, width)
    return torch.cat([state.last_ids, draft.tokens], dim=1), draft


def verify_step(
    target: Target,
    cache: TextCache | RaggedCache,
    layer_ids: Sequence[int],
    blocks: Int[Tensor, "batch width"],
    starts: Int[Tensor, "batch 1"],
    limits: Int[Tensor, "batch 1"],
) -> tuple[Float[Tensor, "batch width vocab"], Float[Tensor, "batch width feature"], Int[Tensor, "batch width"]]:
    """Let the target read blocks, each a last token and proposed ones, in one pass.

    Slots past the last token that a row may emit (`limits`) share that token's position, and their results are not
    used.

    Returns:
        Logits, of which row `k` follows the first `k` proposed tokens; and features and positions of the blocks.
    """
    slots = torch.arange(blocks.shape[1], device=blocks.device)
    positions = torch.minimum(starts + slots, limits)
    hidden, features = target.read(
        blocks, cache, layer_ids, attention_mask=cache.place(positions), position_ids=positions
    )
    # The head takes (row, hidden), so that a packed one gets a plain matrix.
    logits = target.logits(hidden.flatten(0, 1)).unflatten(0, blocks.shape)
    return logits, features, positions
