"""Measure drafters, or running servers, against the baseline without a drafter."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dpace.config import Recipe
from dpace.recipes.flags import Arguments, Given, command
from dpace.system import ranks
from dpace.system.ledger import lock_folder, refuse_foreign_files
from dpace.verbs import generate_command, load_chat, load_target, note_unread, show_results

if TYPE_CHECKING:
    from dpace.prompts.prompts import Prompt, PromptParts

ARGUMENTS = Arguments(Recipe, groups=("prompts", "bench"))
IN_PROCESS = ("drafters", "widths", "verify_rules")
"""Options that running servers do not take."""


def run(recipe: Recipe, given: Given) -> None:
    """Run `dpace bench`."""
    if "bench.max_new_tokens" not in given.names:  # as long as the answers of the training
        recipe = replace(recipe, bench=replace(recipe.bench, max_new_tokens=recipe.respond.max_new_tokens))
    from dpace.prompts.prompts import split_prompts
    from dpace.prompts.public_sets import read_sets

    config = recipe.bench
    if config.num_prompts == 0:
        raise ValueError("--bench.num-prompts is 0, which leaves out decoding in `dpace compare`; name 1 or more")
    if config.sets_dir and not config.sets:
        raise ValueError("--bench.sets-dir is a folder of sets; name those to measure on with --bench.sets")
    is_served = config.server or config.plain_server or config.depths
    if is_served and len(config.server) != max(1, len(config.depths)):
        raise ValueError(
            f"--bench.server names {len(config.server)} servers and --bench.depths {len(config.depths)} depths; name "
            "one server with a drafter, or one for each depth, in the same order"
        )
    if config.depths and not config.plain_server:
        raise ValueError("--bench.depths compares with no drafter; name a server without one by --bench.plain-server")
    parts = None if config.sets else split_prompts(recipe.prompts)
    prompts = parts.heldout if parts else read_sets(config.sets, config.sets_dir)
    if not config.server:
        _measure_here(recipe, prompts, parts)
        return
    from dpace.measure.servers import bench_servers

    note_unread(config, IN_PROCESS, "the servers were started with their own")
    with lock_folder(recipe.output):
        results = bench_servers(load_chat(recipe), prompts, config, recipe.output)
    show_results(results, f"{recipe.output}/servers.json")
    print("next:", command("report", recipe.output))


def _measure_here(recipe: Recipe, prompts: "Sequence[Prompt]", parts: "PromptParts | None") -> None:
    """Decode the first prompts of each set with the drafters and plainly.

    `parts` has the recipe's prompts where the held-out ones of them are decoded.
    """
    from dpace.drafter import load_drafter
    from dpace.measure.benchmark import bench
    from dpace.measure.results import BenchResults, refuse_other_results
    from dpace.target.locate import find_drafter

    config = recipe.bench
    output = Path(recipe.output)
    refuse_other_results(output / "results.json", BenchResults)
    places = config.drafters
    if not places:
        trained = output / "drafter"
        if not trained.exists():
            raise ValueError(f"there is no drafter {trained}; train one, or name one with --bench.drafters")
        if parts:
            _refuse_trained_prompts(recipe, parts, trained)
        places = (str(trained),)
    # Found and named before the target is loaded, which takes longer.
    folders = [find_drafter(place, "--bench.drafters") for place in places]
    names = [Path(place).resolve().name for place in places]
    if len(set(names)) < len(names):  # folders of the same name are told apart by their paths
        names = places
    with lock_folder(output):
        refuse_foreign_files(output, "results.json")
        target = load_target(recipe)
        drafters = {}
        for name, folder in zip(names, folders, strict=True):
            drafters[name] = load_drafter(folder, target)
        results = bench(target, drafters, prompts, config, output)
    if ranks.end():
        show_results(results, f"{output}/results.json")
        print("next:", generate_command(recipe, places[0], prompts[0].id if parts else None))


def _refuse_trained_prompts(recipe: Recipe, parts: "PromptParts", drafter: Path) -> None:
    """Refuse held-out prompts that the recipe's own drafter may have been trained on.

    Raises:
        ValueError: its run was split in another way.
    """
    from dpace.recipes.recipe_file import read_recipe
    from dpace.respond.responses import load_examples
    from dpace.system.provenance import same_run
    from dpace.training.run import choose_conversations, data_facts, read_run

    responses = recipe.responses_path
    run_facts = read_run(drafter)
    if run_facts is None or not responses.exists():
        return  # nothing to compare with: a drafter of another machine, for example
    training = read_recipe(drafter / "recipe.yaml")
    way_out = "the held-out prompts may be among them; give the prompts and options of the training"
    # Where the prompts were split in the same way, the same conversations are left for training.
    train, validation = choose_conversations(*load_examples(responses, parts), training)
    same_run(run_facts, data_facts(train, validation), f"{drafter} holds a run", way_out)
