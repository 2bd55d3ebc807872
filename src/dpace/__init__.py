"""Train parallel drafters with D-PACE and decode Hugging Face causal LMs faster, with the same text.

The names of `__all__` are loaded when they are first used, so that `import dpace` takes no time.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpace.config import (
        BenchConfig,
        DrafterConfig,
        LossConfig,
        PromptsConfig,
        Recipe,
        RespondConfig,
        TrainConfig,
    )
    from dpace.decode import (
        Decoder,
        Generation,
        Paces,
        custom_generate,
        generate,
        generate_batch,
        generate_plain,
        stream,
    )
    from dpace.drafter import Drafter, load_drafter
    from dpace.loss import Slots
    from dpace.measure.heldout import heldout_acceptance
    from dpace.metrics import Acceptance
    from dpace.prompts.prompts import Prompt, PromptParts, read_prompts, split_prompts
    from dpace.recipes.recipe_file import read_recipe, write_recipe
    from dpace.respond.answering import write_responses
    from dpace.respond.responses import Response, read_responses
    from dpace.target import Target
    from dpace.target.chat import encode_chat
    from dpace.target.locate import find_target
    from dpace.train import make_datasets, train

__version__ = "0.1.0"

_NAMES = {
    "config": "BenchConfig DrafterConfig LossConfig PromptsConfig Recipe RespondConfig TrainConfig",
    "target.chat": "encode_chat",
    "prompts.prompts": "Prompt PromptParts read_prompts split_prompts",
    "respond.answering": "write_responses",
    "respond.responses": "Response read_responses",
    "decode": "Decoder Generation Paces custom_generate generate generate_batch generate_plain stream",
    "drafter": "Drafter load_drafter",
    "recipes.recipe_file": "read_recipe write_recipe",
    "target.locate": "find_target",
    "loss": "Slots",
    "measure.heldout": "heldout_acceptance",
    "metrics": "Acceptance",
    "target": "Target",
    "train": "make_datasets train",
}
_PLACES = {name: f"dpace.{module}" for module, names in _NAMES.items() for name in names.split()}

__all__ = [  # noqa: F822, PLE0604
    "Acceptance",
    "BenchConfig",
    "Decoder",
    "Drafter",
    "DrafterConfig",
    "Generation",
    "LossConfig",
    "Paces",
    "Prompt",
    "PromptParts",
    "PromptsConfig",
    "Recipe",
    "RespondConfig",
    "Response",
    "Slots",
    "Target",
    "TrainConfig",
    "custom_generate",
    "encode_chat",
    "find_target",
    "generate",
    "generate_batch",
    "generate_plain",
    "heldout_acceptance",
    "load_drafter",
    "make_datasets",
    "read_prompts",
    "read_recipe",
    "read_responses",
    "split_prompts",
    "stream",
    "train",
    "write_recipe",
    "write_responses",
]


def __getattr__(name: str) -> Any:
    """Load a name of `__all__`."""
    if name not in _PLACES:
        raise AttributeError(f"module 'dpace' has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
