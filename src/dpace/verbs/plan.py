"""Say what a recipe takes before it is run: prompts and answers, memory by part, disk, steps and time."""

from typing import Annotated

from pydantic import ByteSize, Field, TypeAdapter

from dpace.config import Count, Positive, Recipe, options
from dpace.recipes.flags import Arguments, Given, command

OWN = ("--memory", "--ranks", "--minutes")
"""Flags of this verb alone, which the next command does not get."""
Memory = Annotated[str, Field(pattern=r"(?i)^\d+(\.\d+)? *[GM]i?B$")]


@options
class PlanConfig(Recipe):
    """Say what a recipe takes: its prompts and answers, memory by part, disk, steps and time.

    It reads the target's config.json, prompts, answers, and the drafter of --drafter.init, and computes the rest from
    their sizes.
    """

    memory: Memory | None = None
    """Memory to plan for, such as 24GiB or 80GB: of a GPU, or of a CPU with --device cpu.
    By default what is free on this machine."""
    ranks: Count | None = None
    """Processes that train together, one a GPU; by default the processes of this command."""
    minutes: Positive | None = None
    """Minutes that training may take on this machine: the plan says how many steps end in them."""


ARGUMENTS = Arguments(PlanConfig)


def run(asked: PlanConfig, given: Given) -> None:
    """Run `dpace plan`."""
    from dpace.plan import plan_lines
    from dpace.respond.responses import read_meta
    from dpace.training.initial import start_from
    from dpace.training.run import check_recipe

    recipe, init = start_from(asked, given.names)
    check_recipe(recipe)
    memory = TypeAdapter(ByteSize).validate_python(asked.memory) if asked.memory else None
    print(*plan_lines(recipe, memory, init, asked.ranks, asked.minutes), sep="\n")
    shared = []
    previous = ""
    for word in given.words:
        # Neither the flag, with or without =, nor the value after it.
        if not word.startswith(OWN) and previous not in OWN:
            shared.append(word)
        previous = word
    is_answered = read_meta(recipe.responses_path).get("complete")
    print("next:", command("train" if is_answered else "respond", *shared))
