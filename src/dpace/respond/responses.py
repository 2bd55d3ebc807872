"""Let the target answer prompts, and keep its answers as token ids with the spans that it wrote.

What made a file of responses, kept beside it: two runs are the same where all of this is.
"""

import contextlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path
from typing import Any

from dpace.config import RespondConfig
from dpace.prompts.prompts import Prompt
from dpace.respond.answers import Response, read_responses
from dpace.respond.conversation import count_tokens, is_answer, take_own
from dpace.respond.from_servers import Row, ServerAnswers
from dpace.respond.static_batch import answer_batches
from dpace.system import ranks
from dpace.system.ledger import (
    cut_unfinished_line,
    lock_folder,
    naming_file,
    read_text,
    refuse_foreign_files,
    register_files,
    unique_keys,
    write_json,
)
from dpace.system.progress import progress_bar
from dpace.system.provenance import find_versions, hash_file, hash_json
from dpace.target import Target
from dpace.target.chat import ChatTokenizer, tokenizer_hashes

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


__all__ = ["Response", "answer_prompts", "read_meta", "read_responses", "write_responses"]


def write_responses(
    target: Target | ChatTokenizer, prompts: Sequence[Prompt], path: str | Path, config: RespondConfig
) -> list[Response]:
    """Answer prompts as `answer_prompts` does, and read the answers.

    Returns:
        The responses of the given prompts, in their order, without those that servers could not answer.
    """
    answer_prompts(target, prompts, path, config)
    found = {response.id: response for response in read_responses(path)} if Path(path).exists() else {}
    return [found[prompt.id] for prompt in prompts if prompt.id in found]


def answer_prompts(
    target: Target | ChatTokenizer, prompts: Sequence[Prompt], path: str | Path, config: RespondConfig
) -> dict[str, int]:
    """Let the target answer prompts, appending whole lines to a file.

    A prompt whose id is in the file already is not answered again, so an interrupted call continues where it was.
    Beside the file, `.meta.json` tells what made it and whether it is complete. No other process may write to the
    folder meanwhile, except the other ranks of this command: each answers its share and writes a file of its own,
    which rank 0 appends in the end.

    Memory: O(batch_size x tokens) for the target's cache.

    Args:
        target: the model; its tokenizer is enough where servers answer.
        prompts: what to answer; one that passes the target's context is refused before work starts.
        path: `responses.jsonl`.
        config: servers, length, temperature, batch size, seed.

    Returns:
        Number of prompts that servers could not answer, by the reason.

    Raises:
        ValueError: an over-long prompt; the file was made by another target, with other settings or from other
            prompts, or was not written by dpace; another process is writing to its folder; or no server answers.
        OSError: the disk is full; the same call goes on when there is room.
    """
    if config.server and config.source == "own":
        raise ValueError("--respond.server asks servers for answers, and --respond.source own takes those of the file")
    path, by_id = Path(path), {prompt.id: prompt for prompt in prompts}
    with lock_folder(path.parent):
        is_asked = bool(config.server) and not ranks.from_first(lambda: has_all(path, prompts))
        servers = ServerAnswers(target, config) if is_asked else None
        described = servers.described if servers else read_meta(path).get("servers") if config.server else None
        meta = find_meta(target, config, described)
        waiting = ranks.from_first(lambda: _prepare(target, prompts, path, config, meta))
        if waiting:
            mine = [by_id[name] for name in ranks.share(waiting)]
            if servers:
                rows = servers.answers(mine)
            elif config.source == "own":
                rows = ([(take_own(target, prompt), {})] for prompt in mine)
            else:
                assert isinstance(target, Target), "a tokenizer alone answers nothing"
                rows = ([(one, {}) for one in some] for some in answer_batches(target, mine, config))
            part = path if ranks.num_ranks() == 1 else _part(path, ranks.rank())
            num_written = _write_rows(rows, part, len(mine))
            num_left_out = servers.left_out.total() if servers else 0
            assert num_written + num_left_out == len(mine), f"{num_written} answers to {len(mine)} prompts"
        parts = ranks.gather(servers.left_out if servers else Counter())
        left_out = dict(sum(parts, Counter()))
        ranks.from_first(lambda: _finish(prompts, path, meta, left_out, bool(waiting)))
    return left_out


def _prepare(
    target: Target | ChatTokenizer, prompts: Sequence[Prompt], path: Path, config: RespondConfig, meta: dict[str, Any]
) -> list[str]:
    """Check what is there, and give the ids of the prompts that wait for an answer, the short ones first."""
    register_files(path.parent, path.name, meta_path(path).name)
    cut_unfinished_line(path)
    check_meta(path, meta)
    done = {response.id: response for response in read_responses(path)} if path.exists() else {}
    if _append_parts(path, set(done)):
        done = {response.id: response for response in read_responses(path)}
    for prompt in prompts:
        if prompt.id in done and not is_answer(done[prompt.id], prompt):
            raise ValueError(
                f"{path} has an answer with the id {prompt.id!r}, but to another text; name another folder with "
                "--output, or delete the file"
            )
    waiting = [(prompt.id, count_tokens(target, prompt, config)) for prompt in prompts if prompt.id not in done]
    if waiting:
        write_meta(path, meta, prompts, is_complete=False)
        if ranks.num_ranks() > 1:
            register_files(path.parent, *(_part(path, number).name for number in range(ranks.num_ranks())))
    elif done:
        check_unchanged(path)
    return [name for name, _ in sorted(waiting, key=lambda item: item[1])]


def _finish(
    prompts: Sequence[Prompt], path: Path, meta: dict[str, Any], left_out: dict[str, int], is_new: bool
) -> None:
    """Collect what the ranks wrote, and say that the file is complete."""
    if is_new:
        _append_parts(path, set())
        if sum(left_out.values()) == len(prompts):
            raise ValueError(f"no prompt was answered: {'; '.join(left_out)}; fix this, and run the same command again")
    if prompts:
        write_meta(path, meta | ({"left_out": left_out} if left_out else {}), prompts, is_complete=True)


def _write_rows(rows: Iterator[Sequence[Row]], path: Path, num_prompts: int) -> int:
    """Append answers to a file, wait for the disk whenever some came, and count them."""
    with progress_bar() as bar, naming_file(path), path.open("a", encoding="utf-8", newline="\n") as file:
        task, num_tokens, num_rows = bar.add_task("answering prompts", total=num_prompts, info=""), 0, 0
        for some in rows:
            file.write("".join(json.dumps(asdict(one) | more, ensure_ascii=False) + "\n" for one, more in some))
            file.flush()
            os.fsync(file.fileno())
            num_rows += len(some)
            num_tokens += sum(end - start for one, _ in some for start, end in one.response_spans)
            speed = num_tokens / max(1e-9, bar.tasks[task].elapsed or 1e-9)
            bar.update(task, advance=len(some), info=f"{speed:.0f} tokens/s")
    return num_rows


def _part(path: Path, rank: int) -> Path:
    """Give the file of one rank's answers."""
    return path.with_name(f"{path.stem}.rank-{rank}{path.suffix}")


def _append_parts(path: Path, done: set[str]) -> bool:
    """Append what the ranks of this call, or of one that was killed, have written, and remove their files.

    Line by line of each rank in turn, which is the order in which one process would have written them. An id that the
    file has already is left out: its part was appended before the kill.
    """
    parts = sorted(path.parent.glob(f"{path.stem}.rank-*{path.suffix}"), key=lambda part: (len(part.name), part.name))
    refuse_foreign_files(path.parent, *(part.name for part in parts))
    for part in parts:
        cut_unfinished_line(part)
    with contextlib.ExitStack() as files:
        opened = [files.enter_context(part.open(encoding="utf-8", newline="\n")) for part in parts]
        lines = [line for group in zip_longest(*opened) for line in group if line]
    lines = [line for line in lines if json.loads(line)["id"] not in done]
    if lines:
        with naming_file(path), path.open("a", encoding="utf-8", newline="\n") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
    for part in parts:
        part.unlink()
    return bool(lines)
