"""A custom objective: a slot counts as much as it is likely to be reached, but at least a tenth.

dpace train recipe.yaml --loss.objective examples.objective:weigh
dpace compare recipe.yaml --objectives examples.objective:weigh dpace
"""

from torch import Tensor

from dpace import Slots

LEAST = 0.1


def weigh(slots: Slots) -> Tensor:
    """Return the weights, "batch block slot": finite and 0 or more; those of slots that are not scored do not count.

    `token_probs` is 1 where a slot is not scored, so such slots leave the product as it is.
    """
    reached = slots.token_probs.cumprod(-1).roll(1, dims=-1)
    return reached.clamp_min(LEAST)
