"""Values of a drafter's config: their types, and how they are read.

Each is checked by pydantic, and refused in a line that names it.
"""

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import Field, Strict, ValidationError

from dpace.system.ledger import JsonObject
from dpace.system.validation import adapter, describe_invalid

COPY_AGAIN = "copy the config again from where the drafter was trained"
MAX_LAYERS = 1000
"""Most layers of a drafter or of a target; each costs time and memory before the weights are read."""

Index = Annotated[int, Strict(), Field(ge=0, lt=2**31)]
StrictCount = Annotated[int, Strict(), Field(ge=1, lt=2**31)]
LayerCount = Annotated[int, Strict(), Field(ge=1, le=MAX_LAYERS)]
Flag = Annotated[bool, Strict()]
Scale = Annotated[float, Strict(), Field(gt=0, lt=1e30)]
Made = TypeVar("Made")


def read_values(kind: type[Made], values: JsonObject, prefix: str = "") -> Made:
    """Make a dataclass from values under their published names; others are ignored, and None is a missing value.

    Args:
        kind: the dataclass.
        values: without the prefix.
        prefix: of their names in the config.

    Raises:
        ValueError: a value that no drafter has, or none where one is needed; names it.
    """
    values = {name: value for name, value in values.items() if value is not None}
    try:
        return adapter(kind).validate_python(values)
    except ValidationError as error:
        raise ValueError(f"in the drafter's config {prefix}{describe_invalid(error, kind)}; {COPY_AGAIN}") from error


def read_group(config: JsonObject, name: str) -> JsonObject:
    """Read an object; an empty one where the config has none."""
    value = config.get(name)
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f"{name} is {value!r:.100}, expected an object; {COPY_AGAIN}")
    return dict(value or {})


def read_either(config: JsonObject, group: JsonObject, key: str, name: str = "dflash_config") -> Any:
    """Read a value from an object of the config or from its top level; None where it is in neither.

    Args:
        config: the top level.
        group: the object.
        key: of the value.
        name: of the object.

    Raises:
        ValueError: it is in both, and differs.
    """
    inner = group.get(key)
    outer = config.get(key)
    if inner is not None and outer is not None and inner != outer:
        raise ValueError(
            f"{key} is {inner!r} in {name} and {outer!r} at the top level; engines read one or the other: make them "
            "equal"
        )
    return outer if inner is None else inner
