"""Turn messages into token ids through the target's chat template."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dpace.target import Target


@dataclass(frozen=True)
class ChatTokenizer:
    """What `encode_chat` needs of a target whose weights are elsewhere, as on a server."""

    name: str
    """Folder or Hub id."""
    tokenizer: Any
    thinking: bool = False


def encode_chat(target: Target | ChatTokenizer, messages: Sequence[dict[str, str]]) -> list[int]:
    """Tokens of a conversation up to where the target is to answer, through its chat template.

    A tokenizer without a template gets the contents, one a line. A template that knows thinking gets `target.thinking`.

    Raises:
        ValueError: the template refuses the messages, or they give no token.
    """
    tokenizer = target.tokenizer
    if tokenizer is None:
        raise ValueError("the target has no tokenizer; pass one to Target to work with text")
    if tokenizer.chat_template is None:
        token_ids = tokenizer("\n".join(m["content"] for m in messages) + "\n")["input_ids"]
    else:
        try:
            token_ids = tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=True, enable_thinking=target.thinking, return_dict=False
            )
        except Exception as error:  # jinja errors of a template share no narrower class
            raise ValueError(f"the chat template of {target.name} refuses the messages: {error}") from error
    if not token_ids:
        raise ValueError("the prompt has no token")
    return list(token_ids)


def tokenizer_hashes(target: Target) -> dict[str, str]:
    """What tells one tokenizer and chat template from another; empty without a tokenizer."""
    if target.tokenizer is None:
        return {}
    vocab = json.dumps(sorted(target.tokenizer.get_vocab().items()))
    template = str(target.tokenizer.chat_template)
    return {
        "tokenizer_sha256": hashlib.sha256(vocab.encode()).hexdigest(),
        "chat_template_sha256": hashlib.sha256(template.encode()).hexdigest(),
    }
