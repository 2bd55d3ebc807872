"""Options of the demo, and the recipe that follows from them."""

from dataclasses import dataclass, replace

from dpace.config import Recipe
from dpace.flags import read_recipe
from dpace.recipes import RECIPES


@dataclass(frozen=True)
class DemoConfig:
    """Train a drafter for a real LLM on this machine and show what it gains."""

    quick: bool = False
    """Use fewer prompts and steps, and only the objective dpace: 4 minutes at most on two cores, instead of 15."""
    prompts: str | None = None
    """JSONL file of your own prompts; the demo's prompts by default."""
    target: str | None = None
    """Folder or Hub id of the target; SmolLM2-135M-Instruct by default."""
    output: str | None = None
    """Folder that everything is written to; dpace-demo, or dpace-demo-quick with --quick, by default.

    The same command continues an interrupted run in it."""
    wide: bool = False
    """Show every column in the terminal, wider than 80 characters; the page of `dpace report` has them all."""


def demo_recipe(config: DemoConfig) -> Recipe:
    """Read the recipe that the demo runs, `demo-cpu`, and shorten it for `quick`."""
    recipe = read_recipe(RECIPES["demo-cpu"])
    output = config.output or ("dpace-demo-quick" if config.quick else recipe.output)
    recipe = replace(recipe, output=output, target=config.target or recipe.target)
    if config.prompts:
        recipe = replace(recipe, prompts=replace(recipe.prompts, path=config.prompts))
    if config.quick:
        recipe = replace(
            recipe,
            prompts=replace(recipe.prompts, limit=72),
            train=replace(recipe.train, max_steps=60, eval_steps=60),
            bench=replace(recipe.bench, num_prompts=3, max_new_tokens=64),
        )
    return recipe
