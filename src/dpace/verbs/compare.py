"""Train with several objectives and seeds, and compare the drafters."""

from pathlib import Path

from dpace.config import CompareConfig
from dpace.plan.lines import announce, take_dry_run
from dpace.recipes.flags import PROMPT, command, given_options, parse
from dpace.system import ranks
from dpace.verbs import load_target


def run(args: list[str]) -> None:
    """Run `dpace compare`."""
    args, is_dry = take_dry_run(args)
    config = parse(CompareConfig, "compare", args)
    from dpace.engines.initial import start_from
    from dpace.report.tables import compare_table, console
    from dpace.studies.compare import compare, refuse_other_cells
    from dpace.train.trainer import check_trackers

    config, init = start_from(config, given_options(CompareConfig, "compare", args))
    if config.train.target_shard != "none":
        raise ValueError(
            f"--train.target-shard is {config.train.target_shard}, and `dpace compare` decodes, which needs the whole "
            "target on each rank; leave it out, or train each objective with `dpace train`"
        )
    num_cells = refuse_other_cells(config, init)
    check_trackers(config.train.report_to)
    announce(_first_lines(config, num_cells), is_dry=is_dry)
    if is_dry:
        return
    results = compare(load_target(config), config, init)
    ranks.end()
    if not ranks.is_first():
        return
    console(config.wide).print(compare_table(results, config.wide))
    output = Path(config.output)
    print(
        f"written: {output}/results.json, tau.svg, acceptance.svg, weights.svg, a drafter for each objective and seed"
    )
    best = output / results.rows[0].drafter / f"seed-{config.seeds[0]}"
    options = {"target": config.target, "drafter": best, "thinking": config.thinking}
    print("next:", command("generate", **options, prompt=PROMPT))


def _first_lines(config: CompareConfig, num_cells: int) -> list[str]:
    """Say what will be answered, trained and measured."""
    from dpace.plan.lines import prompts_line, say_training
    from dpace.plan.training import find_conversations
    from dpace.prompts.prompts import split_prompts

    lines = say_training(config, find_conversations(config), config.output, drafters=num_cells)
    return [prompts_line(split_prompts(config.prompts)), *lines]
