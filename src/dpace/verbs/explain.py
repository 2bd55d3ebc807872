"""Say where the tau of a drafter is lost."""

from dpace.config import ExplainConfig
from dpace.recipes.flags import Arguments, Given, command
from dpace.system.ledger import lock_folder, refuse_foreign_files
from dpace.verbs import load_target, show_results

ARGUMENTS = Arguments(ExplainConfig)


def run(config: ExplainConfig, given: Given) -> None:
    """Run `dpace explain`."""
    from dpace.drafter import load_drafter
    from dpace.measure.floor import EXPLAIN_FILE, explain
    from dpace.prompts.prompts import first_of_each_set, read_heldout_prompts
    from dpace.target.locate import find_drafter

    prompts = first_of_each_set(read_heldout_prompts(config.prompts), config.num_prompts)
    folder = find_drafter(config.drafter)
    with lock_folder(config.output):
        refuse_foreign_files(config.output, EXPLAIN_FILE)
        target = load_target(config)
        results = explain(target, load_drafter(folder, target), prompts, config)
    show_results(results, f"{config.output}/{EXPLAIN_FILE}")
    print("next:", command("report", config.output))
