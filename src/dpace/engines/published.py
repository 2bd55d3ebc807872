"""Read a drafter's folder in the published DFlash layout, and make a `Drafter` of a spec and its tensors."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from dpace.drafter import Drafter
from dpace.drafter.drafter import TARGET_TABLES, refuse_mask_embedding
from dpace.drafter.kinds import published_name
from dpace.drafter.spec import DrafterSpec, own_tables
from dpace.drafter.values import read_object
from dpace.drafter.vocabulary import drafted_tokens
from dpace.modeling_dflash import DFlashDraftModel
from dpace.system.loading import read_config, refuse_infinite, refuse_mismatch, translate_library_errors

FIX = "copy config and weights again from where they were made, or serve this drafter with the project that did"
DEQUANTIZED = "dequantized_from"
"""Entry of the record that names the precision of the files that the weights were read from."""
OF_HEAD = ("confidence_temperature", "tau", "tau_interval", "tau_responses")
"""Entries of the record that were measured with the head."""
OTHER_NAMES = {"encoder.fc.weight": "fc.weight", "encoder.output_norm_enc.weight": "hidden_norm.weight"}
"""Names in transformers' own container, and the published ones."""


def to_layer_ids(hidden_state_ids: object) -> list[int]:
    """Turn indices into `hidden_states`, where 0 is the embedding, into ids of layers; the inverse of the spec's.

    Raises:
        ValueError: they are no list of integers.
    """
    if not isinstance(hidden_state_ids, list) or not all(type(index) is int for index in hidden_state_ids):
        raise ValueError(f"layer ids are {hidden_state_ids!r:.200}, expected a list of integers; copy the file again")
    return [index - 1 for index in hidden_state_ids]


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read the tensors of a drafter's folder, also in shards, by their published names.

    Raises:
        ValueError: damaged weights.
    """
    tensors = {}
    with translate_library_errors(f"the drafter {folder}", FIX):
        for file in sorted(folder.glob("model*.safetensors")):
            for stored, tensor in load_file(file).items():
                name = stored.removeprefix("model.")
                tensors[OTHER_NAMES.get(name, published_name(name))] = tensor
    return tensors


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
    refuse_mask_embedding(folder)
    config = read_config(folder)
    tensors = read_tensors(folder)
    try:
        values = to_published(config)
        spec = DrafterSpec.from_config({**own_tables(tensors), **values, "quantization_config": None})
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error
    if quantized := read_object(config, "quantization_config"):
        spec = replace(spec, record=spec.record | {DEQUANTIZED: quantized.get("quant_method")})
        tensors = _read_quantized(folder, spec, quantized)
    return spec, tensors


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
    what = f"the drafter {folder}, which is quantized ({quantized.get('quant_method')!r:.50})"
    with translate_library_errors(what, "install what is missing, or take a drafter that is not quantized"):
        loaded: Any = DFlashDraftModel.from_pretrained(
            folder, config=config, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    model, info = loaded
    refuse_mismatch(what, info, FIX, unknown=info["unexpected_keys"] - TARGET_TABLES)
    return model.state_dict()


def make_drafter(spec: DrafterSpec, tensors: dict[str, Tensor]) -> Drafter:
    """Put weights into a drafter as they are, dtype included; tables that the spec calls the target's are left out.

    Raises:
        ValueError: tensors that are missing, unknown, of another shape, no numbers with a point, or not finite.
    """
    unused = TARGET_TABLES - spec.shapes.keys()
    tensors = {name: tensor for name, tensor in tensors.items() if name not in unused}
    if "d2t" in tensors:
        drafted_tokens(tensors["d2t"], spec.vocab_size)
    with translate_library_errors("the drafter", FIX), torch.random.fork_rng():
        with torch.device("meta"):  # where the tensors do not fit, there may be no room for the network
            Drafter(spec.config()).load_state_dict(tensors, assign=True)
        drafter: Any = Drafter(spec.config()).eval()
        drafter.load_state_dict(tensors, assign=True)
    refuse_infinite("the drafter", drafter, FIX)
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
