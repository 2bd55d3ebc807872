"""The mask token of a drafter: a token that no text of its target contains."""

from dpace.target import Target


def choose_mask_token(target: Target) -> int:
    """Pick a token that no text contains: an unused row of the embedding, else a reserved special token.

    Raises:
        ValueError: the tokenizer has neither.
    """
    tokenizer, num_rows = target.tokenizer, len(target.head.weight)
    if tokenizer is None:
        return num_rows - 1
    if len(tokenizer) < num_rows:
        return len(tokenizer)
    free = [token_id for token_id in sorted(tokenizer.added_tokens_decoder) if not _use_of(token_id, target)]
    if not free:
        raise ValueError(
            f"no token of {target.name} is free to be the mask token: all {num_rows} rows of the embedding are in use; "
            "set a reserved one with --drafter.mask-token-id"
        )

    def is_reserved(token_id: int) -> bool:
        name = tokenizer.added_tokens_decoder[token_id].content.lower()
        return any(word in name for word in ("mask", "reserved", "unused"))

    return max(free, key=is_reserved)


def check_mask_token(token_id: int, target: Target) -> None:
    """Refuse a mask token that the target reads or writes; `DrafterSpec.check` refuses one outside the embedding.

    Raises:
        ValueError: padding, a stop or special token in use, in the chat template, or ordinary text.
    """
    if use := _use_of(token_id, target):
        raise ValueError(
            f"mask token {token_id} {use}; it must be a reserved token that no text contains: "
            "name another one, or leave it out to have one chosen"
        )


def _use_of(token_id: int, target: Target) -> str:
    """Say what a target uses a token for; empty where it uses it for nothing."""
    tokenizer = target.tokenizer
    if token_id in target.stop_token_ids:
        return "ends the target's responses"
    if tokenizer is None or token_id >= len(tokenizer):
        return ""
    if token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id):
        return "is padding, or begins or ends text"
    added = tokenizer.added_tokens_decoder.get(token_id)
    if added is None or not added.special:
        return f"is ordinary text ({tokenizer.convert_ids_to_tokens(token_id)!r})"
    return "is used by the chat template" if added.content in str(tokenizer.chat_template) else ""
