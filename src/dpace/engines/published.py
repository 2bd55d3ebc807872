"""Read a drafter's folder in the published DFlash layout, and make a `Drafter` of it."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from dpace.drafter import Drafter
from dpace.engines.config_values import check_config, check_spec
from dpace.engines.folder import read_files
from dpace.engines.speculators import of_speculators
from dpace.engines.tensors import tensor_axes
from dpace.spec import DrafterSpec


def read_folder(folder: str | Path, *, num_target_layers: int | None = None) -> tuple[DrafterSpec, dict[str, Tensor]]:
    """Read a z-lab, SpecForge or speculators folder.

    Args:
        folder: with `config.json` and safetensors.
        num_target_layers: of the target, which speculators' format does not say.

    Returns:
        The spec, and the weights under this project's names, as they are in the files.

    Raises:
        ValueError: no such folder, or a config or tensors that this project does not know.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} is not a drafter's folder: it has no config.json; name a folder that has one, or a .gguf file"
        )
    if (folder / "mask_embedding.pt").exists():
        raise ValueError(
            f"{folder} has a mask embedding of its own (mask_embedding.pt), expected none: dpace uses the target's "
            "embedding; this drafter cannot be used"
        )
    files = read_files(folder)
    damaged = {file: problem for file, problem in files.problems.items() if file != "recipe.yaml"}  # not needed here
    for file, problem in damaged.items():
        raise ValueError(f"{folder / file} is damaged ({problem}); copy or export it again")
    config = files.config
    try:
        if "speculators_model_type" in config:
            config = of_speculators(config, num_target_layers)
        check_config(config)
        spec = DrafterSpec.from_config(config)
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error
    return spec, {name: t for name, t in files.tensors.items() if not name.endswith("rotary_emb.inv_freq")}


def make_drafter(spec: DrafterSpec, tensors: dict[str, Tensor]) -> Drafter:
    """Put weights into a drafter as they are, dtype included.

    Raises:
        ValueError: tensors that are missing, unknown or of another shape.
    """
    check_spec(spec)
    sizes = {"hidden": spec.hidden_size, "head": spec.head_dim, "inner": spec.intermediate_size}
    sizes |= {"query": spec.num_heads * spec.head_dim, "key": spec.num_key_value_heads * spec.head_dim}
    sizes["feature"] = len(spec.target_layer_ids) * spec.hidden_size
    sizes |= {"vocab": spec.vocab_size, "rank": 1, "side": 2, "tap": spec.conv_kernel_size}
    sizes["kernel"] = 2 * spec.conv_kernel_size * (spec.hidden_size // max(1, spec.conv_group_size))
    axes = tensor_axes(spec.num_layers, has_convolutions=spec.conv_kernel_size > 0)
    missing, unknown = sorted(axes.keys() - tensors.keys()), sorted(tensors.keys() - axes.keys())
    if missing or unknown:
        raise ValueError(
            f"these are not the tensors of a DFlash drafter with {spec.num_layers} layers: missing "
            f"{missing[:3] or 'none'}, unknown {unknown[:3] or 'none'}; drafters with their own embedding, head or "
            "vocabulary cannot be used"
        )
    for name, tensor in tensors.items():
        expected = tuple(sizes[axis] for axis in axes[name])
        if tuple(tensor.shape) != expected:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, expected {expected} by the config: config and weights belong "
                "to different drafters; copy both again"
            )
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise ValueError(
                f"{name} holds {str(tensor.dtype).removeprefix('torch.')}, expected float32, bfloat16 or float16; take "
                "a drafter whose weights are not quantized"
            )
        if not tensor.isfinite().all():
            raise ValueError(f"{name} has values that are not finite; copy it again, or take an earlier checkpoint")
    drafter = _build(spec)
    drafter.load_state_dict(tensors, assign=True)
    drafter.refuse_trained_selector()
    return drafter.requires_grad_(False)


def _build(spec: DrafterSpec) -> Any:
    """Make the network of a spec; it is no larger than its tensors, which were compared with the spec."""
    try:
        with torch.random.fork_rng():
            return Drafter(spec.config()).eval()
    except (KeyError, TypeError, AttributeError, ArithmeticError, RuntimeError, StrictDataclassError) as error:
        said = " ".join(str(error).split())[:200]
        raise ValueError(
            f"the config describes no network that can be made ({type(error).__name__}: {said}); copy it again from "
            "where it was made"
        ) from error
