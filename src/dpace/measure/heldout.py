"""Held-out responses in; the accepted lengths that decoding would have, out, without decoding."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dpace.blocks import Blocks, dense_mask, flex_mask
from dpace.data.dataset import ResponseDataset, collate
from dpace.drafter import Drafter
from dpace.loss import frozen_head_nll
from dpace.metrics import Acceptance
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
        features = target.features(token_ids, target_layer_ids, with_last=with_target_hidden)
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


def walk(accepted_from: dict[int, int], span: Sequence[int], block_size: int) -> Acceptance:
    """Follow greedy decoding through a known response: each verification starts where the last one ended.

    Args:
        accepted_from: for each anchor of the response, the draft tokens that agree with the text before the first that does not.
        span: [start, end) of the response; its first token comes from the prefill.
        block_size: slots of a block.

    Returns:
        The accepted lengths of `dpace.decode.generate` on this text.
    """
    start, end = span
    accepted_lengths, missing, anchor = [], 0, start
    while anchor < end - 1:
        accepted = min(accepted_from[anchor], end - 1 - anchor)
        missing += anchor + accepted == end - 1
        accepted_lengths.append(accepted)
        anchor += accepted + 1
    return Acceptance.from_lengths(accepted_lengths, block_size, missing)


@torch.no_grad()
def heldout_acceptance(drafter: Drafter, target: Target, dataset: ResponseDataset) -> Acceptance:
    """Measure accepted lengths on responses that the target wrote greedily, without decoding.

    Equal to what `dpace.decode.generate` accepts at temperature 0. One row a conversation.

    Memory: one conversation at a time, O(block tokens x (context + block tokens)) bytes for the dense mask, where block tokens
    are response tokens x block_size.

    Args:
        drafter: what is measured.
        target: its target.
        dataset: made with `num_anchors=None`, so that every response token is an anchor.

    Raises:
        ValueError: no response of two tokens or more.
    """
    was_training = drafter.training
    drafter.eval()
    results = []
    for i in range(len(dataset)):
        inputs: dict[str, Any] = collate([dataset[i]], drafter.block_size)
        inputs = {name: value if value is None else value.to(target.device) for name, value in inputs.items()}
        hidden, blocks, _ = blocks_hidden(
            drafter, target, inputs, mask_token_id=drafter.mask_token_id, target_layer_ids=drafter.target_layer_ids
        )
        out = frozen_head_nll(hidden, target.head, blocks.labels, blocks.is_scored)
        accepted_from = dict(zip(blocks.anchors[0].tolist(), out.accepted_lengths[0].tolist(), strict=True))
        spans = _spans(dataset.rows[i][2].tolist())
        results.append(Acceptance.pooled([walk(accepted_from, span, drafter.block_size) for span in spans]))
    drafter.train(was_training)
    return Acceptance.of_prompts(results)


TEMPERATURES = [2 ** (i / 4) for i in range(-6, 11)]
MAX_CALIBRATION_ROWS = 1500


@torch.no_grad()
def fit_confidence_temperature(drafter: Drafter, target: Target, dataset: ResponseDataset) -> float:
    """Find the temperature at which the drafter's confidence best says whether a slot is accepted.

    Looks at slots that decoding reaches, those with all slots before them right, and minimizes the cross-entropy between the
    probability of the drafter's most likely token and whether it is the text's, over a grid of quarter octaves. At most
    `MAX_CALIBRATION_ROWS` slots are used.

    Args:
        drafter: a trained drafter.
        target: its target.
        dataset: responses that were not trained on, every token an anchor.

    Returns:
        The temperature, above 1 for a drafter that is too sure; 1 without a response.
    """
    was_training = drafter.training
    drafter.eval()
    logits, matches, count = [], [], 0
    for i in range(len(dataset)):
        inputs: dict[str, Any] = collate([dataset[i]], drafter.block_size)
        inputs = {name: value if value is None else value.to(target.device) for name, value in inputs.items()}
        hidden, blocks, _ = blocks_hidden(
            drafter, target, inputs, mask_token_id=drafter.mask_token_id, target_layer_ids=drafter.target_layer_ids
        )
        out = frozen_head_nll(hidden, target.head, blocks.labels, blocks.is_scored)
        slots = torch.arange(drafter.block_size, device=target.device)
        is_reached = blocks.is_scored & (slots <= out.accepted_lengths[..., None] + 1)
        share = max(1, round(int(is_reached.sum()) * len(dataset) / MAX_CALIBRATION_ROWS))
        rows = is_reached.nonzero()[::share].unbind(-1)
        scaled = target.head.logits(hidden[rows]).float()
        logits.append(torch.stack([(scaled / t).amax(-1) - (scaled / t).logsumexp(-1) for t in TEMPERATURES]))
        matches.append(out.is_match[rows])
        count += len(rows[0])
    drafter.train(was_training)
    if not count:
        return 1.0
    log_confidence, is_match = torch.cat(logits, dim=1).clamp_max(-1e-6), torch.cat(matches)
    errors = -torch.where(is_match, log_confidence, torch.log(-torch.expm1(log_confidence))).mean(-1)
    return TEMPERATURES[int(errors.argmin())]


def _spans(is_response: Sequence[bool]) -> list[tuple[int, int]]:
    """[start, end) of each run of response tokens that is long enough to be drafted for."""
    edges = [i for i, (a, b) in enumerate(zip([False, *is_response], [*is_response, False], strict=True)) if a != b]
    return [(start, end) for start, end in zip(edges[::2], edges[1::2], strict=True) if end - start > 1]
