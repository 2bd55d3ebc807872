"""The selectors that there are, a file each; `dpace.modeling_dflash` has their networks."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any, get_args

from dpace.config import Head
from dpace.drafter.selector import SelectorSizes
from dpace.drafter.values import read_values
from dpace.modeling_dflash import SELECTORS as NETWORKS

SELECTORS: dict[str, type[SelectorSizes]] = {
    name: import_module(f"dpace.drafter.{name}").SIZES for name in get_args(Head)
}


def read_sizes(config: Mapping[str, Any], nested: Mapping[str, Any]) -> SelectorSizes | None:
    """Read the sizes of a selector from a config and its `dflash_config`; None where they have none.

    Raises:
        ValueError: see `read_values`.
    """
    for name, sizes in SELECTORS.items():
        prefix = sizes.prefix or f"{name}_"
        values = {key.removeprefix(prefix): value for key, value in nested.items() if key.startswith(prefix)}
        if NETWORKS[name].is_in(nested) or sizes.architecture in str(config.get("architectures")):
            return read_values(sizes, values, prefix)
    return None


def published_name(name: str) -> str:
    """Return the name that this project writes for a tensor, which older files may call otherwise."""
    sizes = SELECTORS.get(name.partition(".")[0], SelectorSizes)
    for older, newer in sizes.older_names.items():
        name = name.replace(f".{older}.", f".{newer}.")
    return name
