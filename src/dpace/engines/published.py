"""Read a drafter's folder in the published DFlash layout, and make a `Drafter` of a spec and its tensors."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from dpace.drafter import Drafter
from dpace.drafter.drafter import TARGET_TABLES, refuse_mask_embedding
from dpace.drafter.spec import DrafterSpec, own_tables
from dpace.drafter.vocabulary import drafted_tokens
from dpace.engines.folder import mapping, read_files
from dpace.modeling_dflash import DFlashDraftModel
from dpace.system.device import dtype_name
from dpace.system.loading import refuse_infinite, refuse_mismatch, translate_library_errors

FIX = "copy config and weights again from where they were made, or serve this drafter with the project that did"
DEQUANTIZED = "dequantized_from"
"""Entry of the record that names the precision of the files that the weights were read from."""
OF_HEAD = ("confidence_temperature", "tau", "tau_interval", "tau_responses")
"""Entries of the record that were measured with the head."""


def read_folder(
    folder: str | Path, to_published: Callable[[dict[str, Any]], dict[str, Any]] = dict
) -> tuple[DrafterSpec, dict[str, Tensor]]:
    """Read a z-lab or SpecForge folder, also one whose weights are quantized as transformers reads it.

    Args:
        folder: of the drafter.
        to_published: turns another layout's config into the published one.

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
    refuse_mask_embedding(folder)
    files = read_files(folder)
    for file, problem in files.problems.items():
        if file != "recipe.yaml":  # which is not needed here
            raise ValueError(f"{folder / file} is damaged ({problem}); copy or export it again")
    try:
        config = to_published(files.config)
        spec = DrafterSpec.from_config({**own_tables(files.tensors), **config, "quantization_config": None})
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error
    if quantized := mapping(files.config.get("quantization_config")):
        spec = replace(spec, record=spec.record | {DEQUANTIZED: quantized.get("quant_method")})
    tensors = _read_quantized(folder, spec, quantized) if quantized else files.tensors
    unused = TARGET_TABLES - spec.shapes.keys()
    unused |= {name for name in tensors if name.endswith("rotary_emb.inv_freq")}
    return spec, {name: tensor for name, tensor in tensors.items() if name not in unused}


def _read_quantized(folder: Path, spec: DrafterSpec, quantized: dict[str, Any]) -> dict[str, Tensor]:
    """Let transformers turn quantized weights into plain ones.

    Memory: all weights in fp32.

    Returns:
        Tensors by their published names.

    Raises:
        ValueError: a method or tensors that transformers does not know, or a package that is missing.
    """
    config = spec.config()
    config.quantization_config = quantized
    method = quantized.get("quant_method")
    what = f"the drafter {folder}, which is quantized ({method!r:.50})"
    with translate_library_errors(what, "install what is missing, or take a drafter that is not quantized"):
        if method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
            raise ValueError("transformers does not know this method")
        loaded: Any = DFlashDraftModel.from_pretrained(
            folder, config=config, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    model, info = loaded
    refuse_mismatch(what, info, FIX, unknown=info["unexpected_keys"] - TARGET_TABLES)
    return model.state_dict()


def make_drafter(spec: DrafterSpec, tensors: dict[str, Tensor]) -> Drafter:
    """Put weights into a drafter as they are, dtype included.

    Raises:
        ValueError: tensors that are missing, unknown, of another shape, quantized or not finite.
    """
    what, known = "the drafter", spec.shapes
    shapes = [(name, tensor.shape, known.get(name)) for name, tensor in tensors.items()]
    found = {
        "missing_keys": known.keys() - tensors.keys(),
        "mismatched_keys": [(name, a, b) for name, a, b in shapes if b not in (a, None)],
    }
    refuse_mismatch(what, found, FIX, unknown=tensors.keys() - known.keys())
    for name, tensor in tensors.items():
        if name == "d2t":
            drafted_tokens(tensor, spec.vocab_size)
        elif not tensor.is_floating_point() or tensor.element_size() not in (2, 4):
            raise ValueError(
                f"{name} holds {dtype_name(tensor.dtype)}, expected float32, bfloat16 or float16; take "
                "a drafter whose weights are not quantized"
            )
    with translate_library_errors("the drafter of this config", FIX), torch.random.fork_rng():
        drafter: Any = Drafter(spec.config()).eval()  # no larger than its tensors, whose shapes are the spec's
    drafter.load_state_dict(tensors, assign=True)
    refuse_infinite(what, drafter, FIX)
    drafter.refuse_trained_selector()
    return drafter.requires_grad_(False)


def without_selector(spec: DrafterSpec) -> DrafterSpec:
    """Return what a drafter is without its head: DFlash's, or DFlash2's where it has convolutions.

    Raises:
        ValueError: it has no head.
    """
    if spec.selector is None:
        raise ValueError("the drafter has no head that could be left out; export it without --plain")
    record = {name: value for name, value in spec.record.items() if name not in OF_HEAD}
    return replace(spec, selector=None, record=record)
