"""Train a drafter for a real LLM on this machine and show what it gains."""

from pathlib import Path

from dpace.config import DemoConfig
from dpace.recipes.flags import command, parse
from dpace.system.ledger import refuse_foreign_files
from dpace.verbs import announce, load_target

PAGES = ("report.html", "report.md")


def run(args: list[str]) -> None:
    """Run `dpace demo`."""
    config = parse(DemoConfig, "demo", args)

    from dpace.plan.lines import comparison_lines
    from dpace.report.page import comparison, speeds, write_report
    from dpace.report.tables import console, section_table, slots_table
    from dpace.studies.compare import cell_folder, check_output, compare
    from dpace.studies.demo import demo_prompts, demo_recipe, summary

    recipe = demo_recipe(config)
    output = Path(recipe.output)
    folders = [cell_folder(output, cell) for cell in check_output(recipe)]
    refuse_foreign_files(output, *PAGES)
    parts = demo_prompts(config)
    if announce(comparison_lines(recipe, parts, folders), args):
        return
    results = compare(load_target(recipe), recipe, parts=parts)
    decode = results.decode
    assert decode, "the demo's recipe decodes"
    console().print(section_table(speeds(decode)), slots_table(decode), section_table(comparison(results)))
    for line in summary(results):
        print(line)
    write_report([output], output / PAGES[0])
    folder = cell_folder(output, ("dpace", recipe.seeds[0]))
    print(f"\nwritten: {output}/report.html, results.json, acceptance.svg, weights.svg, and the drafter in {folder}")
    prompt = f"{config.prompts or 'demo'}#{decode.rows[0].responses[0].id}"
    print("next:", command("generate", target=results.target, drafter=folder, prompt=prompt))
