"""Weights of the slots of a block in the loss, from token probabilities or a fixed schedule.

Each function `NAME_weights` is an objective, `--loss.objective NAME` with hyphens. Its arguments are named as what they
hold: fields of `dpace.loss.Slots` and options of `LossConfig`. It is pure, and returns detached fp32 weights of the
shape of its inputs, 0 at slots that are not scored.
Slot 0 of every `block slot` tensor is the anchor, which is never scored. `q[k]` below is the probability that the
drafter gives to the target's own token at slot `k`. The functions of the D-PACE family also accept any other estimate
of how likely slot `k` is accepted, such as the overlap of the two distributions.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

TokenProbs = Float[Tensor, "batch block slot"]
IsScored = Bool[Tensor, "batch block slot"]
IsMatch = Bool[Tensor, "batch block slot"]
Weights = Float[Tensor, "batch block slot"]

_TINY = torch.finfo(torch.float32).tiny
"""Keeps a division by 0 from happening, in blocks without a scored slot."""


def smoothed(token_probs: TokenProbs, is_scored: IsScored, alpha: float) -> Weights:
    """Compute `(1 - alpha) q + alpha` in fp32, and 1 at slots that are not scored."""
    # 1 is neutral in a product, so slots that are not scored change no other slot's weight.
    return torch.where(is_scored, (1 - alpha) * token_probs.float() + alpha, 1.0)


@torch.no_grad()
def dpace_weights(token_probs: TokenProbs, is_scored: IsScored, alpha: float = 0.5) -> Weights:
    """Weigh each slot by its share in the expected accepted length.

    `w[j] = sum over m >= j of P[m]` with `P[m] = product over i <= m of ((1 - alpha) q[i] + alpha)`: the gradient of
    the surrogate `S = sum over m of P[m]` with respect to `log q[j]` (exactly so at `alpha = 0`). A slot's weight is
    the product of two factors: how likely the block is accepted up to it (cumulative confidence), and how much accepted
    text is expected from there on (continuation value). Weights do not grow along the block and sum to `sum over m of m
    P[m]`: at most `slots * (slots + 1) / 2`, 2 where the drafter is always wrong and `alpha` is 0.5.

    Args:
        token_probs: `q`, in [0, 1]; any float dtype.
        is_scored: slots that count. Other slots are a factor of 1 in the products and 0 in the sums.
        alpha: smoothing in [0, 1]. At 0 the products vanish at the start of training; 1 is a fixed linear decay.

    Returns:
        fp32 weights, detached, not normalized.

    Source: D-PACE (arXiv 2605.18810), equations 7 and 8.
    """
    products = dpace_confidence_only_weights(token_probs, is_scored, alpha)
    # A sum from each slot to the end of its block is a running sum from the end.
    return products.flip(-1).cumsum(-1).flip(-1) * is_scored


@torch.no_grad()
def dpace_confidence_only_weights(token_probs: TokenProbs, is_scored: IsScored, alpha: float = 0.5) -> Weights:
    """Weigh each slot by the probability that the block is accepted up to it.

    `w[j] = P[j]`, the cumulative-confidence factor of `dpace_weights` alone. Arguments and returns as in
    `dpace_weights`.

    Source: D-PACE (arXiv 2605.18810), ablation "cumulative confidence only".
    """
    return smoothed(token_probs, is_scored, alpha).cumprod(-1) * is_scored


@torch.no_grad()
def dpace_continuation_only_weights(token_probs: TokenProbs, is_scored: IsScored, alpha: float = 0.5) -> Weights:
    """Weigh each slot by how much accepted text follows once it is accepted.

    `w[j] = 1 + sum over m > j of (product over j < i <= m of q~[i])`, the factor `dpace_weights / P`. It is computed by
    the recursion `w[j] = 1 + q~[j + 1] w[j + 1]`, which needs no division. Arguments and returns as in `dpace_weights`.

    Source: D-PACE (arXiv 2605.18810), ablation "continuation value only".
    """
    factors = smoothed(token_probs, is_scored, alpha)
    continuation = torch.zeros_like(factors[..., 0])
    weights = []
    for slot in reversed(range(factors.shape[-1])):
        weight = is_scored[..., slot] + continuation
        weights.append(weight)
        # What the slot before may count on: this slot's weight, as far as this slot is accepted.
        continuation = weight * factors[..., slot]
    return torch.stack(weights[::-1], dim=-1) * is_scored


@torch.no_grad()
def bv_weights(token_probs: TokenProbs, is_scored: IsScored, alpha: float = 0.5) -> Weights:
    """Weigh each slot by its share in the logarithm of the expected accepted length.

    `w[j] = dpace_weights[j] / sum over m of P[m]`: at `alpha = 0` the gradient of `log(sum over m of P[m])` with
    respect to `log q[j]`, which for a greedy target is the loss of BV at its end. It begins with a linear decay, which
    is `alpha = 1`. The first scored slot always weighs 1, so a block that is rejected at once counts as much as one
    that is accepted whole. Arguments and returns as in `dpace_weights`.

    Source: BV (arXiv 2609.34832), with greedy verification; the relation to D-PACE is ours.
    """
    expected_length = dpace_confidence_only_weights(token_probs, is_scored, alpha).sum(-1, keepdim=True)
    return dpace_weights(token_probs, is_scored, alpha) / expected_length.clamp_min(_TINY)


def _slots_after_rejection(is_match: IsMatch, is_scored: IsScored) -> Int[Tensor, "batch block slot"]:
    """Count the scored slots from the first rejection to each slot: 0 at the rejection itself, below 0 before it."""
    # Slots that are not scored, such as the anchor, count as accepted: they reject no slot after them.
    is_accepted = (is_match | ~is_scored).int().cumprod(-1)
    num_accepted = (is_accepted * is_scored).sum(-1, keepdim=True)
    # The rejection is the scored slot of number `num_accepted`, counted from 0.
    return is_scored.cumsum(-1) - 1 - num_accepted


@torch.no_grad()
def vat_weights(is_match: IsMatch, is_scored: IsScored, gamma: float = 7.0) -> Weights:
    """Weigh the slots before the first rejection by 1 and the rest by an exponential decay.

    `w[k] = 1` for `k < k*` and `exp(-(k - k*) / gamma)` from the first rejection `k*` on, counted in scored slots. This
    is DFlash's decay, moved from slot 1 to the first slot where the drafter fails.

    Args:
        is_match: whether the drafter's greedy choice is the target's token.
        is_scored: slots that count.
        gamma: decay length in slots, above 0, as in `dflash_weights`.

    Returns:
        fp32 weights in (0, 1].

    Source: verification-aware training, VAT (arXiv 2608.30135): its weights with greedy verification, without its
    labels and its head.
    """
    return torch.exp(-_slots_after_rejection(is_match, is_scored).clamp_min(0) / gamma) * is_scored


@torch.no_grad()
def spec_auf_weights(is_match: IsMatch, is_scored: IsScored) -> Weights:
    """Weigh the slots up to and including the first rejection by 1, and the later ones by 0.

    Decoding never uses slots after the first wrong draft. With the reduction `weights` this is the published mean over
    the support.

    Args:
        is_match: whether the drafter's greedy choice is the target's token.
        is_scored: slots that count.

    Returns:
        fp32 weights, 0 or 1.

    Source: Spec-AUF (arXiv 2607.01893), cross-entropy up to the first mismatch.
    """
    return (is_scored & (_slots_after_rejection(is_match, is_scored) <= 0)).float()


def _slot_numbers(is_scored: IsScored) -> Float[Tensor, " slot"]:
    """Return the slot numbers 0, 1, ... as fp32."""
    return torch.arange(is_scored.shape[-1], device=is_scored.device, dtype=torch.float32)


@torch.no_grad()
def dflash_weights(is_scored: IsScored, gamma: float = 7.0) -> Weights:
    """Weigh slots by a fixed exponential decay, `exp(-(slot - 1) / gamma)`.

    Args:
        is_scored: slots that count.
        gamma: decay length in slots, above 0; the paper uses 7, 5 and 4 for blocks of 16, 10 and 8 (`dflash_gamma`).

    Returns:
        fp32 weights, 1 at slot 1.

    Source: DFlash (arXiv 2602.06036), equation 4.
    """
    return torch.exp(-(_slot_numbers(is_scored) - 1) / gamma) * is_scored


def dflash_gamma(block_size: int) -> float:
    """Return the decay length for a block size.

    The length is 7, 5 and 4 for blocks of 16, 10 and 8; for other sizes it lies on the line through the values of 8
    and 16.

    Source: DFlash (arXiv 2602.06036), appendix A.1; the other values are ours.
    """
    if block_size == 10:
        return 5.0  # the paper's value, which is not on the line
    return 1.0 + 0.375 * block_size


@torch.no_grad()
def uniform_weights(is_scored: IsScored) -> Weights:
    """Weigh every scored slot by 1."""
    return is_scored.float()


@torch.no_grad()
def medusa_weights(is_scored: IsScored, base: float = 0.8) -> Weights:
    """Weigh slots by `base ** slot`, as Medusa weighs its heads.

    Args:
        is_scored: slots that count.
        base: base of the power, in (0, 1].

    Returns:
        fp32 weights, `base` at slot 1.

    Source: Medusa (arXiv 2401.10774), section 2.2.1.
    """
    return base ** _slot_numbers(is_scored) * is_scored
