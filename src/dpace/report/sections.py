"""Tables of results: numbers with their intervals, verdicts, and what to read from them.

In come results, as other verbs wrote them; out come sections, which the terminal, the page and the model card show.
"""

from collections.abc import Iterator, Sequence
from operator import attrgetter
from pathlib import Path

from dpace.measure.results import (
    BenchResults,
    ComparedRow,
    CompareResults,
    DraftedRow,
    Estimate,
    Results,
    Row,
    ServerResults,
    ServerRow,
)
from dpace.report.tables import Section
from dpace.system.groups import group_by, spread_evenly

MAX_SLOTS = 15
"""Columns of slots that fit 80 characters."""
OF_FILE = (
    "Plain is dpace's own decoding of the numbers of this file. llama.cpp may be faster with the file itself: "
    "`dpace bench --server URL --plain-server URL` compares, see docs/laptop.md."
)
"""Stands below the speeds of a GGUF file."""


def with_interval(
    value: float | None, low: float | None = None, high: float | None = None, form: str = ".2f", unit: str = ""
) -> str:
    """Write `1.23 [1.20, 1.26]`, the number alone where it has no interval, or `-` for none."""
    if value is None:
        return "-"
    number = f"{value:{form}}{unit}"
    if low is None or high is None:
        return number
    return f"{number} [{low:{form}}, {high:{form}}]"


def percent(gain: Estimate) -> str:
    """Write a gain and the ends of its interval, `+5.6 % [+3.1, +8.3]`, or `-` where there is none."""
    value, *ends = [None if number is None else 100 * number for number in gain]
    return with_interval(value, *ends, form="+.1f", unit=" %")


def same_text(row: Row) -> str:
    """Count the responses with the target's own text, where they are to keep it."""
    return f"{row.num_same_text}/{row.num_responses}" if row.keeps_text else "-"


def _rates(row: Row | ServerRow) -> str:
    """Write tokens a second, and the rate of plain decoding in brackets."""
    plain = with_interval(row.plain_tokens_per_second, form=".1f")
    return f"{with_interval(row.tokens_per_second, form='.1f')} ({plain})"


def _way(row: Row) -> dict[str, str]:
    """Name a row; a width that copied says how many of the tokens."""
    width = str(row.width)
    if row.share_copied:
        width += f" {row.share_copied:.0%} copied"
    return {"set": row.set, "drafter": row.drafter, "width": width, "T": f"{row.temperature:g}"}


def verdict(estimate: Estimate, border: int = 1, above: str = "faster", below: str = "slower") -> str:
    """Tell on which side of a border the interval lies: by default, whether a decode_speedup is one.

    Returns:
        `above`, `below`, `not clear` or `too few prompts`.
    """
    _, low, high = estimate
    if low is None or high is None:
        return "too few prompts"
    if low > border:
        return above
    if high < border:
        return below
    return "not clear"


def served_verdict(row: ServerRow) -> str:
    """Judge whether a server accepts what this process does."""
    if row.tau[0] is None:
        return "not known"
    if row.tau_here[0] is None:
        return "no tau here"
    return verdict(row.tau_over_here, 0, "accepts more", "accepts less")


def tables_of(results: Results) -> Iterator[Section]:
    """Yield all tables of results, in the order in which they are read."""
    if isinstance(results, ServerResults):
        yield depths(results) if results.rows[0].depth else servers(results)
        return
    if isinstance(results, CompareResults):
        yield comparison(results)
        benchmark = results.decode
    else:
        benchmark = results
    if benchmark:
        yield speeds(benchmark)
        if len({row.drafter for row in benchmark.rows}) > 1:
            yield pairs(benchmark.rows)
    # Only whole drafts tell how far a drafter gets; `dpace compare` always measures these.
    whole = [row for row in results.rows if isinstance(row, ComparedRow) or row.width == "full"]
    if whole:
        yield slots(whole)


def speeds(results: BenchResults) -> Section:
    """Make the table of decoding, by set and temperature."""
    text = (
        "tau is the mean acceptance length: the tokens that one pass of the target emits, averaged over verifications. "
        "With width auto, passes without a draft count too, and tokens copied from the text before them. "
        "decode_speedup divides the tokens a second with the drafter by those of plain decoding, which stand in "
        "brackets; reading the prompt is not counted. Intervals are 95 %, by bootstrap over prompts."
    )
    rows = []
    for row in results.rows:
        way = _way(row)
        measured = {
            "decode_speedup [95 %]": with_interval(*row.decode_speedup),
            "tau [95 %]": with_interval(*row.tau),
            "tok/s (plain)": _rates(row),
            "same text": same_text(row),
        }
        rows.append({"verdict": verdict(row.decode_speedup)} | way | measured)
    title = f"Speed: {Path(results.target).name}, {results.dtype}, {results.hardware.device}"
    note = OF_FILE if results.target.endswith(".gguf") else ""
    return Section(title, text, rows, num_texts=4, note=note)


def pairs(rows: Sequence[Row]) -> Section:
    """Make the table of drafters against the first one."""
    first = rows[0].drafter
    compared = []
    for row in rows:
        if row.drafter != first:
            gains = {"tau [95 %]": percent(row.tau_gain), "speed ratio [95 %]": with_interval(*row.speed_ratio)}
            compared.append({"verdict": verdict(row.speed_ratio)} | _way(row) | gains)
    text = "Differences on the same prompts, with 95 % intervals of the paired difference."
    return Section(f"Compared with {first}", text, compared, num_texts=4)


def slots(whole: Sequence[DraftedRow]) -> Section:
    """Make one line for each drafter: how often the drafts of a block are all accepted up to each slot.

    There are at most `MAX_SLOTS` slots, evenly chosen. A drafter's blocks may be shorter than another's.
    """
    shown = spread_evenly(range(1, max(row.block_size for row in whole)), MAX_SLOTS)
    rows = []
    for row in whole:
        cells = {"set": row.set, "drafter": row.drafter, "T": f"{row.temperature:g}"}
        for slot in shown:
            cells[f"{slot}"] = ""
            if slot <= len(row.reach_rate):  # the anchor is slot 0, so the rates begin at slot 1
                cells[f"{slot}"] = f"{100 * row.reach_rate[slot - 1]:.0f}"
        rows.append(cells)
    title = "Reach rate in %: slots 1 to k of a whole draft all accepted"
    return Section(title, "What the drafter alone can do.", rows, num_texts=2)


def comparison(results: CompareResults) -> Section:
    """Make the table of `dpace compare`."""
    text = (
        "Mean acceptance length (tau) on held-out answers, which the target wrote at temperature "
        f"{results.rows[0].temperature:g}. Intervals are 95 %, paired: by bootstrap over prompts, and by Student's t "
        "where there are several seeds. With one seed, differences under 3 % say nothing."
    )
    baseline = results.baseline
    rows = []
    for row in results.rows:
        judgement = "baseline"
        gain = "-"
        if row.drafter != baseline:
            judgement = verdict(row.gain, 0, "better", "worse")
            if len(results.seeds) == 1 and abs(row.gain[0] or 1) < 0.03:  # which another seed may turn round
                judgement = "one seed"
            gain = percent(row.gain)
        cells = {
            "verdict": judgement,
            "set": row.set,
            "objective": row.drafter,
            "tau [95 %]": with_interval(*row.tau),
            f"over {baseline} [95 %]": gain,
        }
        rows.append(cells)
    seeds = ", ".join(map(str, results.seeds))
    title = f"Objectives: {Path(results.target).name}, reduction {results.reduction}, seeds {seeds}"
    return Section(title, text, rows, num_texts=3)


def servers(results: ServerResults) -> Section:
    """Make the table of a benchmark of running servers."""
    text = (
        "tau is the mean acceptance length that the server reports; beside it is that of whole drafts in this process, "
        "on the same prompts. tok/s counts the tokens of a request after its first one, one request at a time; those "
        "of the plain server stand in brackets, and speed says on which side of 1 the ratio of both lies. Same text "
        "counts the texts that are those of the plain server's first pass; in brackets, those of its own second pass."
    )
    rows = []
    for row in results.rows:
        speed = "-"
        same = "-"
        if row.num_same_text is not None:  # there is a plain server
            speed = verdict(row.decode_speedup)
            same = f"{row.num_same_text}/{row.num_responses} ({row.control_same_text})"
        cells = {
            "verdict": served_verdict(row),
            "speed": speed,
            "set": row.set,
            "T": f"{row.temperature:g}",
            "tau [95 %]": with_interval(*row.tau),
            "tau here": with_interval(row.tau_here[0]),
            "over here [95 %]": percent(row.tau_over_here),
            "tok/s (plain)": _rates(row),
            "same text (control)": same,
        }
        rows.append(cells)
    names = ", ".join(f"{side} {server.engine} at {server.url}" for side, server in results.servers.items())
    note = f"tau in training, on validation responses: {with_interval(results.tau_in_training)}"
    if not any(row.num_verifications for row in results.rows):
        note += ". The server tells no accepted drafts, so its tau cannot be had: read speed and texts."
    return Section(f"{Path(results.target).name}: {names}", text, rows, num_texts=3, note=note)


def depths(results: ServerResults) -> Section:
    """Make the table of servers that draft different numbers of tokens."""
    text = (
        "Depth is the number of draft tokens that the server was started with, and drafted is how many it drafted in a "
        "verification, on average. decode_speedup divides its tokens a second, one request at a time, by those of the "
        "server without a drafter, which stand in brackets. tau is the mean acceptance length that the server reports."
    )
    rows = []
    for row in results.rows:
        drafted = row.num_drafted / row.num_verifications if row.num_drafted and row.num_verifications else None
        rows.append(
            {
                "verdict": verdict(row.decode_speedup),
                "set": row.set,
                "T": f"{row.temperature:g}",
                "depth": f"{row.depth}",
                "decode_speedup [95 %]": with_interval(*row.decode_speedup),
                "tok/s (plain)": _rates(row),
                "tau [95 %]": with_interval(*row.tau),
                "drafted": with_interval(drafted, form=".1f"),
            }
        )
    server = results.servers[f"{results.rows[0].depth}"]
    title = f"Depth: {Path(results.target).name}, {server.engine} {server.version or ''}"
    return Section(title, text, rows, num_texts=3, note=f"best depth: {depths_note(results.rows)}")


def best_depths(rows: Sequence[ServerRow]) -> dict[tuple[str, float], ServerRow | None]:
    """Find the fastest depth of each set and temperature; None where none is clearly faster than no drafter."""
    best = {}
    for key, of_set in group_by(rows, attrgetter("set", "temperature")).items():
        faster = [row for row in of_set if verdict(row.decode_speedup) == "faster"]
        best[key] = max(faster, key=attrgetter("decode_speedup"), default=None)
    return best


def depths_note(rows: Sequence[ServerRow]) -> str:
    """Say which depth is best for each set and temperature, with its speedup."""
    parts = []
    is_judged = all(verdict(row.decode_speedup) != "too few prompts" for row in rows)
    for (name, temperature), row in best_depths(rows).items():
        found = "none: do not draft" if is_judged else "too few prompts"
        if row:
            found = f"{row.depth}, {with_interval(*row.decode_speedup)} times as fast"
        parts.append(f"{name} (T={temperature:g}) {found}")
    return "; ".join(parts)
