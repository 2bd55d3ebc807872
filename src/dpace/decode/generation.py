"""A checked request, the text that grows from it step by step, and the finished response with its times."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, TypedDict, Unpack

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dpace.config import SamplingConfig
from dpace.decode.sampling import Sampler
from dpace.metrics import Acceptance
from dpace.system.device import synchronize
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


class Step(NamedTuple):
    """The result of one forward pass of the target."""

    token_ids: list[int]
    """Emitted tokens, in order."""
    accepted: int
    """Number of accepted draft tokens among them."""
    width: int
    """Number of tokens that the target read: the last token and the verified draft tokens; 0 for the prompt."""
    copied: int
    """Number of accepted tokens that were copied, from the text or from earlier answers, and not drafted."""
    ended: float
    """When it ended, by `time.perf_counter`."""


@dataclass
class Continuation:
    """A prompt and its response so far."""

    token_ids: list[int]
    """The prompt and the response so far."""
    num_prompt: int
    limit: int
    """Position of the last token that may be emitted."""
    stops: set[int]
    """Tokens that end the response."""
    sampler: Sampler = field(repr=False)
    steps: list[Step] = field(default_factory=list)
    """Steps that emitted the response."""

    @property
    def start(self) -> int:
        """Position of the last token, which is the next block's anchor."""
        return len(self.token_ids) - 1

    @property
    def remaining(self) -> int:
        """Number of tokens that may still be emitted."""
        return self.limit - self.start

    @property
    def is_done(self) -> bool:
        """Whether the response is complete: the budget is used, or its last token is a stop token."""
        return not self.remaining or (bool(self.steps) and self.token_ids[-1] in self.stops)

    def draw(self, logits: Float[Tensor, "slot vocab"], draft: Sequence[int] = ()) -> Int[Tensor, " slot"]:
        """Draw the target's own tokens, where row `k` follows the text and the first `k` tokens of `draft`.

        `draft` may be left out where the sampler has no processors, because only these look at the text.
        """
        scores = self.sampler.scores(logits, [*self.token_ids, *draft])
        return self.sampler.draw(scores, len(self.token_ids) - self.num_prompt)

    def take(self, accepted: int, token_ids: Sequence[int], *, width: int, is_copied: bool = False) -> Step:
        """Append the tokens of a verification, cut at the budget and after the first stop token.

        Args:
            accepted: number of draft tokens that were accepted.
            token_ids: these tokens, then the target's next one.
            width: number of tokens that the target read.
            is_copied: whether they were copied, and not drafted.
        """
        # One token more than was accepted: the target's own next one.
        emitted = list(token_ids[: min(accepted + 1, self.remaining)])
        emitted = emitted[: answer_end(emitted, self.stops)]
        accepted = min(accepted, len(emitted))
        self.token_ids += emitted
        step = Step(emitted, accepted, width, accepted if is_copied else 0, time.perf_counter())
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
    stop_token_ids = values.pop("stop_token_ids", None)
    settings = asdict(SamplingConfig(**values))  # which checks their ranges
    ids = torch.as_tensor(token_ids)
    prompt = ids.flatten().tolist()
    if not prompt or len(prompt) > ids.shape[-1]:
        raise ValueError(
            f"the prompt is empty, or not one row: its shape is {[*ids.shape]}; give the tokens of one prompt, and "
            "several prompts to `generate_batch`"
        )
    num_tokens = len(prompt) + settings.pop("max_new_tokens")
    if target.context and num_tokens > target.context:
        raise ValueError(
            f"with a prompt of {len(prompt)} tokens the text may have {num_tokens}, over the target's limit of "
            f"{target.context}; shorten the prompt, or lower max_new_tokens"
        )
    target.refuse_rotation(1, len(prompt), num_tokens)
    target.refresh_copies()
    if stop_token_ids is None:
        stop_token_ids = target.stop_token_ids
    sampler = Sampler(**settings, device=target.device)
    return Continuation(prompt, len(prompt), num_tokens - 1, set(stop_token_ids), sampler)


@dataclass(frozen=True)
class Generation:
    """A response, its verifications and its times."""

    token_ids: list[int]
    """The response without the prompt; ends with the stop token where there was one."""
    accepted_lengths: list[int]
    """Number of accepted draft tokens of each verification, in order; empty for plain decoding."""
    emitted_lengths: list[int]
    """Number of tokens emitted by each verification: one more, except where an accepted token ended the text."""
    widths: list[int]
    """Number of tokens that the target read in each verification; 1 where nothing was drafted."""
    block_size: int
    prefill_seconds: float
    """Seconds up to and including the first token."""
    decode_seconds: float
    """Seconds for all further tokens."""
    num_copied: int = 0
    """Number of accepted tokens that were copied, from the text or from earlier answers, and not drafted."""

    @classmethod
    def from_steps(
        cls, steps: Sequence[Step], block_size: int, *, prefill_seconds: float, decode_seconds: float
    ) -> "Generation":
        """Put the steps of a response together, of which the first read the prompt; with block size 1 none verified."""
        token_ids = []
        for step in steps:
            token_ids += step.token_ids
        verified = steps[1:] if block_size > 1 else []
        return cls(
            token_ids,
            [step.accepted for step in verified],
            [len(step.token_ids) for step in verified],
            [step.width for step in verified],
            block_size,
            prefill_seconds,
            decode_seconds,
            sum(step.copied for step in verified),
        )

    @property
    def num_decode_tokens(self) -> int:
        """Number of tokens after the first."""
        return len(self.token_ids) - 1

    @property
    def acceptance(self) -> Acceptance:
        """Statistics of the verifications."""
        lengths = zip(self.accepted_lengths, self.emitted_lengths, strict=True)
        num_without_bonus = sum(accepted == emitted for accepted, emitted in lengths)
        return Acceptance.from_lengths(self.accepted_lengths, self.block_size, num_without_bonus)


def read_clock(device: torch.device) -> float:
    """Read a clock in seconds, after the device has finished its work."""
    synchronize(device)
    return time.perf_counter()


def collect(
    texts: Sequence[Continuation], steps: Iterator[object], block_size: int, device: torch.device
) -> list[Generation]:
    """Run all steps of texts, the first of which reads their prompts; each text gets the seconds of all together."""
    started = read_clock(device)
    next(steps)
    prefill_ended = read_clock(device)
    for _ in steps:  # a step adds its tokens to the texts
        pass
    times = {"prefill_seconds": prefill_ended - started, "decode_seconds": read_clock(device) - prefill_ended}
    return [Generation.from_steps(text.steps, block_size, **times) for text in texts]
