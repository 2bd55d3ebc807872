"""The verbs of the command line, one file each with its options.

`run(args)` of such a file reads its arguments and runs the verb.
"""

from pathlib import Path
from typing import Any


def load_target(config: Any, dtype: str | None = None):
    """Find and load the target that a verb's options name.

    Args:
        config: has `target` and, where the verb has these options, `dtype`, `device` and `thinking`.
        dtype: replaces the option of that name.
    """
    if Path(config.target).is_dir() and not (Path(config.target) / "config.json").exists():
        raise ValueError(f"--target {config.target} has no config.json; name the folder of a model")
    import torch

    from dpace.locate import find_target
    from dpace.target import Target

    name = dtype or getattr(config, "dtype", "auto")
    return Target.load(
        find_target(config.target),
        dtype=None if name == "auto" else getattr(torch, name),
        device=getattr(config, "device", "auto"),
        thinking=getattr(config, "thinking", False),
    )


def check_folder(option: str, name: str) -> None:
    """Refuse a folder that does not exist, before a model is loaded.

    Args:
        option: name of the option, for the message.
        name: what the user gave.
    """
    if not Path(name).is_dir():
        kind = "a file" if Path(name).is_file() else "missing"
        raise ValueError(f"--{option} {name} is {kind}, expected a folder; name a folder that exists")
