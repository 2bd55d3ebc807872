"""A prompt that is being answered, turn by turn: token ids of each turn go out, answers come in, a response results."""

import hashlib
from collections.abc import Callable, Iterable
from typing import TypeVar

from dpace.config import RespondConfig
from dpace.prompts.prompts import Prompt
from dpace.respond.responses import Response
from dpace.system.ledger import JsonObject
from dpace.system.progress import count
from dpace.target import Target
from dpace.target.chat import ChatTokenizer, encode_answer, encode_chat

Tokens = TypeVar("Tokens")


class Conversation:
    """A prompt and the answers to its first turns.

    Args:
        target: the model, or its tokenizer.
        prompt: what is answered.
        config: how.
    """

    def __init__(self, target: Target | ChatTokenizer, prompt: Prompt, config: RespondConfig):
        self.target = target
        self.prompt = prompt
        self.config = config
        self.messages: list[JsonObject] = []
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
        # 31 bits: some servers read a seed as a signed integer of 32.
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) >> 1

    @property
    def response(self) -> Response:
        """The conversation so far."""
        return Response(self.prompt.id, self.prompt.set, self.messages, self.token_ids, self.spans)

    def check(self) -> list[int]:
        """Return the tokens of the first turn, and refuse a prompt that may pass the target's context.

        All its turns count, and their answers as long as they may be.

        Raises:
            ValueError: names the prompt, its tokens and the limit.
        """
        turns = self.prompt.turns
        first_turn = self._encode(encode_chat, turns[0])
        if self.config.source == "own":
            self._check_length(self._encode(encode_chat, self.prompt.own_messages()), 0)
            return first_turn
        all_turns = first_turn
        if len(turns) > 1:
            messages = list(turns[0])
            for turn in turns[1:]:
                # A dot stands for the answer, whose longest length is added below.
                messages += [{"role": "assistant", "content": "."}, *turn]
            all_turns = self._encode(encode_chat, messages)
        self._check_length(all_turns, len(turns))
        return first_turn

    def ask(self) -> list[int]:
        """Return the token ids of the next turn, with all that came before it.

        Raises:
            ValueError: read again through the template, the text has grown past the target's context.
        """
        token_ids = self._encode(encode_chat, [*self.messages, *self.prompt.turns[self.num_answers]])
        self._check_length(token_ids, 1)
        return token_ids

    def _encode(self, encode: Callable[..., Tokens], *messages: object) -> Tokens:
        """Call a function that encodes messages; its refusal names the prompt."""
        try:
            return encode(self.target, *messages)
        except ValueError as error:
            raise ValueError(f"prompt {self.prompt.id}: {error}") from error

    def _check_length(self, token_ids: list[int], num_answers: int) -> None:
        """Refuse a text that leaves no room for answers."""
        limit = self.target.context
        length = self.config.max_new_tokens
        if limit and len(token_ids) + num_answers * length > limit:
            raise ValueError(
                f"prompt {self.prompt.id} has {len(token_ids)} tokens; with {count(num_answers, 'answer')} of up to "
                f"{length} new tokens it passes the target's limit of {limit}; shorten the prompt, remove a turn or "
                "lower max-new-tokens"
            )

    def add(self, token_ids: list[int], answer: list[int]) -> None:
        """Add the answer to what `ask` gave."""
        self.messages += self.prompt.turns[self.num_answers]
        # The text goes into the template of the next turn, which writes the special tokens itself.
        text = self.target.tokenizer.decode(answer, skip_special_tokens=True)
        self.messages.append({"role": "assistant", "content": text})
        self._append(token_ids, answer)
        self.num_answers += 1

    def add_own_answers(self) -> None:
        """Add the answers that the prompt comes with: all that the assistant says in it.

        Raises:
            ValueError: it comes without one.
        """
        for message in self.prompt.own_messages():
            if message["role"] == "assistant" and self.messages:
                token_ids, answer = self._encode(encode_answer, self.messages, message)
                self._append(token_ids, answer)
            self.messages.append(message)

    def _append(self, token_ids: list[int], answer: list[int]) -> None:
        """Put the tokens before an answer in the place of all tokens so far, and add the answer with its span."""
        if token_ids[: len(self.token_ids)] != self.token_ids:
            self.spans = []  # the template rewrote what came before, so earlier answers are not the target's tokens
        self.token_ids = token_ids + answer
        self.spans.append([len(token_ids), len(self.token_ids)])


def refuse_long_prompts(target: Target | ChatTokenizer, prompts: Iterable[Prompt], max_new_tokens: int) -> None:
    """Refuse prompts that may pass the target's context with answers of this length, as `Conversation.check` does."""
    config = RespondConfig(max_new_tokens=max_new_tokens)
    for prompt in prompts:
        Conversation(target, prompt, config).check()
