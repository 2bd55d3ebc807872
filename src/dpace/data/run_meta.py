"""What made a file of responses, kept beside it: two runs are the same where all of this is."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dpace.config import RespondConfig
from dpace.data.chat import ChatTokenizer, tokenizer_hashes
from dpace.data.prompts import Prompt
from dpace.ledger import read_text, unique_keys, write_json
from dpace.provenance import find_versions, hash_file, hash_json
from dpace.target import Target

WAYS_OUT = {
    "thinking": "set --thinking as it was",
    "dtype": "set --dtype as it was",
    "max_new_tokens": "set --respond.max-new-tokens as it was",
    "temperature": "set --respond.temperature as it was",
    "seed": "set --respond.seed as it was",
    "source": "set --respond.source as it was",
}
"""How to go on with a setting that was changed; others cannot be set back."""
KINDS: dict[str, type | tuple[type, ...]] = {
    "source": str,
    "target": str,
    "dtype": str,
    "target_sha256": str,
    "tokenizer_sha256": str,
    "chat_template_sha256": str,
    "max_new_tokens": int,
    "temperature": (int, float),
    "thinking": bool,
    "seed": int,
    "complete": bool,
    "num_prompts": int,
    "prompts_sha256": str,
    "responses_sha256": (str, type(None)),
}
"""Keys of the file that are read, and their types."""


def meta_path(path: str | Path) -> Path:
    """Give the file that tells what made a file of responses."""
    return Path(path).with_suffix(".meta.json")


def read_meta(path: str | Path) -> dict[str, Any]:
    """Read what made a file of responses.

    Args:
        path: `responses.jsonl`, or the folder that has it.

    Returns:
        The keys of `KINDS` among others; empty where there is no such file. `complete` says whether all
        `num_prompts` prompts were answered; only then `responses_sha256` is the hash of the responses.

    Raises:
        ValueError: the file cannot be read, or a key has a value of another type.
    """
    path = Path(path)
    path = meta_path(path / "responses.jsonl" if path.is_dir() else path)
    if not path.exists():
        return {}
    fix = "delete it and the responses beside it, and write them again with `dpace respond`"
    try:
        meta = json.loads(read_text(path, "a JSON file"), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"cannot read {path}: {error}; {fix}") from error
    if not isinstance(meta, dict):
        raise ValueError(f"{path} holds {type(meta).__name__}, expected a JSON object; {fix}")
    for key, kind in KINDS.items():
        value = meta.get(key)
        is_right = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        if key in meta and not is_right:
            raise ValueError(f"{path}: {key} is {json.dumps(value)[:60]}, expected another type; {fix}")
    return meta


def known_settings(config: RespondConfig, *, thinking: bool) -> dict[str, Any]:
    """Give what the responses depend on, as far as it is known before the target is loaded."""
    sampling = {"seed": config.seed} if config.temperature > 0 else {}
    source = "servers" if config.server else config.source
    return {
        **({} if source == "target" else {"source": source}),
        "thinking": thinking,
        "max_new_tokens": config.max_new_tokens,
        "temperature": config.temperature,
        **sampling,
    }


def find_meta(
    target: Target | ChatTokenizer, config: RespondConfig, servers: list[dict[str, Any]] | None = None
) -> dict[str, Any]:
    """Give what the responses depend on: weights, tokenizer, template and settings; and the versions.

    Args:
        target: its weights and their precision are not known where servers answer.
        config: of the answers.
        servers: engine and model of those that answer; None where this process does.
    """
    origin: dict[str, Any] = {"servers": servers}
    if servers is None and isinstance(target, Target):
        origin = {
            "revision": getattr(target.model.config, "_commit_hash", None),
            "dtype": str(target.model.dtype),
            "target_sha256": target.sha256,
        }
    return {
        "target": target.name,
        **origin,
        **tokenizer_hashes(target),
        **known_settings(config, thinking=target.thinking),
        "versions": vars(find_versions()),
    }


def check_meta(path: Path, meta: dict[str, Any]) -> None:
    """Refuse to go on with responses that were made in another way.

    Raises:
        ValueError: names the one setting, its old and new value, and the way out.
    """
    if not path.exists() or not path.stat().st_size:
        return
    old = read_meta(path)
    other = "name another folder with --output, or delete the file"
    if not old:
        raise ValueError(f"{path} has no {meta_path(path).name} that tells what made it; {other}")
    here, there = (one.get("source", "target") for one in (meta, old))
    if here != there and "servers" in (here, there):
        who = {"servers": "servers", "target": "this process", "own": "the prompts' file"}
        raise ValueError(
            f"{path} was answered by {who.get(there, there)}, not by {who[here]}; leave --respond.server as it was, "
            f"{other}"
        )
    old, meta = {"source": "target", **old}, {"source": "target", **meta}
    for key in [key for key in KINDS if key in meta and key != "target"]:
        if old.get(key) != meta[key]:
            names = f" (target {old.get('target')})" if key == "target_sha256" else ""
            way = f"{WAYS_OUT[key]}, " if key in WAYS_OUT else ""
            raise ValueError(f"{path} was made with {key} {old.get(key)!r}{names}, not {meta[key]!r}; {way}{other}")


def has_all(path: Path, prompts: Sequence[Prompt]) -> bool:
    """Say whether each of these prompts, and no other, was answered."""
    old = read_meta(path) if path.exists() else {}
    return bool(old.get("complete")) and not old.get("left_out") and old.get("prompts_sha256") == _hash(prompts)


def _hash(prompts: Sequence[Prompt]) -> str:
    return hash_json([asdict(prompt) for prompt in prompts])


def check_unchanged(path: Path) -> None:
    """Refuse a complete file of responses that was changed after it was written.

    Raises:
        ValueError: its hash is not the one that was kept.
    """
    old = read_meta(path)
    if old.get("complete") and old.get("responses_sha256") != hash_file(path):
        raise ValueError(
            f"{path} was changed after dpace wrote it; put the file back as it was, or delete it and run the command "
            "again"
        )


def write_meta(path: Path, meta: dict[str, Any], prompts: Sequence[Prompt], *, is_complete: bool) -> None:
    """Write what made the responses, all or nothing, and only where it changed."""
    old = read_meta(path)
    if is_complete and old.get("complete") and old.get("num_prompts", 0) > len(prompts):
        return  # the file has more answers than this run asks for
    state = {
        "complete": is_complete,
        "num_prompts": len(prompts),
        "prompts_sha256": _hash(prompts),
        "responses_sha256": hash_file(path) if is_complete else None,
    }
    if {key: old.get(key) for key in state} == state and all(old.get(key) == meta[key] for key in meta if key in KINDS):
        return  # written by other versions of the same
    write_json(meta_path(path), meta | state, indent=2)
