"""Measure the accepted lengths that decoding would have on known responses, without decoding.

In come answers that the target wrote greedily. All their blocks are drafted at once, and greedy decoding is followed
through them; out comes an `Acceptance` with one row a conversation.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dpace.batches.dataset import ResponseDataset, collate
from dpace.blocks import Blocks
from dpace.drafter import Drafter
from dpace.drafter.views import blocks_hidden
from dpace.drafter.vocabulary import PackedRows
from dpace.fast.packing import refresh_copies
from dpace.metrics import Acceptance
from dpace.system import ranks
from dpace.system.progress import track
from dpace.target import Target
from dpace.target.draft_rows import DraftRows

SCORED_BLOCKS = 128
"""Number of blocks of a text that are drafted at once where it is measured."""
Visit = Callable[[int, Tensor, Tensor], None]
"""Gets the number of a vocabulary; the states, of `Selector.match`, of the slots of a conversation that decoding may
reach, "slot state"; and whether each is accepted as it is drafted, "slot"."""


@torch.no_grad()
def heldout_acceptance(
    drafter: Drafter,
    target: Target,
    dataset: ResponseDataset,
    *,
    token_ids: Tensor | None = None,
    title: str = "",
) -> Acceptance:
    """Measure accepted lengths on responses that the target wrote greedily, without decoding.

    They equal what `dpace.decode.generate` accepts at temperature 0 with a drafter that drafts any token. Each
    conversation is a row of the result. Of several ranks, each measures a share; all must be here, and all get the
    result.

    Memory: that of `walk_conversation`, one conversation at a time.

    Args:
        drafter: what is measured.
        target: its target.
        dataset: made with `num_anchors=None`, so that every response token is an anchor.
        token_ids: the only tokens that are drafted; by default all. Decoding drafts those of the prompt too.
        title: of a progress bar; none is shown without it.

    Raises:
        ValueError: no response of two tokens or more.
    """
    return measure_vocabularies(drafter, target, dataset, [token_ids], title=title)[0]


@torch.no_grad()
def measure_vocabularies(
    drafter: Drafter,
    target: Target,
    dataset: ResponseDataset,
    vocabularies: Sequence[Tensor | None],
    *,
    visit: Visit | None = None,
    title: str = "",
) -> list[Acceptance]:
    """Do what `heldout_acceptance` does for several `token_ids`, with one forward pass of the drafter.

    `visit` is called with what decoding may reach in each conversation that this rank measures.
    """
    was_training = drafter.training
    drafter.eval()
    refresh_copies(drafter)
    results: dict[int, list[list[Acceptance]]] = {}
    indices = range(len(dataset))
    for i in track([*ranks.share(indices), *[None] * ranks.num_short(indices)], title):
        if i is not None:
            results[i] = walk_conversation(drafter, target, dataset, i, vocabularies, visit)
        elif dataset.features is None:
            target.join_features(drafter.target_layer_ids)
    drafter.train(was_training)
    results = {i: row for share in ranks.gather(results) for i, row in share.items()}
    return [_pool_ways([results[i][number] for i in indices]) for number in range(len(vocabularies))]


def _pool_ways(conversations: Sequence[Sequence[Acceptance]]) -> Acceptance:
    """Put conversations together, each with its ways; the first way is what is drafted, the others are bounds."""
    ways = [Acceptance.of_prompts(rows) for rows in zip(*conversations, strict=True)]
    drafted, *others = ways or [Acceptance.of_prompts([])]
    return replace(drafted, bounds=tuple(way.tau for way in others))


def walk_conversation(
    drafter: Drafter,
    target: Target,
    dataset: ResponseDataset,
    index: int,
    vocabularies: Sequence[Tensor | None],
    visit: Visit | None,
) -> list[list[Acceptance]]:
    """Draft the blocks of a conversation, and follow greedy decoding through its responses.

    `SCORED_BLOCKS` are drafted at once. Where only some tokens are drafted, no other matches.

    Memory: features of the conversation; O(`SCORED_BLOCKS` x block_size x (tokens + `SCORED_BLOCKS` x block_size))
    bytes for the dense mask on a CPU.

    Returns:
        For each vocabulary the accepted lengths in each way of `Selector.match`: as is drafted, and behind that the
        bounds.
    """
    rows = [DraftRows(target, token_ids) for token_ids in vocabularies]
    own = drafter.vocabulary
    if own is not None and own.head is not None:
        rows = [PackedRows(target, own)] * len(rows)
    row = dataset[index]
    if row["features"] is None:
        row["features"] = target.features(row["token_ids"][None], drafter.target_layer_ids)[0]
    inputs = {name: value.to(target.device) for name, value in collate([row], drafter.block_size).items()}
    anchors = inputs["anchors"][0]
    slots = torch.arange(drafter.block_size, device=target.device)
    lengths = [[] for _ in rows]
    reached = [[] for _ in rows]
    for part in torch.arange(len(anchors), device=target.device).split(SCORED_BLOCKS):
        blocks = {name: inputs[name][:, part] for name in Blocks.__dataclass_fields__}
        seen = slice(0, int(anchors[part].max()) + 1)  # no block sees more of the text
        text = {name: inputs[name][:, seen] for name in ("token_ids", "features")}
        found = blocks_hidden(drafter, target, blocks | text)
        for number, of_vocabulary in enumerate(rows):
            states, is_accepted = drafter.selector.match(found, of_vocabulary)
            lengths[number].append(is_accepted.sum(-1))  # "way block"
            if visit is not None:
                drafted = is_accepted[:1]
                is_reached = blocks["is_scored"] & (slots <= drafted.sum(-1, keepdim=True) + 1)
                reached[number].append((states[is_reached], drafted[is_reached]))
    if visit is not None:
        for number, parts in enumerate(reached):
            visit(number, *map(torch.cat, zip(*parts, strict=True)))
    spans = [[min(edge, dataset.max_length) for edge in span] for span in dataset.examples[index].spans]
    return [
        [walk(dict(zip(anchors.tolist(), way, strict=True)), spans, drafter.block_size) for way in ways]
        for ways in (torch.cat(parts, -1).tolist() for parts in lengths)
    ]


def walk(accepted_from: dict[int, int], spans: Sequence[Sequence[int]], block_size: int) -> Acceptance:
    """Follow greedy decoding through known responses: each verification starts where the last one ended.

    Args:
        accepted_from: for each anchor of the responses, the draft tokens that agree with the text before the first that
            does not.
        spans: [start, end) of each response; its first token comes from the prefill.
        block_size: slots of a block.

    Returns:
        The accepted lengths of `dpace.decode.generate` on this text.
    """
    accepted_lengths = []
    without_bonus = 0
    for anchor, end in spans:
        while anchor < end - 1:
            accepted = min(accepted_from[anchor], end - 1 - anchor)
            without_bonus += anchor + accepted == end - 1
            accepted_lengths.append(accepted)
            anchor += accepted + 1
    return Acceptance.from_lengths(accepted_lengths, block_size, without_bonus)
