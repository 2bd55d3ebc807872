"""The tokens of a server's answer, as the target would have kept them, or why they are not known."""

from collections.abc import Sequence
from typing import Any

from dpace.data.chat import ChatTokenizer
from dpace.servers.apis import Answer
from dpace.target import Target


class NotItsTokens(ValueError):
    """The answer's tokens are not known, or the answer does not end where the target's would."""


def tokens_of_answer(
    answer: Answer, prompt: Sequence[int], target: Target | ChatTokenizer, max_new_tokens: int
) -> tuple[list[int], str]:
    """Give the tokens of an answer, its stop token included, and `stop` or `length`.

    Raises:
        NotItsTokens: a text that cannot be turned into the tokens that made it; a stop token that is not the target's;
            or an answer that the server cut.
    """
    stops = list(target.stop_token_ids)
    tokens = answer.token_ids or _tokenize(answer, list(prompt), target.tokenizer)
    if end := next((i + 1 for i, token in enumerate(tokens) if token in stops), None):
        return tokens[:end], "stop"
    if not answer.is_stopped:
        if len(tokens) < max_new_tokens:
            raise NotItsTokens("cut by the server, whose context is too short")
        return tokens, "length"
    is_told = answer.num_tokens is not None and answer.num_tokens == len(tokens)
    named = [answer.stop_token] if answer.stop_token is not None else stops
    if len(named) != 1 or named[0] not in stops or (is_told and answer.token_ids):
        raise NotItsTokens("ended by a token that is not known to be a stop token of the target")
    return [*tokens, *named], "stop"


def _tokenize(answer: Answer, prompt: list[int], tokenizer: Any) -> list[int]:
    """Turn a text back into tokens; the text that they give and their number must be the server's."""
    text = answer.text or ""
    tokens = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    whole, before = (
        tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for ids in (prompt + tokens, prompt)
    )
    allowed = (len(tokens), len(tokens) + answer.is_stopped)
    if whole != before + text or (answer.num_tokens is not None and answer.num_tokens not in allowed):
        raise NotItsTokens("given as a text that is not turned back into its own tokens")
    return tokens
