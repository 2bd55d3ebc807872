"""Read and write results.json, servers.json and heldout.json; no other module does."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, NoReturn

from dpace.data.typed_json import from_json, optional, to_json
from dpace.ledger import write_json
from dpace.measure.row_checks import check_compared, check_rows, check_served
from dpace.measure.rows import ComparedRow, Comparison, LlamacppRow, Prediction, Row, ServerRow
from dpace.metrics import Acceptance
from dpace.provenance import Hardware, Versions

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
    """`dpace.provenance.weights_fingerprint`."""
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
    """results.json of `dpace bench` and `dpace demo`."""

    schema_version: Literal[1] = SCHEMA_VERSION
    rows: list[Row]
    """One for each drafter, width, set and temperature."""
    comparisons: list[Comparison]
    """Every drafter against the first."""
    predictions: list[Prediction]
    llamacpp: list[LlamacppRow] | None = optional()
    """What `dpace demo` measured in llama.cpp."""
    heldout: list[ComparedRow] | None = optional()
    """Its objectives on all held-out prompts, by the walk: each set, then all together; the baseline is dflash."""

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
    """results.json of `dpace compare`."""

    schema_version: Literal[1] = SCHEMA_VERSION
    target: str
    baseline: str
    """The objective that the others are compared with."""
    seeds: list[int]
    reduction: str
    rows: list[ComparedRow]
    """One for each objective and set."""
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
        check_rows(results.rows, results.predictions)
        return check_compared(results.heldout or [])
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
