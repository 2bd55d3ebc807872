"""The weights of an objective: dpace's own by name, or those of a custom function.

A custom objective is a function of the user's, named `package.module:function`. It takes `dpace.loss.Slots` and returns
weights, "batch block slot", finite and not negative. It is found by its name, told from others by its source, tried
before any work, and its weights are checked each time.
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

from dpace import weights as W
from dpace.blocks import block_sizes
from dpace.config import LossConfig, Objective, TokenLoss, is_custom
from dpace.loss import Slots, Weigh
from dpace.system.progress import describe_error
from dpace.system.provenance import hash_json


def load_custom(name: str) -> Weigh:
    """Import the function of an objective `package.module:function`.

    The module is looked for in the working folder too. Its code is run.

    Raises:
        ValueError: there is no such module or function, the module cannot be imported, or it is no function.
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
    return _require_function(found, name)


def _require_function(value: object, name: str) -> Weigh:
    if not inspect.isfunction(value):
        raise ValueError(
            f"the objective {name} is {type(value).__name__}, expected a function; write one with `def` that takes "
            "dpace.Slots and returns the weights"
        )
    return value


def name_of(weigh: Callable) -> str:
    """Return the name of a function, `package.module:function`.

    Raises:
        ValueError: it is no function.
    """
    function: Any = _require_function(weigh, repr(weigh))
    return f"{function.__module__}:{function.__qualname__}"


def source_sha256(weigh: Weigh) -> str:
    """Hash what a function computes with: its source, its default values and those that it took along.

    The source is that of its whole module, since it may call others there; in a script or a notebook, that of the
    function alone.

    Raises:
        ValueError: the source is not on disk, or a value is neither a number nor a text.
    """
    function: Any = inspect.unwrap(weigh)
    name = name_of(function)
    try:
        is_script = function.__module__ == "__main__"
        source = inspect.getsource(function if is_script else sys.modules[function.__module__])
    except (OSError, TypeError, KeyError) as error:
        raise ValueError(
            f"the objective {name} has no source on disk, which tells one run from another; write it into a file"
        ) from error
    held = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    try:
        values = {key: cell.cell_contents for key, cell in held.items()}
        return hash_json([source, values, function.__defaults__, function.__kwdefaults__])
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the objective {name} holds values that cannot be recorded, {describe_error(error)}; let it take numbers "
            "and texts only, and put the rest into its module"
        ) from error


def checked(weigh: Weigh, name: str) -> Weigh:
    """Check the weights of an objective each time, and set those of slots that are not scored to 0.

    Raises:
        ValueError: when called: it fails, or gives weights of another shape or type, or at a scored slot negative or
            not finite.
    """

    def weigh_checked(slots: Slots) -> Tensor:
        try:
            weights = weigh(slots)
        except Exception as error:  # the user's code may raise anything
            raise ValueError(
                f"the objective {name} fails on a batch of shape {tuple(slots.is_scored.shape)}, "
                f"{describe_error(error)}; it gets dpace.Slots, whose blocks have fewer slots with --train.grow-blocks"
            ) from error
        shape = tuple(slots.is_scored.shape)
        found = f"the shape {tuple(weights.shape)}" if isinstance(weights, Tensor) else type(weights).__name__
        if isinstance(weights, Tensor) and weights.shape == slots.is_scored.shape:
            weights = weights.detach().float().where(slots.is_scored, 0.0)
            is_wrong = ~(weights.isfinite() & (weights >= 0))
            if weights.device.type != "cpu":  # the training looks at the loss, and the host does not wait here
                return weights.masked_fill(is_wrong, torch.nan)
            if not is_wrong.any():
                return weights
            found = f"the weight {float(weights[is_wrong][0]):g}"
        raise ValueError(
            f"the objective {name} gives {found}, expected 0 or more and finite for each slot, as a tensor {shape}; "
            "correct it"
        )

    return weigh_checked


def try_out(weigh: Weigh, *, block_size: int, has_overlap: bool) -> None:
    """Call a checked objective on a small random batch, before any work.

    Raises:
        ValueError: see `checked`.
    """
    draws = torch.rand(4, 2, 3, block_size, generator=torch.Generator().manual_seed(0))
    is_scored = draws[0] < 0.7
    is_scored[..., 0] = False
    is_scored[1, 2] = False  # a padding block
    probs, overlap = draws[1:3].where(is_scored, 1.0)
    is_match = (draws[3] < probs) & is_scored
    weigh(Slots(is_scored, probs, is_match, overlap if has_overlap else None))


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
    is_known = objective in get_args(Objective) or is_custom(objective)
    if not is_known or changes["token_loss"] not in get_args(TokenLoss):
        raise ValueError(
            f"there is no objective {name!r}; choose one of {', '.join(get_args(Objective))}, or a custom one as "
            "package.module:function, and add +kl or +lk for that token loss, and +overlap for that confidence"
        )
    if "overlap" in parts and not is_custom(objective) and objective not in (*W.OF_CONFIDENCE, "chain-reward"):
        raise ValueError(
            f"the objective {objective} has no confidence, so {name} trains as without +overlap; take it out"
        )
    return replace(loss, objective=objective, **changes)


def make_weigh(config: LossConfig, block_size: int, weigh: Weigh | None = None, *, is_growing: bool = False) -> Weigh:
    """Make the weights function of an objective, for `frozen_head_nll`.

    With confidence `overlap`, `frozen_head_nll` needs `target_hidden`. A custom objective is tried out on a small
    batch, and its weights are checked each time.

    Args:
        config: names the objective, and has its settings.
        block_size: slots in a block.
        weigh: the function of a custom objective; otherwise it is imported by its name.
        is_growing: whether blocks grow to that size.

    Raises:
        ValueError: see `block_sizes`, `load_custom`, `try_out` and `checked`.
    """
    sizes = block_sizes(block_size, is_growing=is_growing)
    if weigh is not None or is_custom(config.objective):
        weigh = checked(weigh or load_custom(config.objective), config.objective)
        for size in sizes:
            try_out(weigh, block_size=size, has_overlap=config.needs_target_probs)
        return weigh
    objective = config.objective
    gamma = config.gamma or W.dflash_gamma(block_size)
    alpha_end = config.alpha if config.alpha_end is None else config.alpha_end

    def weigh_slots(slots: Slots) -> Tensor:
        is_scored = slots.is_scored
        confidence = slots.token_probs if config.confidence == "token" else slots.overlap
        if confidence is None:
            raise ValueError("confidence 'overlap' compares with the target's distribution and needs target_hidden")
        if objective in W.OF_CONFIDENCE:
            alpha = config.alpha + (alpha_end - config.alpha) * slots.progress
            return W.OF_CONFIDENCE[objective](confidence, is_scored, alpha)
        if objective == "chain-reward":
            return W.chain_reward_weights(confidence, is_scored)
        if objective == "vat":
            return W.vat_weights(slots.is_match, is_scored, gamma)
        if objective == "spec-auf":
            return W.spec_auf_weights(slots.is_match, is_scored)
        if objective == "dflash":
            return W.dflash_weights(is_scored, gamma)
        if objective == "medusa":
            return W.medusa_weights(is_scored, config.base)
        assert objective == "uniform"
        return W.uniform_weights(is_scored)

    return weigh_slots
