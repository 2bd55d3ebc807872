"""The LM head's rows of the tokens that may be drafted: what losses, selectors and decoding turn hidden states into."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dpace.target.target import Target


class DraftRows:
    """The LM head's rows of the tokens that may be drafted: of all, or a copy of those of some.

    Args:
        target: has the head.
        token_ids: in the order of the rows; all by default.
    """

    def __init__(self, target: Target, token_ids: Tensor | None = None):
        self.target = target
        self.head = target.head
        self.token_ids: Int[Tensor, " choice"] | None = None
        if token_ids is not None:
            self.token_ids = token_ids.to(target.device)
            self.head = target.head._replace(weight=target.head.weight[self.token_ids].contiguous())
            self._index = torch.full_like(target.head.weight[:, 0], -1, dtype=torch.long)
            self._index[self.token_ids] = torch.arange(len(token_ids), device=target.device)

    def logits(self, hidden: Float[Tensor, "row hidden"]) -> Float[Tensor, "row choice"]:
        """Compute the logits of the tokens that may be drafted."""
        return self.target.logits(hidden) if self.token_ids is None else self.head.logits(hidden)

    def index(self, token_ids: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        """Return the row of each token; -1 where it has none."""
        return token_ids if self.token_ids is None else self._index[token_ids]

    def tokens(self, index: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        """Return the tokens of rows."""
        return index if self.token_ids is None else self.token_ids[index]

    def spread(self, logits: Float[Tensor, "row choice"]) -> Float[Tensor, "row vocab"]:
        """Return the logits of all tokens: minus infinity for those that are not drafted."""
        if self.token_ids is None:
            return logits
        whole = logits.new_full((len(logits), len(self.target.head.weight)), -torch.inf)
        return whole.index_copy_(1, self.token_ids, logits)
