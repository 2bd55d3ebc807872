"""Tables of results: numbers with their intervals, verdicts, and what to read from them.

In come results, as other verbs wrote them; out come sections, which the terminal, the page and the model card show.
"""

from collections.abc import Iterator, Sequence
from operator import attrgetter
from pathlib import Path

from dpace.measure.records import group_by, spread_evenly
from dpace.measure.results import (
    BenchResults,
    ComparedRow,
    CompareResults,
    DraftedRow,
    Estimate,
    ExplainResults,
    Results,
    Row,
    ServerResults,
    ServerRow,
    SlotLoss,
)
from dpace.report.tables import Section

MAX_SLOTS = 15
"""Columns of slots that fit 80 characters."""
LEAST_REJECTED = 0.001
"""Share of the blocks below which nothing is said of what is rejected at a slot."""


def with_interval(
    value: float | None, low: float | None = None, high: float | None = None, form: str = ".2f", unit: str = ""
) -> str:
    """Write `1.23 [1.20, 1.26]`, the number alone where it has no interval, or `-` for none."""
    if value is None:
        return "-"
    number = f"{value:{form}}{unit}"
    return number if low is None or high is None else f"{number} [{low:{form}}, {high:{form}}]"


def percent(gain: Estimate) -> str:
    """Write a gain and the ends of its interval, `+5.6 % [+3.1, +8.3]`, or `-` where there is none."""
    return with_interval(*(None if end is None else 100 * end for end in gain), form="+.1f", unit=" %")


def same_text(row: Row) -> str:
    """Count the responses with the target's own text, where they are to keep it."""
    return f"{row.num_same_text}/{row.num_responses}" if row.keeps_text else "-"


def _rates(row: Row | ServerRow) -> str:
    """Write tokens a second, and those of plain decoding in brackets."""
    plain = with_interval(row.plain_tokens_per_second, form=".1f")
    return f"{with_interval(row.tokens_per_second, form='.1f')} ({plain})"


def _way(row: Row) -> dict[str, str]:
    """Name a row; a width that copied says how many of the tokens."""
    copied = f", {row.share_copied:.0%} copied" if row.share_copied else ""
    return {"set": row.set, "drafter": row.drafter, "width": f"{row.width}{copied}", "T": f"{row.temperature:g}"}


def verdict(estimate: Estimate, border: int = 1, above: str = "faster", below: str = "slower") -> str:
    """Tell on which side of a border the interval lies: by default, whether a decode_speedup is one.

    Returns:
        `above`, `below`, `not clear` or `too few prompts`.
    """
    _, low, high = estimate
    if low is None or high is None:
        return "too few prompts"
    return above if low > border else below if high < border else "not clear"


def judge_gain(row: ComparedRow) -> str:
    """Judge an objective from the interval of its gain: `better`, `worse`, or as `verdict` otherwise."""
    return verdict(row.gain, 0, "better", "worse")


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
    if isinstance(results, ExplainResults):
        yield losses_by_set(results)
        yield losses_by_slot(results)
        return
    if isinstance(results, CompareResults):
        yield comparison(results)
    benchmark = results.decode if isinstance(results, CompareResults) else results
    if benchmark:
        yield speeds(benchmark)
        if len({row.drafter for row in benchmark.rows}) > 1:
            yield pairs(benchmark.rows)
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
    rows = [
        {
            "verdict": verdict(row.decode_speedup),
            **_way(row),
            "decode_speedup [95 %]": with_interval(*row.decode_speedup),
            "tau [95 %]": with_interval(*row.tau),
            "tok/s (plain)": _rates(row),
            "same text": same_text(row),
        }
        for row in results.rows
    ]
    title = f"Speed: {Path(results.target).name}, {results.dtype}, {results.hardware.device}"
    compiled = {" ".join(_way(row).values()): row.compiled.decode_speedup for row in results.rows if row.compiled}
    notes = [advice(results)]
    if compiled:
        found = ", ".join(f"{way}: {with_interval(*speedup)}" for way, speedup in compiled.items())
        notes.append(f"decode_speedup over plain decoding with compiled steps: {found}")
    return Section(title, text, rows, num_texts=4, note="; ".join(filter(None, notes)))


def advice(results: BenchResults) -> str:
    """Tell what can be done where no drafter is clearly faster."""
    rows = [row for row in results.rows if row.width != "copies"] or results.rows
    if any(verdict(row.decode_speedup) == "faster" for row in rows):
        return ""
    return (
        "nothing here is clearly faster than plain decoding: measure more prompts, train longer or on more prompts "
        "(docs/train.md), or decode without the drafter"
    )


def pairs(rows: Sequence[Row]) -> Section:
    """Make the table of drafters against the first one."""
    first = rows[0].drafter
    cells = [
        {
            "verdict": verdict(row.speed_ratio),
            **_way(row),
            "tau [95 %]": percent(row.tau_gain),
            "speed ratio [95 %]": with_interval(*row.speed_ratio),
        }
        for row in rows
        if row.drafter != first
    ]
    text = "Differences on the same prompts, with 95 % intervals of the paired difference."
    return Section(f"Compared with {first}", text, cells, num_texts=4)


def slots(whole: Sequence[DraftedRow]) -> Section:
    """Make one line for each drafter: how often the drafts of a block are all accepted up to each slot.

    There are at most `MAX_SLOTS` slots, evenly chosen. A drafter's blocks may be shorter than another's.
    """
    shown = spread_evenly(range(1, max(row.block_size for row in whole)), MAX_SLOTS)
    rows = []
    for row in whole:
        rates = {slot: f"{100 * rate:.0f}" for slot, rate in enumerate(row.reach_rate, start=1)}
        named = {"set": row.set, "drafter": row.drafter, "T": f"{row.temperature:g}"}
        rows.append(named | {f"{slot}": rates.get(slot, "") for slot in shown})
    title = "Reach rate in %: slots 1 to k of a whole draft all accepted"
    return Section(title, "What the drafter alone can do.", rows, num_texts=2)


def comparison(results: CompareResults) -> Section:
    """Make the table of `dpace compare`."""
    text = (
        "Mean acceptance length (tau) on held-out answers, which the target wrote at temperature "
        f"{results.rows[0].temperature:g}. Intervals are 95 %, paired: by bootstrap over prompts, and by Student's t "
        "over seeds."
    )
    base = results.baseline
    rows = [
        {
            "verdict": "baseline" if row.drafter == base else judge_gain(row),
            "set": row.set,
            "objective": row.drafter,
            "tau [95 %]": with_interval(*row.tau),
            f"over {base} [95 %]": "-" if row.drafter == base else percent(row.gain),
        }
        for row in results.rows
    ]
    seeds = ", ".join(map(str, results.seeds))
    title = f"Objectives: {Path(results.target).name}, reduction {results.reduction}, seeds {seeds}"
    return Section(title, text, rows, num_texts=3)


def _own(loss: SlotLoss) -> str:
    """Write which share of the rejections is the drafter's own, `20 to 35 % [15, 41]`: bounds, and their interval."""
    ends = loss.own_least[0], loss.own_most[0], loss.own_least[1], loss.own_most[2]
    shares = [100 * min(max(0.0, share), 1.0) for share in ends if share is not None]
    if len(shares) < 2 or loss.rejected < LEAST_REJECTED:
        return "-"
    bounds = f"{shares[0]:.0f} to {shares[1]:.0f} %"
    return f"{bounds} [{shares[2]:.0f}, {shares[3]:.0f}]" if len(shares) == len(ends) else bounds


def losses_by_set(results: ExplainResults) -> Section:
    """Make the table of what is rejected, and how much of it is the drafter's own, for each set."""
    text = (
        "A draft slot does not know the tokens before it in its block, which the target draws. So some rejections no "
        f"block drafter avoids: estimated from {results.num_samples} continuations of the target behind each anchor. "
        "The others are the drafter's own. The two numbers are the bounds of that share, and in brackets stands the "
        "95 % interval over prompts around both."
    )
    rows = [
        {
            "set": row.set,
            "prompts": f"{row.num_prompts}",
            "blocks": f"{row.num_blocks}",
            "with a rejection": f"{100 * min(row.whole.rejected, 1.0):.0f} %",
            "the drafter's own [95 %]": _own(row.whole),
        }
        for row in results.rows
    ]
    title = f"Where tau is lost: {Path(results.target).name}, T={results.temperature:g}, {results.verify_rule}"
    return Section(title, text, rows, note=lever(results))


def lever(results: ExplainResults) -> str:
    """Tell what can bring tau up."""
    whole = results.rows[-1].whole
    least = whole.own_least[0]
    most = whole.own_most[0]
    if results.temperature == 0:
        return "at temperature 0 the text before decides every token, so all rejections are the drafter's own"
    if least is None or most is None:
        return "nothing was rejected"
    own = "train on more prompts, for more steps, or with another objective (docs/train.md)"
    blind = "train with a selector (docs/objectives.md), which knows the tokens before, or serve shorter drafts"
    if least > 0.5:
        return f"most rejections are the drafter's own: {own}"
    if most < 0.5:
        return f"most rejections no block drafter avoids: {blind}"
    return f"neither share is clearly larger: {own}; or {blind}; more --num-samples narrow the bounds"


def losses_by_slot(results: ExplainResults) -> Section:
    """Make one line for each slot, of all sets together."""
    rows = [
        {
            "slot": f"{slot}",
            "reached": f"{100 * loss.reached:.0f} %",
            "rejected": f"{100 * loss.rejected:.1f} %",
            "the drafter's own [95 %]": _own(loss),
        }
        for slot, loss in enumerate(results.rows[-1].slots, start=1)
    ]
    return Section("Slot by slot, in % of the blocks, and of what is rejected at the slot", "", rows)


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
        same = f"{row.num_same_text}/{row.num_responses} ({row.control_same_text})"
        rows.append(
            {
                "verdict": served_verdict(row),
                "speed": "-" if row.num_same_text is None else verdict(row.decode_speedup),
                "set": row.set,
                "T": f"{row.temperature:g}",
                "tau [95 %]": with_interval(*row.tau),
                "tau here": with_interval(row.tau_here[0]),
                "over here [95 %]": percent(row.tau_over_here),
                "tok/s (plain)": _rates(row),
                "same text (control)": "-" if row.num_same_text is None else same,
            }
        )
    names = ", ".join(f"{side} {server.engine} at {server.url}" for side, server in results.servers.items())
    trained = f"tau in training, on validation responses: {with_interval(results.tau_in_training)}"
    note = "; ".join(filter(None, [trained, texts_note(results.rows)]))
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


def texts_note(rows: Sequence[ServerRow]) -> str:
    """Compare greedy texts with those of the plain server's second pass, set by set; empty without such a server."""
    judged = [
        f"{row.set} {verdict(row.same_text_gain, 0, 'more often equal', 'less often equal')}"
        for row in rows
        if row.temperature == 0 and row.num_same_text is not None
    ]
    return f"greedy texts against the control, the plain server's second pass: {', '.join(judged)}" if judged else ""
