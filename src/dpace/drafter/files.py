"""Read a drafter's folder in the published DFlash layout: its description and its tensors."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from dpace.drafter.spec import DrafterSpec, own_tables
from dpace.drafter.values import read_object
from dpace.modeling_dflash import DFlashDraftModel
from dpace.system.loading import read_config, refuse_mismatch, translate_library_errors

FIX = "copy config and weights again, or `dpace import` the drafter if another program wrote it"
TARGET_TABLES = {"embed_tokens.weight", "lm_head.weight", "t2d", "verifier_norm.weight", "verifier_lm_head.weight"}
"""Tensors that say nothing new: tables that the config calls the target's, and what speculators trains with."""


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read the tensors of a drafter's folder, also in shards.

    Raises:
        ValueError: damaged weights, or none in safetensors.
    """
    tensors = {}
    with translate_library_errors(f"the drafter {folder}", FIX):
        for file in sorted(folder.glob("model*.safetensors")):
            tensors |= {name.removeprefix("model."): tensor for name, tensor in load_file(file).items()}
    if not tensors:
        raise ValueError(f"the drafter {folder} has no model.safetensors, and pickles are not read; {FIX}")
    return tensors


def read_folder(
    folder: str | Path, to_published: Callable[[dict[str, Any]], dict[str, Any]] = dict
) -> tuple[DrafterSpec, dict[str, Tensor]]:
    """Read a z-lab or SpecForge folder, also one whose weights are quantized as transformers reads it.

    Args:
        folder: of the drafter.
        to_published: turns another layout's config into the published one.

    Returns:
        The spec, and the weights as they are in the files; quantized ones in fp32.

    Raises:
        ValueError: no such folder, or a config or tensors that this project does not know.
    """
    folder = Path(folder)
    if (folder / "mask_embedding.pt").exists():
        raise ValueError(
            f"{folder} has a mask embedding of its own (mask_embedding.pt), a pickle, which dpace does not open; write "
            "the target's embedding with this row at mask_token_id into model.safetensors, as embed_tokens.weight"
        )
    config = read_config(folder)
    tensors = read_tensors(folder)
    try:
        spec = DrafterSpec.from_config(own_tables(tensors) | to_published(config))
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error
    if quantized := read_object(config, "quantization_config"):
        tensors = read_quantized(folder, spec, quantized)
    return spec, tensors


def read_quantized(folder: Path, spec: DrafterSpec, quantized: dict[str, Any]) -> dict[str, Tensor]:
    """Let transformers turn quantized weights into plain ones.

    Memory: all weights in fp32.

    Returns:
        Tensors by their published names.

    Raises:
        ValueError: a method or tensors that transformers does not know, or a package that is missing.
    """
    config = spec.config()
    config.quantization_config = quantized
    what = f"the drafter {folder}, which is quantized ({quantized.get('quant_method')!r:.50})"
    with translate_library_errors(what, "install what is missing, or take a drafter that is not quantized"):
        loaded: Any = DFlashDraftModel.from_pretrained(
            folder, config=config, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    model, info = loaded
    refuse_mismatch(what, info, FIX, unknown=info["unexpected_keys"] - TARGET_TABLES)
    return model.state_dict()
