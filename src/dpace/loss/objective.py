"""The weights of an objective: one of dpace's by name, or a custom function.

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
    path_before = sys.path[:]
    sys.path.insert(0, str(Path.cwd()))  # which the command `dpace`, unlike `python -m`, does not look in
    try:
        weigh = pkgutil.resolve_name(name)
    except Exception as error:  # the user's code may raise anything
        raise ValueError(
            f"--loss.objective {name} cannot be imported, {describe_error(error)}; run dpace in the folder that has "
            "its module, or add that folder to PYTHONPATH, and repair the module where it fails"
        ) from error
    finally:
        sys.path[:] = path_before
    name_of(weigh)  # refuses what is no function
    return weigh


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
    """Hash what a function computes with: its source, its default values, and what it takes from outside.

    The source of its whole module is hashed, since it may call others there; in a script or a notebook, the source of
    the function alone.

    Raises:
        ValueError: the source is not on disk, or a value is neither a number nor a text.
    """
    function = inspect.unwrap(weigh)
    has_source: Any = inspect.getmodule(function)
    if function.__module__ == "__main__":
        has_source = function
    try:
        source = inspect.getsource(has_source)
        captured = inspect.getclosurevars(function).nonlocals
        return hash_json([source, captured, function.__defaults__, function.__kwdefaults__])
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
        given = type(weights).__name__
        if isinstance(weights, Tensor):
            given = f"the shape {tuple(weights.shape)}"
        if not isinstance(weights, Tensor) or weights.shape != shape:
            raise ValueError(f"the objective {name} gives {given}, expected a tensor {tuple(shape)}; correct it")
        weights = weights.detach().float().where(slots.is_scored, 0.0)
        # NaN and no error: to raise one here, the host would wait for the device in every step.
        return weights.where(weights.isfinite() & (weights >= 0), torch.nan)

    return weigh_checked


def try_out(weigh: Weigh, config: LossConfig, block_size: int) -> None:
    """Call a checked objective on a small random batch, before any work.

    Raises:
        ValueError: a weight is negative or not finite; or see `checked`.
    """
    probs = torch.rand(2, 3, block_size, generator=torch.Generator().manual_seed(0))  # (batch, block, slot)
    is_scored = probs < 0.7
    is_scored[..., 0] = False  # anchors never are
    is_scored[1, 2] = False  # a padding block
    probs = probs.where(is_scored, 1.0)
    overlap = probs if config.needs_target_probs else None
    slots = Slots(is_scored, probs, is_scored & (probs > 0.4), overlap)
    if weigh(slots).isnan().any():
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
    objective, *additions = name.split("+")
    token_loss = "nll"
    confidence = "token"
    for addition in additions:
        if addition == "overlap":
            confidence = "overlap"
        else:
            token_loss = addition
    objectives = get_args(Objective)
    token_losses = get_args(TokenLoss)
    is_known = objective in objectives or is_custom(objective)
    if not is_known or token_loss not in token_losses:
        raise ValueError(
            f"there is no objective {name!r}; choose one of {', '.join(objectives)}, or a custom one as "
            f"package.module:function, and add +{' or +'.join(token_losses[1:])} for that token loss, and "
            "+overlap for that confidence"
        )
    if confidence == "overlap" and objective in objectives and "token_probs" not in function_of(objective)[1]:
        raise ValueError(
            f"the objective {objective} has no confidence, so {name} trains as without +overlap; take it out"
        )
    return replace(loss, objective=objective, token_loss=token_loss, confidence=confidence)


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
        for size in dict.fromkeys(sizes):
            try_out(weigh, config, size)
        return weigh
    function, argument_names = function_of(name)
    alpha_end = config.alpha if config.alpha_end is None else config.alpha_end

    def weigh_slots(slots: Slots) -> Tensor:
        # All that a function of `dpace.weights` may ask for by name: options, and facts of the slots.
        values = vars(config) | slots._asdict()
        if config.confidence == "overlap":
            values["token_probs"] = slots.overlap
        values["alpha"] = config.alpha + (alpha_end - config.alpha) * slots.progress
        values["gamma"] = config.gamma or dpace.weights.dflash_gamma(block_size)
        return function(**{argument: values[argument] for argument in argument_names})

    return weigh_slots
