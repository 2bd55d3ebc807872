"""Check a request, and decide where a text stops."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from dpace.target import Target

VerifyRule = Literal["equality", "speculative"]
Width = Literal["auto", "full"] | int


def first_stop(token_ids: Sequence[int], stop_token_ids: set[int]) -> int | None:
    """Index of the first stop token."""
    return next((i for i, token in enumerate(token_ids) if token in stop_token_ids), None)


def prepare(target: Target, token_ids, max_new_tokens: int, stop_token_ids) -> tuple[Tensor, set[int]]:
    """Check the request; the prompt as a row, and the stop tokens."""
    prompt = torch.as_tensor(token_ids, device=target.device).reshape(1, -1)
    if not prompt.numel():
        raise ValueError("the prompt is empty; give at least one token")
    limit = getattr(target.config, "max_position_embeddings", None)
    if limit and prompt.shape[1] + max_new_tokens > limit:
        raise ValueError(
            f"the prompt has {prompt.shape[1]} tokens and max_new_tokens is {max_new_tokens}; together they pass the target's "
            f"limit of {limit}: shorten the prompt or ask for at most {limit - prompt.shape[1]}"
        )
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be 1 or more")
    return prompt, set(target.stop_token_ids if stop_token_ids is None else stop_token_ids)
