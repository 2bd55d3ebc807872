"""A checked request and the text that grows from it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict, Unpack

import torch
from jaxtyping import Float, Int
from pydantic import ValidationError
from torch import Tensor

from dpace.config import SamplingConfig
from dpace.decode.generation import Step
from dpace.decode.sampling import Sampler
from dpace.recipes.validation import explain
from dpace.target import Target, answer_end


class SamplingOptions(TypedDict, total=False):
    """Keyword options of all decoding functions; `SamplingConfig` documents them and their defaults."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int | None
    stop_token_ids: Sequence[int] | None
    """Tokens that end a response and are its last token; by default the target's own stop tokens."""


@dataclass
class Continuation:
    """A prompt and its response so far."""

    token_ids: list[int]
    """The prompt and the response so far."""
    num_prompt: int
    max_new_tokens: int
    stops: set[int]
    """Tokens that end the response."""
    sampler: Sampler = field(repr=False)
    steps: list[Step] = field(default_factory=list)
    """Steps that emitted the response."""

    @property
    def position(self) -> int:
        """Number of tokens of the response so far."""
        return len(self.token_ids) - self.num_prompt

    @property
    def start(self) -> int:
        """Position of the last token, which is the next block's anchor."""
        return len(self.token_ids) - 1

    @property
    def limit(self) -> int:
        """Position of the last token that may be emitted."""
        return self.num_prompt + self.max_new_tokens - 1

    @property
    def remaining(self) -> int:
        """Number of tokens that may still be emitted."""
        return self.max_new_tokens - self.position

    @property
    def is_done(self) -> bool:
        """Whether the response is complete: the budget is used, or its last token is a stop token."""
        return not self.remaining or (self.position > 0 and self.token_ids[-1] in self.stops)

    def draw(self, logits: Float[Tensor, "slot vocab"], draft: Sequence[int] = ()) -> Int[Tensor, " slot"]:
        """Draw the target's own tokens, where row `k` follows the text and the first `k` tokens of `draft`.

        `draft` may be left out where the sampler has no processors, because only these look at the text.
        """
        return self.sampler.draw(self.sampler.scores(logits, [*self.token_ids, *draft]), self.position)

    def take(self, accepted: int, token_ids: Sequence[int], *, width: int, is_copied: bool = False) -> Step:
        """Append the tokens of a verification, cut at the budget and after the first stop token.

        Args:
            accepted: number of draft tokens that were accepted.
            token_ids: these tokens, then the target's next one.
            width: number of tokens that the target read.
            is_copied: whether they were copied, and not drafted.
        """
        emitted = list(token_ids[: min(accepted + 1, self.remaining)])
        if end := answer_end(emitted, self.stops):
            emitted = emitted[:end]
            accepted = min(accepted, end)
        self.token_ids += emitted
        step = Step(emitted, accepted, width, accepted if is_copied else 0)
        self.steps.append(step)
        return step


def make_continuation(
    target: Target,
    token_ids: Sequence[int] | Int[Tensor, "..."],
    **options: Unpack[SamplingOptions],
) -> Continuation:
    """Check a request and start its text.

    Raises:
        ValueError: an empty prompt, a prompt that exceeds the target's context, or an option outside its range.
    """
    values: Any = dict(options)
    stops = values.pop("stop_token_ids", None)
    try:
        config = SamplingConfig(**values)
    except ValidationError as error:
        raise ValueError(f"{explain(error, SamplingConfig)}; change it, or leave it out for the default") from error
    sampling = dict(vars(config))
    max_new_tokens = sampling.pop("max_new_tokens")
    ids = torch.as_tensor(token_ids)
    prompt = ids.flatten().tolist()
    if not prompt:
        raise ValueError("the prompt is empty; give at least one token")
    if len(prompt) > ids.shape[-1]:
        raise ValueError(f"the prompt has the shape {[*ids.shape]}, expected one row; several are for `generate_batch`")
    limit = target.context
    if limit and len(prompt) + max_new_tokens > limit:
        raise ValueError(
            f"the prompt has {len(prompt)} tokens and max_new_tokens is {max_new_tokens}; together they exceed "
            f"the target's limit of {limit}: shorten the prompt"
            + (f" or ask for at most {limit - len(prompt)} new tokens" if limit > len(prompt) else "")
        )
    target.refuse_crossing(len(prompt), max_new_tokens)
    target.refresh_copies()
    stops = target.stop_token_ids if stops is None else stops
    sampler = Sampler(**sampling, device=target.device)
    return Continuation(prompt, len(prompt), max_new_tokens, set(stops), sampler)
