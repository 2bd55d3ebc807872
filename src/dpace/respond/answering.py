"""Let the target answer prompts, and keep its answers as token ids with the spans that it wrote.

Prompts come in, lines of `responses.jsonl` go out: answered in this process or by servers, shared by ranks, and
continued where an earlier call was interrupted.
"""

import json
from array import array
from collections import Counter
from collections.abc import Sequence
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
    iterate_responses,
    read_meta,
    write_meta,
)
from dpace.system import ranks
from dpace.system.ledger import (
    JsonObject,
    append_lines,
    cut_unfinished_line,
    find_rank_files,
    lock_folder,
    rank_file,
    read_jsonl,
    write_text,
)
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
    if not prompts:
        return []  # nothing was written, so there may be no file
    by_id = {response.id: response for response in answers_to(path, prompts)}
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
        # Rank 0 alone changes the file; all ranks share what it finds.
        waiting = ranks.from_first(lambda: _find_waiting(target, by_id, path, config, meta))
        left_out: Counter[str] = Counter()
        if waiting:
            servers = ServerAnswers(target, config) if config.server else None
            if servers:
                meta["servers"] = sorted({server.engine for server in servers.servers})
                left_out = servers.left_out  # filled while the answers come
            ranks.from_first(lambda: write_meta(path, meta, is_complete=False))
            rank_prompts = [by_id[prompt_id] for prompt_id in ranks.share(waiting)]
            with progress_bar() as bar:
                task = bar.add_task("answering prompts", total=len(rank_prompts), info="")
                show = partial(bar.update, task)
                if servers:
                    answers = servers.answers(rank_prompts)
                else:
                    answers = answer_batches(target, rank_prompts, config, show)
                for batch in answers:
                    append_lines(rank_file(path, ranks.rank()), map(asdict, batch))
                    show(advance=len(batch), info="")
        # `gather` also waits until every rank has written its file.
        all_left_out = dict(sum(ranks.gather(left_out), Counter()))
        ranks.from_first(lambda: _complete(prompts, path, meta, all_left_out))
    return all_left_out


def _find_waiting(
    target: Target | ChatTokenizer, by_id: dict[str, Prompt], path: Path, config: RespondConfig, meta: JsonObject
) -> list[str]:
    """Check what is there, and return the ids of the prompts that wait for an answer.

    Those that begin alike are neighbours, and the short ones come first otherwise.
    """
    check_meta(path, meta)  # before anything is changed
    _collect(path, [])
    check_meta(path, meta)  # again, where the file comes only now from files of ranks
    answered = set()
    if path.exists():
        answered = {response.id for response in answers_to(path, by_id.values())}
    waiting = [prompt for prompt in by_id.values() if prompt.id not in answered]
    # 4 bytes a token, since there may be many prompts.
    first_turns = [array("i", Conversation(target, prompt, config).check()) for prompt in waiting]
    old_meta = read_meta(path)
    # While prompts wait, lines are added and the hash is written anew; else the file has to be as it was.
    is_done = answered and not waiting and old_meta.get("complete")
    if is_done and old_meta.get("responses_sha256") != hash_file(path):
        raise ValueError(
            f"{path} was changed after dpace wrote it; put the file back as it was, or delete it and run the command "
            "again"
        )
    order, _ = find_shared(first_turns)
    return [waiting[place].id for place in order]


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

    Raises:
        ValueError: a line that is no response; see also `cut_unfinished_line` and `find_rank_files`.
    """
    rank_files = find_rank_files(path)
    lines: dict[str, str] = {}
    for file in (path, *rank_files):
        cut_unfinished_line(file)
        if not file.exists() or not (rank_files or prompts):
            continue  # nothing to merge and nothing to sort
        # A line is checked, and kept with the notes that somebody may have added.
        for response, (_, row) in zip(iterate_responses(file), read_jsonl(file), strict=True):
            lines[response.id] = json.dumps(row, ensure_ascii=False) + "\n"
    if lines:
        places = {prompt.id: place for place, prompt in enumerate(prompts)}
        # Lines of other prompts come first, in the order that they have.
        ids = sorted(lines, key=lambda prompt_id: places.get(prompt_id, -1))
        write_text(path, "".join(lines[prompt_id] for prompt_id in ids))
    for file in rank_files:  # only now, when their lines are on the disk a second time
        file.unlink()
