"""Finished responses of a measurement, kept on disk at once, so that an interrupted one goes on after them.

`Records` takes what is measured and how, and gives back what a file holds of it: responses of `dpace bench`, prompts
that running servers answered, or prompts of `dpace explain`. The rows of results are pooled from these records.
"""

import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import numpy as np
from pydantic import Field

from dpace.config import BenchConfig, ExplainConfig, RespondConfig, Width
from dpace.metrics import Acceptance
from dpace.prompts.prompts import Prompt
from dpace.recipes.validation import from_json, json_object, to_json
from dpace.respond.conversation import Conversation
from dpace.servers.apis import Counts
from dpace.system import ranks
from dpace.system.ledger import cut_unfinished_line, naming_file, read_jsonl, register_files, write_text
from dpace.system.provenance import Hardware, Versions, hash_json
from dpace.target import Target
from dpace.target.chat import ChatTokenizer, tokenizer_hashes

PLAIN = "plain"
"""Name of decoding without a drafter."""
COMPILED = "plain, compiled"
"""Name of the same with compiled steps."""
ALL_SETS = "all"
"""Name of all sets together, in the rows of several sets."""
SEED_RULE = "seed + i for prompt i, counted from 0"
"""How each prompt's seed is made, in results."""
Item = TypeVar("Item")
Count = Annotated[int, Field(ge=0, description="a count")]
Seconds = Annotated[float, Field(ge=0, description="a time in seconds")]


@json_object
class Setup:
    """What all records of a measurement share; with the prompts, it tells them from those of another one."""

    target: str
    max_new_tokens: int
    seed: int
    prompt_seeds: str | None = None
    """`SEED_RULE`; one seed for all in results of older versions, which lack the next ones too."""
    tokenizer_sha256: str | None = None
    chat_template_sha256: str | None = None
    thinking: bool | None = None


@json_object
class Provenance(Setup):
    """What made the numbers of `dpace bench`."""

    drafters: dict[str, str]
    """Hashes of their weights, by name."""
    target_weights_sha256: str | None = None
    """`dpace.target.Target.sha256`."""
    drafter_configs: dict[str, str] | None = None
    """Hashes of the drafters' configs, by name."""
    engine: str
    dtype: str
    hardware: Hardware
    versions: Versions


@json_object
class ServerAddress:
    """Where a server runs."""

    url: str
    engine: str
    """What it turned out to be."""
    model: str | None = None
    """What it calls its model, where it says so."""
    version: str | None = None
    """Which version of the engine runs, where it says so."""


@json_object
class ServerSetup(Setup):
    """What made the numbers of running servers."""

    servers: dict[str, ServerAddress]
    """By side, `drafter` and `plain`."""


@json_object
class ExplainSetup(Setup):
    """What made the numbers of `dpace explain`."""

    target_weights_sha256: str
    drafter_sha256: str
    drafter_config: str
    """Hash of it."""
    dtype: str
    temperature: float
    verify_rule: str
    num_samples: int
    """Continuations of an anchor."""
    num_blocks: int
    """Most blocks of a response."""


@json_object
class ResponseRecord:
    """One response, decoded by a drafter or plainly; a line of bench.jsonl."""

    drafter: str
    """Its name, `PLAIN` or `COMPILED`."""
    width: Width | None
    """None for plain decoding."""
    set: str
    id: str
    """The prompt's."""
    turn: int
    """Turn of the prompt, from 0."""
    temperature: float
    prompt_tokens: int
    token_ids: list[int]
    accepted_lengths: list[Count]
    """Accepted draft tokens of each verification, in order; empty for plain decoding, as are the next ones."""
    widths: list[int]
    """Tokens that the target read in each."""
    num_copied: int
    """Accepted tokens that prompt lookup proposed."""
    histogram: list[Count]
    """Verifications by accepted length."""
    num_without_bonus: Count
    """Verifications whose last accepted token ended the text."""
    decode_tokens: Count
    """Tokens after the first."""
    decode_seconds: Seconds
    prefill_seconds: float
    same_text: bool
    """It has the tokens of plain decoding."""

    @property
    def key(self) -> tuple:
        """What tells it from the others of a file."""
        return self.temperature, self.id, self.turn, self.drafter, self.width


@json_object
class ServedAnswer:
    """What a server answered to one turn of a prompt."""

    token_ids: list[int]
    decode_seconds: Seconds
    """After the first token."""
    counts: Counts | None
    """Verifications; None where the server reports none."""

    @property
    def decode_tokens(self) -> int:
        """Number of tokens after the first."""
        return len(self.token_ids) - 1


@json_object
class ServedRecord:
    """A prompt that servers answered; a line of servers.jsonl."""

    set: str
    id: str
    """The prompt's."""
    temperature: float
    turns: list[dict[str, ServedAnswer]]
    """For each turn the answers by side: `drafter`, and `plain` and `plain again` where there is such a server."""

    @property
    def key(self) -> tuple:
        """What tells it from the others of a file."""
        return self.temperature, self.id


@json_object
class ExplainedRecord:
    """A prompt whose blocks were measured by `dpace explain`; a line of explain.jsonl."""

    set: str
    id: str
    """The prompt's."""
    num_blocks: Count
    losses: list[list[float]]
    """What `dpace.measure.floor.score_block` returns, summed over the blocks."""

    @property
    def key(self) -> str:
        """What tells it from the others of a file."""
        return self.id


def setup_of(chat: Target | ChatTokenizer, config: BenchConfig | ExplainConfig) -> dict[str, Any]:
    """Return the values of a `Setup`."""
    return {
        "target": chat.name,
        "max_new_tokens": config.max_new_tokens,
        "seed": config.seed,
        "prompt_seeds": SEED_RULE,
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
    """Let all ways answer the turns of a prompt; answers to earlier turns are those of the first way.

    Args:
        chat: tokenizer and template.
        prompt: has one turn or more.
        ways: what answers in each way; they get token ids and the options, and their answers have `token_ids`.
        rotation: turns their order, which differs from prompt to prompt, so that a drift of the speed favours none.
        max_new_tokens: an option for the ways.
        options: others.

    Yields:
        For each turn, its token ids and the answers by way.
    """
    order = deque(ways)
    order.rotate(-rotation)
    conversation = Conversation(chat, prompt, RespondConfig(max_new_tokens=max_new_tokens))
    while not conversation.is_answered:
        token_ids = conversation.ask()
        answers = {way: ways[way](token_ids, max_new_tokens=max_new_tokens, **options) for way in order}
        yield token_ids, answers
        conversation.add(token_ids, answers[next(iter(ways))].token_ids)


def group_by(items: Iterable[Item], key: Callable[[Item], Any]) -> dict[Any, list[Item]]:
    """Group items that have the same key, in the order in which they come."""
    groups: dict[Any, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def group_by_set(items: Sequence[Item]) -> dict[str, list[Item]]:
    """Group prompts or their records by set; where there are several sets, all together come last as `ALL_SETS`."""
    groups = group_by(items, attrgetter("set"))
    if len(groups) > 1:
        groups[ALL_SETS] = list(items)
    return groups


def spread_evenly(items: Sequence[Item], most: int) -> list[Item]:
    """Choose some of many items, with the first and the last one."""
    places = np.linspace(0, len(items) - 1, min(len(items), most)).round().astype(int)
    return [items[place] for place in places]


def acceptance_of(responses: Iterable[ResponseRecord]) -> Acceptance:
    """Put the verifications of a drafter's responses together, one histogram a prompt."""
    prompts = [
        Acceptance.pooled([Acceptance(turn.histogram, len(turn.histogram), turn.num_without_bonus) for turn in turns])
        for turns in group_by(responses, attrgetter("id")).values()
    ]
    return Acceptance.of_prompts(prompts)


def tokens_per_second(answers: Sequence[ResponseRecord] | Sequence[ServedAnswer]) -> float:
    """Return the rate after the first token; nan where all tokens came at once, and without answers."""
    seconds = sum(answer.decode_seconds for answer in answers)
    return sum(answer.decode_tokens for answer in answers) / seconds if seconds else math.nan


Record = TypeVar("Record", ResponseRecord, ServedRecord, ExplainedRecord)


class Records(Generic[Record]):
    """Finished responses or prompts by their keys, kept in a file whose first line says all that changes them.

    Each way to measure has a file of its own, which its name tells by a hash of that line. So records of other weights,
    servers or settings are neither taken for new ones nor lost. Of two records with the same key, the last one counts.
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
        known = {name: value for name, value in to_json(setup).items() if value is not None}
        self.first_line = known | {"prompts_sha256": hash_json([asdict(prompt) for prompt in prompts])}
        self.path = path.with_stem(f"{path.stem}-{hash_json(self.first_line)[:8]}")
        self.own = self.path.with_suffix(f".rank-{ranks.rank()}.jsonl") if ranks.num_ranks() > 1 else self.path
        self.read()

    def add(self, record: Record) -> None:
        """Keep one, on disk at once."""
        self.rows[record.key] = record
        with naming_file(self.own), self.own.open("a", encoding="utf-8") as file:
            file.write(json.dumps(to_json(record), allow_nan=False) + "\n")

    def read(self) -> None:
        """Put what all ranks have measured into one file, and let each of them have it."""
        ranks.barrier()
        ranks.from_first(self._collect)
        self.rows: dict[Any, Record] = {}
        for number, line in list(read_jsonl(self.path))[1:]:
            try:
                record = from_json(self.kind, line)
            except ValueError as error:
                raise ValueError(f"{self.path}:{number}: {error}; remove the line, and it is measured again") from error
            self.rows[record.key] = record

    def _collect(self) -> None:
        """Begin the file, or append what ranks have left; a kill in between leaves lines twice."""
        register_files(self.path.parent, self.path.name)
        cut_unfinished_line(self.path)
        if not self.path.exists() or not self.path.stat().st_size:
            write_text(self.path, json.dumps(self.first_line) + "\n")
        for part in sorted(self.path.parent.glob(f"{self.path.stem}.rank-*.jsonl")):
            cut_unfinished_line(part)
            with naming_file(self.path), self.path.open("ab") as file:
                file.write(part.read_bytes())
            part.unlink()
