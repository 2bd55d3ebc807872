"""The verbs of the command line, one file each with its options.

`run(args)` of such a file reads its arguments and runs the verb.
"""

from pathlib import Path
from typing import Any

from dpace.config import TargetShard
from dpace.system import ranks


def load_target(config: Any, dtype: str | None = None, shard: TargetShard = "none"):
    """Find and load the target that a verb's options name.

    Args:
        config: has `target` and, where the verb has these options, `dtype`, `device`, `device_map` and `thinking`.
        dtype: replaces the option of that name.
        shard: how it is spread over several ranks.
    """
    check_target(config)
    import torch

    from dpace.target import Target
    from dpace.target.locate import find_target
    from dpace.target.sharded import ShardedTarget

    name = dtype or getattr(config, "dtype", "auto")
    options: Any = {
        "dtype": None if name == "auto" else getattr(torch, name),
        "device": getattr(config, "device", "auto"),
        "device_map": getattr(config, "device_map", None),
        "thinking": getattr(config, "thinking", False),
    }
    if shard != "none" and ranks.num_ranks() > 1:
        return ShardedTarget.load_share(find_target(config.target), shard, **options)
    return Target.load(find_target(config.target), **options)


def load_chat(config: Any):
    """Find and load the tokenizer of the target that a verb's options name, without its weights."""
    check_target(config)
    from dpace.target.chat import ChatTokenizer
    from dpace.target.locate import find_target

    return ChatTokenizer.load(find_target(config.target), config.thinking)


def check_target(config: Any) -> None:
    """Refuse a folder without a config."""
    if Path(config.target).is_dir() and not (Path(config.target) / "config.json").exists():
        raise ValueError(f"--target {config.target} has no config.json; name the folder of a model")
