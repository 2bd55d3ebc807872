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
    names = tokenizer.added_tokens_decoder
    reserved = sorted(
        names, key=lambda i: (not any(w in names[i].content.lower() for w in ("mask", "reserved", "unused")), i)
    )
    for token_id in reserved:
        try:
            check_mask_token(token_id, target)
        except ValueError:
            continue
        return token_id
    raise ValueError(
        f"no token of {target.name} is free to be the mask token: all {num_rows} rows of the embedding are in use; "
        "set a reserved one with --drafter.mask-token-id"
    )


def check_mask_token(token_id: int, target: Target) -> None:
    """Refuse a mask token that the target reads or writes.

    Raises:
        ValueError: outside the embedding, padding, a stop or special token in use, in the chat template, or ordinary
            text.
    """
    tokenizer, num_rows = target.tokenizer, len(target.head.weight)
    reason = None
    if not 0 <= token_id < num_rows:
        reason = f"lies outside the embedding's {num_rows} rows"
    elif token_id in target.stop_token_ids:
        reason = "ends the target's responses"
    elif tokenizer is not None and token_id < len(tokenizer):
        special = {tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id}
        if token_id in special:
            reason = "is padding, or begins or ends text"
        elif token_id not in tokenizer.added_tokens_decoder or not tokenizer.added_tokens_decoder[token_id].special:
            reason = f"is ordinary text ({tokenizer.convert_ids_to_tokens(token_id)!r})"
        elif tokenizer.chat_template and tokenizer.convert_ids_to_tokens(token_id) in str(tokenizer.chat_template):
            reason = "is used by the chat template"
    if reason:
        raise ValueError(
            f"mask token {token_id} {reason}; it must be a reserved token that no text contains: "
            "name another one, or leave it out to have one chosen"
        )
