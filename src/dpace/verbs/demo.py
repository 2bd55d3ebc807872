"""Train a drafter for a real LLM on this machine and show what it gains."""

from pathlib import Path

from dpace.config import DemoConfig
from dpace.recipes.flags import parse
from dpace.system.ledger import refuse_foreign_files
from dpace.system.progress import note
from dpace.verbs import generate_command, load_target

PAGE = "report.html"


def run(args: list[str]) -> None:
    """Run `dpace demo`."""
    config = parse(DemoConfig, "demo", args)

    from dpace.plan import comparison_lines
    from dpace.report.page import write_report
    from dpace.report.tables import console, plain, section_table
    from dpace.studies.compare import cell_folder, check_output
    from dpace.studies.demo import DECODED, demo_prompts, demo_recipe, findings, run_demo

    recipe = demo_recipe(config)
    output = Path(recipe.output)
    drafters = list(check_output(recipe))
    refuse_foreign_files(output, PAGE)
    parts = demo_prompts(config)
    note("\n".join(comparison_lines(recipe, parts, drafters)))
    demo = run_demo(load_target(recipe), recipe, parts)
    tables, remarks = findings(demo)
    console().print(*map(section_table, tables), *map(plain, remarks))
    write_report([output, *(output / name for name in DECODED)], output / PAGE)
    print(f"report: {output / PAGE}")
    folder = cell_folder(recipe, "dpace", recipe.seeds[0])
    prompt = f"{config.prompts or 'demo'}#{demo.decoded.rows[0].responses[0].id}"
    print("next:", generate_command(recipe, folder, prompt))
