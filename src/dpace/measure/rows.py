"""What the files of a measurement hold: responses, groups of requests, and rows made from them."""

import math
from dataclasses import dataclass

from dpace.config import Width
from dpace.data.typed_json import optional
from dpace.metrics import Acceptance, published_tau
from dpace.servers.apis import Counts

Interval = tuple[float | None, float | None]
"""Ends of a 95 % interval; None where there are too few prompts for one, or nothing to measure."""
Estimate = tuple[float | None, float | None, float | None]
"""A number and the ends of its 95 % interval."""
PLAIN = "plain"
"""Name of decoding without a drafter."""
COMPILED = "plain, compiled"
"""Name of the same with compiled steps."""


def defined(value: float) -> float | None:
    """Replace what has no value, nan or infinite, by None, as JSON has neither."""
    return float(value) if math.isfinite(value) else None


def interval_of(ends: tuple[float, float]) -> Interval:
    """Replace undefined ends by None."""
    return defined(ends[0]), defined(ends[1])


def estimate_of(numbers: tuple[float, float | None, float | None]) -> Estimate:
    """Replace an undefined number and undefined ends of its interval by None."""
    value, low, high = (None if x is None else defined(x) for x in numbers)
    return value, low, high


@dataclass(frozen=True, kw_only=True)
class ResponseRecord:
    """One response, decoded by a drafter or plainly; a line of bench.jsonl."""

    drafter: str
    """Its name, `PLAIN` or `COMPILED`."""
    width: Width | None
    """None for plain decoding."""
    set: str
    id: str
    """The prompt's."""
    turn: int
    """Turn of the prompt, from 0."""
    temperature: float
    prompt_tokens: int
    token_ids: list[int]
    accepted_lengths: list[int]
    """Accepted draft tokens of each verification, in order; empty for plain decoding, as are the next ones."""
    widths: list[int]
    """Tokens that the target read in each."""
    num_copied: int
    """Accepted tokens that prompt lookup proposed."""
    histogram: list[int]
    """Verifications by accepted length."""
    num_without_bonus: int
    """Verifications whose last accepted token ended the text."""
    decode_tokens: int
    """Tokens after the first."""
    decode_seconds: float
    prefill_seconds: float
    same_text: bool
    """It has the tokens of plain decoding."""

    @property
    def published_tau(self) -> float:
        """Mean of `accepted_length + 1`, as published tables have it; nan without a verification."""
        return published_tau([self.accepted_lengths])

    def speedup_over(self, plain: "ResponseRecord") -> float | None:
        """Divide tokens a second by those of the plain response; None where one of them is a single token."""
        if not (self.decode_tokens and plain.decode_tokens):
            return None
        return self.decode_tokens * plain.decode_seconds / (self.decode_seconds * plain.decode_tokens)


def acceptance_of(responses: list[ResponseRecord], block_size: int) -> Acceptance:
    """Put the verifications of responses together, one histogram a response."""
    counts = [response.num_without_bonus for response in responses]
    return Acceptance([response.histogram for response in responses], block_size, counts)


@dataclass(frozen=True, kw_only=True)
class Published:
    """The two numbers as published tables define them."""

    tau: float | None
    """Mean over responses of their means."""
    decode_speedup: float | None
    """Ratio of mean seconds a token."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """A response to show."""

    id: str
    """The prompt's."""
    what: str
    """Why it is shown: `fastest` or `slowest`."""
    tau: float
    """As published tables have it."""
    speedup: float
    pieces: list[tuple[str, bool]]
    """Pieces of its text, and whether each came from the drafter."""


@dataclass(frozen=True, kw_only=True)
class CompiledBaseline:
    """Plain decoding with compiled steps, of the same prompts, and the drafter against it."""

    tokens_per_second: float
    decode_speedup: float | None
    """The drafter's tokens a second over these."""
    decode_speedup_interval: Interval
    num_same_text: int
    """Responses with the tokens of plain decoding."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A drafter with one width, on one set at one temperature, against plain decoding."""

    drafter: str
    width: Width
    set: str
    temperature: float
    num_responses: int
    block_size: int
    histogram: list[int]
    """Verifications by accepted length."""
    num_without_bonus: int
    tau: float | None
    """Pooled over verifications; None without one."""
    tau_interval: Interval
    acceptance_rate: float | None
    reach_rate: list[float]
    slot_acceptance_rate: list[float | None]
    """None for slots that were never reached."""
    share_copied: float
    """Share of the tokens that prompt lookup proposed, 0 to 1."""
    tokens_per_second: float
    plain_tokens_per_second: float
    decode_speedup: float | None
    """None where every response is a single token."""
    decode_speedup_interval: Interval
    published: Published
    num_same_text: int
    responses: list[ResponseRecord]
    plain_responses: list[ResponseRecord]
    """Plain decoding of the same prompts, in the same order."""
    examples: list[Example]
    compiled: CompiledBaseline | None = optional()
    """None where it was not measured, as on a CPU."""

    @property
    def acceptance(self) -> Acceptance:
        """The verifications, one histogram a response."""
        return acceptance_of(self.responses, self.block_size)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A drafter against the first one, on the same prompts."""

    set: str
    temperature: float
    width: Width
    drafter: str
    baseline: str
    """The first drafter's name."""
    tau_gain: Estimate
    """Ratio of the taus minus 1."""
    speed_ratio: Estimate
    """Ratio of tokens a second."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Predicted decode_speedup by verify width, with what was measured."""

    drafter: str
    set: str
    temperature: float
    concurrency: int
    """Prompts at once."""
    widths: list[int]
    speedups: list[float]
    """Predicted, one a width."""
    measured: list[float | None]
    """One a width; None where that was not measured."""


@dataclass(frozen=True, kw_only=True)
class LlamacppRow:
    """What llama.cpp made of the exported drafter, on one set."""

    set: str
    plain_tokens_per_second: float
    tokens_per_second: float
    num_same_text: int
    num_responses: int
    threads: int


@dataclass(frozen=True, kw_only=True)
class ComparedRow:
    """An objective on one set, all seeds pooled, measured on held-out responses."""

    set: str
    drafter: str
    """The objective."""
    temperature: float
    num_prompts: int
    block_size: int
    histogram: list[int]
    tau: float | None
    tau_interval: Interval
    tau_by_seed: list[float | None]
    reach_rate: list[float]
    gain: Estimate
    """Tau over the baseline's, as a ratio minus 1."""
    gain_by_seed: list[float | None]
    step_seconds: float | None
    """Median of the training steps; None where no step was logged."""
    peak_memory_bytes: int | None
    """While training; None where that is not known."""


@dataclass(frozen=True, kw_only=True)
class SideRecord:
    """What one server answered to a group of requests; the lists have one entry a request."""

    token_ids: list[list[int]]
    decode_tokens: list[int]
    decode_seconds: list[float]
    first_seconds: list[float]
    """To the first token."""
    seconds: float
    """Until all were answered."""
    counts: Counts | None
    """Verifications, as far as the server reports them."""


@dataclass(frozen=True, kw_only=True)
class GroupRecord:
    """Prompts that were sent to servers together; a line of servers.jsonl."""

    set: str
    ids: list[str]
    """The prompts'."""
    temperature: float
    concurrency: int
    turns: list[dict[str, SideRecord]]
    """For each turn the answers by side, `drafter` and `plain`."""


@dataclass(frozen=True, kw_only=True)
class ServerRow:
    """A server with a drafter, on one set at one temperature and concurrency; `plain_` is the one without."""

    set: str
    temperature: float
    concurrency: int
    tokens_per_second: float
    """Rate of a request after its first token."""
    throughput: float
    """Tokens a second of all requests together, with prompts read."""
    first_seconds: tuple[float, float]
    """To the first token: median and 95th percentile."""
    plain_tokens_per_second: float | None = optional()
    plain_throughput: float | None = optional()
    plain_first_seconds: tuple[float, float] | None = optional()
    num_responses: int
    tau: float | None
    """None where the server does not report verifications, as are the next ones."""
    tau_interval: Interval
    num_verifications: int | None
    histogram: list[int] | None
    reach_rate: list[float] | None
    decode_speedup: float | None
    """None without a plain server."""
    decode_speedup_interval: Interval
    num_same_text: int | None
    """None without a plain server."""
