"""The conversations of a recipe, as far as they are known before its training."""

from pathlib import Path

from dpace.config import Recipe
from dpace.data.corpus import load_corpus
from dpace.data.prompts import split_prompts
from dpace.plan.training import Conversations, known_conversations, unknown_conversations
from dpace.train.run import choose_conversations


def find_conversations(recipe: Recipe) -> Conversations:
    """Read the answers of a recipe, else count its prompts, else know nothing of them.

    Raises:
        ValueError: prompts or answers that cannot be read.
    """
    if recipe.prompts.path != "demo" and not Path(recipe.prompts.path).exists():
        return unknown_conversations(recipe, None, 0)
    parts = split_prompts(recipe.prompts)
    path = Path(recipe.output) / "responses.jsonl"
    if path.exists():
        answered, validation = load_corpus(path, recipe.prompts)
        if len(answered) == len(parts.train):
            return known_conversations(*choose_conversations(answered, validation, recipe), recipe)
    return unknown_conversations(recipe, len(parts.train), len(parts.validation))
