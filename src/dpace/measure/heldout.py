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

    Memory: what `walk_conversation` takes, one conversation at a time.

    Args:
        drafter: what is measured.
        target: its target.
        dataset: made with `num_anchors=None`, so that every response token is an anchor.
        token_ids: the only tokens that are drafted; by default all. Decoding drafts the prompt's tokens too.
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
    visit: Visit = lambda *_: None,
    title: str = "",
) -> list[Acceptance]:
    """Do what `heldout_acceptance` does for several `token_ids`, with one forward pass of the drafter.

    `visit` is called with what decoding may reach in each conversation that this rank measures.
    """
    was_training = drafter.training
    drafter.eval()
    refresh_copies(drafter)
    draft_rows = [DraftRows(target, token_ids) for token_ids in vocabularies]
    vocabulary = drafter.vocabulary
    if vocabulary is not None and vocabulary.head is not None:
        # A drafter with a head of its own drafts its tokens alone, whatever is asked for.
        draft_rows = [PackedRows(target, vocabulary)] * len(vocabularies)
    indices = range(len(dataset))
    measured: dict[int, list[list[Acceptance]]] = {}
    for index in track(ranks.share(indices), title):
        measured[index] = walk_conversation(drafter, target, dataset, index, draft_rows, visit)
    if dataset.features is None:
        # A sharded target reads a text only where all ranks call it: a rank with fewer texts joins the last call.
        for _ in range(ranks.num_short(indices)):
            target.join_features(drafter.target_layer_ids)
    drafter.train(was_training)
    for of_rank in ranks.gather(measured):
        measured |= of_rank
    acceptances = []
    for number in range(len(vocabularies)):
        conversations = [measured[index][number] for index in indices]
        # The first way is what is drafted. Without a conversation there is no way, and `of_prompts` refuses the call.
        ways = list(zip(*conversations, strict=True)) or [()]
        drafted, *bounds = map(Acceptance.of_prompts, ways)
        acceptances.append(replace(drafted, bounds=tuple(bound.tau for bound in bounds)))
    return acceptances


def walk_conversation(
    drafter: Drafter,
    target: Target,
    dataset: ResponseDataset,
    index: int,
    draft_rows: Sequence[DraftRows],
    visit: Visit,
) -> list[list[Acceptance]]:
    """Draft the blocks of a conversation, and follow greedy decoding through its responses.

    `SCORED_BLOCKS` are drafted at once. Where only some tokens are drafted, no other matches.

    Memory: features of the conversation; O(`SCORED_BLOCKS` x block_size x (tokens + `SCORED_BLOCKS` x block_size))
    bytes for the dense mask on a CPU.

    Args:
        drafter: what is measured.
        target: its target.
        dataset: has the conversation.
        index: number of the conversation.
        draft_rows: for each vocabulary the head's rows of its tokens.
        visit: called with what decoding may reach.

    Returns:
        For each vocabulary the accepted lengths in each way of `Selector.match`: as is drafted, and after that the
        bounds.
    """
    row = dataset[index]
    if row["features"] is None:
        row["features"] = target.features(row["token_ids"][None], drafter.target_layer_ids)[0]
    batch = {name: value.to(target.device) for name, value in collate([row], drafter.block_size).items()}
    anchors = batch["anchors"][0]
    slots = torch.arange(drafter.block_size, device=target.device)
    accepted_lengths = [[] for _ in draft_rows]
    reached = [[] for _ in draft_rows]
    for start in range(0, len(anchors), SCORED_BLOCKS):
        chunk = slice(start, start + SCORED_BLOCKS)
        blocks = {name: batch[name][:, chunk] for name in Blocks.__dataclass_fields__}
        # Anchors ascend: no block of the chunk sees more of the text than the last one.
        num_seen = int(anchors[chunk][-1]) + 1
        text = {name: batch[name][:, :num_seen] for name in ("token_ids", "features")}
        hidden = blocks_hidden(drafter, target, blocks | text)
        for number, rows in enumerate(draft_rows):
            states, is_accepted = drafter.selector.match(hidden, rows)  # the flags are (way, block, slot)
            accepted_lengths[number].append(is_accepted.sum(-1))
            is_drafted = is_accepted[:1]
            # Decoding reaches the accepted slots, which come after the anchor, and the first wrong one.
            is_reached = blocks["is_scored"] & (slots <= is_drafted.sum(-1, keepdim=True) + 1)
            reached[number].append((states[is_reached], is_drafted[is_reached]))
    for number, chunks in enumerate(reached):
        states, is_right = zip(*chunks, strict=True)
        visit(number, torch.cat(states), torch.cat(is_right))
    spans = [(start, min(end, dataset.max_length)) for start, end in dataset.examples[index].spans]
    acceptances = []
    for chunks in accepted_lengths:
        ways = torch.cat(chunks, dim=-1).tolist()  # (way, anchor)
        by_anchor = [dict(zip(anchors.tolist(), way, strict=True)) for way in ways]
        acceptances.append([walk(accepted, spans, drafter.block_size) for accepted in by_anchor])
    return acceptances


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
        last = end - 1
        while anchor < last:
            # A block may reach past the response, and decoding takes no draft after its last token.
            accepted = min(accepted_from[anchor], last - anchor)
            without_bonus += anchor + accepted == last
            accepted_lengths.append(accepted)
            anchor += accepted + 1  # past the bonus token, which is the next anchor
    return Acceptance.from_lengths(accepted_lengths, block_size, without_bonus)
