"""Measure the accepted lengths that decoding would have on known responses, without decoding.

In come answers that the target wrote greedily. All their blocks are drafted at once, and greedy decoding is followed
through them; out comes an `Acceptance` with one row a conversation.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dpace.batches.dataset import ResponseDataset, collate
from dpace.blocks import Blocks
from dpace.drafter import Drafter
from dpace.drafter.lilicorr import make_lattice, take_walk
from dpace.drafter.views import BlocksHidden, blocks_hidden
from dpace.fast.packing import refresh_copies
from dpace.loss import frozen_head_nll
from dpace.metrics import Acceptance
from dpace.system import ranks
from dpace.system.progress import progress_bar
from dpace.target import Target
from dpace.target.head import Head

SCORED_BLOCKS = 128
"""Number of blocks of a text that are drafted at once where it is measured."""
Visit = Callable[[int, Tensor, Tensor], None]
"""Gets the number of a conversation; states or scores of the slots that decoding may reach, of `score_conversation`,
"slot hidden"; and whether each is accepted as it is drafted, "slot"."""


@torch.no_grad()
def heldout_acceptance(
    drafter: Drafter,
    target: Target,
    dataset: ResponseDataset,
    *,
    token_ids: Tensor | None = None,
    over_ranks: bool = False,
    is_ended: Callable[[], bool] = lambda: False,
    visit: Visit | None = None,
    title: str = "",
) -> Acceptance:
    """Measure accepted lengths on responses that the target wrote greedily, without decoding.

    They equal what `dpace.decode.generate` accepts at temperature 0 with a drafter that drafts any token. Each
    conversation is a row of the result.

    Memory: that of `score_conversation`, one conversation at a time.

    Args:
        drafter: what is measured.
        target: its target.
        dataset: made with `num_anchors=None`, so that every response token is an anchor.
        token_ids: the only tokens that are drafted; by default all. Decoding drafts those of the prompt too.
        over_ranks: let each rank measure a share; all ranks of the command must be here, and all get the result.
        is_ended: asked after each conversation, by all ranks as often; where it is true, the others are left out.
        visit: called with what decoding may reach in each conversation that this rank measures.
        title: of a progress bar; none is shown without it.

    Raises:
        ValueError: no response of two tokens or more.
    """
    was_training = drafter.training
    drafter.eval()
    refresh_copies(drafter)
    results: dict[int, list[Acceptance]] = {}
    indices = range(len(dataset))
    mine = [*ranks.share(indices), *[None] * ranks.num_short(indices)] if over_ranks else indices
    with progress_bar(is_shown=bool(title)) as bar:
        task = bar.add_task(title, total=len(mine), info="")
        for i in mine:
            if i is not None:
                results[i] = walk_conversation(drafter, target, dataset, i, token_ids, visit)
            elif dataset.features is None:
                target.join_features(drafter.target_layer_ids)
            bar.update(task, advance=1)
            if is_ended():
                break
    drafter.train(was_training)
    if over_ranks:
        results = {i: row for share in ranks.gather(results) for i, row in share.items()}
    ways = zip(*(results[i] for i in sorted(results)), strict=True)
    drafted, *others = [Acceptance.of_prompts(rows) for rows in ways] or [Acceptance.of_prompts([])]
    return replace(drafted, bounds=tuple(way.tau for way in others))


def walk_conversation(
    drafter: Drafter,
    target: Target,
    dataset: ResponseDataset,
    index: int,
    token_ids: Tensor | None,
    visit: Visit | None = None,
) -> list[Acceptance]:
    """Follow greedy decoding through the responses of a conversation, in each way of `score_conversation`."""
    accepted_from: list[dict[int, int]] = [{} for _ in range(3 if drafter.num_candidates > 1 else 1)]
    reached = []
    for states, blocks, is_accepted in score_conversation(drafter, target, dataset, index, token_ids):
        for known, lengths in zip(accepted_from, is_accepted.sum(-1).tolist(), strict=True):
            known |= zip(blocks.anchors[0].tolist(), lengths, strict=True)
        if visit is not None:
            drafted = is_accepted[:1]
            slots = torch.arange(drafter.block_size, device=target.device)
            is_reached = blocks.is_scored & (slots <= drafted.sum(-1, keepdim=True) + 1)
            reached.append((states[is_reached], drafted[is_reached]))
    if visit is not None:
        visit(index, *(torch.cat(parts) for parts in zip(*reached, strict=True)))
    cut = dataset.corpus.spans(int(dataset.chosen[index])).clip(max=dataset.max_length).tolist()
    spans = [span for span in cut if span[1] - span[0] > 1]  # two tokens or more
    walks = [[walk(known, span, drafter.block_size) for span in spans] for known in accepted_from]
    return [Acceptance.pooled(parts) for parts in walks]


def score_conversation(
    drafter: Drafter, target: Target, dataset: ResponseDataset, index: int, token_ids: Tensor | None = None
) -> Iterator[tuple[Tensor, Blocks, Tensor]]:
    """Draft the blocks of a conversation in parts, and compare the drafts with its text.

    A part has `SCORED_BLOCKS` blocks. With `token_ids`, only these tokens are drafted, and no other matches.

    Memory: features of the conversation; O(`SCORED_BLOCKS` x block_size x (tokens + `SCORED_BLOCKS` x block_size))
    bytes for the dense mask on a CPU.

    Yields:
        Final hidden states, "1 block slot hidden", or with a head of the drafter's own the scores of its drafts; the
        blocks; and the slots that are accepted, "way block slot". With a head there are three ways: its walk, each
        slot's own best token, and the target's token wherever it is a candidate.
    """
    head, rows = target.head.part(token_ids)
    if drafter.vocabulary is not None and drafter.vocabulary.head is not None:
        head, rows = target.head.part(drafter.vocabulary.token_ids, drafter.vocabulary.head.weight)
    inputs: dict[str, Any] = collate([dataset[index]], drafter.block_size)
    inputs = {name: value if value is None else value.to(target.device) for name, value in inputs.items()}
    tokens, features = inputs["token_ids"], inputs["features"]
    if features is None:
        features = target.features(tokens, drafter.target_layer_ids)
    for part in torch.arange(inputs["anchors"].shape[1], device=target.device).split(SCORED_BLOCKS):
        chosen = {name: inputs[name][:, part] for name in Blocks.__dataclass_fields__}
        seen = slice(0, int(chosen["anchors"].max()) + 1)  # no block sees more of the text
        text = {"token_ids": tokens[:, seen], "features": features[:, seen]}
        with torch.no_grad():
            found = blocks_hidden(drafter, target, {**chosen, **text})
            states, blocks = found[:2]
            labels = blocks.labels if rows is None else rows[blocks.labels]
            if drafter.num_candidates == 1:
                is_accepted = leading_matches(states, head, labels, blocks.is_scored)
            else:
                states, is_right = walk_blocks(drafter, target, found, head, token_ids)
                is_accepted = (is_right & blocks.is_scored[..., 1:]).int().cumprod(-1).bool()
                is_accepted = torch.nn.functional.pad(is_accepted, (1, 0))
        yield states, blocks, is_accepted


def walk_blocks(
    drafter: Drafter, target: Target, found: BlocksHidden, head: Head, token_ids: Tensor | None
) -> tuple[Float[Tensor, "1 block slot choice"], Bool[Tensor, "3 block draft"]]:
    """Draft the blocks of a conversation with the drafter's head.

    Returns:
        Its scores, of slot 0 any; and which drafts are the target's, for each way of `score_conversation`.
    """
    hidden, blocks = found[:2]
    every = torch.ones_like(blocks.is_scored)
    out = frozen_head_nll(hidden, head, blocks.labels * 0, every, num_candidates=drafter.num_candidates)
    candidates = out.candidates if token_ids is None else token_ids.to(out.candidates.device)[out.candidates]
    candidates, log_probs, states = (x[0, :, 1:] for x in (candidates, out.log_probs, hidden))
    lattice = make_lattice(drafter, target, candidates, log_probs, states, found.before[0], blocks.anchors[0] > 0)
    tokens, scores = take_walk(lattice)
    labels = blocks.labels[0, :, 1:]
    is_true = candidates == labels[..., None]
    is_right = torch.stack([tokens == labels, is_true[..., 0], is_true.any(-1)])
    return torch.cat([scores[:, :1], scores], dim=1)[None], is_right


def leading_matches(
    hidden: Float[Tensor, "batch block slot hidden"],
    head: Head,
    labels: Int[Tensor, "batch block slot"],
    is_scored: Bool[Tensor, "batch block slot"],
) -> Bool[Tensor, "batch block slot"]:
    """Find the slots of each block that greedy verification accepts: those before its first wrong draft.

    It is what `frozen_head_nll` finds, up to each block's first miss. Blocks that are right so far go on with twice as
    many slots, so little more than tau rows of a block are multiplied with the head, in few products.

    Memory: logits of `SCORED_BLOCKS` rows.
    """
    is_accepted, is_right = torch.zeros_like(is_scored), torch.ones_like(is_scored[..., 0])
    start, width = 1, 1
    while start < labels.shape[-1] and is_right.any():
        at = slice(start, start + width)
        is_tried = is_right[..., None] & is_scored[..., at]
        rows = hidden[..., at, :][is_tried].split(SCORED_BLOCKS)
        is_match = torch.zeros_like(is_tried)
        is_match[is_tried] = torch.cat([head.logits(part).argmax(-1) for part in rows]) == labels[..., at][is_tried]
        is_accepted[..., at] = is_match.int().cumprod(-1).bool()
        is_right = is_accepted[..., at][..., -1]
        start += width
        width *= 2
    return is_accepted


def walk(accepted_from: dict[int, int], span: Sequence[int], block_size: int) -> Acceptance:
    """Follow greedy decoding through a known response: each verification starts where the last one ended.

    Args:
        accepted_from: for each anchor of the response, the draft tokens that agree with the text before the first that
            does not.
        span: [start, end) of the response; its first token comes from the prefill.
        block_size: slots of a block.

    Returns:
        The accepted lengths of `dpace.decode.generate` on this text.
    """
    anchor, end = span
    accepted_lengths = []
    without_bonus = 0
    while anchor < end - 1:
        accepted = min(accepted_from[anchor], end - 1 - anchor)
        without_bonus += anchor + accepted == end - 1
        accepted_lengths.append(accepted)
        anchor += accepted + 1
    return Acceptance.from_lengths(accepted_lengths, block_size, without_bonus)
