"""The loops that ours is compared with, on a model in this process: transformers' generation and z-lab's package."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from dpace.prompts.prompts import demo_path, first_of_each_set, read_prompts
from dpace.target import Target
from dpace.target.chat import encode_chat

Way = Callable[[list[int], int], list[int]]
"""Function from a prompt and a number of tokens to the response, greedily."""
INSTALL_ZLAB = "pip install --no-deps --target /tmp/dflash dflash==0.1.0, and set PYTHONPATH=/tmp/dflash"


def demo_questions(target: Target, num_prompts: int, *files: Path) -> list[tuple[str, list[int]]]:
    """Take the first held-out prompts of each of the demo's sets, and of more files: the set, and token ids."""
    prompts = [prompt for file in (demo_path("heldout"), *files) for prompt in read_prompts(file)]
    chosen = first_of_each_set(prompts, num_prompts)
    return [(prompt.set, encode_chat(target, prompt.turns[0])) for prompt in chosen]


def transformers_way(model: Any, **options: Any) -> Way:
    """Make transformers' generation."""

    def run(ids: list[int], count: int) -> list[int]:
        inputs = torch.tensor([ids], device=model.device)
        settings = {"do_sample": False, "max_new_tokens": count, "pad_token_id": 0, **options}
        return model.generate(inputs, attention_mask=torch.ones_like(inputs), **settings)[0, len(ids) :].tolist()

    return run


def zlab_package() -> Any:
    """Import z-lab's package.

    Raises:
        ImportError: it is not installed; says how to install it.
    """
    try:
        import dflash.model as zlab  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(f"z-lab's package `dflash` is not installed: {INSTALL_ZLAB}") from error
    return zlab


def zlab_drafter(folder: str, model: Any) -> Any:
    """Read a drafter's folder with z-lab's class."""
    return zlab_package().DFlashDraftModel.from_pretrained(folder, dtype=model.dtype).to(model.device).eval()


def zlab_way(model: Any, drafter: Any, stop_token_ids: Sequence[int]) -> Way:
    """Make z-lab's loop."""
    zlab = zlab_package()

    def run(ids: list[int], count: int) -> list[int]:
        inputs = torch.tensor([ids], device=model.device)
        return zlab.dflash_generate(drafter, model, inputs, count, stop_token_ids, 0.0)[0, len(ids) :].tolist()

    return run
