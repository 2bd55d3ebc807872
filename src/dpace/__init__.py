"""Train parallel drafters with D-PACE and decode Hugging Face causal LMs faster, with the same text.

A public name is loaded when it is first used, so that `import dpace` takes no time. `__init__.pyi` tells editors the
same names with their types.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PLACES = {
    "Acceptance": "dpace.metrics",
    "BenchConfig": "dpace.config",
    "Decoder": "dpace.decode",
    "Drafter": "dpace.drafter",
    "DrafterConfig": "dpace.config",
    "Generation": "dpace.decode",
    "LossConfig": "dpace.config",
    "Paces": "dpace.decode",
    "Prompt": "dpace.prompts.prompts",
    "PromptParts": "dpace.prompts.prompts",
    "PromptsConfig": "dpace.config",
    "Recipe": "dpace.config",
    "RespondConfig": "dpace.config",
    "Response": "dpace.respond.responses",
    "Slots": "dpace.loss",
    "Target": "dpace.target",
    "TrainConfig": "dpace.config",
    "custom_generate": "dpace.decode",
    "encode_chat": "dpace.target.chat",
    "find_target": "dpace.target.locate",
    "generate": "dpace.decode",
    "generate_batch": "dpace.decode",
    "generate_plain": "dpace.decode",
    "heldout_acceptance": "dpace.measure.heldout",
    "load_drafter": "dpace.drafter",
    "make_datasets": "dpace.training.run",
    "read_prompts": "dpace.prompts.prompts",
    "read_recipe": "dpace.recipes.recipe_file",
    "read_responses": "dpace.respond.responses",
    "split_prompts": "dpace.prompts.prompts",
    "stream": "dpace.decode",
    "train": "dpace.training.run",
    "write_recipe": "dpace.recipes.recipe_file",
    "write_responses": "dpace.respond.answering",
}
"""The public names, by the module that each is loaded from."""
__all__ = list(_PLACES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Load a public name."""
    if name not in _PLACES:
        raise AttributeError(f"module 'dpace' has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
