"""Let the target answer the prompts."""

from pathlib import Path

from dpace.config import Recipe
from dpace.flags import parse
from dpace.verbs import load_target


def run(args: list[str]) -> None:
    """Answer all prompts, and print what to do next."""
    recipe = parse(Recipe, "respond", args)
    from dpace.data.prompts import split_prompts
    from dpace.data.responses import write_responses

    parts = split_prompts(recipe.prompts)
    path = Path(recipe.output) / "responses.jsonl"
    responses = write_responses(
        load_target(recipe),
        [*parts.train, *parts.validation, *parts.heldout],
        path,
        recipe.respond,
    )
    print(f"{len(responses)} responses in {path}")
    print("next: dpace train", *args)
