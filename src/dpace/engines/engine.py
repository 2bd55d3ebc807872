"""What an engine is, for those that read the published layout; the others override what differs.

In come a drafter's spec and tensors; out come the files that an engine reads, its command, and its part of the card.
"""

from dataclasses import MISSING, fields
from pathlib import Path

import torch
from torch import Tensor

from dpace.config import EngineName, ExportConfig
from dpace.drafter import Drafter
from dpace.drafter.spec import DrafterSpec, published_name, read_folder
from dpace.target import Target

NETWORKS = ("DFlashDraftModel", "DFlash2DraftModel", "LiLiCorrDraftModel")
"""Published names of the networks that dpace trains."""
DSPARK = "Qwen3DSparkModel"
"""The same of the one with DSpark's head, which not all of these engines read."""
CONVOLUTIONS = ("conv_kernel_size", "conv_group_size")
"""Options of a `DrafterSpec` for convolutions, which `DFlash2DraftModel` has, and others may have."""
TABLES = ("draft_vocab_size", "has_own_embed_tokens", "has_own_lm_head")
"""Options of a `DrafterSpec` for tables that the drafter does not take from its target."""
EVERYWHERE = (
    # The target's own values.
    "input_embedding_scale",
    "output_multiplier",
    "final_logit_softcapping",
    "sliding_window",
    "layer_types",
    "is_causal",
    "selector",  # named by its architecture
    "record",
)
"""Options of a `DrafterSpec` that every engine reads or need not read, but for what its own `fault` refuses."""
OTHER_NAMES = {"encoder.fc.weight": "fc.weight", "encoder.output_norm_enc.weight": "hidden_norm.weight"}
"""Names of tensors in transformers' own container, and the published ones."""


def traits_of(spec: DrafterSpec) -> list[str]:
    """Return what an engine must read to serve a drafter: its network's name, and options that not every engine has.

    An option that nothing here knows is among them, so no engine is given what it was not written for.
    """
    traits = [spec.architecture]
    for option in fields(spec):
        is_everywhere = option.default is MISSING or option.name in EVERYWHERE  # every drafter has it
        if not is_everywhere and getattr(spec, option.name) != option.default:
            traits.append(option.name)
    return traits


def to_layer_ids(hidden_state_ids: object) -> list[int]:
    """Turn indices into `hidden_states`, where 0 is the embedding, into ids of layers.

    This is the inverse of `DrafterSpec.hidden_state_ids`.

    Raises:
        ValueError: they are no list of integers.
    """
    if not isinstance(hidden_state_ids, list) or not all(type(index) is int for index in hidden_state_ids):
        raise ValueError(f"layer ids are {hidden_state_ids!r:.200}, expected a list of integers; copy the file again")
    return [index - 1 for index in hidden_state_ids]


class Engine:
    """An engine that reads the published layout, which `dpace train` writes."""

    name: EngineName
    title: str
    """Its name on pages and in messages."""
    reads: tuple[str, ...] = ("DFlashDraftModel",)
    """What it reads of `traits_of` a drafter."""
    layout: str = "published"
    """Which files it reads; a model card is for all engines that read the same ones."""
    files: tuple[str, ...] = ("config.json", "model*.safetensors*", "modeling_*.py")
    """Patterns of the names of all files that `write` makes; a later export or import removes them."""
    card: str = ""
    """Its part of the model card, with `{target}`, `{drafter}` and `{command}` to fill in; empty where it has none."""

    def check(self, config: ExportConfig, spec: DrafterSpec) -> None:
        """Refuse what it cannot have, before a model is loaded.

        Raises:
            ValueError: see `fault`.
        """
        if fault := self.fault(spec):
            raise ValueError(fault)

    def fault(self, spec: DrafterSpec) -> str:
        """Say why it cannot serve a drafter and, after a semicolon, what to do; empty where it can."""
        unread = [trait for trait in traits_of(spec) if trait not in self.reads]
        if not unread:
            return ""
        return (
            f"the drafter has {unread[0]}, which {self.title} does not read, and so would draft wrongly without a "
            "message; docs/serve.md says which engines read it, and --plain leaves a selector out"
        )

    def target_fault(self, kind: str) -> str:
        """Say why it can serve no drafter of a kind of target, the `model_type` of a config, as `fault` does."""
        return ""

    def command(self, spec: DrafterSpec, drafter: str, target: str) -> str:
        """Write the command, the configuration or the line of Python with which it drafts whole blocks.

        Args:
            spec: of the drafter.
            drafter: its folder, file or Hub id.
            target: its target's folder, file or Hub id.
        """
        raise NotImplementedError

    def adapt(
        self, spec: DrafterSpec, tensors: dict[str, Tensor], folder: Path, target: Target
    ) -> tuple[DrafterSpec, dict[str, Tensor]]:
        """Turn a drafter into what the files hold; by default nothing changes.

        Args:
            spec: of the drafter.
            tensors: its weights.
            folder: that it was read from.
            target: its target.
        """
        return spec, tensors

    def cast(self, tensor: Tensor, dtype: str) -> Tensor:
        """Round a tensor to the precision of `--dtype`."""
        if dtype == "keep" or not tensor.is_floating_point():  # d2t holds integers
            return tensor
        return tensor.to(getattr(torch, dtype))

    def write(self, folder: Path, drafter: Drafter, config: ExportConfig, target: Target) -> Path:
        """Write the files into an empty folder; return what the engine is given: the folder, or a file in it."""
        drafter.save_pretrained(folder)
        return folder

    def is_written(self, path: Path) -> bool:
        """Return whether a path holds files of a layout of its own."""
        return False

    def read(self, path: Path, num_target_layers: int | None) -> tuple[DrafterSpec, dict[str, Tensor]]:
        """Read the files as they are, tensors by their published names.

        Args:
            path: the folder, or a file.
            num_target_layers: for layouts that do not say it.

        Raises:
            ValueError: damaged files, files of another kind of drafter, or `num_target_layers` is needed.
        """
        spec, tensors = read_folder(path)
        published = {}
        for name, tensor in tensors.items():
            published[OTHER_NAMES.get(name, published_name(name))] = tensor
        return spec, published
