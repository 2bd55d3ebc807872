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
    """speculators: drafters in its own layout, also with a small vocabulary; command and card are vLLM's."""

    name = "speculators"
    title = "speculators"
    reads = ("DFlashDraftModel", "sample_from_anchor", "draft_vocab_size")
    layout = "speculators"

    def fault(self, spec: DrafterSpec) -> str:
        """Refuse causal layers with full attention too."""
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
        head = target.head.weight[token_ids.to(target.device)].cpu()
        offsets = token_ids - torch.arange(len(token_ids))  # what is added to a row's number to get its token
        record = spec.record | {"confidence_temperature": vocabulary.confidence_temperature}
        spec = replace(spec, draft_vocab_size=len(token_ids), record=record)
        return spec, tensors | {"lm_head.weight": head, "d2t": offsets}

    def write(self, folder: Path, drafter: Drafter, config: ExportConfig, target: Target) -> Path:
        """Write the published weights and a config of speculators; return the folder."""
        spec = drafter.spec
        tensors = drafter.state_dict()
        if spec.draft_vocab_size:
            # (vocab,): whether a token is drafted, the inverse of `d2t`.
            tensors["t2d"] = torch.zeros(spec.vocab_size, dtype=torch.bool)
            tensors["t2d"][drafted_tokens(drafter.d2t, spec.vocab_size)] = True
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        target_name = config.served_target
        if Path(target_name).is_dir():
            target_name = str(Path(target_name).resolve())  # the server may start in another folder
        published = spec.config().to_dict()
        layer_config = {key: value for key, value in published.items() if key not in ELSEWHERE}
        layer_config["rope_theta"] = spec.rope_parameters["rope_theta"]
        layer_config["dtype"] = config.dtype
        contents = {
            "architectures": ["DFlashDraftModel"],
            "aux_hidden_state_layer_ids": spec.hidden_state_ids,
            "block_size": spec.block_size,
            "draft_vocab_size": spec.draft_vocab_size or spec.vocab_size,
            "dtype": config.dtype,
            "mask_token_id": spec.mask_token_id,
            "sample_from_anchor": spec.sample_from_anchor,
            # Also true without windows: vLLM 0.32 otherwise makes every layer causal, full attention too.
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
                    "name_or_path": target_name,
                    "architectures": list(target.model.config.architectures or []),
                },
            },
            "speculators_model_type": "dflash",
            "speculators_version": "0.9.0",
            "target_hidden_size": None,
            "tie_word_embeddings": False,
            "transformer_layer_config": layer_config,
        }
        (folder / "config.json").write_text(json.dumps(contents, indent=2, sort_keys=True) + "\n")
        return folder

    def is_written(self, path: Path) -> bool:
        """Return whether a folder has a config of speculators."""
        return (path / "config.json").is_file() and "speculators_model_type" in read_config(path)

    def read(self, path: Path, num_target_layers: int | None) -> tuple[DrafterSpec, dict[str, Tensor]]:
        """Read the weights as they are, and the config as `to_published` turns it."""
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
    published = read_group(config, "transformer_layer_config")
    for key in ("mask_token_id", "draft_vocab_size", "sample_from_anchor"):
        published[key] = config.get(key)
    # Only sliding layers are causal in this format, and only without this key; None lets the layout's own rule say so.
    has_sliding = "sliding_attention" in (published.get("layer_types") or ())
    published["is_causal"] = None
    if config.get("sliding_window_non_causal") or not has_sliding:
        published["is_causal"] = False
    published["block_size"] = config.get("block_size", 0)
    published["has_own_embed_tokens"] = False  # both tables are the target's, whatever the file has
    published["has_own_lm_head"] = False
    published["target_layer_ids"] = to_layer_ids(config.get("aux_hidden_state_layer_ids"))
    published["num_target_layers"] = num_target_layers
    return published


ENGINE = Speculators()
