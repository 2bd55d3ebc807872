"""Find where tau is lost: slot by slot, which rejected drafts no block drafter could have avoided.

    python benchmarks/explain.py TARGET DRAFTER --prompts heldout.jsonl --max-new-tokens 32

A slot of a block drafter is blind: it does not know the tokens of the slots before it. Above temperature 0 the target
draws those, and its next token depends on them. So several drafts are drawn after real anchors, and the target reads
them. For each slot the one distribution is sought that is rejected least after all of them: its rejections are the
floor. At temperature 0 there is no floor. Only the first turn of a prompt is answered.

Source: the idea of arXiv 2608.27339.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import tyro
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import DynamicCache

from dpace.blocks import build_blocks
from dpace.decode import generate
from dpace.decode.sampling import Sampler
from dpace.drafter import Drafter, load_drafter
from dpace.drafter.views import blocks_hidden
from dpace.drafter.vocabulary import PackedRows
from dpace.metrics import estimate
from dpace.prompts.prompts import read_heldout_prompts
from dpace.system.groups import spread_evenly
from dpace.system.progress import track
from dpace.target import Target
from dpace.target.chat import encode_chat
from dpace.target.locate import find_target

NUM_FOLDS = 4
"""Parts of the samples of an anchor; the floor's upper end is fitted on all but one, and measured on that one."""
LEAST_PROB = 1e-7
"""Tokens to which no sample gives this probability are left out of a fit, which is never better by more than their sum.
"""


@dataclass(frozen=True)
class Options:
    """What is measured, and how."""

    target: tyro.conf.Positional[str]
    """Folder, Hub id or GGUF file."""
    drafter: tyro.conf.Positional[str]
    """Its folder or Hub id."""
    prompts: str = "demo"
    """JSONL file of prompts that the drafter was not trained on."""
    num_prompts: int = 16
    """Most prompts to take from the file, evenly spread."""
    num_blocks: int = 8
    """Most blocks of an answer, evenly spread."""
    num_samples: int = 16
    """Drafts that are drawn after each anchor, 2 or more; more of them narrow the floor."""
    temperature: float = 1.0
    """Sampling temperature of the target."""
    max_new_tokens: int = 128
    """Longest answer in tokens."""


def fit_blind(probs: Float[Tensor, "sample vocab"], weights: Float[Tensor, " sample"]) -> Float[Tensor, " vocab"]:
    """Find the distribution `q` of drafts that the target accepts most, where it cannot be told which sample is true.

    It has the largest `sum over samples of weight * sum over tokens of min(p, q)`. One more bit of `q[x]` gains the
    weights of the samples whose `p[x]` is larger, so `q` is filled where this gain is largest, until its sum is 1.

    Args:
        probs: the target's distributions.
        weights: of the samples.
    """
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
) -> Float[np.ndarray, "4 slot"]:
    """Measure the rejections in a block, on drafts that were drawn after its anchor.

    A draft counts for a slot as far as it is accepted: each token before with probability `min(1, p / q)`. So decoding
    has the same rejections.

    The floor has two ends. A distribution that is fitted to the same samples knows them too well, so it rejects too
    little; one that is fitted to others does not know enough, so it rejects too much. In expectation the floor of a
    drafter that knows the target's distribution lies between them, and they meet as samples are added.

    Memory: a few times the size of `probs` at one slot.

    Args:
        probs: the target's distributions.
        drafted: those that the tokens were drawn from. Only with a selector do samples differ in them.
        tokens: of the drafts.
        is_end: tokens that end a text.

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
        low = rejections(true, fit_blind(true, weights), weights)
        high = 0.0
        for fold in folds.unique():
            is_measured = folds == fold
            fitted = fit_blind(true[~is_measured], weights[~is_measured])
            high += rejections(true[is_measured], fitted, weights[is_measured])
        # Few samples may bring the ends into the wrong order.
        losses[:, slot] = float(weights.sum()), rejections(true, draft, weights), low, max(low, high)
        chosen = tokens[:, slot, None]
        accepted = (true.gather(1, chosen) / draft.gather(1, chosen))[:, 0].clamp_max(1)
        weights = torch.where(is_end[:, slot], 0.0, weights * accepted)
    return losses


def read_drafts(
    target: Target, prefix: Int[Tensor, " seq"], tokens: Int[Tensor, "sample slot"], sampler: Sampler
) -> Float[Tensor, "sample slot vocab"]:
    """Let the target read drafts after a text of two tokens or more; return its distributions in their slots.

    Memory: keys and values of the text for each draft, and what is returned.
    """
    num_samples = len(tokens)
    cache = DynamicCache(config=target.config)
    # The text is read once, but for its last token, whose distribution is the first slot's.
    target.hidden(prefix[None, :-1], cache)
    cache.batch_repeat_interleave(num_samples)
    known = torch.cat([prefix[-1:].expand(num_samples, 1), tokens[:, :-1]], dim=1)
    hidden = target.hidden(known, cache)
    probs = sampler.probs(sampler.scores(target.logits(hidden.flatten(0, 1)), ()))
    return probs.unflatten(0, tokens.shape)


@torch.inference_mode()
def explain_prompt(
    target: Target, drafter: Drafter, token_ids: Sequence[int], options: Options, seed: int
) -> Float[np.ndarray, "block 4 slot"]:
    """Decode a prompt with whole drafts, and measure the rejections in some of its blocks; see `score_block`.

    Cost: for each block, a pass of the target over its text, and one over `num_samples` drafts.
    """
    answer = generate(
        target,
        drafter,
        token_ids,
        width="full",
        verify_rule="speculative",
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        seed=seed,
    )
    text = torch.tensor([[*token_ids, *answer.token_ids]], device=target.device)
    # The first anchor is the token of the prefill, and each next one the last token that a verification emitted.
    starts = len(token_ids) + np.cumsum([0, *answer.emitted_lengths])[:-1]
    anchors = spread_evenly(starts.tolist(), options.num_blocks)
    if not anchors:  # the answer is one token
        return np.zeros((0, 4, drafter.block_size - 1))
    is_response = torch.ones_like(text).bool()  # only the loss reads which slots are scored
    blocks = build_blocks(text, is_response, [torch.tensor(anchors)], drafter.block_size)
    out = blocks_hidden(drafter, target, {**vars(blocks), "token_ids": text, "features": None})
    rows = PackedRows(target, drafter.vocabulary, token_ids)
    sampler = Sampler(options.temperature, seed=seed, device=target.device)
    stops = torch.tensor(target.stop_token_ids, device=target.device)
    losses = []
    for anchor, hidden, before in zip(anchors, out.hidden[0], out.before[0], strict=True):
        draft = drafter.selector.propose(rows, hidden[None], text[:, anchor], before[None], drafter.block_size)
        prefix = text[0, : anchor + 1]
        num_drafts = draft.tokens.shape[1]
        if options.temperature > 0:
            samples = range(options.num_samples)
            drawn = [draft.draw(num_drafts, sampler) for _ in samples]
            tokens, drafted = map(torch.stack, zip(*drawn, strict=True))
        else:
            tokens = draft.tokens.expand(options.num_samples, -1)
            drafted = nn.functional.one_hot(tokens, len(target.head.weight)).float()
        probs = read_drafts(target, prefix, tokens, sampler)
        losses.append(score_block(probs, drafted, tokens, torch.isin(tokens, stops)))
    return np.array(losses)


def own_share(losses: Float[np.ndarray, "4 prompt"]) -> str:
    """Write which share of the rejections is the drafter's own, `20 to 35 % [15, 41]`: bounds, and their interval."""
    _, rejected, low, high = losses
    # What lies above a floor is the drafter's own. Shares from few samples may lie outside of 0 to 1.
    shares = [estimate([[np.stack([rejected - floor, rejected], axis=1)]]) for floor in (high, low)]
    (least, bottom, _), (most, _, top) = 100 * np.clip(shares, 0, 1)
    return f"{least:.0f} to {most:.0f} % [{bottom:.0f}, {top:.0f}]"


def main(options: Options) -> None:
    """Print what is rejected, and how much of it is the drafter's own: slot by slot, and in all."""
    target = Target.load(find_target(options.target))
    drafter = load_drafter(options.drafter, target)
    prompts = spread_evenly(read_heldout_prompts(options.prompts), options.num_prompts)
    num_blocks = 0
    losses = []
    for seed, prompt in enumerate(track(prompts, "sampling")):
        of_blocks = explain_prompt(target, drafter, encode_chat(target, prompt.turns[0]), options, seed)
        num_blocks += len(of_blocks)
        losses.append(of_blocks.sum(0))
    by_slot = np.stack(losses, axis=-1).swapaxes(0, 1)  # (slot, 4, prompt)
    print(f"{len(prompts)} prompts, {num_blocks} blocks, temperature {options.temperature:g}; % of the blocks")
    print("slot  reached  rejected  the drafter's own [95 %]")
    for slot, of_slot in enumerate([*by_slot, by_slot.sum(0)], start=1):
        reached, rejected = 100 * of_slot[:2].sum(-1) / max(1, num_blocks)
        name = slot if slot <= len(by_slot) else "all"
        print(f"{name:>4}  {reached:7.1f}  {rejected:8.1f}  {own_share(of_slot)}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
