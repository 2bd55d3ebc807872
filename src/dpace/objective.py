"""The weights function of each named objective."""

from dataclasses import replace
from typing import get_args

from torch import Tensor

from dpace import weights as W
from dpace.config import LossConfig, Objective, TokenLoss
from dpace.loss import Slots, Weigh


def with_objective(loss: LossConfig, name: str) -> LossConfig:
    """Set the objective from a name such as `dpace`, `dpace+kl` or `dpace+kl+overlap`.

    All other settings stay as they are.

    Raises:
        ValueError: unknown name; the message lists the known ones.
    """
    objective, *parts = name.split("+")
    changes = {"token_loss": "nll", "confidence": "token"}
    for part in parts:
        changes |= {"confidence": part} if part == "overlap" else {"token_loss": part}
    if objective not in get_args(Objective) or changes["token_loss"] not in get_args(TokenLoss):
        raise ValueError(
            f"there is no objective {name!r}; choose one of {', '.join(get_args(Objective))}, "
            "and add +kl or +lk for that token loss and +overlap for that confidence"
        )
    return replace(loss, objective=objective, **changes)


def make_weigh(config: LossConfig, block_size: int) -> Weigh:
    """Make the weights function of an objective, for `frozen_head_nll`.

    With confidence `overlap`, `frozen_head_nll` needs `target_hidden`.
    """
    alpha, gamma = config.alpha, config.gamma or W.dflash_gamma(block_size)

    def confidence(slots: Slots) -> Tensor:
        if config.confidence == "token":
            return slots.token_probs
        if slots.overlap is None:
            raise ValueError("confidence 'overlap' compares with the target's distribution and needs target_hidden")
        return slots.overlap

    functions: dict[str, Weigh] = {
        "dpace": lambda s: W.dpace_weights(confidence(s), s.is_scored, alpha),
        "dpace-confidence-only": lambda s: W.dpace_confidence_only_weights(confidence(s), s.is_scored, alpha),
        "dpace-continuation-only": lambda s: W.dpace_continuation_only_weights(confidence(s), s.is_scored, alpha),
        "dpace-exact": lambda s: W.dpace_exact_weights(confidence(s), s.is_scored, alpha),
        "chain-reward": lambda s: W.chain_reward_weights(confidence(s), s.is_scored),
        "vat": lambda s: W.vat_weights(s.is_match, s.is_scored, gamma),
        "spec-auf": lambda s: W.spec_auf_weights(s.is_match, s.is_scored),
        "dflash": lambda s: W.dflash_weights(s.is_scored, gamma),
        "uniform": lambda s: W.uniform_weights(s.is_scored),
        "medusa": lambda s: W.head_weights(s.is_scored, config.base),
    }
    return functions[config.objective]
