"""Load only weights that the model expects: every tensor, in its shape, with finite values."""

import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.utils.logging import EmptyTqdm, set_tqdm_hook

from dpace.system import ranks
from dpace.system.ledger import JsonObject, read_object
from dpace.system.progress import shorten

LIBRARY_ERRORS = (ValueError, RuntimeError, TypeError, KeyError, AttributeError, IndexError, ArithmeticError)
"""What transformers raises for a config with values of the wrong kind."""


def first_names(names: Sequence[str]) -> str:
    """Return the first three names, and the number of the others."""
    text = ", ".join(names[:3])
    if len(names) > 3:
        text += f" and {len(names) - 3} more"
    return text


@contextmanager
def quiet_library() -> Iterator[None]:
    """Show no bar of transformers, and no warning to peft's authors, inside the `with` block; downloads keep theirs."""
    previous_hook = set_tqdm_hook(lambda _factory, args, _options: EmptyTqdm(*args))
    try:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            yield
    finally:
        set_tqdm_hook(previous_hook)


@contextmanager
def translate_library_errors(what: str, fix: str) -> Iterator[None]:
    """Turn what transformers raises for files that it cannot read into one line, and let it show nothing else.

    Raises:
        ValueError: damaged weights, a config that its own class refuses, a package that is missing, or a connection
            that breaks.
        OSError: a file that is missing or cannot be read, or weights that are in a pickle only.
    """
    try:
        with quiet_library():
            yield
    except OSError as error:
        # One with a number comes from the system and names its file; transformers writes the others itself.
        if error.errno or not re.search(r"\b(adapter_)?model\.safetensors", str(error)):
            raise
        raise OSError(
            f"{what} has no weights in safetensors, and a pickle (*.bin) is not read, since it may run code; where you "
            "trust it, load it with transformers or peft, and name the folder that save_pretrained writes"
        ) from error
    except SafetensorError as error:
        raise ValueError(f"the weights of {what} are damaged ({error}); {fix}") from error
    except (*LIBRARY_ERRORS, StrictDataclassError, ImportError, httpx.HTTPError) as error:
        reason = shorten(error, 300) or type(error).__name__
        raise ValueError(f"cannot load {what}: {reason}; {fix}") from error


def refuse_mismatch(what: str, found: Mapping[str, Any], fix: str, *, unknown: Collection[str] = ()) -> None:
    """Refuse a model whose file lacks tensors, has others, or has them in other shapes.

    transformers fills what is missing with random numbers.

    Args:
        what: the model, for the message.
        found: what `from_pretrained` gives with `output_loading_info`.
        fix: what to do.
        unknown: tensors of the file that the model does not know and must not have; a target's may have some, for other
            heads.

    Raises:
        ValueError: names the first few tensors.
    """
    shapes = []
    for name, shape, expected in found["mismatched_keys"]:
        shapes.append(f"{name} is {list(shape)}, expected {list(expected)}")
    faults: dict[str, Iterable[str]] = {
        "lack": found["missing_keys"],
        "have unknown": unknown,
        "have other shapes:": shapes,
        "could not be read:": map(str, found.get("error_msgs") or ()),
    }
    for fault, tensors in faults.items():
        if names := sorted(tensors):
            raise ValueError(f"the weights of {what} {fault} {first_names(names)}; {fix}")


@torch.no_grad()
def refuse_infinite(what: str, model: torch.nn.Module, fix: str) -> None:
    """Refuse weights that are NaN or infinite.

    Raises:
        ValueError: names the first few tensors.
    """
    names = [name for name, value in model.state_dict().items() if _is_infinite(value)]
    if names:
        raise ValueError(f"{what} has NaN or infinity in {first_names(names)}; {fix}")


def _is_infinite(value: object) -> bool:
    """Return whether a tensor has a value that is not finite; quantized ones are not examined."""
    value = ranks.local(value)
    if not isinstance(value, torch.Tensor) or is_traceable_wrapper_subclass(value) or not value.is_floating_point():
        return False
    if value.element_size() == 1:  # torch examines no float8
        value = value.float()
    return not bool(value.isfinite().all())


def read_config(folder: str | Path) -> JsonObject:
    """Read the `config.json` of a drafter's folder.

    Raises:
        ValueError: it cannot be read, or is not a JSON object.
    """
    return read_object(Path(folder) / "config.json", "train the drafter, or copy it again")


def attention_of(model_class: Any) -> str:
    """Choose the attention code of a model: torch's own, where its class supports it.

    It is passed explicitly, since a config may name another one, also one that has to be downloaded.
    """
    return "sdpa" if getattr(model_class, "_supports_sdpa", False) else "eager"
