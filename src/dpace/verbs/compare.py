"""Train with several objectives and seeds, and compare the drafters."""

from dpace.config import CompareConfig
from dpace.recipes.flags import Arguments, Given
from dpace.system import ranks
from dpace.system.progress import note
from dpace.verbs import generate_command, load_target, note_unread, note_untrained

ARGUMENTS = Arguments(CompareConfig)
OF_BENCH = ("sets", "sets_dir", "drafters", "server", "plain_server")
"""Options of measuring for `dpace bench` alone."""


def run(config: CompareConfig, given: Given) -> None:
    """Run `dpace compare`."""
    from dpace.plan import expected_lengths, plan_recipe, training_lines
    from dpace.prompts.prompts import prompts_line, split_prompts
    from dpace.report.sections import comparison
    from dpace.report.tables import console, section_table
    from dpace.studies.compare import cell_folder, check_output, compare
    from dpace.training.initial import start_from
    from dpace.training.progress import check_trackers

    config, init = start_from(config, given.names)
    if config.train.target_shard != "none":
        raise ValueError(
            f"--train.target-shard is {config.train.target_shard}, and `dpace compare` decodes, which needs the whole "
            "target on each rank; leave it out, or train each objective with `dpace train`"
        )
    drafters = list(check_output(config, init))
    check_trackers(config.train.report_to)
    note_unread(config.bench, OF_BENCH, "`dpace compare` measures its own drafters on its held-out prompts")
    parts = split_prompts(config.prompts)
    # The plan needs no weights, so it is there before they are loaded.
    plan = plan_recipe(config, expected_lengths(parts.train, config), init=init)
    note("\n".join([prompts_line(parts), *training_lines(plan, drafters)]))
    results = compare(load_target(config), config, parts=parts, init=init)
    if not ranks.end():
        return
    console().print(section_table(comparison(results)))
    print(f"written: {config.output}/results.json, a drafter for each objective and seed")
    # The last rows are for all datasets together, and the best objective stands first among them.
    best = next(row for row in results.rows if row.set == results.rows[-1].set)
    note_untrained(best.tau[0])
    folder = cell_folder(config, best.drafter, config.seeds[0])
    print("next:", generate_command(config, folder, parts.heldout[0].id))
