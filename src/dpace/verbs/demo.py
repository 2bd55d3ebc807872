"""Train a drafter for a real LLM on this machine and show what it gains."""

from pathlib import Path

from dpace.config import DemoConfig
from dpace.recipes.flags import Arguments, Given, command
from dpace.system.ledger import refuse_foreign_files
from dpace.system.progress import note
from dpace.verbs import generate_command, load_target

ARGUMENTS = Arguments(DemoConfig)
PAGE = "report.html"


def run(config: DemoConfig, given: Given) -> None:
    """Run `dpace demo`."""
    from dpace.plan import comparison_lines
    from dpace.report.page import write_report
    from dpace.report.tables import console, plain, section_table
    from dpace.studies.compare import cell_folder, check_output
    from dpace.studies.demo import (
        DECODED,
        KINDS,
        OF_DPACE,
        choose_demo,
        decode_kinds,
        demo_recipe,
        demo_sizes,
        duration,
        findings,
        run_demo,
        speeds,
    )

    # Which size runs is chosen by a measurement, which takes a while; what may be refused comes before it.
    sizes = demo_sizes(config)
    for recipe in map(demo_recipe, sizes):
        check_output(recipe)
        refuse_foreign_files(recipe.output, PAGE)
    planned = choose_demo(sizes)
    recipe = planned.recipe
    output = Path(recipe.output)
    note(duration(planned))
    note("\n".join(comparison_lines(planned.plan, planned.parts, list(check_output(recipe)))))
    target = load_target(recipe)
    kinds = decode_kinds(target, recipe)
    if kinds:
        title = f"Nothing is trained yet: {OF_DPACE}, which comes with dpace"
        console().print(section_table(speeds(kinds, title)))
    demo = run_demo(target, recipe, planned.parts)
    tables, remarks = findings(demo)
    console().print(*map(section_table, tables), *map(plain, remarks))
    if planned.config.quick:
        whole = command("demo", full=True, prompts=config.prompts, target=config.target)
        print(f"This was the quick demo. `{whole}` trains longer, on more prompts.")
    names = [KINDS, *DECODED] if kinds else DECODED
    write_report([output, *(output / name for name in names)], output / PAGE)
    print(f"report: {output / PAGE}")
    folder = cell_folder(recipe, "dpace", recipe.seeds[0])
    # A prompt of the table, so that the gain is seen again.
    prompt = f"{config.prompts or 'demo'}#{demo.decoded.rows[0].responses[0].id}"
    print("next:", generate_command(recipe, folder, prompt))
