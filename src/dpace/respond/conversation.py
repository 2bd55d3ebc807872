"""A prompt that is being answered, turn by turn: token ids of each turn go out, answers come in, a response results."""

import hashlib
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from dpace.config import RespondConfig
from dpace.prompts.prompts import Prompt
from dpace.respond.responses import Response
from dpace.target import Target
from dpace.target.chat import ChatTokenizer, encode_answer, encode_chat


class Conversation:
    """A prompt and the answers to its first turns."""

    def __init__(self, target: Target | ChatTokenizer, prompt: Prompt, config: RespondConfig):
        self.target = target
        self.prompt = prompt
        self.config = config
        self.messages: list[dict[str, Any]] = []
        self.token_ids: list[int] = []
        self.spans: list[list[int]] = []
        self.num_answers = 0

    @property
    def is_answered(self) -> bool:
        """Whether all turns have their answer."""
        return self.num_answers == len(self.prompt.turns)

    @property
    def seed(self) -> int:
        """Seed of the next answer, 0 .. 2**31 - 1: it depends on nothing but the option, the id and the turn."""
        text = f"{self.config.seed}\n{self.num_answers}\n{self.prompt.id}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) >> 1

    @property
    def response(self) -> Response:
        """The conversation so far."""
        return Response(self.prompt.id, self.prompt.set, self.messages, self.token_ids, self.spans)

    def check(self) -> array:
        """Return the tokens of the first turn, and refuse a prompt that may pass the target's context.

        All its turns count, and their answers as long as they may be.

        Raises:
            ValueError: names the prompt, its tokens and the limit.
        """
        turns = self.prompt.turns
        with self._named():
            first = encode_chat(self.target, turns[0])
        num_tokens = len(first)
        if len(turns) > 1:
            messages = list(turns[0])
            for turn in turns[1:]:
                messages += [{"role": "assistant", "content": "."}, *turn]
            with self._named():
                num_tokens = len(encode_chat(self.target, messages))
        if self.config.source == "target":
            self._check_length(num_tokens, len(turns))
        else:
            own_messages(self.prompt)
        return array("i", first)

    def ask(self) -> list[int]:
        """Return the token ids of the next turn, with all that came before it.

        Raises:
            ValueError: read again through the template, the text has grown past the target's context.
        """
        with self._named():
            token_ids = encode_chat(self.target, [*self.messages, *self.prompt.turns[self.num_answers]])
        self._check_length(len(token_ids), 1)
        return token_ids

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Let a refusal inside the `with` block name the prompt."""
        try:
            yield
        except ValueError as error:
            raise ValueError(f"prompt {self.prompt.id}: {error}") from error

    def _check_length(self, num_tokens: int, num_answers: int) -> None:
        """Refuse a text that leaves no room for answers."""
        limit, length = self.target.context, self.config.max_new_tokens
        if limit and num_tokens + num_answers * length > limit:
            answers = f"{num_answers} answers of up to " if num_answers > 1 else ""
            raise ValueError(
                f"prompt {self.prompt.id} has {num_tokens} tokens; with {answers}{length} new tokens it passes the "
                f"target's limit of {limit}; shorten the prompt, remove a turn or lower max-new-tokens"
            )

    def add(self, token_ids: list[int], answer: list[int]) -> None:
        """Add the answer to what `ask` gave."""
        self.messages += self.prompt.turns[self.num_answers]
        text = self.target.tokenizer.decode(answer, skip_special_tokens=True)
        self.messages.append({"role": "assistant", "content": text})
        self._append(token_ids, answer)
        self.num_answers += 1

    def add_own_answers(self) -> None:
        """Add the answers that the prompt comes with: all that the assistant says in it.

        Raises:
            ValueError: it comes without one.
        """
        for message in own_messages(self.prompt):
            if message["role"] == "assistant" and self.messages:
                with self._named():
                    tokens = encode_answer(self.target, self.messages, message)
                self._append(*tokens)
            self.messages.append(message)

    def _append(self, before: list[int], answer: list[int]) -> None:
        if before[: len(self.token_ids)] != self.token_ids:
            self.spans = []  # the template rewrote what came before, so earlier answers are not the target's tokens
        self.token_ids = before + answer
        self.spans.append([len(before), len(self.token_ids)])


def refuse_long_prompts(target: Target | ChatTokenizer, prompts: Iterable[Prompt], max_new_tokens: int) -> None:
    """Refuse prompts that may pass the target's context with answers of this length; see `Conversation.check`."""
    config = RespondConfig(max_new_tokens=max_new_tokens)
    for prompt in prompts:
        Conversation(target, prompt, config).check()


def own_messages(prompt: Prompt) -> list[dict[str, Any]]:
    """Return the messages of a prompt that comes with a reply, and the reply.

    Raises:
        ValueError: there is no reply.
    """
    answer = prompt.answer
    if answer is None:
        raise ValueError(
            f"prompt {prompt.id} has no reply at its end, which --respond.source own trains on; remove the prompt, or "
            "let the target answer with --respond.source target"
        )
    return [*prompt.turns[0], answer if isinstance(answer, dict) else {"role": "assistant", "content": answer}]


def is_answer(response: Response, prompt: Prompt, *, is_own: bool = False) -> bool:
    """Return whether the response answers this very prompt, or with `is_own` is the reply that it comes with."""
    if is_own:
        return response.messages == own_messages(prompt)
    return response.turns(map(len, prompt.turns)) == prompt.turns
