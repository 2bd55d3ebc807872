"""Finished prompts of a measurement, kept on disk at once, so that an interrupted one goes on after them.

`Records` takes what is measured and how, and gives back what a file holds of it: prompts of `dpace bench` or
of running servers. The rows of results are pooled from these records.
"""

import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from operator import attrgetter
from pathlib import Path
from typing import Any, Generic, TypeVar

from dpace.config import BenchConfig, RespondConfig
from dpace.measure.results import Estimate, PromptRecord, ResponseRecord, ServedAnswer, Setup, nullable
from dpace.metrics import estimate, ratio
from dpace.prompts.prompts import Prompt
from dpace.respond.conversation import Conversation
from dpace.system import ranks
from dpace.system.groups import group_by
from dpace.system.ledger import (
    JsonObject,
    append_lines,
    cut_unfinished_line,
    find_rank_files,
    rank_file,
    read_jsonl,
    register_files,
    write_text,
)
from dpace.system.provenance import hash_json
from dpace.system.validation import read_as, to_json
from dpace.target import Target
from dpace.target.chat import ChatTokenizer, tokenizer_hashes

PLAIN = "plain"
"""Name of decoding without a drafter."""
ALL_SETS = "all"
"""Name of all sets together, in the rows of several sets."""
Item = TypeVar("Item")
MeasuredAnswer = ResponseRecord | ServedAnswer
Record = TypeVar("Record", bound=PromptRecord)
Job = tuple[float, Prompt]
"""What a record is made of: a temperature and a prompt."""


def setup_of(chat: Target | ChatTokenizer, config: BenchConfig) -> JsonObject:
    """Return the values of a `Setup`."""
    return {
        "target": chat.name,
        "max_new_tokens": config.max_new_tokens,
        "seed": config.seed,
        "thinking": chat.thinking,
        **tokenizer_hashes(chat),
    }


def ask_in_turn(
    chat: Target | ChatTokenizer,
    prompt: Prompt,
    ways: Mapping[Item, Callable[..., Any]],
    *,
    rotation: int,
    max_new_tokens: int,
    **options: Any,
) -> Iterator[tuple[list[int], dict[Item, Any]]]:
    """Let all ways answer the turns of a prompt; in later turns, all see the answers of the first way.

    Args:
        chat: tokenizer and template.
        prompt: has one turn or more.
        ways: what answers in each way; they get token ids and the options, and their answers have `token_ids`.
        rotation: turns their order, which differs from prompt to prompt, so that a drift of the speed favours none.
        max_new_tokens: an option for the ways.
        options: further ones.

    Yields:
        For each turn, its token ids and the answers by way.
    """
    order = deque(ways)
    order.rotate(-rotation)
    first_way = next(iter(ways))
    conversation = Conversation(chat, prompt, RespondConfig(max_new_tokens=max_new_tokens))
    while not conversation.is_answered:
        token_ids = conversation.ask()
        answers = {way: ways[way](token_ids, max_new_tokens=max_new_tokens, **options) for way in order}
        # In the order of `ways` again, so that a file does not tell which way was first here.
        yield token_ids, {way: answers[way] for way in ways}
        conversation.add(token_ids, answers[first_way].token_ids)


def group_by_set(items: Sequence[Item]) -> dict[str, list[Item]]:
    """Group prompts or their records by set; where there are several sets, all together come last as `ALL_SETS`.

    Where a set has this name itself, all together have a longer one.
    """
    groups = group_by(items, attrgetter("set"))
    if len(groups) > 1:
        name_of_all = ALL_SETS
        while name_of_all in groups:
            name_of_all += " sets"
        groups[name_of_all] = list(items)
    return groups


def tokens_per_second(answers: Sequence[MeasuredAnswer]) -> float:
    """Return the rate after the first token; nan where all tokens came at once, and without answers."""
    seconds, num_tokens = _totals(answers)
    return num_tokens / seconds if seconds else math.nan


def _totals(answers: Sequence[MeasuredAnswer]) -> tuple[float, int]:
    """Sum the seconds after the first token of each answer, and the tokens that were decoded in them."""
    seconds = float(sum(answer.decode_seconds for answer in answers))  # of no answers, the sum is an integer
    return seconds, sum(answer.num_decode_tokens for answer in answers)


def speedup(ours: Iterable[Sequence[MeasuredAnswer]], theirs: Iterable[Sequence[MeasuredAnswer]]) -> Estimate:
    """Divide the tokens a second of one side by the other side's: ratio of totals, prefill excluded.

    A side has the answers to each prompt. The result is None where all tokens came at once, and without answers.
    """
    # (prompt, 2) each. Seconds a token of the other side over seconds a token of this one: the ratio of their speeds.
    return nullable(estimate([[list(map(_totals, theirs))], [list(map(_totals, ours))]], ratio))


class Records(Generic[Record]):
    """Finished prompts by temperature and id, kept in a file whose first line says all that changes them.

    Each way to measure has a file of its own, which its name tells by a hash of that line. So records of other weights,
    servers or settings are neither taken for new ones nor lost. Of two records of a prompt, the last one counts.
    Each rank of a command adds to a file of its own until `read`.

    Args:
        path: its stem begins the name.
        kind: of the records.
        setup: what they have in common.
        prompts: all of the measurement.

    Raises:
        ValueError: a line that holds no record; names it.
    """

    def __init__(self, path: Path, kind: type[Record], setup: Setup, prompts: Sequence[Prompt]):
        self.kind = kind
        self.seeds = {prompt.id: setup.seed + number for number, prompt in enumerate(prompts)}
        self.first_line = to_json(setup) | {"prompts_sha256": hash_json([asdict(prompt) for prompt in prompts])}
        self.path = path.with_stem(f"{path.stem}-{hash_json(self.first_line)[:8]}")
        self.rank_path = rank_file(self.path, ranks.rank())
        self.read()

    def missing(self, jobs: Iterable[Job]) -> list[tuple[int, Job]]:
        """Return the jobs that have no record, with their numbers among all."""
        return [(number, job) for number, job in enumerate(jobs) if (job[0], job[1].id) not in self.rows]

    def of(self, jobs: Iterable[Job]) -> list[Record]:
        """Return the records of jobs, which all have one."""
        return [self.rows[temperature, prompt.id] for temperature, prompt in jobs]

    def add(self, record: Record) -> None:
        """Keep a record, on disk at once."""
        self.rows[record.temperature, record.id] = record
        append_lines(self.rank_path, [to_json(record)])

    def read(self) -> None:
        """Put what all ranks have measured into one file, and let each of them have it."""
        ranks.barrier()  # all ranks have written their files
        ranks.from_first(self._collect)
        self.rows: dict[tuple[float, str], Record] = {}
        for number, line in list(read_jsonl(self.path))[1:]:  # the first line is the setup
            record = read_as(self.kind, line, f"{self.path}:{number}", "remove the line, and it is measured again")
            self.rows[record.temperature, record.id] = record

    def _collect(self) -> None:
        """Begin the file, or append what ranks have left; a kill in between leaves lines twice."""
        register_files(self.path.parent, self.path.name)
        cut_unfinished_line(self.path)
        if not self.path.exists() or not self.path.stat().st_size:
            write_text(self.path, json.dumps(self.first_line) + "\n")
        for rank_path in find_rank_files(self.path):
            cut_unfinished_line(rank_path)
            append_lines(self.path, (row for _, row in read_jsonl(rank_path)))
            rank_path.unlink()
