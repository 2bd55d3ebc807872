"""Measure drafters, or running servers, against the baseline without a drafter."""

from pathlib import Path

from dpace.config import Recipe
from dpace.flags import PROMPT, command, parse
from dpace.ledger import hold
from dpace.verbs import load_target


def run(args: list[str]) -> None:
    """Run `dpace bench`."""
    recipe = parse(Recipe, "bench", args)
    from dpace.data.prompts import split_prompts
    from dpace.data.public_sets import read_sets
    from dpace.drafter import load_drafter
    from dpace.locate import find_drafter
    from dpace.measure.benchmark import bench
    from dpace.report.tables import console, drafters_table, predictions_table, results_table, slots_table

    if recipe.bench.sets:
        prompts = read_sets(recipe.bench.sets, recipe.bench.sets_dir)
    else:
        prompts = split_prompts(recipe.prompts).heldout
    if recipe.bench.server:
        return _bench_servers(recipe, prompts)
    if recipe.bench.plain_server:
        raise ValueError(
            f"--bench.plain-server {recipe.bench.plain_server} has no server to be compared with; "
            "name the one with a drafter by --bench.server"
        )
    folders = recipe.bench.drafters or (str(Path(recipe.output) / "drafter"),)
    found = [find_drafter(folder, "--bench.drafters") if recipe.bench.drafters else folder for folder in folders]
    named = {Path(one).resolve().name: path for one, path in zip(folders, found, strict=True)}
    if len(named) < len(folders):
        raise ValueError(
            f"two folders have the same name among {', '.join(folders)}; results are listed by name: rename one"
        )
    target = load_target(recipe)
    drafters = {name: load_drafter(folder, target) for name, folder in named.items()}
    with hold(recipe.output):
        results = bench(target, drafters, prompts, recipe.bench, recipe.output)
    console().print(results_table(results), slots_table(results))
    if results.comparisons:
        console().print(drafters_table(results.comparisons))
    if results.predictions:
        console().print(predictions_table(results.predictions))
    print(f"written: {recipe.output}/results.json")
    options = {"target": recipe.target, "drafter": folders[0], "thinking": recipe.thinking}
    print("next:", command("generate", **options, prompt=PROMPT))


def _bench_servers(recipe: Recipe, prompts: list) -> None:
    """Measure the running servers that the recipe names."""
    from transformers import AutoTokenizer

    from dpace.data.chat import ChatTokenizer
    from dpace.locate import find_target
    from dpace.measure.servers import bench_servers
    from dpace.report.tables import console, servers_table

    name, settings = find_target(recipe.target), recipe.bench
    chat = ChatTokenizer(name, AutoTokenizer.from_pretrained(name, trust_remote_code=False), recipe.thinking)
    servers = settings.server or "", settings.plain_server
    with hold(recipe.output):
        results = bench_servers(chat, *servers, prompts, settings, recipe.output)
    console().print(servers_table(results))
    print(f"written: {recipe.output}/servers.json")
    print("next:", command("report", recipe.output))
