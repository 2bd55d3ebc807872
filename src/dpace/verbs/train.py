"""Train a drafter on the responses."""

from pathlib import Path

from dpace.config import Recipe
from dpace.recipes.flags import Arguments, Given, command
from dpace.system import ranks
from dpace.system.ledger import refuse_foreign_files
from dpace.system.progress import note
from dpace.verbs import load_target, note_untrained

ARGUMENTS = Arguments(Recipe, groups=("prompts", "drafter", "loss", "train"))


def run(recipe: Recipe, given: Given) -> None:
    """Run `dpace train`."""
    from dpace.measure.own_text import greedy_share
    from dpace.plan import known_lengths, plan_recipe, training_lines
    from dpace.prompts.prompts import split_prompts
    from dpace.respond.responses import find_answers, load_examples, refuse_other_answers
    from dpace.training.initial import start_from
    from dpace.training.progress import check_trackers
    from dpace.training.run import (
        FILES,
        Run,
        choose_conversations,
        data_facts,
        target_facts,
        train,
    )

    run = Run(*start_from(recipe, given.names))
    check_trackers(recipe.train.report_to)
    path = recipe.responses_path
    meta = find_answers(recipe, command("respond", *given.words))
    parts = split_prompts(recipe.prompts)
    dataset, validation = choose_conversations(*load_examples(path, parts), run.recipe)
    run.facts |= data_facts(dataset, validation)
    folder = Path(recipe.output) / "drafter"
    refuse_foreign_files(folder, *FILES)
    run.is_in(folder)  # refuses another run, as far as it is known without the target
    plan = plan_recipe(run.recipe, known_lengths(dataset), init=run.init)
    note("\n".join(training_lines(plan, [folder])))
    target = load_target(recipe, shard=recipe.train.target_shard)
    facts = target_facts(target, run.recipe)
    refuse_other_answers(path, meta, facts)
    run.facts |= facts
    # One rank alone cannot read with a target that is spread over all of them.
    is_given = meta.get("source") in ("own", "servers")
    if is_given and recipe.train.target_shard == "none" and ranks.is_first():
        note(
            f"{greedy_share(target, dataset):.0%} of the tokens of the given answers, in a sample, are the "
            "target's greedy choice, and only such tokens are accepted; about 99 % are where the target itself, here "
            "or on servers with its template, answered greedily"
        )
    drafter = train(target, dataset, validation, run.recipe, folder, init=run.init, run=run)
    note_untrained(drafter.spec.record.get("tau"))
    if ranks.end():
        print(f"drafter in {folder}")
        print("next:", command("bench", *given.words))
