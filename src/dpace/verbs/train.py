"""Train a drafter on the responses."""

import os
from pathlib import Path

from dpace.config import Recipe
from dpace.flags import next_command, parse
from dpace.verbs import load_target


def run(args: list[str]) -> None:
    """Run `dpace train`."""
    recipe = parse(Recipe, "train", args)
    from torch import distributed

    from dpace.data.prompts import split_prompts
    from dpace.data.responses import read_responses
    from dpace.train.run import make_datasets, train

    path = Path(recipe.output) / "responses.jsonl"
    responses = {response.id: response for response in read_responses(path)} if path.exists() else {}
    answered, validation, _ = (
        [responses[p.id] for p in part if p.id in responses] for part in split_prompts(recipe.prompts)
    )
    if not answered:
        raise ValueError(
            f"{path} has no answers to these prompts; write them first with `{next_command('respond', recipe, args)}`"
        )
    folder = Path(recipe.output) / "drafter"
    target = load_target(recipe)
    train(target, *make_datasets(target, answered, validation, recipe), recipe, folder)
    if distributed.is_initialized():
        distributed.destroy_process_group()
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"drafter in {folder}")
        print("next:", next_command("bench", recipe, args))
