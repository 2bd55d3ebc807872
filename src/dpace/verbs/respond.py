"""Let the target answer the prompts."""

import sys
from pathlib import Path

from dpace.config import Recipe
from dpace.flags import next_command, parse
from dpace.ledger import claim, hold
from dpace.plan.facts import announce, take_dry_run
from dpace.progress import show
from dpace.verbs import load_target


def run(args: list[str]) -> None:
    """Run `dpace respond`."""
    args, is_dry = take_dry_run(args)
    recipe = parse(Recipe, "respond", args)
    from dpace.data.prompts import split_prompts
    from dpace.data.responses import write_responses
    from dpace.data.run_meta import check_meta, known_settings, meta_path
    from dpace.plan.answers import say_answers

    parts = split_prompts(recipe.prompts)
    path = Path(recipe.output) / "responses.jsonl"
    check_meta(path, known_settings(recipe.respond, thinking=recipe.thinking))
    announce(say_answers(recipe, parts, path), is_dry=is_dry)
    if is_dry:
        return
    with hold(recipe.output):
        claim(recipe.output, path.name, meta_path(path).name)
        prompts = [*parts.train, *parts.validation, *parts.heldout]
        if recipe.respond.source == "target" and (answered := sum(prompt.answer is not None for prompt in prompts)):
            note = "prompts come with an answer, which is left out; --respond.source own would train on it"
            print(f"{answered} {note}", file=sys.stderr)
        responses = write_responses(load_target(recipe), prompts, path, recipe.respond)
    show(f"{len(responses)} responses in {path}")
    show(f"next: {next_command('train', recipe, args)}")
