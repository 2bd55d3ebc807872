"""The validity head: how likely a slot is before the first miss, from the drafter's hidden state.

It is one linear layer, kept in `validity.json` beside the weights: engines that do not know it load the drafter
unchanged. It is no `.safetensors` file, since some engines read every such file of a folder as weights.
"""

import math
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from dpace.system.ledger import read_object, write_json

VALIDITY_FILE = "validity.json"


class ValidityHead(nn.Module):
    """A linear layer from a slot's hidden state to the log-odds that it is before the first miss.

    It starts at 0, so that every slot has even odds.

    Source: the verification head of VAT (arXiv 2608.30135).
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(hidden_size))
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, hidden: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows"]:
        """Compute the log-odds in fp32."""
        with torch.autocast(hidden.device.type, enabled=False):
            return hidden.float() @ self.weight + self.bias

    def confidences(self, hidden: Float[Tensor, "draft hidden"]) -> list[float]:
        """Compute how likely each slot is accepted, given that the slots before it are.

        That is the ratio of its probability to that of the slot before it, at most 1.
        """
        reach = self(hidden).sigmoid().cummin(0).values.clamp_min(torch.finfo(torch.float32).tiny)
        before = torch.cat([torch.ones_like(reach[:1]), reach[:-1]])
        return (reach / before).tolist()

    def save(self, folder: str | Path) -> None:
        """Write `validity.json`."""
        write_json(Path(folder) / VALIDITY_FILE, {"weight": self.weight.tolist(), "bias": self.bias.item()})


def load_validity(folder: str | Path, hidden_size: int) -> ValidityHead | None:
    """Read the validity head of a drafter's folder; None where it has none.

    Raises:
        ValueError: the file does not have `hidden_size` finite weights and a bias.
    """
    path = Path(folder) / VALIDITY_FILE
    if not path.exists():
        return None
    fix = "train the drafter again, or remove the file"
    values = read_object(path, fix)
    weight, bias = values.get("weight"), values.get("bias")
    numbers = [*weight, bias] if isinstance(weight, list) else []
    is_right = len(numbers) == hidden_size + 1 and all(
        isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) for x in numbers
    )
    if not is_right:
        raise ValueError(f"{path} does not have a bias and {hidden_size} weights that are finite numbers; {fix}")
    head, values = ValidityHead(hidden_size), torch.tensor(numbers, dtype=torch.float32)
    head.load_state_dict({"weight": values[:-1], "bias": values[-1]})
    return head


def is_before_miss(
    is_match: Bool[Tensor, "batch block slot"], is_scored: Bool[Tensor, "batch block slot"]
) -> Bool[Tensor, "batch block slot"]:
    """Say which scored slots are accepted: they and all scored slots before them are right."""
    return (is_match | ~is_scored).int().cumprod(-1).bool() & is_scored


def validity_losses(
    log_odds: Float[Tensor, "batch block slot"],
    is_match: Bool[Tensor, "batch block slot"],
    is_scored: Bool[Tensor, "batch block slot"],
) -> Float[Tensor, "batch block"]:
    """Compute the binary cross-entropy of each block, the mean over its scored slots, in nats.

    Source: VAT (arXiv 2608.30135), which adds it with the weight 1.
    """
    labels = is_before_miss(is_match, is_scored).float()
    losses = nn.functional.binary_cross_entropy_with_logits(log_odds, labels, reduction="none")
    return (losses * is_scored).sum(-1) / is_scored.sum(-1).clamp_min(1)
