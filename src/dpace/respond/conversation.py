"""A prompt that is being answered, turn by turn: token ids of each turn go out, answers come in, a response results."""

import hashlib

from dpace.config import RespondConfig
from dpace.prompts.prompts import Prompt
from dpace.respond.responses import Response
from dpace.target import Target
from dpace.target.chat import ChatTokenizer, context_of, encode_answer, encode_chat


class Conversation:
    """A prompt and the answers to its first turns.

    Args:
        target: whose chat template and tokenizer are used.
        prompt: what is to be answered.
        config: length of answers, and the seed.
    """

    def __init__(self, target: Target | ChatTokenizer, prompt: Prompt, config: RespondConfig):
        self.target = target
        self.prompt = prompt
        self.config = config
        self.messages: list[dict[str, str]] = []
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
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1

    def ask(self) -> list[int]:
        """Return the token ids of the next turn, with all that came before it.

        Raises:
            ValueError: read again through the template, the text has grown past the target's context.
        """
        token_ids = encode_chat(self.target, [*self.messages, *self.prompt.turns[self.num_answers]])
        limit, length = context_of(self.target), self.config.max_new_tokens
        if limit and len(token_ids) + length > limit:
            raise ValueError(
                f"a turn of prompt {self.prompt.id} has {len(token_ids)} tokens; with {length} new tokens it "
                f"passes the target's limit of {limit}; remove a turn or lower --respond.max-new-tokens"
            )
        return token_ids

    def add(self, token_ids: list[int], answer: list[int]) -> None:
        """Add the answer to what `ask` gave."""
        if token_ids[: len(self.token_ids)] != self.token_ids:
            self.spans = []  # the template rewrote what came before, so earlier answers are not the target's tokens
        self.messages += self.prompt.turns[self.num_answers]
        text = self.target.tokenizer.decode(answer, skip_special_tokens=True)
        self.messages.append({"role": "assistant", "content": text})
        self.token_ids = token_ids + answer
        self.spans.append([len(token_ids), len(self.token_ids)])
        self.num_answers += 1

    @property
    def response(self) -> Response:
        """The conversation so far."""
        return Response(self.prompt.id, self.prompt.set, self.messages, self.token_ids, self.spans)


def count_tokens(target: Target | ChatTokenizer, prompt: Prompt, config: RespondConfig) -> int:
    """Count the tokens of a prompt's first turn, and refuse a prompt that may pass the target's context.

    All its turns count, and their answers as long as they may be.

    Raises:
        ValueError: names the prompt, its tokens and the limit.
    """
    num_first = len(encode_chat(target, prompt.turns[0]))
    num_tokens, num_turns = num_first, len(prompt.turns)
    if num_turns > 1:
        messages = list(prompt.turns[0])
        for turn in prompt.turns[1:]:
            messages += [{"role": "assistant", "content": "."}, *turn]
        num_tokens = len(encode_chat(target, messages))
    limit = context_of(target)
    if config.source == "target" and limit and num_tokens + num_turns * config.max_new_tokens > limit:
        turns = f"{num_turns} answers of up to " if num_turns > 1 else ""
        raise ValueError(
            f"prompt {prompt.id} has {num_tokens} tokens; with {turns}{config.max_new_tokens} new tokens it passes "
            f"the target's limit of {limit}; shorten the prompt or lower --respond.max-new-tokens"
        )
    return num_first


def use_own_answers(target: Target | ChatTokenizer, prompt: Prompt) -> Response:
    """Make a response of the answers that a prompt comes with: all that the assistant says in it.

    Raises:
        ValueError: it comes without one.
    """
    if prompt.answer is None:
        raise ValueError(
            f"prompt {prompt.id} has no reply at its end, which --respond.source own trains on; remove the prompt, or "
            "let the target answer with --respond.source target"
        )
    messages: list[dict[str, str]] = []
    token_ids: list[int] = []
    spans: list[list[int]] = []
    for message in [*prompt.turns[0], {"role": "assistant", "content": prompt.answer}]:
        if message["role"] == "assistant" and messages:
            before, answer = encode_answer(target, messages, message["content"])
            if before[: len(token_ids)] != token_ids:
                spans = []  # the template rewrote what came before
            token_ids = before + answer
            spans.append([len(before), len(token_ids)])
        messages.append(message)
    return Response(prompt.id, prompt.set, messages, token_ids, spans)


def is_answer(response: Response, prompt: Prompt) -> bool:
    """Return whether the response answers this very prompt."""
    start = 0
    for turn in prompt.turns:
        if response.messages[start : start + len(turn)] != turn:
            return False
        start += len(turn) + 1
    return True
