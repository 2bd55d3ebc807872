"""The target's frozen LM head: weight, multiplier and cap."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

TINY = torch.finfo(torch.float32).tiny


class LmHead(NamedTuple):
    """The target's frozen LM head: `softcap * tanh(multiplier * hidden @ weight.T / softcap)`.

    The multiplier is 1 and the cap absent in most families (Gemma 2 caps, Granite and Cohere scale).
    """

    weight: Float[Tensor, "vocab hidden"]
    multiplier: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows vocab"]:
        """Compute the logits of the given rows, in the dtype of the weight."""
        return self.finish(hidden.to(self.weight.dtype) @ self.weight.T)

    def finish(self, logits: Float[Tensor, "*rows vocab"]) -> Float[Tensor, "*rows vocab"]:
        """Apply multiplier and cap to plain products with the weight."""
        if self.multiplier != 1:
            logits = logits * self.multiplier
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def slope(self, logits: Float[Tensor, "*rows vocab"]) -> Float[Tensor, "*rows vocab"] | None:
        """Compute the derivative of the cap, given the capped logits; None without a cap."""
        return None if self.softcap is None else 1 - (logits / self.softcap) ** 2
