"""Train a drafter for a real LLM on this machine and show what it gains."""

import time
from pathlib import Path

from dpace.config import DemoConfig
from dpace.recipes.flags import Arguments, Given
from dpace.system.ledger import refuse_foreign_files
from dpace.system.progress import note
from dpace.verbs import generate_command, load_target

ARGUMENTS = Arguments(DemoConfig)
PAGE = "report.html"


def run(config: DemoConfig, given: Given) -> None:
    """Run `dpace demo`."""
    from dpace.plan import expected_lengths, plan_recipe, training_lines
    from dpace.prompts.prompts import prompts_line
    from dpace.report.page import write_report
    from dpace.report.tables import console, section_table
    from dpace.studies.compare import check_output
    from dpace.studies.demo import (
        DECODED,
        KINDS,
        OF_DPACE,
        announce,
        best_folder,
        decode_kinds,
        demo_prompts,
        demo_recipe,
        findings,
        run_demo,
        speeds,
    )

    recipe = demo_recipe(config)
    output = Path(recipe.output)
    drafters = [*check_output(recipe), best_folder(recipe)]
    refuse_foreign_files(output, PAGE)
    parts = demo_prompts(config)
    plan = plan_recipe(recipe, expected_lengths(parts.train, recipe))
    note("\n".join([prompts_line(parts), *training_lines(plan, drafters)]))
    target = load_target(recipe)
    started = time.perf_counter()
    kinds = decode_kinds(target, recipe)
    decoding = time.perf_counter() - started
    if kinds:
        title = f"Nothing is trained yet: {OF_DPACE}, which comes with dpace"
        console().print(section_table(speeds(kinds, title)))
    announce(target, recipe, parts, decoding)
    demo = run_demo(target, recipe, parts)
    console().print(*map(section_table, findings(demo)))
    names = [KINDS, DECODED] if kinds else [DECODED]
    write_report([output, *(output / name for name in names)], output / PAGE)
    print(f"report: {output / PAGE}")
    # A prompt of the table, so that the gain is seen again.
    print("next:", generate_command(recipe, best_folder(recipe), parts.heldout[0].id))
