"""The weights function of each named objective."""

from dataclasses import replace
from typing import get_args

from torch import Tensor

from dpace import weights as W
from dpace.config import LossConfig, Objective, TokenLoss, is_objective, is_own
from dpace.loss import Slots, Weigh
from dpace.own_objective import checked, load_own, name_of, source_sha256, try_out
from dpace.restarts import expected_passes_weights


def with_objective(loss: LossConfig, name: str) -> LossConfig:
    """Set the objective from a name such as `dpace`, `dpace+kl+overlap` or `package.module:function`.

    All other settings stay as they are.

    Raises:
        ValueError: unknown name; the message lists the known ones.
    """
    objective, *parts = name.split("+")
    changes = {"token_loss": "nll", "confidence": "token"}
    for part in parts:
        named = {"overlap": {"confidence": "overlap"}, "validity": {"validity": "joint"}}
        changes |= named.get(part, {"token_loss": part})
    if not is_objective(objective) or changes["token_loss"] not in get_args(TokenLoss):
        raise ValueError(
            f"there is no objective {name!r}; choose one of {', '.join(get_args(Objective))}, or your own as "
            "package.module:function, and add +kl, +lk or +mix for that token loss, +overlap for that confidence, and "
            "+validity for a joint validity head"
        )
    return replace(loss, objective=objective, **changes)


def name_own(loss: LossConfig, weigh: Weigh | None) -> LossConfig:
    """Set the objective to the name of a function of one's own, if there is one.

    Raises:
        ValueError: it is no function.
    """
    return loss if weigh is None else replace(loss, objective=name_of(weigh))


def objective_sha256(loss: LossConfig, weigh: Weigh | None = None) -> str | None:
    """Hash the source of an objective of one's own; None for those of dpace.

    Args:
        loss: names the objective.
        weigh: its function, where it is at hand; otherwise it is imported by its name.

    Raises:
        ValueError: see `own_objective.load_own` and `own_objective.source_sha256`.
    """
    if weigh is None and not is_own(loss.objective):
        return None
    return source_sha256(weigh or load_own(loss.objective))


def make_weigh(config: LossConfig, block_size: int, weigh: Weigh | None = None) -> Weigh:
    """Make the weights function of an objective, for `frozen_head_nll`.

    With confidence `overlap`, `frozen_head_nll` needs `target_hidden`. One's own objective is tried out on a small
    batch, and its weights are checked each time.

    Args:
        config: names the objective, and has its settings.
        block_size: slots in a block.
        weigh: the function of one's own objective; otherwise it is imported by its name.

    Raises:
        ValueError: see `own_objective`.
    """
    if weigh is not None or is_own(config.objective):
        weigh = weigh or load_own(config.objective)
        try_out(weigh, config.objective, block_size=block_size, has_overlap=config.needs_target_probs)
        return checked(weigh, config.objective)
    gamma = config.gamma or W.dflash_gamma(block_size)

    def alpha(slots: Slots) -> float:
        end = config.alpha if config.alpha_end is None else config.alpha_end
        return config.alpha + (end - config.alpha) * slots.progress

    def confidence(slots: Slots) -> Tensor:
        if config.confidence == "token":
            return slots.token_probs
        if slots.overlap is None:
            raise ValueError("confidence 'overlap' compares with the target's distribution and needs target_hidden")
        return slots.overlap

    functions: dict[str, Weigh] = {
        "dpace": lambda s: W.dpace_weights(confidence(s), s.is_scored, alpha(s)),
        "dpace-confidence-only": lambda s: W.dpace_confidence_only_weights(confidence(s), s.is_scored, alpha(s)),
        "dpace-continuation-only": lambda s: W.dpace_continuation_only_weights(confidence(s), s.is_scored, alpha(s)),
        "dpace-exact": lambda s: W.dpace_exact_weights(confidence(s), s.is_scored, alpha(s)),
        "expected-passes": lambda s: _expected_passes(confidence(s), s, alpha(s)),
        "chain-reward": lambda s: W.chain_reward_weights(confidence(s), s.is_scored),
        "vat": lambda s: W.vat_weights(s.is_match, s.is_scored, gamma),
        "spec-auf": lambda s: W.spec_auf_weights(s.is_match, s.is_scored),
        "dflash": lambda s: W.dflash_weights(s.is_scored, gamma),
        "uniform": lambda s: W.uniform_weights(s.is_scored),
        "medusa": lambda s: W.head_weights(s.is_scored, config.base),
    }
    return functions[config.objective]


def _expected_passes(confidence: Tensor, slots: Slots, alpha: float) -> Tensor:
    if slots.anchors is None or slots.is_response is None:
        raise ValueError("the objective expected-passes needs the blocks' places in the text: Slots.anchors")
    return expected_passes_weights(confidence, slots.is_scored, slots.anchors, slots.is_response, alpha)
