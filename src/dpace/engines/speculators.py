"""speculators 0.9, whose format vLLM serves too: the published weights with another `config.json`.

Source: https://github.com/vllm-project/speculators.
"""

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from dpace.config import ExportConfig
from dpace.drafter import Drafter
from dpace.drafter.spec import DrafterSpec, read_folder
from dpace.drafter.values import read_group
from dpace.drafter.vocabulary import drafted_tokens, load_vocabulary
from dpace.engines.engine import to_layer_ids
from dpace.engines.vllm import Vllm
from dpace.system.ledger import JsonObject
from dpace.system.loading import read_config
from dpace.target import Target

ELSEWHERE = (
    "block_size",
    "mask_token_id",
    "target_layer_ids",
    "num_target_layers",
    "dflash_config",
    "sample_from_anchor",
    "draft_vocab_size",
)
"""Keys of the published layout that stand elsewhere here."""


class Speculators(Vllm):
    """See `Engine`; command and card are vLLM's."""

    name = "speculators"
    title = "speculators"
    reads = ("DFlashDraftModel", "sample_from_anchor", "draft_vocab_size")
    layout = "speculators"

    def fault(self, spec: DrafterSpec) -> str:
        """See `Engine`."""
        if spec.is_causal is True and (spec.sliding_window is None or "full_attention" in spec.layer_types):
            return (
                "is_causal is true and some layers have full attention, never causal in the format of speculators; "
                "give vLLM the folder that `dpace train` writes"
            )
        return super().fault(spec)

    def adapt(
        self, spec: DrafterSpec, tensors: dict[str, Tensor], folder: Path, target: Target
    ) -> tuple[DrafterSpec, dict[str, Tensor]]:
        """Add the draft vocabulary as an LM head: the target's rows."""
        vocabulary = load_vocabulary(folder, spec.vocab_size)
        if spec.draft_vocab_size or vocabulary is None or len(vocabulary.token_ids) == spec.vocab_size:
            return spec, tensors
        token_ids = vocabulary.token_ids
        rows = target.head.weight[token_ids.to(target.device)].cpu()
        own = {"lm_head.weight": rows, "d2t": token_ids - torch.arange(len(token_ids))}
        record = spec.record | {"confidence_temperature": vocabulary.confidence_temperature}
        return replace(spec, draft_vocab_size=len(token_ids), record=record), tensors | own

    def write(self, folder: Path, drafter: Drafter, config: ExportConfig, target: Target) -> Path:
        """See `Engine`.

        `sliding_window_non_causal` is also true without windows, because vLLM 0.32 otherwise makes every layer causal,
        full attention too.
        """
        spec = drafter.spec
        tensors = drafter.state_dict()
        if spec.draft_vocab_size:
            tensors["t2d"] = torch.zeros(spec.vocab_size, dtype=torch.bool)
            tensors["t2d"][drafted_tokens(drafter.d2t, spec.vocab_size)] = True
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        place = Path(config.served_target)
        written = {
            "architectures": ["DFlashDraftModel"],
            "aux_hidden_state_layer_ids": spec.hidden_state_ids,
            "block_size": spec.block_size,
            "draft_vocab_size": spec.draft_vocab_size or spec.vocab_size,
            "dtype": config.dtype,
            "mask_token_id": spec.mask_token_id,
            "sample_from_anchor": spec.sample_from_anchor,
            "sliding_window_non_causal": not spec.is_causal,
            "speculators_config": {
                "algorithm": "dflash",
                "default_proposal_method": "greedy",
                "proposal_methods": [
                    {
                        "proposal_type": "greedy",
                        "speculative_tokens": spec.num_draft_tokens,
                        "verifier_accept_k": 1,
                        "accept_tolerance": 0.0,
                    }
                ],
                "verifier": {
                    "name_or_path": str(place.resolve()) if place.is_dir() else config.served_target,
                    "architectures": list(target.model.config.architectures or []),
                },
            },
            "speculators_model_type": "dflash",
            "speculators_version": "0.9.0",
            "target_hidden_size": None,
            "tie_word_embeddings": False,
            "transformer_layer_config": {
                **{key: value for key, value in spec.config().to_dict().items() if key not in ELSEWHERE},
                "rope_theta": spec.rope_parameters["rope_theta"],
                "dtype": config.dtype,
            },
        }
        (folder / "config.json").write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")
        return folder

    def is_written(self, path: Path) -> bool:
        """See `Engine`."""
        return (path / "config.json").is_file() and "speculators_model_type" in read_config(path)

    def read(self, path: Path, num_target_layers: int | None) -> tuple[DrafterSpec, dict[str, Tensor]]:
        """See `Engine`."""
        return read_folder(path, lambda config: to_published(config, num_target_layers))


def to_published(config: JsonObject, num_target_layers: int | None) -> JsonObject:
    """Turn a config of speculators into the published layout."""
    if config["speculators_model_type"] != "dflash":
        raise ValueError(
            f"speculators_model_type is {config['speculators_model_type']!r}, expected 'dflash'; other drafters have "
            "networks that dpace does not run"
        )
    if num_target_layers is None:
        raise ValueError(
            "the format of speculators does not say how many layers the target has; name the target with --target"
        )
    inner = read_group(config, "transformer_layer_config")
    is_causal = not config.get("sliding_window_non_causal") and "sliding_attention" in (inner.get("layer_types") or ())
    return {
        **inner,
        **{key: config.get(key) for key in ("mask_token_id", "draft_vocab_size", "sample_from_anchor")},
        "is_causal": None if is_causal else False,  # of sliding layers only
        "block_size": config.get("block_size", 0),
        "has_own_embed_tokens": False,  # speculators takes both tables from the target, whatever the file has
        "has_own_lm_head": False,
        "target_layer_ids": to_layer_ids(config.get("aux_hidden_state_layer_ids")),
        "num_target_layers": num_target_layers,
    }


ENGINE = Speculators()
