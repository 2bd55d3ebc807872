"""The range of every option, checked before any work.

Imports no torch, so that a wrong option is refused at once.
"""

import math
from dataclasses import fields, is_dataclass
from numbers import Integral, Real
from typing import Any, NamedTuple, get_args

from dpace.config import Objective, is_objective
from dpace.recipes.validation import UsageError

LARGEST = 2**31 - 1


class Range(NamedTuple):
    """The values that a number may have."""

    low: float
    high: float = math.inf
    is_open: bool = False
    """Whether `low` itself is refused."""
    is_whole: bool = True
    """Whether only integers are taken."""
    also: tuple[Any, ...] = ()
    """Values that are taken too."""

    def __contains__(self, value: object) -> bool:
        """Say whether a value is in the range."""
        if value in self.also and not isinstance(value, bool):
            return True
        kind = Integral if self.is_whole else Real
        if not isinstance(value, kind) or isinstance(value, bool):
            return False
        try:
            number = float(value)
        except OverflowError:  # an integer past all floats
            return False
        return math.isfinite(number) and self.low <= number <= self.high and not (self.is_open and number == self.low)

    def __str__(self):
        """Say what is taken, in words."""
        kind = "an integer" if self.is_whole else "a number"
        above = "above " if self.is_open else ""
        if self.high in (math.inf, LARGEST):
            words = f"{kind} above {self.low:g}" if self.is_open else f"{kind} of {self.low:g} or more"
        else:
            words = f"{kind} from {above}{self.low:g} to {self.high:.20g}"
        return " or ".join([*(repr(value) for value in self.also), words])


COUNT, COUNT_OR_NONE = Range(1, LARGEST), Range(0, LARGEST)
POSITIVE = Range(0, is_open=True, is_whole=False)
NOT_NEGATIVE = Range(0, is_whole=False)
FRACTION = Range(0, 1, is_whole=False)
SEED = Range(0, 2**32 - 1)

RANGES = {
    "SamplingConfig": {
        "max_new_tokens": COUNT,
        "temperature": NOT_NEGATIVE,
        "top_k": COUNT_OR_NONE,
        "top_p": Range(0, 1, is_open=True, is_whole=False),
        "min_p": FRACTION,
        "seed": Range(0, 2**63 - 1),
    },
    "PromptsConfig": {
        "num_heldout": COUNT_OR_NONE,
        "num_validation": COUNT_OR_NONE,
        "limit": COUNT,
        "near_duplicates": Range(0, 1, is_open=True, is_whole=False),
    },
    "RespondConfig": {
        "max_new_tokens": COUNT,
        "temperature": NOT_NEGATIVE,
        "batch_size": COUNT,
        "seed": SEED,
        "retry_seconds": NOT_NEGATIVE,
    },
    "DrafterConfig": {
        "num_layers": Range(1, 1000),
        "block_size": Range(2, 1000),
        "num_features": Range(1, 1000),
        "target_layer_ids": COUNT_OR_NONE,
        "mask_token_id": COUNT_OR_NONE,
        "norm_scale": POSITIVE,
        "conv_kernel_size": Range(2, 1000, also=(0,)),
    },
    "LossConfig": {
        "alpha": FRACTION,
        "alpha_end": FRACTION,
        "gamma": POSITIVE,
        "base": POSITIVE,
        "chunk_mib": COUNT,
    },
    "TrainConfig": {
        "learning_rate": POSITIVE,
        "num_epochs": POSITIVE,
        "max_steps": Range(1, LARGEST, also=(-1,)),
        "warmup_ratio": FRACTION,
        "batch_size": COUNT,
        "gradient_accumulation_steps": COUNT,
        "num_anchors": COUNT,
        "max_length": Range(2, LARGEST),
        "max_grad_norm": NOT_NEGATIVE,
        "weight_decay": NOT_NEGATIVE,
        "seed": SEED,
        "logging_steps": COUNT,
        "eval_steps": COUNT,
        "save_steps": COUNT,
        "feature_cache_gib": NOT_NEGATIVE,
        "feature_files_gib": NOT_NEGATIVE,
    },
    "BenchConfig": {
        "temperatures": NOT_NEGATIVE,
        "max_new_tokens": COUNT,
        "num_prompts": COUNT_OR_NONE,
        "widths": Range(1, LARGEST, also=("auto", "full")),
        "concurrencies": Range(1, 4096),
        "seed": SEED,
    },
    "CompareConfig": {"seeds": SEED},
    "CheckConfig": {"num_prompts": COUNT, "max_new_tokens": COUNT, "seed": SEED},
    "ExportConfig": {"num_prompts": COUNT_OR_NONE, "max_new_tokens": COUNT},
}
"""Range of each option that is a number or a list of them; a test holds that none is missing."""

NOT_EMPTY = ("temperatures", "widths", "concurrencies", "objectives", "seeds", "dtypes", "folders")
"""Lists that need an entry."""


def check_ranges(config: Any, *, prefix: str = "--") -> None:
    """Check every option of a config, group by group.

    Args:
        config: a dataclass of options.
        prefix: `--` where the options are flags; empty where they are arguments of Python functions.

    Raises:
        UsageError: an objective that is none of dpace's and not of the form `package.module:function`.
        ValueError: an option outside its range, an empty or undecodable text, or a list with an entry twice.
    """
    for entry in fields(config):
        value = getattr(config, entry.name)
        if is_dataclass(value):
            check_ranges(value, prefix=f"{prefix}{entry.name}.")
        elif value is not None or entry.default is not None:
            name = f"{prefix}{entry.name}"
            _check(type(config), entry.name, value, name.replace("_", "-") if prefix else name)


def _check(kind: type, name: str, value: Any, shown: str) -> None:
    """Check one option."""
    allowed = next((RANGES[c.__name__][name] for c in kind.__mro__ if name in RANGES.get(c.__name__, ())), None)
    values = value if isinstance(value, list | tuple) else (value,)
    if not values and name in NOT_EMPTY:
        raise ValueError(f"{shown} is empty, expected one or more values; give one, or leave the option out")
    for item in values:
        if allowed is not None and item not in allowed:
            raise ValueError(f"{shown} is {item!r}, expected {allowed}; change it, or leave it out for the default")
        if isinstance(item, str) and (not item.strip() or "\0" in item or not _is_unicode(item)):
            what = "empty" if not item.strip() else ascii(item)
            raise ValueError(
                f"{shown} is {what}, expected a text in Unicode that is not empty; change it, or leave it out"
            )
    if name == "objective" and not is_objective(value):
        raise UsageError(f"{shown} is {value!r}, expected {objective_words()}; change it, or leave it out for dpace")
    if len(set(values)) < len(values):
        twice = next(item for item in values if values.count(item) > 1)
        raise ValueError(f"{shown} has {twice!r} twice, expected different values; remove one of them")
    if name == "target_layer_ids" and list(values) != sorted(values):
        raise ValueError(f"{shown} is {values}, expected numbers in ascending order; sort them")


def _is_unicode(text: str) -> bool:
    """Say whether a text can be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def objective_words() -> str:
    """Say what names an objective."""
    return f"one of {', '.join(get_args(Objective))}, or package.module:function"
