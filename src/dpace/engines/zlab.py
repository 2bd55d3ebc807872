"""z-lab's `dflash`, for torch and for MLX: the published layout, which is its own.

Source: https://github.com/z-lab/dflash.
"""

from dpace.drafter.spec import DrafterSpec
from dpace.engines.engine import CONVOLUTIONS, Engine


class Zlab(Engine):
    """z-lab's dflash: drafters in the published layout, also with convolutions."""

    name = "zlab"
    title = "z-lab's dflash"
    reads = ("DFlashDraftModel", "DFlash2DraftModel", *CONVOLUTIONS)

    def command(self, spec: DrafterSpec, drafter: str, target: str) -> str:
        """Write the line of Python that decodes up to the stop tokens, greedily."""
        return (
            f"dflash_generate(DFlashDraftModel.from_pretrained({drafter!r}, dtype=model.dtype), model, token_ids, "
            "max_new_tokens, stop_token_ids, 0.0)"
        )


ENGINE = Zlab()
