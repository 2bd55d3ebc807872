"""Train with several objectives and seeds, and compare the drafters."""

from pathlib import Path

from dpace.config import CompareConfig
from dpace.flags import PROMPT, command, given_options, parse
from dpace.verbs import load_target


def run(args: list[str]) -> None:
    """Run `dpace compare`."""
    config = parse(CompareConfig, "compare", args)
    from dpace.compare import compare, make_recipes
    from dpace.engines.initial import start_from
    from dpace.report.tables import compare_table, console

    make_recipes(config)  # refuses an unknown objective before the target is loaded
    config, init = start_from(config, given_options(CompareConfig, "compare", args))
    results = compare(load_target(config), config, init)
    console(config.wide).print(compare_table(results, config.wide))
    output = Path(config.output)
    print(
        f"written: {output}/results.json, tau.png, acceptance.png, weights.png, a drafter for each objective and seed"
    )
    best = output / results.rows[0].drafter / f"seed-{config.seeds[0]}"
    options = {"target": config.target, "drafter": best, "thinking": config.thinking}
    print("next:", command("generate", **options, prompt=PROMPT))
