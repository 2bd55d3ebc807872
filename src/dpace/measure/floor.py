"""Find how many rejected drafts no block drafter could have avoided, slot by slot, and how many are the drafter's own.

A slot of a block drafter is blind: it does not know the tokens of the slots before it. Above temperature 0 the target
draws those, and its next token depends on them. So the target continues the text after real anchors several times, and
for each slot the one distribution is sought that is rejected least in all continuations: its rejections are the floor.

Source: the idea of arXiv 2608.27339.
"""

from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import DynamicCache

from dpace.blocks import build_blocks
from dpace.config import ExplainConfig
from dpace.decode import generate
from dpace.decode.sampling import Sampler
from dpace.drafter import Drafter
from dpace.drafter.views import blocks_hidden
from dpace.drafter.vocabulary import PackedRows
from dpace.measure.benchmark import hash_config
from dpace.measure.records import Records, group_by_set, setup_of
from dpace.measure.results import (
    Estimate,
    ExplainedRecord,
    ExplainResults,
    ExplainRow,
    ExplainSetup,
    SlotLoss,
    nullable,
    write_results,
)
from dpace.metrics import estimate
from dpace.prompts.prompts import Prompt
from dpace.respond.conversation import refuse_long_prompts
from dpace.system.device import dtype_name
from dpace.system.groups import spread_evenly
from dpace.system.ledger import register_files
from dpace.system.progress import track
from dpace.system.provenance import fingerprint
from dpace.target import Target
from dpace.target.chat import encode_chat

NUM_FOLDS = 4
"""Parts of the samples of an anchor; the floor's upper end is fitted on all but one, and measured on that one."""
LEAST_PROB = 1e-7
"""Tokens to which no sample gives this probability are left out of a fit, which is never better by more than their sum.
"""
EXPLAIN_FILE = "explain.json"


def fit_blind(
    probs: Float[Tensor, "sample vocab"], weights: Float[Tensor, " sample"], *, is_drawn: bool
) -> Float[Tensor, " vocab"]:
    """Find the distribution `q` of drafts that the target accepts most, where it cannot be told which sample is true.

    It has the largest `sum over samples of weight * sum over tokens of min(p, q)`. One more bit of `q[x]` gains the
    weights of the samples whose `p[x]` is larger, so `q` is filled where this gain is largest, until its sum is 1.

    Args:
        probs: the target's distributions.
        weights: of the samples.
        is_drawn: whether drafts are drawn from `q`; otherwise `q` is one token, the one that the target draws most.
    """
    if not is_drawn:
        return nn.functional.one_hot((weights @ probs).argmax(), probs.shape[1]).to(probs.dtype)
    tokens = (probs.amax(0) > LEAST_PROB).nonzero()[:, 0]
    # A token's probabilities, ascending, are levels. `q[x]` is filled from one level to the next, as one piece.
    levels, order = probs[:, tokens].sort(dim=0)  # (level, token)
    heights = levels.diff(dim=0, prepend=torch.zeros_like(levels[:1]))
    # What a piece gains: the weights of the samples at its level and above, so the sum runs from the last level down.
    gains = weights[order].flip(0).cumsum(0).flip(0)
    # Gains fall with the level, and the sort is stable: no piece is taken before the pieces below it.
    best = gains.flatten().argsort(descending=True, stable=True)
    # Pieces are taken whole until they sum to 1: the differences of the cut sum are what each gets.
    taken = heights.flatten()[best].cumsum(0).clamp_max(1).diff(prepend=heights.new_zeros(1))
    pieces = torch.zeros_like(taken).index_copy_(0, best, taken).view_as(heights)
    return torch.zeros_like(probs[0]).index_copy_(0, tokens, pieces.sum(0))


def rejections(probs: Tensor, drafted: Tensor, weights: Tensor) -> float:
    """Sum what weighted samples of the target, "sample vocab", reject of `drafted`, "sample vocab" or "vocab".

    A draft from `q` is accepted with probability `sum of min(p, q)`, also where `q` is one token.
    """
    return float(weights @ (1 - torch.minimum(probs, drafted).sum(-1)).clamp_min(0))


def score_block(
    probs: Float[Tensor, "sample slot vocab"],
    drafted: Float[Tensor, "sample slot vocab"],
    tokens: Int[Tensor, "sample slot"],
    is_end: Bool[Tensor, "sample slot"],
    *,
    is_drawn: bool,
) -> Float[np.ndarray, "4 slot"]:
    """Measure the rejections in a block, on continuations that the target has drawn after its anchor.

    A continuation counts for a slot as far as the drafter's own drafts reach it: each token before is accepted with
    probability `min(1, q / p)`. So decoding has the same rejections.

    The floor has two ends. A distribution that is fitted to the same samples knows them too well, so it rejects too
    little; one that is fitted to others does not know enough, so it rejects too much. In expectation the floor of a
    drafter that knows the target's distribution lies between them, and they meet as samples are added.

    Memory: a few times the size of `probs` at one slot.

    Args:
        probs: the target's distributions.
        drafted: the drafter's; of one token where drafts are not drawn. Only with a selector do samples differ in it.
        tokens: that the target drew.
        is_end: tokens that end a text.
        is_drawn: whether drafts are drawn from `drafted`, as in `fit_blind`.

    Returns:
        For each slot: how often it is reached; how often it is reached and rejected; and the lower and the upper end of
        the rejections that no blind slot avoids.
    """
    num_samples, num_slots = tokens.shape
    folds = torch.arange(num_samples, device=probs.device) % min(NUM_FOLDS, num_samples)
    # How often drafting comes to a slot of a sample: together 1 at the first slot.
    weights = torch.full_like(probs[:, 0, 0], 1 / num_samples)
    losses = np.zeros((4, num_slots))
    for slot in range(num_slots):
        true = probs[:, slot]
        draft = drafted[:, slot]
        low = rejections(true, fit_blind(true, weights, is_drawn=is_drawn), weights)
        high = 0.0
        for fold in folds.unique():
            is_measured = folds == fold
            fitted = fit_blind(true[~is_measured], weights[~is_measured], is_drawn=is_drawn)
            high += rejections(true[is_measured], fitted, weights[is_measured])
        # Few samples may bring the ends into the wrong order.
        losses[:, slot] = float(weights.sum()), rejections(true, draft, weights), low, max(low, high)
        chosen = tokens[:, slot, None]
        accepted = (draft.gather(1, chosen) / true.gather(1, chosen))[:, 0].clamp_max(1)
        weights = torch.where(is_end[:, slot], 0.0, weights * accepted)
    return losses


def draw_continuations(
    target: Target, prefix: Sequence[int], num_samples: int, num_slots: int, sampler: Sampler
) -> tuple[Int[Tensor, "sample slot"], Float[Tensor, "sample slot vocab"]]:
    """Let the target continue a text several times.

    Memory: keys and values of the text for each sample, and the distributions that are returned.

    Returns:
        The tokens, and the distribution that each was drawn from.
    """
    inputs = torch.tensor([prefix], device=target.device)
    cache: Any = DynamicCache(config=target.config)
    # The prefix is read once: its last hidden state and its keys and values are repeated for each sample.
    hidden = target.hidden(inputs, cache)[:, -1].expand(num_samples, -1)
    cache.reorder_cache(inputs.new_zeros(num_samples))
    tokens = []
    probs = []
    while True:
        probs.append(sampler.probs(sampler.scores(target.logits(hidden), ())))
        tokens.append(torch.multinomial(probs[-1], 1, generator=sampler.generator))
        if len(tokens) == num_slots:
            return torch.cat(tokens, dim=1), torch.stack(probs, dim=1)
        hidden = target.hidden(tokens[-1], cache)[:, -1]


@torch.inference_mode()
def explain_prompt(
    target: Target, drafter: Drafter, token_ids: Sequence[int], config: ExplainConfig, seed: int
) -> Float[np.ndarray, "block 4 slot"]:
    """Decode a prompt with whole drafts, and measure the rejections in some of its blocks; see `score_block`."""
    is_drawn = config.verify_rule == "speculative" and config.temperature > 0
    options: Any = {"max_new_tokens": config.max_new_tokens, "temperature": config.temperature, "seed": seed}
    answer = generate(target, drafter, token_ids, width="full", verify_rule=config.verify_rule, **options)
    text = torch.tensor([[*token_ids, *answer.token_ids]], device=target.device)
    # The first anchor is the token of the prefill, and each next one the last token that a verification emitted.
    starts = len(token_ids) + np.cumsum([0, *answer.emitted_lengths])[:-1]
    anchors = spread_evenly(starts.tolist(), config.num_blocks)
    if not anchors:  # the answer is one token
        return np.zeros((0, 4, drafter.block_size - 1))
    is_response = torch.ones_like(text).bool()  # only the loss reads which slots are scored
    blocks = build_blocks(text, is_response, [torch.tensor(anchors)], drafter.block_size)
    out = blocks_hidden(drafter, target, {**vars(blocks), "token_ids": text, "features": None})
    rows = PackedRows(target, drafter.vocabulary, token_ids)
    sampler = Sampler(config.temperature, seed=seed, device=target.device)
    stops = torch.tensor(target.stop_token_ids, device=target.device)
    losses = []
    for anchor, hidden, before in zip(anchors, out.hidden[0], out.before[0], strict=True):
        read_before = partial(before.__getitem__, None)  # with a batch axis
        draft = drafter.selector.propose(rows, hidden[None], text[:, anchor], read_before, drafter.block_size)
        prefix = text[0, : anchor + 1].tolist()
        tokens, probs = draw_continuations(target, prefix, config.num_samples, draft.tokens.shape[1], sampler)
        if is_drawn:
            drafted = drafter.selector.chances(draft, tokens, rows, sampler)
        else:
            drafted = nn.functional.one_hot(draft.tokens, probs.shape[-1]).to(probs.dtype).expand_as(probs)
        losses.append(score_block(probs, drafted, tokens, torch.isin(tokens, stops), is_drawn=is_drawn))
    return np.array(losses)


def explain(target: Target, drafter: Drafter, prompts: Sequence[Prompt], config: ExplainConfig) -> ExplainResults:
    """Measure what is rejected of a drafter's drafts, and what of it no block drafter avoids; write `explain.json`.

    Each finished prompt is kept in `explain-*.jsonl`, a file for each way to measure; an interrupted call goes on after
    it. Only the first turn of a prompt is answered.

    Cost: for each block, `num_samples` rows in as many passes of the target as a block has draft slots.

    Raises:
        ValueError: a drafter for another target, or an over-long prompt.
    """
    folder = Path(config.output)
    refuse_long_prompts(target, prompts, config.max_new_tokens)
    register_files(folder, EXPLAIN_FILE)
    setup = ExplainSetup(
        **setup_of(target, config),
        target_weights_sha256=target.sha256,
        drafter_sha256=fingerprint(drafter),
        drafter_config=hash_config(drafter),
        dtype=dtype_name(target.model.dtype),
        temperature=config.temperature,
        verify_rule=config.verify_rule,
        num_samples=config.num_samples,
        num_blocks=config.num_blocks,
    )
    records = Records(folder / "explain.jsonl", ExplainedRecord, setup, prompts)
    for _, (temperature, prompt) in track(records.missing(product([config.temperature], prompts)), "sampling"):
        token_ids = encode_chat(target, prompt.turns[0])
        losses = explain_prompt(target, drafter, token_ids, config, records.seeds[prompt.id])
        record = ExplainedRecord(
            set=prompt.set,
            id=prompt.id,
            temperature=temperature,
            num_blocks=len(losses),
            losses=losses.sum(0).tolist(),
        )
        records.add(record)
    results = ExplainResults(**vars(setup), drafter=config.drafter, rows=make_rows(list(records.rows.values())))
    write_results(folder / EXPLAIN_FILE, results)
    return results


def make_rows(records: Sequence[ExplainedRecord]) -> list[ExplainRow]:
    """Pool prompts by set, and all of several sets together."""
    rows = []
    for name, group in group_by_set(records).items():
        losses = np.array([record.losses for record in group]).transpose(2, 1, 0)  # (slot, 4, prompt)
        num_blocks = sum(record.num_blocks for record in group)
        row = ExplainRow(
            set=name,
            num_prompts=len(group),
            num_blocks=num_blocks,
            whole=_slot_loss(losses.sum(0), num_blocks),
            slots=[_slot_loss(of_slot, num_blocks) for of_slot in losses],
        )
        rows.append(row)
    return rows


def _slot_loss(losses: Float[np.ndarray, "4 prompt"], num_blocks: int) -> SlotLoss:
    """Make shares of blocks, and of the rejections, from sums by prompt."""
    reached, rejected, low, high = losses

    def share_above(floor: Float[np.ndarray, " prompt"]) -> Estimate:
        """Estimate which share of the rejections lies above a floor: these are the drafter's own."""
        return nullable(estimate([[np.stack([rejected - floor, rejected], axis=1)]]))

    count = max(1, num_blocks)
    return SlotLoss(
        reached=float(reached.sum() / count),
        rejected=float(rejected.sum() / count),
        own_least=share_above(high),
        own_most=share_above(low),
    )
