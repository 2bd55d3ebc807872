"""Files of answers: a line of `responses.jsonl` is a conversation, and `responses.meta.json` says what made them.

Responses come out as dataclasses, and those that a drafter is trained on as token ids: these are all in memory, 4 bytes
a token. What they depend on is a dictionary: two runs are the same where all of it is.
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import pydantic

from dpace.config import MAX_TOKENS, STRICT, Recipe, RespondConfig
from dpace.prompts.prompts import Prompt, PromptParts
from dpace.system.ledger import JsonObject, read_jsonl, read_object, refuse_foreign_files, register_files, write_json
from dpace.system.progress import count, note, quoted
from dpace.system.provenance import find_versions, hash_file, same_run
from dpace.system.validation import describe_invalid
from dpace.target import Target
from dpace.target.chat import ChatTokenizer, tokenizer_hashes


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class Response:
    """One conversation with the target's answers: a line of `responses.jsonl`; its types are checked."""

    id: str
    set: str
    messages: list[JsonObject]
    token_ids: list[int]
    """The whole conversation as the target read and wrote it."""
    response_spans: list[list[int]]
    """Span [start, end) of each answer of the target, stop token included."""

    def answers_turns(self, turns: Sequence[list[JsonObject]]) -> bool:
        """Return whether the messages are these turns, each with an answer after it, and nothing more."""
        start = 0
        for turn in turns:
            end = start + len(turn)
            if self.messages[start:end] != turn:
                return False
            start = end + 1  # after the answer
        return start >= len(self.messages)


class Example(NamedTuple):
    """A conversation as token ids with the spans that the target wrote."""

    id: str
    token_ids: array
    spans: list[list[int]]
    """[start, end) of each answer."""

    @classmethod
    def of(cls, response: Response) -> "Example":
        """Return the part of a response that is trained on."""
        return cls(response.id, array("i", response.token_ids), response.response_spans)

    def num_anchors(self, max_length: int) -> int:
        """Count the places in the first tokens that a block can start from."""
        num_anchors = 0
        for start, end in self.spans:
            # All tokens of an answer but the last one, which no token follows.
            num_anchors += max(0, min(end, max_length) - start - 1)
        return num_anchors


def read_responses(path: str | Path, num_tokens: int = MAX_TOKENS) -> list[Response]:
    """Read `responses.jsonl`, which may still be written: a last line that is not finished is left out.

    Args:
        path: of the file.
        num_tokens: tokens that the target has.

    Raises:
        ValueError: a file or a line that cannot be read, tokens that the target does not have, or an id that occurs
            twice.
    """
    return list(iterate_responses(path, num_tokens))


def iterate_responses(path: str | Path, num_tokens: int = MAX_TOKENS) -> Iterator[Response]:
    """Read `responses.jsonl` as `read_responses` does, one response at a time."""
    keys = {field.name for field in fields(Response)}
    ids: set[str] = set()
    for number, row in read_jsonl(path, is_growing=True):
        try:
            # Other keys may be anybody's notes; they are not read.
            response = Response(**{key: value for key, value in row.items() if key in keys})
            _check_numbers(response, num_tokens)
            if response.id in ids:
                raise ValueError(f"the id {response.id!r} occurs twice, expected unique ids")
        except ValueError as error:
            reason = str(error)
            if isinstance(error, pydantic.ValidationError):
                reason = describe_invalid(error, Response)
            raise ValueError(f"{path}:{number}: {reason}; write the file again with `dpace respond`") from error
        ids.add(response.id)
        yield response


def answers_to(path: str | Path, prompts: Iterable[Prompt]) -> Iterator[Response]:
    """Read the answers to prompts from `responses.jsonl`, one at a time; answers to others are passed over.

    Raises:
        ValueError: see `read_responses`; or an answer has the id of a prompt, but is one to another text.
    """
    by_id = {prompt.id: prompt for prompt in prompts}
    is_own = read_meta(path).get("source") == "own"
    for response in iterate_responses(path):
        prompt = by_id.get(response.id)
        if prompt is None:
            continue
        # Answers that the file gave are part of the prompt, so all of it is one turn.
        turns = [prompt.own_messages()] if is_own else prompt.turns
        if not response.answers_turns(turns):
            raise ValueError(
                f"{path} has an answer with the id {response.id!r}, but to another text; put the prompts back as they "
                f"were, name another folder with --output, or delete {path} and answer again"
            )
        yield response


def _check_numbers(response: Response, num_tokens: int) -> None:
    """Refuse tokens that the target does not have, and spans that are not within the text, one after the other."""
    # Smallest and largest token alone: a loop in Python over all would take seconds for a large file.
    for token in (min(response.token_ids, default=0), max(response.token_ids, default=0)):
        if not 0 <= token < num_tokens:
            raise ValueError(f"token_ids has {token}, expected 0 .. {num_tokens - 1}")
    spans = response.response_spans
    # Start, end, start, end ... of the spans, between the ends of the text.
    places = [0, *chain(*spans), len(response.token_ids)]
    if places != sorted(places) or any(len(span) != 2 for span in spans):
        raise ValueError(
            f"response_spans is {quoted(spans)}, expected ascending starts and ends within {places[-1]} tokens"
        )


INFORMATIVE = ("target", "servers", "revision", "versions")
"""Facts in `responses.meta.json` for people: responses with others are continued."""


def meta_path(path: str | Path) -> Path:
    """Return the file that says what made a file of responses."""
    return Path(path).with_suffix(".meta.json")


def read_meta(path: str | Path) -> JsonObject:
    """Read what made a file of responses, `responses.jsonl`.

    Returns:
        The facts of `find_meta` and `write_meta`; empty where there is no such file. `complete` says whether all
        prompts were answered; only then `responses_sha256` is the hash of the responses.

    Raises:
        ValueError: the file cannot be read.
    """
    path = meta_path(path)
    fix = "delete it and the responses beside it, and write them again with `dpace respond`"
    return read_object(path, fix) if path.exists() else {}


def known_settings(config: RespondConfig, *, thinking: bool) -> JsonObject:
    """Return what the responses depend on, as far as it is known before the target is loaded.

    Raises:
        ValueError: servers are asked for answers that the prompts come with.
    """
    if config.server and config.source == "own":
        raise ValueError("--respond.server asks servers for answers, and --respond.source own takes those of the file")
    settings = {
        "source": "servers" if config.server else config.source,
        "thinking": thinking,
        "max_new_tokens": config.max_new_tokens,
        "temperature": config.temperature,
    }
    if config.temperature > 0:  # greedy answers do not depend on the seed
        settings["seed"] = config.seed
    return settings


def find_meta(target: Target | ChatTokenizer, config: RespondConfig) -> JsonObject:
    """Return what the responses depend on: weights, tokenizer, template and settings; and `INFORMATIVE` facts.

    Args:
        target: its weights and their precision are not known where servers answer.
        config: of the answers.
    """
    meta: JsonObject = {"target": target.name}
    if not config.server and isinstance(target, Target):
        meta["revision"] = getattr(target.model.config, "_commit_hash", None)
        meta["dtype"] = target.dtype_name
        meta["target_sha256"] = target.sha256
    # The order of the keys is the order in which `check_meta` looks for the first difference.
    meta |= tokenizer_hashes(target)
    meta |= known_settings(config, thinking=target.thinking)
    meta["versions"] = vars(find_versions())
    return meta


def check_meta(path: Path, meta: JsonObject) -> None:
    """Refuse to go on with responses that were made in another way.

    Raises:
        ValueError: names the one setting, its old and new value, and the way out.
    """
    if not path.exists():
        refuse_foreign_files(path.parent, meta_path(path).name)
        return
    old_meta = read_meta(path)
    way_out = "name another folder with --output, or move the file away"
    if not old_meta:  # perhaps another program's
        raise ValueError(f"{path} has no {meta_path(path).name} that tells what made it; {way_out}")
    compared = {key: value for key, value in meta.items() if key not in INFORMATIVE}
    title = f"{path} was made by {old_meta.get('target')!r}"
    same_run(old_meta, compared, title, f"set this as it was, {way_out}")


def write_meta(path: Path, meta: JsonObject, *, is_complete: bool) -> None:
    """Write what made the responses, all or nothing.

    Raises:
        ValueError: there are none yet, and a file of its name that dpace did not write.
    """
    if not path.exists():
        register_files(path.parent, path.name, meta_path(path).name)
    state = {"complete": is_complete, "responses_sha256": hash_file(path) if is_complete else None}
    write_json(meta_path(path), meta | state)


def read_examples(path: Path, parts: Sequence[Sequence[Prompt]]) -> list[list[Example]]:
    """Read what is trained on of the answers to the prompts of each part, in their order.

    Args:
        path: of `responses.jsonl`.
        parts: prompts; those without an answer are left out.

    Raises:
        ValueError: see `answers_to`.
    """
    # The file is read once for all parts: its responses are checked, which takes time.
    by_id = {response.id: Example.of(response) for response in answers_to(path, chain(*parts))}
    examples = []
    for prompts in parts:
        examples.append([by_id[prompt.id] for prompt in prompts if prompt.id in by_id])
    return examples


def load_examples(path: Path, parts: PromptParts) -> tuple[list[Example], list[Example]]:
    """Read the answers to the prompts of training and of validation, in the order of the prompts.

    Raises:
        ValueError: responses that cannot be read, or none to train on.
    """
    train, validation = read_examples(path, [parts.train, parts.validation])
    if not train:
        raise ValueError(f"{path} has no answers to these prompts; write them first with `dpace respond`")
    num_missing = len(parts.train) + len(parts.validation) - len(train) - len(validation)
    if num_missing:
        note(f"{count(num_missing, 'prompt')} left out: no answer; `dpace respond` asks for them")
    return train, validation


def find_answers(recipe: Recipe, respond: str) -> JsonObject:
    """Find the answers in a recipe's folder, and return what made them.

    Args:
        recipe: names the folder and the prompts.
        respond: the command that writes the answers.

    Raises:
        ValueError: there are none, not all prompts are answered, it is not known what made the answers, they were
            changed, or they were made with another `thinking`.
    """
    path = recipe.responses_path
    if not path.exists():
        raise ValueError(f"{path} has no answers to these prompts; write them first with `{respond}`")
    meta = read_meta(path)
    if meta.get("responses_sha256") != hash_file(path):  # which only a complete file has
        raise ValueError(
            f"{path} is not what a finished `dpace respond` wrote; run `{respond}`, which goes on with it or says what "
            "to do"
        )
    refuse_other_answers(path, meta, {"thinking": recipe.thinking})
    return meta


def refuse_other_answers(path: Path, meta: JsonObject, known: JsonObject) -> None:
    """Refuse answers that another target gave, or that were made in another way.

    Args:
        path: of the answers.
        meta: what made them.
        known: the same of this training, as far as it is known.

    Raises:
        ValueError: names the first thing that differs, with both values.
    """
    # Answers of servers lack some facts, such as the precision.
    compared = {fact: value for fact, value in known.items() if fact in meta}
    way_out = (
        "train on the target's own answers: set --target, --dtype and --thinking as they were, or write new answers "
        "with `dpace respond` into another folder"
    )
    same_run(meta, compared, f"the answers in {path} were made", way_out)
