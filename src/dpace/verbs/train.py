"""Train a drafter on the responses."""

from pathlib import Path

from dpace.config import Recipe
from dpace.recipes.flags import given_options, next_command, parse
from dpace.system import ranks
from dpace.verbs import announce, load_target


def run(args: list[str]) -> None:
    """Run `dpace train`."""
    recipe = parse(Recipe, "train", args, groups=("prompts", "drafter", "loss", "train"))
    from dpace.batches.corpus import load_corpus
    from dpace.engines.initial import start_from
    from dpace.plan.lines import train_lines
    from dpace.plan.training import known_conversations
    from dpace.prompts.prompts import prompt_files
    from dpace.respond.responses import read_meta
    from dpace.train.identity import (
        data_of,
        refuse_other_answers,
        refuse_other_run,
        refuse_unfinished_answers,
        settings_of,
        target_of,
    )
    from dpace.train.progress import check_trackers
    from dpace.train.run import check_recipe, choose_conversations, train

    settled, init = start_from(recipe, given_options(Recipe, "train", args))
    check_recipe(settled)
    prompt_files(recipe.prompts)  # refuses a missing file before the advice to answer it
    path, respond = Path(recipe.output) / "responses.jsonl", next_command("respond", recipe, args)
    unanswered = ValueError(f"{path} has no answers to these prompts; write them first with `{respond}`")
    if not path.exists():
        raise unanswered
    meta, folder = read_meta(path), Path(recipe.output) / "drafter"
    refuse_unfinished_answers(meta, path, respond)
    refuse_other_answers(meta, {"thinking": recipe.thinking}, path, respond)
    answered, validation = load_corpus(path, recipe.prompts)
    if not len(answered):
        raise unanswered
    datasets = choose_conversations(answered, validation, settled)
    facts = {**settings_of(settled, init=init), **data_of(*datasets), "thinking": recipe.thinking}
    refuse_other_run(folder, facts)
    check_trackers(recipe.train.report_to)
    if announce(train_lines(settled, known_conversations(*datasets, settled), folder), args):
        return
    target = load_target(recipe, shard=recipe.train.target_shard)
    of_target = target_of(target)
    refuse_other_answers(meta, of_target, path, respond)
    facts |= of_target
    refuse_other_run(folder, facts)
    train(target, *datasets, settled, folder, init=init, run=facts)
    if ranks.end():
        print(f"drafter in {folder}")
        print("next:", next_command("bench", recipe, args))
