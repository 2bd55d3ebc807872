"""Say what a recipe takes before it is run: memory by part, disk, tokens, steps and time."""

from pathlib import Path
from typing import Annotated

from pydantic import ByteSize, Field, TypeAdapter

from dpace.config import Recipe, options
from dpace.recipes.flags import given_options, next_command, parse

Memory = Annotated[str, Field(pattern=r"(?i)^\d+(\.\d+)? *[GM]i?B$", description="a size such as 24GiB or 80GB")]


@options
class PlanConfig(Recipe):
    """Say what training a recipe takes: memory by part, disk, tokens, steps and time.

    It reads the target's config.json, prompts, answers, and the drafter of --drafter.init, and computes the rest from
    their sizes.
    """

    memory: Memory | None = None
    """Memory to plan for, such as 24GiB or 80GB: of a GPU, or of a CPU with --device cpu.
    By default what is free on this machine."""


def run(args: list[str]) -> None:
    """Run `dpace plan`."""
    asked = parse(PlanConfig, "plan", args)
    pairs = zip(["", *args], args, strict=False)  # --memory and its value are for this verb only
    shared = [arg for before, arg in pairs if before != "--memory" and not arg.startswith("--memory")]
    parse(Recipe, "plan", shared)  # refuses keys of the recipe that other verbs do not have
    memory = TypeAdapter(ByteSize).validate_python(asked.memory) if asked.memory else None
    import numpy as np

    from dpace.engines.initial import start_from
    from dpace.plan.lines import kept_answers, memory_lines, size, time_line, training_lines
    from dpace.plan.training import expected_lengths, plan_recipe
    from dpace.prompts.prompts import parse_hub_id, split_prompts
    from dpace.respond.responses import read_meta
    from dpace.train.identity import STEP_SIZE, Run
    from dpace.train.run import check_recipe

    recipe, init = start_from(asked, given_options(PlanConfig, "plan", args))
    check_recipe(recipe)
    folders = [Path(recipe.output) / "drafter"]
    run = Run(recipe, init)
    del run.facts[STEP_SIZE]  # of the ranks that will train
    run.is_in(folders[0])
    kept = kept_answers(recipe)
    path = recipe.prompts.path
    has_prompts = path == "demo" or Path(path).exists() or (kept and parse_hub_id(path))
    parts = split_prompts(recipe.prompts) if has_prompts else None
    longest = np.full((2, recipe.train.batch_size), float(recipe.train.max_length))
    lengths = [expected_lengths(part, recipe, kept) for part in parts[:2]] if parts else [longest, longest[:, :0]]
    plan = plan_recipe(recipe, *lengths, memory=memory)
    lines = training_lines(plan, folders) if parts else ["no prompts yet: memory and disk of the longest conversations"]
    if parts:
        lines.append(time_line({"start": plan.start_seconds, **plan.seconds(folders)}))
    lines += [*memory_lines(plan), f"disk: up to {size(plan.disk_bytes)} in {folders[0]}"]
    if not kept:
        lines.append("no answers yet: each one counts as long as the recipe allows")
    print("\n".join(lines))
    meta = read_meta(Path(recipe.output) / "responses.jsonl")
    print("next:", next_command("train" if meta.get("complete") else "respond", "plan", shared))
