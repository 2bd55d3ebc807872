"""The verbs of the command line, one file each with its options, and what several of them do.

`run(args)` of such a file reads the arguments, checks what needs no model, loads the models, runs, and prints the
command that comes next. Heavy imports stand behind the arguments, so that `--help` and refusals come at once.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dpace.config import Device, DeviceMap, Dtype, Recipe, TargetShard
from dpace.system import ranks

if TYPE_CHECKING:
    from dpace.target import Target
    from dpace.target.chat import ChatTokenizer

DRY_RUN = "--dry-run"


def take_dry_run(args: list[str]) -> tuple[list[str], bool]:
    """Return a verb's arguments without `--dry-run`, and whether it was there."""
    return [arg for arg in args if arg != DRY_RUN], DRY_RUN in args


def announce(lines: Sequence[str], *, is_dry: bool) -> None:
    """Print what will be done: as the result of a dry run, else as a message; by one process of several."""
    if ranks.is_first():
        print("\n".join(lines), file=sys.stdout if is_dry else sys.stderr, flush=True)


def load_recipe_target(recipe: Recipe, *, shard: TargetShard = "none") -> "Target":
    """Find and load the target of a recipe, as `load_target` does."""
    return load_target(
        recipe.target,
        dtype=recipe.dtype,
        device=recipe.device,
        device_map=recipe.device_map,
        thinking=recipe.thinking,
        shard=shard,
    )


def load_target(
    name: str,
    *,
    dtype: Dtype = "auto",
    device: Device = "auto",
    device_map: DeviceMap = None,
    thinking: bool = False,
    shard: TargetShard = "none",
) -> "Target":
    """Find and load a target; `Recipe` documents the options, `shard` is how it is spread over several ranks.

    Raises:
        ValueError: see `check_target` and `dpace.target.locate.find_target`.
    """
    check_target(name)
    import torch

    from dpace.target import Target
    from dpace.target.locate import find_target
    from dpace.target.sharded import ShardedTarget

    precision = None if dtype == "auto" else getattr(torch, dtype)
    folder = find_target(name)
    if shard != "none" and ranks.num_ranks() > 1:
        return ShardedTarget.load_share(
            folder, shard, dtype=precision, device=device, device_map=device_map, thinking=thinking
        )
    return Target.load(folder, dtype=precision, device=device, device_map=device_map, thinking=thinking)


def load_chat(recipe: Recipe) -> "ChatTokenizer":
    """Find and load the tokenizer of a recipe's target, without its weights."""
    check_target(recipe.target)
    from dpace.target.chat import ChatTokenizer
    from dpace.target.locate import find_target

    return ChatTokenizer.load(find_target(recipe.target), recipe.thinking)


def check_target(name: str) -> None:
    """Refuse a folder that holds neither a model nor an adapter of one.

    Raises:
        ValueError: it has no config.json and no adapter_config.json.
    """
    folder = Path(name)
    if folder.is_dir() and not any((folder / f"{kind}config.json").exists() for kind in ("", "adapter_")):
        raise ValueError(
            f"--target {name} has no config.json or adapter_config.json; name the folder of a model or an adapter"
        )
