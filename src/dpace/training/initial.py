"""Read the drafter that a training starts from, and give the recipe the settings that follow from it."""

from collections.abc import Collection
from dataclasses import replace

from dpace.drafter import Drafter
from dpace.drafter.spec import SAME_AS_OPTIONS
from dpace.drafter.vocabulary import load_vocabulary
from dpace.engines.read import read_drafter
from dpace.recipes.recipe_file import AnyRecipe
from dpace.system.ledger import JsonObject
from dpace.target.files import count_layers
from dpace.target.locate import find_drafter


def start_from(recipe: AnyRecipe, given: Collection[str]) -> tuple[AnyRecipe, Drafter | None]:
    """Read the drafter that `drafter.init` names, and give the recipe its size, layers and mask token.

    Args:
        recipe: names the drafter: what `read_drafter` reads, or a Hub id.
        given: names of the options that the user set, such as `drafter.block_size`.

    Returns:
        The recipe and the drafter, in the precision of its files, with its draft vocabulary and the asked length of
        blocks; the recipe as it is and None without `drafter.init`.

    Raises:
        ValueError: an option that contradicts the drafter; a drafter of a size that no recipe has; or see
            `find_drafter` and `read_drafter`.
    """
    name = recipe.drafter.init
    if name is None:
        return recipe, None
    path = find_drafter(name, "--drafter.init")
    init = read_drafter(path, num_target_layers=count_layers(recipe.target))
    init.vocabulary = load_vocabulary(path, init.spec.vocab_size)
    asked_slots = recipe.drafter.block_size
    resized = replace(init.spec, block_size=asked_slots)
    # Only LiLiCorr's weights depend on the number of slots.
    if "drafter.block_size" in given and resized.shapes == init.spec.shapes:
        init.config.block_size = asked_slots
    spec = init.spec
    values: JsonObject = {option: None for option in vars(recipe.drafter) if option.startswith("selector")}
    for option in SAME_AS_OPTIONS:
        values[option] = getattr(spec, option)
    values["selector"] = None  # the spec has its sizes, the recipe its name
    if spec.selector is not None:
        values["selector"] = spec.selector.name
        values |= spec.selector.options(spec.hidden_size)
    values["num_features"] = len(spec.target_layer_ids)
    values["full_layers"] = tuple(i for i, kind in enumerate(spec.layer_types) if kind == "full_attention")
    values["causal"] = spec.is_causal is True  # of all layers
    for option, value in values.items():
        asked = getattr(recipe.drafter, option)
        if asked not in (None, "auto", value) and f"drafter.{option}" in given:
            flag = f"--drafter.{option.replace('_', '-')}"
            raise ValueError(
                f"{flag} is {asked}, but {name} has {value}; leave {flag} out, or train without --drafter.init"
            )
    values["norm_scale"] = 1.0  # what a recipe says of untrained drafters does not matter
    return replace(recipe, drafter=replace(recipe.drafter, **values)), init
