"""The drafter's two views: all blocks of a text at once in training, and one block behind a cache in decoding."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dpace.blocks import Blocks, dense_mask, flex_mask
from dpace.target import Target


def blocks_hidden(
    drafter,
    target: Target,
    inputs: dict[str, Any],
    *,
    mask_token_id: int,
    target_layer_ids: Sequence[int],
    with_target_hidden: bool = False,
) -> tuple[Tensor, Blocks, Tensor | None]:
    """Run the drafter over all blocks of a batch at once.

    Returns:
        Final hidden states, "batch block slot hidden"; the blocks; and, where asked for, what the target's head reads where it
        predicts each slot, of the same shape.
    """
    blocks = Blocks(**{name: inputs[name] for name in Blocks.__dataclass_fields__})
    token_ids, features = inputs["token_ids"], inputs["features"]
    if features is None:
        features = target.features(token_ids, target_layer_ids, with_head_input=with_target_hidden)
    last = features[..., len(target_layer_ids) * target.hidden_size :]
    batch, num_context = token_ids.shape
    make_mask = flex_mask if token_ids.device.type == "cuda" else dense_mask
    context_ids = torch.arange(num_context, device=token_ids.device).expand(batch, -1)
    hidden = drafter(
        noise_embeds=target.embed(blocks.input_ids(mask_token_id)).flatten(1, 2),
        context_hidden_states=features[..., : len(target_layer_ids) * target.hidden_size],
        position_ids=torch.cat([context_ids, blocks.position_ids.flatten(1)], dim=1),
        attention_mask=make_mask(blocks, num_context),
    ).last_hidden_state.unflatten(1, blocks.labels.shape[1:])
    if not with_target_hidden:
        return hidden, blocks, None
    before = (blocks.position_ids - 1).clamp(0, num_context - 1)
    rows = torch.arange(batch, device=token_ids.device)[:, None, None]
    return hidden, blocks, last[rows, before]
