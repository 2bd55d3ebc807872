"""speculators 0.9, whose format vLLM serves too: the published weights with another `config.json`.

Source: https://github.com/vllm-project/speculators.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from dpace.drafter.spec import DrafterSpec
from dpace.drafter.vocabulary import VOCABULARY_FILE, drafted_tokens, load_vocabulary
from dpace.engines.engine import Contents
from dpace.engines.folder import mapping, to_layer_ids
from dpace.engines.published import read_folder
from dpace.engines.vllm import Vllm
from dpace.system.loading import read_config

OURS = {"block_size", "mask_token_id", "target_layer_ids", "num_target_layers", "dflash_config"}
OURS |= {"sample_from_anchor", "draft_vocab_size"}
"""Keys of the published layout that stand elsewhere here."""


class Speculators(Vllm):
    """See `Engine`; command and card are vLLM's."""

    name = "speculators"
    title = "speculators"
    reads = ("DFlashDraftModel", "sample_from_anchor", "draft_vocab_size")
    layout = "speculators"
    library = "speculators"

    def fault(self, spec):
        """See `Engine`."""
        if spec.is_causal is True and (spec.sliding_window is None or "full_attention" in spec.layer_types):
            return (
                "is_causal is true and some layers have full attention, never causal in the format of speculators; "
                "give vLLM the folder that `dpace train` writes"
            )
        return super().fault(spec)

    def adapt(self, contents, folder, target):
        """Add the draft vocabulary as an LM head: the target's rows, in 16 bits where that changes no value."""
        spec, tensors = contents.spec, contents.tensors
        vocabulary = load_vocabulary(folder, spec.vocab_size)
        if spec.draft_vocab_size or vocabulary is None or len(vocabulary.token_ids) == spec.vocab_size:
            return contents
        token_ids = vocabulary.token_ids
        print(
            f"the LM head has {len(token_ids)} of {spec.vocab_size} tokens, those of {VOCABULARY_FILE}: engines draft "
            "no others; remove that file to keep all",
            file=sys.stderr,
        )
        exact = target.head.weight[token_ids.to(target.device)].cpu()
        rows = exact.to(tensors["fc.weight"].dtype)
        rows = rows if torch.equal(rows.to(exact.dtype), exact) else exact
        own = {"lm_head.weight": rows, "d2t": token_ids - torch.arange(len(token_ids))}
        return Contents(replace(spec, draft_vocab_size=len(token_ids)), tensors | own)

    def write(self, folder, contents, request, target):
        """See `Engine`."""
        spec, tensors = contents.spec, contents.tensors
        if spec.draft_vocab_size:
            is_drafted = torch.zeros(spec.vocab_size, dtype=torch.bool)
            is_drafted[drafted_tokens(tensors["d2t"], spec.vocab_size)] = True
            tensors = tensors | {"t2d": is_drafted}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        place = Path(request.target_name)
        verifier = {
            "name_or_path": str(place.resolve()) if place.is_dir() else request.target_name,
            "architectures": list(target.model.config.architectures or []),
        }
        config = to_speculators(spec, verifier, contents.dtype)
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        return folder

    def is_written(self, path):
        """See `Engine`."""
        return (path / "config.json").is_file() and "speculators_model_type" in read_config(path)

    def read(self, path, num_target_layers):
        """See `Engine`."""
        return read_folder(path, lambda config: to_published(config, num_target_layers))

    def target_of(self, path):
        """See `Engine`."""
        name = mapping(mapping(read_config(path).get("speculators_config")).get("verifier")).get("name_or_path")
        if name is not None and not isinstance(name, str):
            raise ValueError(f"{path / 'config.json'} names the target {name!r}, expected text; name it with --target")
        return name or None


def to_speculators(spec: DrafterSpec, verifier: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Write the `config.json`.

    `sliding_window_non_causal` is also true without windows, because vLLM 0.32 otherwise makes every layer causal, full
    attention too.

    Args:
        spec: of the drafter.
        verifier: name and architectures of the target.
        dtype: of the matrices.
    """
    transformer = {key: value for key, value in spec.config().to_dict().items() if key not in OURS}
    transformer |= {"rope_theta": spec.rope["rope_theta"], "dtype": dtype}
    return {
        "architectures": ["DFlashDraftModel"],
        "aux_hidden_state_layer_ids": spec.hidden_state_ids,
        "block_size": spec.block_size,
        "draft_vocab_size": spec.draft_vocab_size or spec.vocab_size,
        "dtype": dtype,
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
            "verifier": verifier,
        },
        "speculators_model_type": "dflash",
        "speculators_version": "0.9.0",
        "target_hidden_size": None,
        "tie_word_embeddings": False,
        "transformer_layer_config": transformer,
    }


def to_published(config: dict[str, Any], num_target_layers: int | None) -> dict[str, Any]:
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
    inner = mapping(config.get("transformer_layer_config"))
    is_causal = not config.get("sliding_window_non_causal") and "sliding_attention" in (inner.get("layer_types") or ())
    same = ("mask_token_id", "draft_vocab_size", "sample_from_anchor", "quantization_config")
    return {
        **inner,
        **{key: config.get(key) for key in same},
        "is_causal": None if is_causal else False,  # of sliding layers only
        "block_size": config.get("block_size", 0),
        "has_own_embed_tokens": False,  # speculators takes both tables from the target, whatever the file has
        "has_own_lm_head": False,
        "target_layer_ids": to_layer_ids(config.get("aux_hidden_state_layer_ids")),
        "num_target_layers": num_target_layers,
    }


ENGINE = Speculators()
