"""Turn messages into token ids through the target's chat template.

The target may be here, or only its tokenizer (`ChatTokenizer`), as where a server has the weights.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig

from dpace.system.ledger import JsonObject
from dpace.system.provenance import hash_json
from dpace.target import Target, answer_end, stop_tokens
from dpace.target.files import find_target_files, full_name, read_tokenizer


@dataclass(frozen=True)
class ChatTokenizer:
    """A tokenizer with its chat template, for a target whose weights are elsewhere, as on a server."""

    name: str
    """Folder, Hub id or GGUF file of the target."""
    tokenizer: Any
    thinking: bool = False
    stop_token_ids: Sequence[int] = ()
    """Tokens that end a response."""
    context: int | None = None
    """Longest text of the target in tokens."""

    @classmethod
    def load(cls, name: str, thinking: bool = False) -> "ChatTokenizer":
        """Load what a folder or the Hub says of a target, or of an adapter and its base, without the weights.

        Raises:
            OSError: there is no readable model of that name.
            ValueError: see `dpace.target.files.find_target_files`.
        """
        files = find_target_files(name)
        config = files.config.get_text_config(decoder=True)
        try:
            stops = stop_tokens(GenerationConfig.from_pretrained(files.base))
        except OSError:  # no such file: then the model's config says it
            stops = stop_tokens(config)
        context = getattr(config, "max_position_embeddings", None)
        return cls(full_name(name), read_tokenizer(name, files), thinking, stops, context)


def encode_chat(
    target: Target | ChatTokenizer, messages: Sequence[JsonObject], *, is_answered: bool = False
) -> list[int]:
    """Encode a conversation up to where the target is to answer, with its chat template.

    With `is_answered`, the last message is the answer, and the text ends as the template ends it.

    Without a template, the contents are encoded, one on each line. A template that knows thinking gets
    `target.thinking`, and one that knows tools the `tools` of a message.

    Raises:
        ValueError: the template refuses the messages or does not know what they have of tools, they give no token, or
            one that the embedding does not have.
    """
    tokenizer = target.tokenizer
    if tokenizer is None:
        raise ValueError("the target has no tokenizer, which text needs; pass one to Target")
    words = set()
    tools = None
    template_messages = []
    for message in messages:
        words.update(message, [message["role"]])
        tools = tools or message.get("tools")
        template_messages.append({key: value for key, value in message.items() if key != "tools"})
    for word in ("tools", "tool_calls", "tool"):
        if word in words and word not in str(tokenizer.chat_template):
            raise ValueError(
                f"the chat template of {target.name} knows no `{word}`, which the prompt has; take it out of the "
                "prompt, or name a target whose template knows it"
            )
    try:
        if tokenizer.chat_template is None:
            token_ids = tokenizer("\n".join(message["content"] for message in messages) + "\n")["input_ids"]
        else:
            token_ids = tokenizer.apply_chat_template(
                template_messages,
                tools=tools,
                add_generation_prompt=not is_answered,
                enable_thinking=target.thinking,
                return_dict=False,
            )
    except Exception as error:  # jinja errors of a template share no narrower class
        raise ValueError(
            f"the chat template of {target.name} refuses the messages ({error}); change the prompt to roles that "
            "it knows, and to whole characters of Unicode"
        ) from error
    if not token_ids:
        raise ValueError(
            "the prompt gives no token, expected one or more; write a prompt that is not empty, and see whether the "
            "target has the files of its tokenizer"
        )
    if isinstance(target, Target) and max(token_ids) >= len(target.head.weight):
        raise ValueError(
            f"the tokenizer of {target.name} gives the token {max(token_ids)}, and its embedding has "
            f"{len(target.head.weight)} rows; copy both again from one model"
        )
    return list(token_ids)


def encode_answer(
    target: Target | ChatTokenizer, messages: Sequence[JsonObject], answer: JsonObject
) -> tuple[list[int], list[int]]:
    """Encode a conversation up to an answer, and a given answer as if the target had written it.

    The answer is what the chat template puts after the text before it, up to and with the first stop token. A template
    that writes that text in another way where an answer follows leaves the answer's own tokens and a stop token.

    Returns:
        The tokens before the answer, and those of the answer.

    Raises:
        ValueError: as `encode_chat`; or an answer with more than a text whose own tokens are not known.
    """
    before = encode_chat(target, messages)
    stops = list(target.stop_token_ids)
    whole = encode_chat(target, [*messages, answer], is_answered=True)
    if target.tokenizer.chat_template is not None and whole[: len(before)] == before:
        tokens = whole[len(before) :]
    elif answer.keys() != {"role", "content"}:
        raise ValueError(
            f"the chat template of {target.name} changes what stands before an answer of more than a text, so that the "
            "answer's own tokens are not known; add --thinking where it has reasoning, or let the target answer with "
            "--respond.source target"
        )
    else:
        tokens = target.tokenizer(answer["content"], add_special_tokens=False)["input_ids"] + stops[:1]
    return before, tokens[: answer_end(tokens, stops)]


def tokenizer_hashes(target: Target | ChatTokenizer) -> dict[str, str]:
    """Hash the vocabulary and the chat template; empty without a tokenizer."""
    if target.tokenizer is None:
        return {}
    template = str(target.tokenizer.chat_template)
    return {
        "tokenizer_sha256": hash_json(sorted(target.tokenizer.get_vocab().items())),
        "chat_template_sha256": hashlib.sha256(template.encode()).hexdigest(),
    }
