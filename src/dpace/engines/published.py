"""Read a drafter's folder in the published DFlash layout, and make a `Drafter` of it."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpace.drafter import Drafter
from dpace.engines.folder import read_files
from dpace.engines.speculators import of_speculators
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
    if not (folder / "config.json").exists():
        raise ValueError(
            f"{folder} is not a drafter's folder: it has no config.json; name a folder that has one, or a .gguf file"
        )
    if (folder / "mask_embedding.pt").exists():
        raise ValueError(
            f"{folder} has a mask embedding of its own (mask_embedding.pt), expected none: dpace uses the target's "
            "embedding; this drafter cannot be used"
        )
    files = read_files(folder)
    for file, problem in files.problems.items():
        raise ValueError(f"{folder / file} is damaged ({problem}); copy or export it again")
    config = files.config
    if "speculators_model_type" in config:
        config = of_speculators(config, num_target_layers)
    spec = DrafterSpec.from_config(config)
    return spec, {name: t for name, t in files.tensors.items() if not name.endswith("rotary_emb.inv_freq")}


def make_drafter(spec: DrafterSpec, tensors: dict[str, Tensor]) -> Drafter:
    """Put weights into a drafter as they are, dtype included.

    Raises:
        ValueError: tensors that are missing, unknown or of another shape.
    """
    with torch.random.fork_rng():
        drafter: Any = Drafter(spec.config()).eval()
    expected = drafter.state_dict()
    missing, unknown = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or unknown:
        raise ValueError(
            f"these are not the tensors of a DFlash drafter with {spec.num_layers} layers: missing "
            f"{missing[:3] or 'none'}, unknown {unknown[:3] or 'none'}; drafters with their own embedding, head or "
            "vocabulary cannot be used"
        )
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, expected {tuple(expected[name].shape)} by the config: config "
                "and weights belong to different drafters; copy both again"
            )
    drafter.load_state_dict(tensors, assign=True)
    return drafter.requires_grad_(False)
