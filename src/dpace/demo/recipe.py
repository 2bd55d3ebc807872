"""Options of the demo, and the recipe that follows from them."""

from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

from dpace.config import Recipe
from dpace.flags import read_recipe


@dataclass(frozen=True)
class DemoConfig:
    """Train a drafter for a real LLM and show what it gains."""

    quick: bool = False
    """Fewer prompts and steps, and D-PACE only: at most 4 minutes on two cores instead of 15."""
    prompts: str | None = None
    """Your own prompts, a JSONL file, instead of the demo's."""
    target: str | None = None
    """Another target, a folder or Hub id, instead of SmolLM2-135M-Instruct."""
    output: str | None = None
    """Folder for everything that is written, dpace-demo or dpace-demo-quick by default; the same command goes on."""


def demo_recipe(config: DemoConfig) -> Recipe:
    """Read the recipe that the demo runs, `recipes/demo-cpu.yaml`, and shorten it for `quick`."""
    recipe = read_recipe(Path(str(files("dpace") / "demo" / "cpu.yaml")))
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
