"""Write and read the `config.json` of speculators: from a spec, and to the published layout."""

from pathlib import Path
from typing import Any

from dpace.drafter.spec import DrafterSpec
from dpace.engines.folder import mapping
from dpace.system.loading import read_config

OURS = {"block_size", "mask_token_id", "target_layer_ids", "num_target_layers", "dflash_config", "dpace"}
OURS |= {"sample_from_anchor", "draft_vocab_size"}
"""Keys of the published layout that stand elsewhere here."""


def speculators_config(spec: DrafterSpec, *, target_name: str, architectures: list[str], dtype: str) -> dict[str, Any]:
    """Write the `config.json` of speculators 0.9, which vLLM reads too.

    `sliding_window_non_causal` is also true without windows, because vLLM 0.32 otherwise makes every layer causal, full
    attention too.

    Raises:
        ValueError: a drafter with full attention that is causal.
    """
    if spec.is_causal is True and (spec.sliding_window is None or "full_attention" in spec.layer_types):
        raise ValueError(
            "is_causal is true and some layers have full attention, never causal in the format of speculators; "
            "give vLLM the folder that `dpace train` writes"
        )
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
            "verifier": {"name_or_path": target_name, "architectures": architectures},
        },
        "speculators_model_type": "dflash",
        "speculators_version": "0.9.0",
        "target_hidden_size": None,
        "tie_word_embeddings": False,
        "transformer_layer_config": transformer,
    }


def verifier_name(folder: str | Path) -> str | None:
    """Read which target a speculators folder names; None in other formats.

    Raises:
        ValueError: a config that cannot be read.
    """
    config = read_config(folder) if (Path(folder) / "config.json").exists() else {}
    name = mapping(mapping(config.get("speculators_config")).get("verifier")).get("name_or_path")
    if name is not None and not isinstance(name, str):
        raise ValueError(
            f"{Path(folder) / 'config.json'} names the target {name!r}, expected text; name it with --target"
        )
    return name or None


def of_speculators(config: dict[str, Any], num_target_layers: int | None) -> dict[str, Any]:
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
    return inner | {
        "is_causal": None if is_causal else False,  # of sliding layers only
        "block_size": config.get("block_size", 0),
        "mask_token_id": config.get("mask_token_id"),
        "draft_vocab_size": config.get("draft_vocab_size"),
        "has_own_embed_tokens": False,  # speculators takes both tables from the target, whatever the file has
        "has_own_lm_head": False,
        "sample_from_anchor": config.get("sample_from_anchor"),
        "quantization_config": config.get("quantization_config"),
        "target_layer_ids": to_layer_ids(config.get("aux_hidden_state_layer_ids")),
        "num_target_layers": num_target_layers,
    }


def to_layer_ids(hidden_state_ids: object) -> list[int]:
    """Turn indices into `hidden_states`, where 0 is the embedding, into ids of layers; the inverse of the spec's.

    Raises:
        ValueError: they are no list of integers.
    """
    if not isinstance(hidden_state_ids, list) or not all(type(index) is int for index in hidden_state_ids):
        raise ValueError(f"layer ids are {hidden_state_ids!r:.200}, expected a list of integers; copy the file again")
    return [index - 1 for index in hidden_state_ids]
