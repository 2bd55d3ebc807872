"""Train a drafter for a real LLM on this machine and show what it gains."""

from pathlib import Path

from dpace.config import Recipe
from dpace.plan.lines import announce, take_dry_run
from dpace.recipes.flags import command, parse
from dpace.system.ledger import lock_folder, register_files


def run(args: list[str]) -> None:
    """Run `dpace demo`."""
    from dpace.studies.demo import DemoConfig, demo_recipe

    args, is_dry = take_dry_run(args)
    config = parse(DemoConfig, "demo", args)

    from dpace.report.tables import console, results_table, slots_table
    from dpace.studies.demo import run_demo, summary
    from dpace.target.locate import find_target

    recipe = demo_recipe(config)
    output = Path(recipe.output)
    lines = _first_lines(recipe, drafters=1 if config.quick else 2)
    if is_dry:
        return announce(lines, is_dry=True)
    with lock_folder(output):
        register_files(output, "results.json", "acceptance.svg", "weights.svg")
        announce(lines, is_dry=False)
        results = run_demo(config)
    console(config.wide).print(results_table(results, config.wide), slots_table(results, config.wide))
    for line in summary(results):
        print(line)
    print(f"\nwritten: {output}/results.json, acceptance.svg, weights.svg, and the drafter in {output}/dpace")
    prompt = f"{config.prompts or 'demo'}#{results.rows[0].responses[0].id}"
    print(
        "next:",
        command("generate", target=find_target(results.target), drafter=output / "dpace", prompt=prompt),
    )


def _first_lines(recipe: Recipe, *, drafters: int) -> list[str]:
    """Say what will be answered, trained and measured."""
    from dpace.plan.lines import prompts_line, say_training
    from dpace.plan.training import unknown_conversations
    from dpace.prompts.prompts import split_prompts

    parts = split_prompts(recipe.prompts)
    conversations = unknown_conversations(recipe, len(parts.train), len(parts.validation))
    return [prompts_line(parts), *say_training(recipe, conversations, recipe.output, drafters=drafters)]
