"""The verbs of the command line, one file each with its options.

`run(args)` of such a file reads its arguments and runs the verb.
"""

from pathlib import Path
from typing import Any


def load_target(config: Any, dtype: str | None = None):
    """Find and load the target that a verb's options name.

    Args:
        config: has `target` and, where the verb has these options, `dtype`, `device`, `device_map` and `thinking`.
        dtype: replaces the option of that name.
    """
    check_target(config)
    import torch

    from dpace.locate import find_target
    from dpace.target import Target

    name = dtype or getattr(config, "dtype", "auto")
    return Target.load(
        find_target(config.target),
        dtype=None if name == "auto" else getattr(torch, name),
        device=getattr(config, "device", "auto"),
        device_map=getattr(config, "device_map", None),
        thinking=getattr(config, "thinking", False),
    )


def load_chat(config: Any):
    """Find and load the tokenizer of the target that a verb's options name, without its weights."""
    check_target(config)
    from dpace.data.chat import ChatTokenizer
    from dpace.locate import find_target

    return ChatTokenizer.load(find_target(config.target), config.thinking)


def check_target(config: Any) -> None:
    """Refuse a folder without a config."""
    if Path(config.target).is_dir() and not (Path(config.target) / "config.json").exists():
        raise ValueError(f"--target {config.target} has no config.json; name the folder of a model")
