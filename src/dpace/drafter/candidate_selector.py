"""DFlash2's candidate selector: how well a candidate follows the token before is added to its logit.

Here are its sizes and config keys. Its network is `CandidateSelectorNetwork` of `dpace.modeling_dflash`.

Source: DFlash2, z-lab/dflash; the loss, of `PairSelector`, is ours.
"""

from dataclasses import dataclass

from dpace.config import DrafterConfig
from dpace.drafter.lattice import PairSelector
from dpace.drafter.selector import SelectorSizes
from dpace.drafter.values import StrictCount


@dataclass(frozen=True)
class CandidateSelectorSizes(SelectorSizes):
    """Sizes of DFlash2's selector."""

    name = "candidate_selector"
    prefix = "selector_"
    architecture = "DFlashSelectorDraftModel"
    with_convolutions = "DFlash2DraftModel"
    selector = PairSelector
    reads = {"selector_candidates": "top_k", "selector_width": "rank"}

    top_k: StrictCount
    """Best tokens of each slot that it chooses from."""
    rank: StrictCount
    """Numbers of a token in each of its two tables."""

    @classmethod
    def chosen(cls, config: DrafterConfig, hidden_size: int) -> "CandidateSelectorSizes":
        """Choose the sizes of a selector: the published ones, and smaller ones next to a small target.

        Its tables have a row for each token. At 576 and a rank of 64 they have as many numbers as the drafter.
        """
        top_k, rank = (8, 64) if hidden_size < 1024 else (16, 256)
        return cls(top_k=config.selector_candidates or top_k, rank=config.selector_width or rank)


SIZES = CandidateSelectorSizes
