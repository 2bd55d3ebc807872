"""The weights of an objective: dpace's own by name, or those of a custom function.

A custom objective is a function of the user's, named `package.module:function`. It takes `dpace.loss.Slots` and returns
weights, "batch block slot", finite and not negative. It is found by its name, told from others by its source, and tried
before any work.
"""

import inspect
import pkgutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

import dpace.weights
from dpace.blocks import block_sizes
from dpace.config import LossConfig, Objective, TokenLoss, is_custom
from dpace.loss.loss import Slots, Weigh
from dpace.system.progress import describe_error
from dpace.system.provenance import hash_json


def load_custom(name: str) -> Weigh:
    """Import the function of an objective `package.module:function`.

    The module is looked for in the working folder too. Its code is run.

    Raises:
        ValueError: it cannot be imported, or is no function.
    """
    before = sys.path[:]
    sys.path.insert(0, str(Path.cwd()))
    try:
        found = pkgutil.resolve_name(name)
    except Exception as error:  # the user's code may raise anything
        raise ValueError(
            f"--loss.objective {name} cannot be imported, {describe_error(error)}; run dpace in the folder that has "
            "its module, or add that folder to PYTHONPATH, and repair the module where it fails"
        ) from error
    finally:
        sys.path[:] = before
    name_of(found)
    return found


def name_of(weigh: object) -> str:
    """Return the name of a function, `package.module:function`.

    Raises:
        ValueError: it is no function.
    """
    if not inspect.isfunction(weigh):
        raise ValueError(
            f"the objective {weigh!r} is {type(weigh).__name__}, expected a function; write one with `def` that takes "
            "dpace.Slots and returns the weights"
        )
    return f"{weigh.__module__}:{weigh.__qualname__}"


def source_sha256(weigh: Weigh) -> str:
    """Hash what a function computes with: its source, its default values and those that it took along.

    The source is that of its whole module, since it may call others there; in a script or a notebook, that of the
    function alone.

    Raises:
        ValueError: the source is not on disk, or a value is neither a number nor a text.
    """
    function = inspect.unwrap(weigh)
    place: Any = function if function.__module__ == "__main__" else inspect.getmodule(function)
    try:
        source = inspect.getsource(place)
        values = inspect.getclosurevars(function).nonlocals
        return hash_json([source, values, function.__defaults__, function.__kwdefaults__])
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(
            f"the objective {name_of(function)} cannot be recorded, {describe_error(error)}; write it into a file, and "
            "let it take numbers and texts only from outside"
        ) from error


def checked(weigh: Weigh, name: str) -> Weigh:
    """Let an objective give weights of the right shape: 0 at slots that are not scored, NaN where a weight is wrong.

    Training ends at a loss that is NaN.

    Raises:
        ValueError: when called: it fails, or gives no tensor of the right shape.
    """

    def weigh_checked(slots: Slots) -> Tensor:
        shape = slots.is_scored.shape
        try:
            weights = weigh(slots)
        except Exception as error:  # the user's code may raise anything
            raise ValueError(
                f"the objective {name} fails on a batch of shape {tuple(shape)}, {describe_error(error)}; it gets "
                "dpace.Slots, whose blocks have fewer slots with --train.grow-blocks"
            ) from error
        if not isinstance(weights, Tensor) or weights.shape != shape:
            found = f"the shape {tuple(weights.shape)}" if isinstance(weights, Tensor) else type(weights).__name__
            raise ValueError(f"the objective {name} gives {found}, expected a tensor {tuple(shape)}; correct it")
        weights = weights.detach().float().where(slots.is_scored, 0.0)
        return weights.where(weights.isfinite() & (weights >= 0), torch.nan)

    return weigh_checked


def try_out(weigh: Weigh, config: LossConfig, block_size: int) -> None:
    """Call a checked objective on a small random batch, before any work.

    Raises:
        ValueError: a weight is negative or not finite; or see `checked`.
    """
    probs = torch.rand(2, 3, block_size, generator=torch.Generator().manual_seed(0))
    is_scored = probs < 0.7
    is_scored[..., 0] = False
    is_scored[1, 2] = False  # a padding block
    probs = probs.where(is_scored, 1.0)
    overlap = probs if config.needs_target_probs else None
    if weigh(Slots(is_scored, probs, is_scored & (probs > 0.4), overlap)).isnan().any():
        raise ValueError(f"the objective {config.objective} gives weights that are negative or not finite; correct it")


def function_of(objective: str) -> tuple[Callable[..., Tensor], list[str]]:
    """Find the function of an objective of dpace, and what it computes from."""
    function = getattr(dpace.weights, f"{objective.replace('-', '_')}_weights")
    return function, list(inspect.signature(function).parameters)


def with_objective(loss: LossConfig, name: str) -> LossConfig:
    """Set the objective from a name such as `dpace`, `dpace+kl+overlap` or `package.module:function`.

    All other settings stay as they are.

    Raises:
        ValueError: unknown name; the message lists the known ones. Or a confidence for an objective without one.
    """
    objective, *parts = name.split("+")
    changes = {"token_loss": "nll", "confidence": "token"}
    for part in parts:
        changes |= {"confidence": "overlap"} if part == "overlap" else {"token_loss": part}
    known = get_args(Objective)
    if not (objective in known or is_custom(objective)) or changes["token_loss"] not in get_args(TokenLoss):
        raise ValueError(
            f"there is no objective {name!r}; choose one of {', '.join(known)}, or a custom one as "
            f"package.module:function, and add +{' or +'.join(get_args(TokenLoss)[1:])} for that token loss, and "
            "+overlap for that confidence"
        )
    if "overlap" in parts and objective in known and "token_probs" not in function_of(objective)[1]:
        raise ValueError(
            f"the objective {objective} has no confidence, so {name} trains as without +overlap; take it out"
        )
    return replace(loss, objective=objective, **changes)


def make_weigh(config: LossConfig, block_size: int, weigh: Weigh | None = None, *, is_growing: bool = False) -> Weigh:
    """Make the weights function of an objective, for `frozen_head_nll`.

    With confidence `overlap`, `frozen_head_nll` needs `target_hidden`. A custom objective is tried out on a small
    batch.

    Args:
        config: names the objective, and has its settings.
        block_size: slots in a block.
        weigh: the function of a custom objective; otherwise it is imported by its name.
        is_growing: whether blocks grow to that size.

    Raises:
        ValueError: see `block_sizes`, `load_custom` and `try_out`.
    """
    sizes = block_sizes(block_size, is_growing=is_growing)
    name = config.objective
    if weigh is not None or is_custom(name):
        weigh = checked(weigh or load_custom(name), name)
        for size in sizes:
            try_out(weigh, config, size)
        return weigh
    function, needed = function_of(name)
    alpha_end = config.alpha if config.alpha_end is None else config.alpha_end

    def weigh_slots(slots: Slots) -> Tensor:
        known = {
            **vars(config),
            **slots._asdict(),
            "token_probs": slots.token_probs if config.confidence == "token" else slots.overlap,
            "alpha": config.alpha + (alpha_end - config.alpha) * slots.progress,
            "gamma": config.gamma or dpace.weights.dflash_gamma(block_size),
        }
        return function(**{name: known[name] for name in needed})

    return weigh_slots
