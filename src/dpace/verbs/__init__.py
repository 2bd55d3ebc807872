"""The verbs of the command line, one file each with its options, and what several of them do.

`run(args)` of such a file reads the arguments, checks what needs no model, loads the models, runs, and prints the
command that comes next. Heavy imports stand behind the arguments, so that `--help` and refusals come at once.
"""

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from dpace.config import Recipe, TargetShard
from dpace.recipes.flags import DRY_RUN
from dpace.system import ranks

if TYPE_CHECKING:
    from dpace.prompts.prompts import Prompt
    from dpace.target import Target
    from dpace.target.chat import ChatTokenizer

TARGET_OPTIONS = ("target", "dtype", "device", "device_map", "thinking")
"""Options that say which target is loaded, and how."""


def announce(lines: Sequence[str], args: Sequence[str]) -> bool:
    """Print what will be done, by one process of several; return whether that is all, as `--dry-run` asks.

    It is the result of a dry run, and else a message.
    """
    is_dry = DRY_RUN in args
    if ranks.is_first():
        print("\n".join(lines), file=sys.stdout if is_dry else sys.stderr, flush=True)
    return is_dry


def refuse_unreadable(config: Any, prompts: Iterable["Prompt"], max_new_tokens: int, args: Sequence[str]) -> None:
    """Refuse with `--dry-run` the prompts that a verb refuses once its target is loaded; it takes the tokenizer alone.

    Raises:
        ValueError: a prompt that passes the target's context with so many new tokens, or that its chat template does
            not take.
    """
    from dpace.respond.conversation import refuse_long_prompts

    if DRY_RUN in args:
        refuse_long_prompts(load_chat(config), prompts, max_new_tokens)


def load_target(config: Any, *, shard: TargetShard = "none") -> "Target":
    """Find and load the target that the options of a verb name; `shard` is how it is spread over several ranks.

    Where a verb lacks an option of `TARGET_OPTIONS`, that of a recipe counts.

    Raises:
        ValueError: see `dpace.target.locate.find_target`.
    """
    import torch

    from dpace.target import Target
    from dpace.target.locate import find_target

    recipe = Recipe(**{name: value for name, value in vars(config).items() if name in TARGET_OPTIONS})
    return Target.load(
        find_target(recipe.target),
        dtype=getattr(torch, recipe.dtype, None),  # None for auto
        device=recipe.device,
        device_map=recipe.device_map,
        thinking=recipe.thinking,
        shard=shard,
    )


def load_chat(config: Any) -> "ChatTokenizer":
    """Find and load the tokenizer of the target that the options of a verb name, without its weights."""
    from dpace.target.chat import ChatTokenizer
    from dpace.target.locate import find_target

    return ChatTokenizer.load(find_target(config.target), config.thinking)
