"""Say where the tau of a drafter is lost."""

from dpace.config import ExplainConfig
from dpace.recipes.flags import command, parse
from dpace.system.ledger import lock_folder
from dpace.system.progress import print_text
from dpace.verbs import announce, load_target, refuse_unreadable


def run(args: list[str]) -> None:
    """Run `dpace explain`."""
    config = parse(ExplainConfig, "explain", args)
    from dpace.drafter import load_drafter
    from dpace.measure.floor import RESULTS_FILE, explain
    from dpace.prompts.prompts import first_of_each_set, read_heldout
    from dpace.report.sections import tables_of
    from dpace.report.tables import console, section_table
    from dpace.target.locate import find_drafter

    prompts = first_of_each_set(read_heldout(config.prompts), config.num_prompts)
    folder = find_drafter(config.drafter)
    refuse_unreadable(config, prompts, config.max_new_tokens, args)
    lines = [
        f"prompts: {len(prompts):,}, each answered with up to {config.max_new_tokens} tokens",
        f"blocks: up to {config.num_blocks} of an answer, each continued {config.num_samples} times by the target",
    ]
    if announce(lines, args):
        return
    target = load_target(config)
    drafter = load_drafter(folder, target)
    with lock_folder(config.output):
        results = explain(target, drafter, prompts, config)
    console().print(*map(section_table, tables_of(results)))
    print_text(f"written: {config.output}/{RESULTS_FILE}")
    print("next:", command("report", config.output))
