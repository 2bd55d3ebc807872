"""The drafter's forward pass over all blocks of a text (training) or the block after it (decoding)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import Cache

from dpace.blocks import Blocks, dense_mask, flex_mask
from dpace.modeling_dflash import DFlashDraftModel, Mask
from dpace.system.device import TILED
from dpace.target import Target
from dpace.target.target import Features

Inputs = dict[str, Any]
"""Tensors of a conversation, or of several with their blocks, by name; None where one is not known."""


class BlockRows(NamedTuple):
    """What the drafter computes for blocks and the text before them."""

    hidden: Float[Tensor, "batch slot hidden"]
    """Hidden states of the blocks, which the target's head turns into drafts."""
    context: Float[Tensor, "batch context hidden"]
    """Rows that the attention reads of the tokens whose features were given."""


def draft_block(
    drafter: Any,
    target: Target,
    blocks: Int[Tensor, "batch slot"],
    features: Float[Tensor, "batch context feature"],
    *,
    position_ids: Int[Tensor, "rows new"] | None = None,
    attention_mask: Mask | Mapping[str, Mask] = None,
    cache: Cache | None = None,
    block_size: int | None = None,
) -> BlockRows:
    """Compute the hidden states of blocks.

    All drafting goes through this function.

    Args:
        drafter: a `Drafter`, or its wrapper in training.
        target: its target.
        blocks: tokens of the slots, the anchor's and then mask tokens; the blocks of a text follow one another.
        features: features of the tokens before the anchor that are not in the cache yet.
        position_ids: absolute positions of these tokens, then of the slots; by default the features are of a whole
            text.
        attention_mask: as in `DFlashDraftModel.forward`; by default every slot sees everything.
        cache: receives keys and values of the features and the slots; the caller removes the slots' own.
        block_size: slots of each of several blocks; by default the drafter's.
    """
    if position_ids is None:
        position_ids = torch.arange(features.shape[1] + blocks.shape[1], device=blocks.device)[None]
    embeds = target.embed(blocks)
    # A wrapper in training is another class; what is trained always has the target's embedding.
    if isinstance(drafter, DFlashDraftModel) and drafter.embed_tokens is not None:
        embeds = drafter.embed_tokens(blocks) * target.embed_scale
    out = drafter(
        noise_embeds=embeds,
        context_hidden_states=features,
        position_ids=position_ids,
        attention_mask=attention_mask,
        cache=cache,
        block_size=block_size,
    )
    return BlockRows(out.last_hidden_state, *out.hidden_states)


def to_predicted(
    hidden: Float[Tensor, "*block slot hidden"], first_slot: int
) -> Float[Tensor, "*block position hidden"]:
    """Move hidden states to the positions whose tokens they predict; slot 0 comes to be at `1 - first_slot`."""
    # A row of zeros takes the anchor's place, whose token is known.
    return hidden if first_slot else nn.functional.pad(hidden, (0, 0, 1, 0))


class BlocksHidden(NamedTuple):
    """What the training forward pass gives."""

    hidden: Float[Tensor, "batch block slot hidden"]
    """Final hidden states."""
    blocks: Blocks
    before: Float[Tensor, "batch block hidden"]
    """What the attention reads of the token before each anchor; of the first token where an anchor is the first."""
    target_hidden: Float[Tensor, "batch block slot hidden"] | None
    """Input of the target's head where it predicts each slot; None where it was not asked for."""
    whole_blocks: Int[Tensor, " whole"] | None
    """Numbers of the blocks all of whose slots are scored; None where the batch does not say, as the host would have to
    wait for the device."""


def blocks_hidden(
    drafter: Any,
    target: Target,
    inputs: Inputs,
    *,
    model: Any = None,
    with_target_hidden: bool = False,
) -> BlocksHidden:
    """Run the drafter over all blocks of a batch at once: the training forward pass.

    Memory: O(batch x block tokens x (context + block tokens)) bytes for the dense mask, where `flex_attention` has no
    kernel (`dpace.system.device.TILED`).

    Where the first slot predicts already (`first_slot` 0), the network reads one slot less than a block has, and the
    hidden states are moved to the slots whose tokens they predict.

    Args:
        drafter: a `Drafter`.
        target: its target.
        inputs: a batch of `dpace.batches.dataset.collate`; `text` may have its `token_ids` on the CPU, see
            `Target.read_features`.
        model: the drafter's wrapper in training; by default the drafter itself.
        with_target_hidden: give the input of the target's head too.

    Raises:
        ValueError: it is asked for, and the features of the batch were kept without it.
    """
    blocks = Blocks(**{name: inputs[name] for name in Blocks.__dataclass_fields__})
    features = _read_features(drafter, target, inputs, with_target_hidden)
    slots = blocks
    if not drafter.first_slot:  # the network reads no last slot
        slots = replace(blocks, labels=blocks.labels[..., :-1], is_scored=blocks.is_scored[..., :-1])
    batch, num_context = inputs["token_ids"].shape
    device = blocks.labels.device
    context_positions = torch.arange(num_context, device=device).expand(batch, -1)
    make_mask = flex_mask if device.type in TILED else dense_mask
    drafted = draft_block(
        drafter if model is None else model,
        target,
        slots.input_ids(drafter.mask_token_id).flatten(1, 2),  # (batch, block * slot)
        features.layers,
        position_ids=torch.cat([context_positions, slots.position_ids.flatten(1)], dim=1),
        attention_mask={kind: make_mask(slots, num_context, reach) for kind, reach in drafter.reaches.items()},
        block_size=slots.block_size,
    )
    hidden = to_predicted(drafted.hidden.unflatten(1, slots.labels.shape[1:]), drafter.first_slot)
    # The token before a slot is where the target predicts it: (batch, block, slot).
    before = (blocks.position_ids - 1).clamp(0, num_context - 1)
    batch_rows = torch.arange(batch, device=device)[:, None, None]
    target_hidden = None
    if with_target_hidden and features.head_input is not None:
        target_hidden = features.head_input[batch_rows, before]
    before_anchors = drafted.context[batch_rows[..., 0], before[..., 0]]
    return BlocksHidden(hidden, blocks, before_anchors, target_hidden, inputs.get("whole_blocks"))


def _read_features(drafter: Any, target: Target, inputs: Inputs, with_head_input: bool) -> Features:
    """Return the features of a batch, computed now where none were kept; see `blocks_hidden`."""
    if inputs["features"] is not None:
        features = Features(inputs["features"], inputs.get("head_input"))
    else:
        text = inputs.get("text", inputs["token_ids"])
        features = target.read_features(text, drafter.target_layer_ids, with_head_input=with_head_input)
    if with_head_input and features.head_input is None:
        raise ValueError(
            "the features of these conversations were kept without the input of the target's LM head, which the loss "
            "reads; keep them by `dpace.make_datasets` with the recipe of the training"
        )
    return features
