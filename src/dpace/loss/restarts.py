"""Where decoding restarts: a response as a chain of verifications, and the weights that make it short.

A verification at anchor `s` accepts at least `a` draft tokens with probability `S[a](s) = q~[1] ... q~[a]`, and the
next one starts at `t = s + a + 1` where it accepts exactly `a`: with probability `P[s, t] = S[a](s) - S[a + 1](s)`.
`P` is strictly upper triangular, so expectations over the whole response are two triangular systems. All functions are
pure and give detached fp32. docs/objectives.md derives the weights.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dpace.weights import IsScored, TokenProbs, Weights, smoothed

Anchors = Int[Tensor, "batch block"]
IsResponse = Bool[Tensor, "batch seq"]


class Passes(NamedTuple):
    """A response as decoding goes through it; all are 0 at positions that no verification starts from."""

    visits: Float[Tensor, "batch seq"]
    """Expected number of verifications that start here, 0 to 1."""
    to_go: Float[Tensor, "batch seq"]
    """Expected number of verifications from here to the end of the response."""
    is_anchor: Bool[Tensor, "batch seq"]
    """Positions that a verification can start from: this token and the next one are the target's."""


def survival(token_probs: TokenProbs, is_scored: IsScored, alpha: float = 0.5) -> Weights:
    """Compute the probability that a block is accepted through each slot, 1 at the anchor.

    It is 0 from the first slot on that is not scored, since decoding ends there.
    """
    is_inside = is_scored.clone()
    is_inside[..., 0] = True
    return smoothed(token_probs, is_scored, alpha).where(is_scored, 1.0).cumprod(-1) * is_inside.cumprod(-1)


def _windows(is_response: IsResponse, block_size: int) -> Bool[Tensor, "batch seq slot"]:
    """Say whether a response goes on without a gap from each position to each slot behind it."""
    return nn.functional.pad(is_response, (0, block_size - 1)).unfold(1, block_size, 1).cumprod(-1).bool()


@torch.no_grad()
def expected_passes(
    reach: Float[Tensor, "batch block slot"],
    anchors: Anchors,
    is_block: Bool[Tensor, "batch block"],
    is_response: IsResponse,
) -> Passes:
    """Compute how often a verification starts at each position, and how many are to go from there.

    With `1` the positions that a verification can start from, and `e` the first one of each response,
    `to_go = 1 + P to_go` and `visits = e + visits P`. At positions that are not anchors of the batch, `S` is that of
    the nearest anchor.

    Memory: O(batch x seq x (seq + block)) fp32.

    Args:
        reach: `S`, of `survival`.
        anchors: position of each block; ascending but for padding blocks.
        is_block: False for padding blocks.
        is_response: tokens that the target wrote; responses are runs of them.
    """
    batch, seq = is_response.shape
    size = reach.shape[-1]
    inside = _windows(is_response, size)
    is_anchor = inside[..., 1]
    positions = torch.arange(seq, device=anchors.device)
    distances = (positions[:, None] - anchors[:, None, :]).abs().where(is_block[:, None, :], 2 * seq)
    nearest = distances.argmin(-1)[..., None].expand(-1, -1, size)
    everywhere = reach.gather(1, nearest) * inside * is_anchor[..., None]
    stops = everywhere - nn.functional.pad(everywhere[..., 1:], (0, 1))  # exactly `slot` draft tokens are accepted
    chain = torch.zeros(batch, seq, seq + size, device=anchors.device)
    next_anchor = positions[:, None] + 1 + torch.arange(size, device=anchors.device)
    chain.scatter_(2, next_anchor.expand(batch, -1, -1), stops)
    system = torch.eye(seq, device=anchors.device) - chain[..., :seq] * is_anchor[:, None, :]
    first = is_anchor & ~nn.functional.pad(is_response, (1, 0))[:, :-1]
    to_go = torch.linalg.solve_triangular(system, is_anchor.float()[..., None], upper=True, unitriangular=True)
    visits = torch.linalg.solve_triangular(system.mT, first.float()[..., None], upper=False, unitriangular=True)
    return Passes(visits[..., 0], to_go[..., 0], is_anchor)


@torch.no_grad()
def passes_weights(
    reach: Float[Tensor, "batch block slot"],
    visits: Float[Tensor, "batch block"],
    savings: Float[Tensor, "batch block slot"],
) -> Weights:
    """Weigh slot `k` by `visits * sum over m >= k of S[m] savings[m]`; those of D-PACE where both are 1.

    Args:
        reach: `S`, of `survival`.
        visits: how often decoding starts a verification at the block's anchor.
        savings: verifications that are saved by accepting slot `m` too.
    """
    terms = reach * savings
    terms[..., 0] = 0
    weights = terms.flip(-1).cumsum(-1).flip(-1) * visits[..., None]
    weights[..., 0] = 0
    return weights


@torch.no_grad()
def expected_passes_weights(
    token_probs: TokenProbs,
    is_scored: IsScored,
    anchors: Anchors,
    is_response: IsResponse,
    alpha: float = 0.5,
) -> Weights:
    """Weigh each slot by its share in the number of verifications that the whole response takes.

    `w[k](t) = v(t) * sum over m >= k of S[m](t) D[m](t)`, with `v` the expected visits and
    `D[m](t) = N(t + m) - N(t + m + 1)` the verifications that accepting slot `m` saves. This is the negative gradient
    of the expected number of verifications `N` with respect to `log q~[k](t)`, not differentiated further. `v` and `D`
    are divided by their means over the conversation, so that weights are those of D-PACE where both are constant, and
    their scale does not fall as the drafter gets better. A negative `D` counts as 0: there, accepting one token more
    would end on a worse anchor.

    Args:
        token_probs: `q`, in [0, 1].
        is_scored: slots that count; a block counts up to the first one that does not.
        anchors: position of each block.
        is_response: tokens that the target wrote.
        alpha: smoothing in [0, 1], as in `dpace_weights`.

    Returns:
        fp32 weights, detached.

    Raises:
        ValueError: `alpha` outside [0, 1].

    Source: ours; docs/objectives.md derives it.
    """
    reach, is_block = survival(token_probs, is_scored, alpha), is_scored.any(-1)
    passes = expected_passes(reach, anchors, is_block, is_response)
    num_anchors = passes.is_anchor.sum(-1).clamp_min(1)
    mean = (passes.visits.sum(-1) / num_anchors).clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    slots = torch.arange(reach.shape[-1] + 1, device=anchors.device)
    to_go = nn.functional.pad(passes.to_go, (0, len(slots)))
    there = to_go.gather(1, (anchors[..., None] + slots).flatten(1)).view(*anchors.shape, len(slots))
    savings = (there[..., :-1] - there[..., 1:]).clamp_min(0)
    weights = passes_weights(reach, passes.visits.gather(1, anchors) / mean, savings / mean[..., None])
    return weights * is_scored


@torch.no_grad()
def restart_rates(
    token_probs: TokenProbs, is_scored: IsScored, anchors: Anchors, is_response: IsResponse
) -> Float[Tensor, "batch seq"]:
    """Estimate how often decoding restarts at each position, from the blocks of a batch alone.

    At position `t` it is the mean over the blocks `s` that cover `t` of `S[t - s - 1](s) - S[t - s](s)`, with `S` not
    smoothed: the share of them whose verification ends just before `t`. A response's first position is 1, since
    decoding always starts there. Positions that no block covers have the mean of the others.

    Returns:
        Rates in [0, 1]; 0 at positions that no verification starts from.

    Source: our estimate of the error positions that Draft-OPD (arXiv 2605.29343) replays from.
    """
    size, is_block = is_scored.shape[-1], is_scored.any(-1)
    reach = survival(token_probs, is_scored, alpha=0.0)
    stops = (reach - nn.functional.pad(reach[..., 1:], (0, 1))).flatten(1)
    is_anchor = _windows(is_response, size)[..., 1]
    goals = anchors[..., None] + 1 + torch.arange(size, device=anchors.device)
    is_covered = (
        (nn.functional.pad(is_scored[..., 1:], (0, 1), value=True) & is_block[..., None]).cumprod(-1).flatten(1)
    )
    total, count = (
        torch.zeros(len(anchors), is_response.shape[1] + size + 1, device=anchors.device).scatter_add_(
            1, goals.flatten(1), values
        )[:, : is_response.shape[1]]
        for values in (stops * is_covered, is_covered.float())
    )
    is_known = (count > 0) & is_anchor
    rates = (total / count.clamp_min(1)).where(is_known, 0.0)
    mean = rates.sum(-1, keepdim=True) / is_known.sum(-1, keepdim=True).clamp_min(1)
    first = is_anchor & ~nn.functional.pad(is_response, (1, 0))[:, :-1]
    return rates.where(is_known, mean).masked_fill(first, 1.0) * is_anchor
