"""The files that measuring writes, and reading and writing them; no other module does.

The dataclasses are the files: a field is a key. A `PromptRecord` is a line of bench-*.jsonl or servers-*.jsonl;
`Results` are results.json and servers.json, which the report, the model card and scripts read; and `Heldout` is
heldout.json. The keys and types of what is read are checked.
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jinja2
from pydantic import Field
from pydantic.dataclasses import dataclass

from dpace.config import CountOrZero, VerifyRule, Width, options as json_object
from dpace.decode import Generation
from dpace.drafter.spec import DrafterSpec
from dpace.metrics import Acceptance
from dpace.servers.apis import Counts
from dpace.system.ledger import JsonObject, lock_folder, read_object, register_files, write_json, write_text
from dpace.system.provenance import Hardware, Versions
from dpace.system.validation import read_as, to_json

RESULT_FILES = ("results.json", "servers.json")
"""Names under which results are found in a folder."""
HELDOUT_FILE = "heldout.json"
MEASURE_AGAIN = "measure again with this version of dpace"

NOT_EMPTY = Field(min_length=1)
Seconds = Annotated[float, Field(ge=0)]
Estimate = tuple[float | None, float | None, float | None]
"""A number and the ends of its 95 % interval; None where there are too few prompts for one, or nothing to measure."""


def defined(value: float) -> float | None:
    """Replace what has no value, nan or infinite, by None, as JSON has neither."""
    return float(value) if math.isfinite(value) else None


def nullable(numbers: Iterable[float]) -> tuple[Any, ...]:
    """Replace the numbers that have no value by None."""
    return tuple(map(defined, numbers))


@json_object
class Setup:
    """What all records of a measurement share; with the prompts, it tells them from records of another measurement.

    Prompt `i` draws with `seed + i`.
    """

    target: str
    max_new_tokens: int
    seed: int
    tokenizer_sha256: str
    chat_template_sha256: str
    thinking: bool


@json_object
class Provenance(Setup):
    """What made the numbers of `dpace bench`."""

    drafters: dict[str, str]
    """Hashes of the drafters' weights, by name."""
    target_weights_sha256: str
    """`dpace.target.Target.sha256`."""
    drafter_configs: dict[str, str]
    """Hashes of the drafters' configs, by name."""
    widths: list[Width]
    engine: str
    dtype: str
    hardware: Hardware
    versions: Versions


@json_object
class ServerAddress:
    """Where a server runs."""

    url: str
    engine: str
    """What it turned out to be."""
    model: str | None
    """What it calls its model, where it says so."""
    version: str | None
    """Which version of the engine runs, where it says so."""


@json_object
class ServerSetup(Setup):
    """What made the numbers of running servers."""

    servers: dict[str, ServerAddress]
    """By side: `plain`, and `drafter` or the depths that were compared."""


@json_object
class ResponseRecord(Generation):
    """One response, decoded by a drafter or plainly."""

    accepted_lengths: list[CountOrZero]
    emitted_lengths: list[CountOrZero]
    decode_seconds: Seconds
    drafter: str
    """Its name, or `PLAIN` of `dpace.measure.records`."""
    width: Width | None
    """None for plain decoding."""
    id: str
    """Id of the prompt."""
    turn: int
    """Turn of the prompt, from 0."""
    prompt_tokens: int
    same_text: bool
    """Whether it has the tokens of plain decoding."""


@json_object
class ServedAnswer:
    """What a server answered to one turn of a prompt."""

    token_ids: list[int]
    decode_seconds: Seconds
    """After the first token."""
    counts: Counts | None
    """Verifications; None where the server reports none."""

    @property
    def num_decode_tokens(self) -> int:
        """Number of tokens after the first."""
        return len(self.token_ids) - 1


@json_object
class PromptRecord:
    """A prompt that was measured at a temperature."""

    set: str
    id: str
    """Id of the prompt."""
    temperature: float


@json_object
class BenchRecord(PromptRecord):
    """A prompt that was decoded in every way; a line of bench-*.jsonl."""

    responses: Annotated[list[ResponseRecord], NOT_EMPTY]
    """Turn by turn."""


@json_object
class ServedRecord(PromptRecord):
    """A prompt that servers answered; a line of servers-*.jsonl."""

    turns: Annotated[list[dict[str, ServedAnswer]], NOT_EMPTY]
    """For each turn the answers by side: `drafter` or the depths, and `plain` and `plain again` where there is such a
    server."""


@json_object
class DraftedRow:
    """What a drafter accepts on one set at one temperature."""

    drafter: str
    """Its name; in results of `dpace compare` the objective."""
    set: str
    temperature: float
    """At which the target wrote the responses."""
    block_size: int
    histogram: list[CountOrZero]
    """Verifications by accepted length."""
    tau: Estimate
    """Pooled over verifications; None without one."""
    reach_rate: list[float]


@json_object
class Row(DraftedRow):
    """A drafter with one width, on one set at one temperature, against plain decoding."""

    verify_rule: VerifyRule
    """The rule that verified the drafts."""
    width: Width
    num_responses: int
    tau_gain: Estimate
    """Tau over the first drafter's tau, on the same prompts, as a ratio minus 1."""
    speed_ratio: Estimate
    """Tokens a second over the first drafter's."""
    share_copied: float
    """Share of the tokens that prompt lookup proposed, 0 to 1."""
    tokens_per_second: float
    plain_tokens_per_second: float
    decode_speedup: Estimate
    """None where every response is a single token."""
    num_same_text: int
    responses: list[ResponseRecord]
    plain_responses: list[ResponseRecord]
    """Plain decoding of the same prompts, in the same order."""

    @property
    def keeps_text(self) -> bool:
        """Whether the text is to be the target's own; above temperature 0, the rule `speculative` draws another."""
        return self.temperature == 0 or self.verify_rule == "equality"


@json_object
class ComparedRow(DraftedRow):
    """An objective on one set, all seeds pooled, measured on held-out responses."""

    num_prompts: int
    tau_by_seed: list[float | None]
    gain: Estimate
    """Tau over the baseline's, as a ratio minus 1."""


def split_depth(depth: str) -> tuple[int, str, str]:
    """Return the number of draft tokens of a depth, its p-min and its kind of n-grams, which may be empty."""
    draft, _, ngrams = depth.partition("+")
    count, _, p_min = draft.partition("@")
    return int(count), p_min, ngrams


@json_object
class ServerRow:
    """A server with a drafter, on one set at one temperature; `plain_` is the one without."""

    set: str
    temperature: float
    depth: str | None
    """Draft tokens that the server was started with, of several that are compared; `7@0.5` has a p-min of 0.5."""
    num_responses: int
    tau: Estimate
    """None where the server does not report verifications, as is the next one."""
    num_verifications: int | None
    num_drafted: int | None
    """Draft tokens of these verifications; None where the server does not say."""
    tau_here: Estimate
    """Tau of whole drafts in this process, on the prompts that both have; from results.json."""
    tau_over_here: Estimate
    """Ratio of the taus on these prompts minus 1."""
    tokens_per_second: float | None
    """Rate of a request after its first token; None where all tokens came at once."""
    plain_tokens_per_second: float | None
    """None without a plain server, as are the next ones."""
    decode_speedup: Estimate
    """Ratio of these two rates."""
    num_same_text: int | None
    """Responses with the plain server's text."""
    control_same_text: int | None
    """Texts of the plain server's own second pass that equal its first."""


@json_object
class BenchResults(Provenance):
    """results.json of `dpace bench`, and what `dpace compare` and `dpace demo` decoded."""

    schema_version: Literal[2] = 2
    rows: Annotated[list[Row], NOT_EMPTY]
    """One or more: for each drafter, width, set and temperature."""


@json_object
class CompareResults:
    """results.json of `dpace compare` and `dpace demo`."""

    schema_version: Literal[2] = 2
    target: str
    baseline: str
    """The objective that the others are compared with."""
    seeds: list[int]
    reduction: str
    rows: Annotated[list[ComparedRow], NOT_EMPTY]
    """One for each objective and set; the rows of all sets together come last where there are several."""
    decode: BenchResults | None
    """What decoding with the drafters of the first seed gave; None where that was left out."""


@json_object
class ServerResults(ServerSetup):
    """servers.json of `dpace bench --bench.server`."""

    schema_version: Literal[4] = 4
    tau_in_training: float | None
    """Tau of the validation responses, which chose the checkpoint; None where the log is missing."""
    drafter_sha256: str | None
    """Hash of the weights of `drafter` in the same folder, where depths were compared; None where it has none."""
    hardware: Hardware | None
    """This machine, where the servers ran on it too; None where one ran elsewhere."""
    rows: Annotated[list[ServerRow], NOT_EMPTY]
    """One for each set and temperature."""


Results = BenchResults | CompareResults | ServerResults


def write_results(path: Path, results: Results) -> None:
    """Write results, all or nothing."""
    write_json(path, to_json(results))


def write_profile(folder: Path, spec: DrafterSpec, rows: Sequence[Row], target: str) -> None:
    """Write how a drafter's whole drafts are accepted, in NVIDIA's schema, which is made for tools of deployment.

    The keys stand in `speculation_profile.json.jinja`. A length there is the number of accepted draft tokens plus one,
    also where a text ends without its bonus token. So the mean is 1 plus the sum of the marginal rates, and at least
    tau.

    Args:
        folder: for `speculation_profile.json`.
        spec: of the drafter.
        rows: what measured it. Of those of the first drafter at the first temperature, the ones with width `full`
            count, all sets together; without one, the profile says that nothing was measured.
        target: the target's name.

    Source: schema 1.0 of NVIDIA's Model-Optimizer, `examples/specdec_bench/specdec_bench/speculation_profile.py` (its
    pull requests 2247, 2313 and 2315, open when this was written).
    """
    size = spec.num_draft_tokens + 1
    whole = [
        row
        for row in rows
        if (row.block_size, row.width, row.temperature, row.drafter)
        == (size, "full", rows[0].temperature, rows[0].drafter)
    ]
    acceptance = Acceptance([[0] * size, *(row.histogram for row in whole)], size)
    template = jinja2.Template(Path(__file__).with_name("speculation_profile.json.jinja").read_text(), trim_blocks=True)
    write_text(
        folder / "speculation_profile.json",
        template.render(spec=spec, rows=whole, acceptance=acceptance, target=target),
    )


def read_results(path: Path) -> Results:
    """Read what `write_results` wrote; the type says what kind of results the file holds.

    Raises:
        ValueError: not JSON, of another schema version, or with missing, unknown or wrong keys.
        OSError: a file that cannot be read.
    """
    value = read_object(path, MEASURE_AGAIN)
    # Each kind but the first has a key that no other kind has.
    kind = BenchResults
    if "decode" in value:
        kind = CompareResults
    elif "servers" in value:
        kind = ServerResults
    return read_as(kind, value, path, MEASURE_AGAIN)


def refuse_other_results(path: Path, kind: type[BenchResults | CompareResults]) -> None:
    """Refuse to write over results of another kind; a file that cannot be read may be written over.

    Raises:
        ValueError: names the file and the way out.
    """
    try:
        is_other = path.exists() and not isinstance(read_results(path), kind)
    except ValueError:
        return
    if is_other:
        raise ValueError(f"{path} holds what another verb measured; name another folder with --output")


def find_results(folder: Path) -> list[Results]:
    """Read all results in a folder.

    Raises:
        ValueError: there is none, or one cannot be read.
    """
    paths = [folder / name for name in RESULT_FILES if (folder / name).exists()]
    if not paths:
        raise ValueError(f"{folder} has no {' or '.join(RESULT_FILES)}; measure with `dpace bench` or `dpace compare`")
    return [read_results(path) for path in paths]


@json_object
class Heldout:
    """heldout.json of a drafter of `dpace compare`: accepted lengths on held-out responses, by prompt."""

    ids: list[str]
    """Ids of the prompts."""
    block_size: int
    histogram: list[list[CountOrZero]]
    num_without_bonus: list[CountOrZero]
    responses_sha256: str
    """Hash of the responses."""

    def acceptance(self, ids: Sequence[str]) -> Acceptance | None:
        """Take the rows of some prompts, in their order; None where no row is of these prompts."""
        places = {prompt_id: place for place, prompt_id in enumerate(self.ids)}
        chosen = [places[prompt_id] for prompt_id in ids if prompt_id in places]
        if not chosen:
            return None
        num_without_bonus = [self.num_without_bonus[place] for place in chosen]
        return Acceptance([self.histogram[place] for place in chosen], self.block_size, num_without_bonus)


def write_heldout(folder: Path, ids: list[str], acceptance: Acceptance, sha256: str) -> None:
    """Write heldout.json into a drafter's folder, all or nothing, from an acceptance with a row for each prompt.

    `sha256` is the hash of the responses.
    """
    heldout = Heldout(
        ids=ids,
        block_size=acceptance.block_size,
        histogram=acceptance.rows.tolist(),
        num_without_bonus=acceptance.without_bonus.tolist(),
        responses_sha256=sha256,
    )
    with lock_folder(folder):
        register_files(folder, HELDOUT_FILE)
        write_json(folder / HELDOUT_FILE, to_json(heldout))


def read_heldout(folder: Path) -> Heldout:
    """Read the heldout.json of a drafter's folder.

    Raises:
        ValueError: not JSON, or with missing, unknown or wrong keys.
        OSError: a file that cannot be read.
    """
    path = folder / HELDOUT_FILE
    fix = "remove the file: `dpace compare` measures this drafter again"
    return read_as(Heldout, read_object(path, fix), path, fix)


@dataclass
class Log:
    """What is read of `trainer_state.json`."""

    log_history: list[dict[str, float]]


def read_log(folder: str | Path) -> list[JsonObject]:
    """Read the training log of a drafter's folder: `log_history` of `trainer_state.json`.

    Raises:
        ValueError: a file that training did not write.
        OSError: a file that cannot be read.
    """
    path = Path(folder) / "trainer_state.json"
    fix = "train again, in an empty folder"
    entries = read_as(Log, read_object(path, fix), path, fix).log_history
    if not all("step" in entry for entry in entries):
        raise ValueError(f"{path}: an entry of log_history has no step; {fix}")
    return entries
