"""Say what a recipe takes before it is run: memory by part, disk, tokens, steps and time."""

import re
from dataclasses import fields
from pathlib import Path

from pydantic.dataclasses import dataclass

from dpace.config import Recipe, Text
from dpace.recipes.flags import next_command, parse


@dataclass(frozen=True)
class PlanConfig(Recipe):
    """Say what training a recipe takes: memory by part, disk, tokens, steps and time.

    It reads the target's config.json only, and computes the training step on tensors without values.
    """

    memory: Text | None = None
    """Memory to plan for, such as 24GiB or 80GB: of a GPU, or of a CPU with --device cpu.
    By default what is free on this machine."""
    calibrate: bool = False
    """Also load the target, take a few real steps here, and compare."""


def read_memory(text: str) -> int:
    """Read a memory such as 24GiB or 80GB, in bytes.

    Raises:
        ValueError: it is not of that form.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(GiB|GB|MiB|MB)\s*", text, re.IGNORECASE)
    if not match or not float(match[1]):
        raise ValueError(f"--memory is {text!r}, expected a size such as 24GiB or 80GB; write it with its unit")
    unit = {"gib": 2**30, "gb": 10**9, "mib": 2**20, "mb": 10**6}[match[2].lower()]
    return int(float(match[1]) * unit)


def run(args: list[str]) -> None:
    """Run `dpace plan`."""
    config = parse(PlanConfig, "plan", args)
    memory = read_memory(config.memory) if config.memory else None
    from dpace.plan.calibrate import calibrate
    from dpace.plan.lines import fit_lines, kept_answers, memory_lines, time_line, training_lines
    from dpace.plan.training import find_conversations, plan_recipe
    from dpace.prompts.prompts import split_prompts

    recipe = Recipe(**{field.name: getattr(config, field.name) for field in fields(Recipe)})
    has_prompts = recipe.prompts.path == "demo" or Path(recipe.prompts.path).exists()
    parts = split_prompts(recipe.prompts) if has_prompts else None
    kept = kept_answers(recipe)
    conversations = find_conversations(recipe, parts, kept)
    plan = plan_recipe(recipe, conversations, memory=memory)
    lines = training_lines(plan, recipe.train)
    if plan.num_steps is not None:
        lines.append(time_line(plan.seconds([Path(recipe.output) / "drafter"]), is_bound=not kept))
    lines += memory_lines(plan) + fit_lines(plan, recipe.train)
    if not conversations.is_known:
        lines.append("no answers yet: each one counts as long as the recipe allows")
    print("\n".join(lines), flush=True)
    if config.calibrate:
        print(calibrate(recipe, plan))
    print("next:", next_command("train" if kept else "respond", recipe, args))
