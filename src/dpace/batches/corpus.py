"""Read the answers that a drafter is trained on: a recipe's files come in, conversations as token ids go out.

All of them are in memory, 4 bytes a token; each rank reads the files for itself.
"""

from array import array
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from dpace.config import PromptsConfig, Recipe
from dpace.prompts.prompts import Prompt, split_and_explain
from dpace.respond.responses import Response, answers_to, read_meta
from dpace.system.progress import count, note
from dpace.system.provenance import hash_file, same_run


class Example(NamedTuple):
    """A conversation as token ids with the spans that the target wrote."""

    id: str
    token_ids: array
    spans: list[list[int]]
    """[start, end) of each answer."""

    @classmethod
    def of(cls, response: Response) -> "Example":
        """Keep of a response what is trained on."""
        return cls(response.id, array("i", response.token_ids), response.response_spans)

    def num_anchors(self, max_length: int) -> int:
        """Count the places in the first tokens that a block can start from."""
        return sum(max(0, min(end, max_length) - start - 1) for start, end in self.spans)


def read_examples(path: Path, parts: Sequence[Sequence[Prompt]]) -> list[list[Example]]:
    """Read what is trained on of the answers to the prompts of each part, in their order.

    Args:
        path: of `responses.jsonl`.
        parts: prompts; those without an answer are left out.

    Raises:
        ValueError: see `answers_to`.
    """
    found = {response.id: Example.of(response) for response in answers_to(path, chain(*parts))}
    return [[found[prompt.id] for prompt in part if prompt.id in found] for part in parts]


def load_corpus(path: Path, config: PromptsConfig) -> list[list[Example]]:
    """Read the answers to the prompts of training and those of validation, in the order of the prompts.

    Raises:
        ValueError: prompts or responses that cannot be read.
    """
    parts = split_and_explain(config)[0][:2]
    corpus = read_examples(path, parts)
    if missing := sum(map(len, parts)) - sum(map(len, corpus)):
        note(f"{count(missing, 'prompt')} left out: no answer; `dpace respond` asks for them")
    return corpus


class Answers:
    """The answers in a recipe's folder, and what made them.

    Args:
        recipe: names the folder and the prompts.
        respond: the command that writes the answers.

    Raises:
        ValueError: there are none, not all prompts are answered, it is not known what made the answers, they were
            changed, or they were made with another `thinking`.
    """

    def __init__(self, recipe: Recipe, respond: str):
        self.prompts = recipe.prompts
        self.respond = respond
        self.path = recipe.responses_path
        if not self.path.exists():
            raise ValueError(self._none())
        self.meta = read_meta(self.path)
        fault = None
        if self.meta.get("complete") is False:
            fault = "holds the answers of an interrupted `dpace respond`"
        elif "target" not in self.meta:
            fault = "has no meta file beside it that says which target made the answers"
        elif self.meta.get("responses_sha256") not in (None, hash_file(self.path)):
            fault = "was changed after `dpace respond` wrote it"
        if fault:
            raise ValueError(f"{self.path} {fault}; run `{respond}`, which goes on with it or says what to do")
        self.refuse_others({"thinking": recipe.thinking})

    def _none(self) -> str:
        return f"{self.path} has no answers to these prompts; write them first with `{self.respond}`"

    def load(self) -> list[list[Example]]:
        """Read those to train on and those of validation; see `load_corpus`.

        Raises:
            ValueError: none to train on.
        """
        corpus = load_corpus(self.path, self.prompts)
        if not corpus[0]:
            raise ValueError(self._none())
        return corpus

    def refuse_others(self, known: Mapping[str, Any]) -> None:
        """Refuse answers that another target gave, or that were made in another way.

        Raises:
            ValueError: names the first thing that differs, with both values.
        """
        answered = {**self.meta, "dtype": str(self.meta.get("dtype")).removeprefix("torch.")}
        compared = {name: value for name, value in known.items() if name in self.meta}
        way_out = (
            "train on the target's own answers: set --target, --dtype and --thinking as they were, or write new "
            f"answers into another folder with `{self.respond}`"
        )
        same_run(answered, compared, f"the answers in {self.path} were made", way_out)
