"""Let the target answer the prompts."""

from pathlib import Path

from dpace.config import Recipe
from dpace.flags import next_command, parse
from dpace.verbs import load_target


def run(args: list[str]) -> None:
    """Run `dpace respond`."""
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
    print("next:", next_command("train", recipe, args))
