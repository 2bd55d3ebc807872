"""Read and write results.json, servers.json and heldout.json; no other module does.

What numbers of results have to fit together, beyond their types.

What the files of a measurement hold: responses, groups of requests, and rows made from them.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, NoReturn

from dpace.config import Width
from dpace.metrics import Acceptance, published_tau
from dpace.recipes.validation import from_json, optional, to_json
from dpace.servers.apis import Counts
from dpace.system.ledger import write_json
from dpace.system.provenance import Hardware, Versions

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


def nullable(numbers: Iterable[float]) -> tuple[Any, ...]:
    """Replace those of several numbers that have no value by None."""
    return tuple(map(defined, numbers))


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


def tau_interval_of(responses: list[ResponseRecord], block_size: int) -> Interval:
    """Bootstrap the 95 % interval of tau; None for turns of one prompt, which say nothing of others."""
    if len({response.id for response in responses}) < 2:
        return None, None
    return nullable(acceptance_of(responses, block_size).interval())


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


MAX_COUNT = 2**53
"""Largest count that every reader of JSON keeps exactly."""


def check_rows(rows: list[Row]) -> None:
    """Refuse rows of `dpace bench` whose numbers contradict each other.

    Raises:
        ValueError: names the row and the value.
    """
    for number, row in enumerate(rows):
        where = f"rows[{number}]"
        _check_histogram(row.histogram, row.block_size, where)
        _expect(len(row.reach_rate) == row.block_size - 1, f"{where}.reach_rate", row.reach_rate, "one a draft slot")
        pair = len(row.responses), len(row.plain_responses)
        _expect(pair[0] == pair[1], f"{where}.responses", pair[0], f"as many as plain_responses, {pair[1]}")
        for place, response in enumerate(row.responses):
            _check_response(response, row.block_size, f"{where}.responses[{place}]")
        for place, response in enumerate(row.plain_responses):
            _check_times(response, f"{where}.plain_responses[{place}]")


def check_compared(rows: list[ComparedRow]) -> None:
    """Refuse rows of `dpace compare` whose numbers contradict each other."""
    for number, row in enumerate(rows):
        _check_histogram(row.histogram, row.block_size, f"rows[{number}]")


def check_served(rows: list[ServerRow]) -> None:
    """Refuse rows of servers whose numbers contradict each other."""
    for number, row in enumerate(rows):
        if row.histogram is not None:
            _check_histogram(row.histogram, len(row.histogram), f"rows[{number}]")


def _check_histogram(histogram: list[int], block_size: int, where: str) -> None:
    is_right = len(histogram) == block_size and all(0 <= count <= MAX_COUNT for count in histogram)
    _expect(is_right, f"{where}.histogram", histogram, f"{block_size} counts, one for each accepted length")


def _check_response(response: ResponseRecord, block_size: int, where: str) -> None:
    _check_histogram(response.histogram, block_size, where)
    lengths = response.accepted_lengths
    _expect(
        all(0 <= length < block_size for length in lengths), f"{where}.accepted_lengths", lengths, "below block_size"
    )
    is_right = 0 <= response.num_without_bonus <= MAX_COUNT
    _expect(is_right, f"{where}.num_without_bonus", response.num_without_bonus, "a count")
    _check_times(response, where)


def _check_times(response: ResponseRecord, where: str) -> None:
    tokens, seconds = response.decode_tokens, response.decode_seconds
    _expect(0 <= tokens <= MAX_COUNT, f"{where}.decode_tokens", tokens, "a count")
    is_right = 0 <= seconds <= MAX_COUNT and (seconds > 0 or not tokens)
    _expect(is_right, f"{where}.decode_seconds", seconds, f"the time of {tokens} tokens")


def _expect(is_right: bool, where: str, value: object, expected: str) -> None:
    if not is_right:
        raise ValueError(f"{where} is {value!r:.60}, expected {expected}")


SCHEMA_VERSION = 1
RESULT_FILES = ("results.json", "servers.json")
"""Names under which results are found in a folder."""
MEASURE_AGAIN = "measure again with this version of dpace"
HELDOUT_FILE = "heldout.json"
MAX_LOGGED = 1e15
"""Largest number of a training log that is drawn."""
SEED_RULE = "seed + i for prompt i, counted from 0"
"""How each prompt's seed is made, in results."""


@dataclass(frozen=True, kw_only=True)
class BenchSetup:
    """What was decoded, and how."""

    target: str
    drafters: dict[str, str]
    """Hashes of their weights, by name."""
    max_new_tokens: int
    seed: int
    prompt_seeds: str | None = optional()
    """`SEED_RULE`; one seed for all in results of older versions, which lack the next ones too."""
    target_weights_sha256: str | None = optional()
    """`dpace.system.provenance.weights_fingerprint`."""
    drafter_configs: dict[str, str] | None = optional()
    """Hashes of the drafters' configs, by name."""
    tokenizer_sha256: str | None = optional()
    chat_template_sha256: str | None = optional()
    thinking: bool | None = optional()


@dataclass(frozen=True, kw_only=True)
class Provenance(BenchSetup):
    """What made the numbers; responses have to share it and the prompts to be compared."""

    engine: str
    dtype: str
    hardware: Hardware
    versions: Versions


@dataclass(frozen=True, kw_only=True)
class BenchResults(Provenance):
    """results.json of `dpace bench`, and what `dpace compare` and `dpace demo` decoded."""

    schema_version: Literal[1] = SCHEMA_VERSION
    rows: list[Row]
    """One for each drafter, width, set and temperature."""
    comparisons: list[Comparison]
    """Every drafter against the first."""
    llamacpp: list[LlamacppRow] | None = optional()
    """What `dpace demo` measured in llama.cpp."""

    @property
    def whole_blocks(self) -> list[Row]:
        """The rows where whole drafts were verified, which say what a drafter can do; else all."""
        return [row for row in self.rows if row.width == "full"] or self.rows

    @property
    def num_same_text(self) -> int:
        """Responses, over all rows, that are the target's own text."""
        return sum(row.num_same_text for row in self.rows)

    @property
    def num_responses(self) -> int:
        """Responses over all rows."""
        return sum(row.num_responses for row in self.rows)


@dataclass(frozen=True, kw_only=True)
class CompareResults:
    """results.json of `dpace compare` and `dpace demo`."""

    schema_version: Literal[1] = SCHEMA_VERSION
    target: str
    baseline: str
    """The objective that the others are compared with."""
    seeds: list[int]
    reduction: str
    rows: list[ComparedRow]
    """One for each objective and set; those of all sets together come last where there are several."""
    decode: BenchResults | None
    """What decoding with the drafters of the first seed gave; None where that was left out."""


@dataclass(frozen=True, kw_only=True)
class ServerAddress:
    """Where a server runs."""

    url: str
    engine: str
    """What it turned out to be."""
    model: str | None = optional()
    """What it calls its model, where it says so."""


@dataclass(frozen=True, kw_only=True)
class ServerSetup:
    """What answers of servers have to share to be compared, beside the prompts."""

    target: str
    servers: dict[str, ServerAddress]
    """By side, `drafter` and `plain`."""
    max_new_tokens: int
    seed: int
    prompt_seeds: str | None = optional()
    """`SEED_RULE`; one seed for all in results of older versions, which lack the next ones too."""
    tokenizer_sha256: str | None = optional()
    chat_template_sha256: str | None = optional()
    thinking: bool | None = optional()


@dataclass(frozen=True, kw_only=True)
class ServerResults(ServerSetup):
    """servers.json of `dpace bench --bench.server`."""

    schema_version: Literal[1] = SCHEMA_VERSION
    rows: list[ServerRow]
    """One for each set, temperature and concurrency."""


Results = BenchResults | CompareResults | ServerResults


def write_results(path: Path, results: Results) -> None:
    """Write results, all or nothing."""
    write_json(path, to_json(results))


def read_results(path: Path) -> Results:
    """Read what `write_results` wrote; the type says what kind of results the file holds.

    Raises:
        ValueError: not JSON, of another schema version, or with missing, unknown or wrong keys.
        OSError: a file that cannot be read.
    """
    value = _load(path, MEASURE_AGAIN)
    version = value.get("schema_version")
    if type(version) is not int or version != SCHEMA_VERSION:
        found = f"schema_version {version!r:.40}" if "schema_version" in value else "no schema_version"
        _refuse(path, f"{found}, expected {SCHEMA_VERSION}", MEASURE_AGAIN)
    kinds = (BenchResults, CompareResults, ServerResults)
    kind = max(kinds, key=lambda kind: len(value.keys() & {entry.name for entry in fields(kind)}))
    for of_bench in (value, value.get("decode")):
        if isinstance(of_bench, dict):
            of_bench.pop("predictions", None)  # of other widths, in files of older versions
    try:
        results = from_json(kind, value)
        _check(results)
    except ValueError as error:
        _refuse(path, str(error), MEASURE_AGAIN)
    return results


def _check(results: Results) -> None:
    """Refuse numbers that contradict each other."""
    if isinstance(results, ServerResults):
        return check_served(results.rows)
    if isinstance(results, BenchResults):
        return check_rows(results.rows)
    check_compared(results.rows)
    if results.decode:
        _check(results.decode)


def find_results(folder: Path) -> list[Results]:
    """Read all results in a folder.

    Raises:
        ValueError: there is none, or one cannot be read.
    """
    found = [folder / name for name in RESULT_FILES if (folder / name).exists()]
    if not found:
        raise ValueError(
            f"{folder} has no {' or '.join(RESULT_FILES)}; `dpace demo`, `dpace bench` and `dpace compare` write one"
        )
    return [read_results(path) for path in found]


@dataclass(frozen=True, kw_only=True)
class Heldout:
    """heldout.json of a drafter of `dpace compare`: accepted lengths on held-out responses, by prompt."""

    ids: list[str]
    """The prompts'."""
    block_size: int
    histogram: list[list[int]]
    num_without_bonus: list[int]

    @classmethod
    def of(cls, ids: Sequence[str], acceptance: Acceptance) -> "Heldout":
        """Take the rows of an acceptance, one for each prompt."""
        without_bonus = acceptance.without_bonus.tolist()
        return cls(
            ids=list(ids),
            block_size=acceptance.block_size,
            histogram=acceptance.rows.tolist(),
            num_without_bonus=without_bonus,
        )

    def acceptance(self, ids: Sequence[str]) -> Acceptance | None:
        """Take the rows of some prompts, in the file's order; None where it has none of them."""
        wanted = set(ids)
        chosen = [i for i, prompt_id in enumerate(self.ids) if prompt_id in wanted]
        if not chosen:
            return None
        counts = [self.num_without_bonus[i] for i in chosen]
        return Acceptance([self.histogram[i] for i in chosen], self.block_size, counts)


def has_heldout(folder: Path) -> bool:
    """Whether a drafter's folder has its heldout.json."""
    return (folder / HELDOUT_FILE).exists()


def write_heldout(folder: Path, heldout: Heldout) -> None:
    """Write heldout.json into a drafter's folder, all or nothing."""
    write_json(folder / HELDOUT_FILE, to_json(heldout))


def read_heldout(folder: Path) -> Heldout:
    """Read the heldout.json of a drafter's folder.

    Raises:
        ValueError: not JSON, with missing, unknown or wrong keys, or with rows that do not fit together.
        OSError: a file that cannot be read.
    """
    path, fix = folder / HELDOUT_FILE, "remove the file: `dpace compare` measures this drafter again"
    value = _load(path, fix)
    try:
        heldout = from_json(Heldout, value)
    except ValueError as error:
        _refuse(path, str(error), fix)
    rows = len(heldout.ids), len(heldout.histogram), len(heldout.num_without_bonus)
    if len(set(rows)) > 1 or any(len(row) != heldout.block_size for row in heldout.histogram):
        found = "ids, histogram and num_without_bonus of {}, {} and {} prompts".format(*rows)
        _refuse(path, f"{found}, expected the same and {heldout.block_size} counts each", fix)
    return heldout


def read_log(folder: str | Path) -> list[dict[str, Any]]:
    """Read the training log of a drafter's folder, the `log_history` that the Trainer wrote.

    Raises:
        ValueError: a file that the Trainer did not write.
        OSError: a file that cannot be read.
    """
    path, fix = Path(folder) / "trainer_state.json", "train again, in an empty folder"
    log = _load(path, fix, allow_nan=True).get("log_history")
    if not isinstance(log, list) or not all(isinstance(entry, dict) for entry in log):
        _refuse(path, "no list of objects under log_history", fix)
    for number, entry in enumerate(log):
        for name, number_found in entry.items():
            is_drawn = name in ("step", "step_seconds", "eval_tau") or name.startswith("weight_share/")
            if is_drawn and (type(number_found) not in (int, float) or abs(number_found) > MAX_LOGGED):
                _refuse(path, f"log_history[{number}].{name} is {number_found!r:.60}, expected a number", fix)
        if "step" not in entry and any(name in entry for name in ("eval_tau", "step_seconds", "weight_share/1")):
            _refuse(path, f"log_history[{number}] has no step", fix)
    return log


def _load(path: Path, fix: str, *, allow_nan: bool = False) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        value = json.loads(path.read_bytes(), parse_constant=None if allow_nan else _refuse_constant)
    except (ValueError, RecursionError) as error:
        _refuse(path, f"not JSON ({error})", fix)
    if not isinstance(value, dict):
        _refuse(path, f"found {type(value).__name__}, expected an object", fix)
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _refuse(path: Path, what: str, fix: str) -> NoReturn:
    raise ValueError(f"{path}: {what}; {fix}")
