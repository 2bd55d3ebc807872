"""Let the target answer prompts, and keep its answers as token ids with the spans that it wrote.

Prompts come in, lines of `responses.jsonl` go out: answered in this process or by servers, shared by ranks, and
continued where an earlier call was interrupted.
"""

import json
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from dpace.config import RespondConfig
from dpace.prompts.prompts import Prompt
from dpace.respond.conversation import Conversation
from dpace.respond.from_servers import ServerAnswers
from dpace.respond.in_process import answer_batches
from dpace.respond.responses import (
    Response,
    answers_to,
    check_meta,
    find_meta,
    read_meta,
    write_meta,
)
from dpace.system import ranks
from dpace.system.ledger import JsonObject, cut_unfinished_line, lock_folder, naming_file, writing
from dpace.system.progress import progress_bar
from dpace.system.provenance import hash_file
from dpace.target import Target
from dpace.target.beginnings import find_shared
from dpace.target.chat import ChatTokenizer


def write_responses(
    target: Target | ChatTokenizer, prompts: Sequence[Prompt], path: str | Path, config: RespondConfig
) -> list[Response]:
    """Answer prompts as `answer_prompts` does, and read the answers.

    Returns:
        The responses of the given prompts, in their order, without those that servers could not answer.
    """
    answer_prompts(target, prompts, path, config)
    by_id = {response.id: response for response in answers_to(path, prompts)} if prompts else {}
    return [by_id[prompt.id] for prompt in prompts if prompt.id in by_id]


def answer_prompts(
    target: Target | ChatTokenizer, prompts: Sequence[Prompt], path: str | Path, config: RespondConfig
) -> dict[str, int]:
    """Let the target answer prompts, appending whole lines to a file.

    Prompts that begin alike are answered together; once all are, the lines are put in the prompts' order. A prompt
    whose id is in the file already is not answered again, so an interrupted call continues where it was.
    Beside the file, `.meta.json` tells what made it and whether it is complete. No other process may write to the
    folder meanwhile, except the other ranks of this command: each answers its share and writes a file of its own,
    which rank 0 appends in the end.

    Memory: O(batch_size x tokens) for the target's cache, and 4 bytes for each token of the prompts' first turns.

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
    path = Path(path)
    with lock_folder(path.parent):
        meta = find_meta(target, config)
        by_id = {prompt.id: prompt for prompt in prompts}
        waiting = ranks.from_first(lambda: _find_waiting(target, by_id, path, config, meta))
        servers = ServerAnswers(target, config, waiting) if config.server and waiting else None
        if servers:
            meta["servers"] = sorted({server.engine for server in servers.servers})
        if waiting:
            ranks.from_first(lambda: write_meta(path, meta, is_complete=False))
            mine = [by_id[name] for name in ranks.share(list(waiting))]
            own = path if ranks.num_ranks() == 1 else path.with_stem(f"{path.stem}.rank-{ranks.rank()}")
            with progress_bar() as bar:
                show = partial(bar.update, bar.add_task("answering prompts", total=len(mine), info=""))
                answers = servers.answers(mine) if servers else answer_batches(target, mine, waiting, config, show)
                _append_answers(answers, own, show)
        parts = ranks.gather(servers.left_out if servers else Counter())
        left_out = dict(sum(parts, Counter()))
        ranks.from_first(lambda: _complete(prompts, path, meta, left_out))
    return left_out


def _find_waiting(
    target: Target | ChatTokenizer, by_id: dict[str, Prompt], path: Path, config: RespondConfig, meta: JsonObject
) -> dict[str, array]:
    """Check what is there, and return the tokens of the first turn of each prompt that waits for an answer, by its id.

    Those that begin alike are neighbours, and the short ones come first otherwise.
    """
    check_meta(path, meta)  # before anything is changed
    _collect(path, [])
    check_meta(path, meta)  # where only ranks had written
    done = {response.id for response in answers_to(path, by_id.values())} if path.exists() else set()
    texts = {name: Conversation(target, prompt, config).check() for name, prompt in by_id.items() if name not in done}
    old = read_meta(path)
    if done and not texts and old.get("complete") and old.get("responses_sha256") != hash_file(path):
        raise ValueError(
            f"{path} was changed after dpace wrote it; put the file back as it was, or delete it and run the command "
            "again"
        )
    names = list(texts)
    return {names[number]: texts[names[number]] for number in find_shared(list(texts.values()))[0]}


def _complete(prompts: Sequence[Prompt], path: Path, meta: JsonObject, left_out: dict[str, int]) -> None:
    """Collect what the ranks wrote, and note that the file is complete."""
    if left_out and sum(left_out.values()) == len(prompts):
        raise ValueError(f"no prompt was answered: {'; '.join(left_out)}; fix this, and run the same command again")
    if prompts and not read_meta(path).get("complete"):
        _collect(path, prompts)
        write_meta(path, read_meta(path) | meta, is_complete=True)


def _collect(path: Path, prompts: Sequence[Prompt]) -> None:
    """Put what ranks have written into the file, and the lines into the order of the prompts, where there are any.

    A call that was killed before may have left such files, with lines that the file has already, and a line without its
    end.
    """
    parts = list(path.parent.glob(f"{path.stem}.rank-*{path.suffix}"))
    lines: dict[str, bytes] = {}
    for part in (path, *parts):
        cut_unfinished_line(part)
        if part.exists() and (parts or prompts):
            lines |= {
                json.loads(line)["id"]: line for line in part.read_bytes().splitlines(keepends=True) if line.strip()
            }
    if lines:
        places = {prompt.id: place for place, prompt in enumerate(prompts)}
        order = sorted(lines, key=lambda name: places.get(name, -1))  # those of other prompts come first
        with writing(path) as unfinished:
            unfinished.write_bytes(b"".join(lines[name] for name in order))
    for part in parts:
        part.unlink()


def _append_answers(answers: Iterator[Sequence[Response]], path: Path, show: Callable[..., object]) -> None:
    """Append answers to a file, and wait for the disk whenever some came."""
    with naming_file(path), path.open("a", encoding="utf-8", newline="\n") as file:
        for batch in answers:
            file.writelines(json.dumps(asdict(response), ensure_ascii=False) + "\n" for response in batch)
            file.flush()
            os.fsync(file.fileno())
            show(advance=len(batch), info="")
