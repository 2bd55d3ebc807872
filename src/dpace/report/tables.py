"""Tables of results for the terminal, and the cells that they share with the page."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dpace.measure.results import BenchResults, CompareResults, ServerResults
from dpace.measure.rows import ComparedRow, Comparison, Estimate, Interval, Prediction, Row, ServerRow
from dpace.report.markdown import one_line

Verdict = Literal["faster", "slower", "no clear difference", "too few prompts"]


def console() -> Console:
    """Make the console for tables, at least 140 columns wide, so that a file has unbroken numbers."""
    return Console(width=max(140, Console().width))


def plain(text: str) -> str:
    """Write a text that the terminal shows as it is: in one line, and no markup of rich."""
    return escape(one_line(text))


def shown(cells: Sequence[str]) -> list[str]:
    """Write cells that the terminal shows as they are."""
    return [plain(cell) for cell in cells]


def results_table(results: BenchResults) -> Table:
    """Make one line for each drafter, width, set and temperature, with 95 % intervals or counts.

    With width `auto`, tau counts tokens a pass of the target, passes without a draft included, and tokens that were
    copied from the text instead of drafted; the caption says how many. The columns with a star are what published
    tables have, see `dpace.metrics.published_tau`.
    """
    table = Table(
        title=plain(f"{Path(results.target).name}, {results.dtype}, {results.hardware.device}"),
        caption="*: as in published tables: the mean over responses of their means, and mean seconds a token\n"
        + plain(copied_note(results.rows, start="")),
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for heading in RESULT_HEADINGS:
        is_text = heading in ("set", "drafter", "width", "")
        table.add_column(heading, justify="left" if is_text else "right", no_wrap=True)
    for row in results.rows:
        table.add_row(*shown(result_cells(row)))
    return table


def copied_note(rows: Sequence[Row], start: str) -> str:
    """Say how many tokens of each set prompt lookup copied with width `auto`; empty where it copied none."""
    shares = {(row.set, row.temperature): row.share_copied for row in rows if row.width == "auto"}
    if not any(shares.values()):
        return ""
    listed = ", ".join(f"{name} {share:.0%} at T={temperature:g}" for (name, temperature), share in shares.items())
    return f"{start}with width auto, tokens copied from the text before them (prompt lookup): {listed}"


RESULT_HEADINGS = (
    "set",
    "T",
    "drafter",
    "width",
    "tau [95 %]",
    "tok/s",
    "plain",
    "decode_speedup [95 %]",
    "tau*",
    "speedup*",
    "same text",
    "",
)


def result_cells(row: Row) -> list[str]:
    """Write a line of `results_table`."""
    return [
        row.set,
        f"{row.temperature:g}",
        row.drafter,
        str(row.width),
        with_interval(row.tau, row.tau_interval),
        f"{row.tokens_per_second:.1f}",
        f"{row.plain_tokens_per_second:.1f}",
        with_interval(row.decode_speedup, row.decode_speedup_interval),
        with_interval(row.published.tau),
        with_interval(row.published.decode_speedup),
        f"{row.num_same_text}/{row.num_responses}",
        verdict(row.decode_speedup_interval),
    ]


def slots_table(results: BenchResults) -> Table:
    """Show how often the drafts of a block are all accepted up to each slot."""
    rows = results.whole_blocks
    block_size = max((row.block_size for row in rows), default=1)
    table = Table(
        title="reach rate: share of verifications that accepted slots 1..k", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for heading in ("set", "T", "drafter", *map(str, range(1, block_size))):
        table.add_column(heading, justify="left" if heading in ("set", "drafter") else "right", no_wrap=True)
    for row in rows:
        table.add_row(*shown([row.set, f"{row.temperature:g}", row.drafter]), *(f"{x:.2f}" for x in row.reach_rate))
    return table


def drafters_table(comparisons: Sequence[Comparison]) -> Table:
    """Make one line for each drafter but the first: against it, on the same prompts."""
    title = plain(f"paired comparison with {comparisons[0].baseline}, the same prompts, 95 % intervals")
    table = Table(*PAIR_HEADINGS, title=title, box=SIMPLE_HEAD)
    for row in comparisons:
        table.add_row(*shown(pair_cells(row)))
    return table


PAIR_HEADINGS = ("set", "T", "drafter", "width", "tau", "tokens a second, ratio")


def pair_cells(row: Comparison) -> list[str]:
    """Write a line of `drafters_table`."""
    ratio, low, high = row.speed_ratio
    start = [row.set, f"{row.temperature:g}", row.drafter, str(row.width)]
    return [*start, percent(row.tau_gain), with_interval(ratio, (low, high))]


def predictions_table(predictions: Sequence[Prediction]) -> Table:
    """Make one line for each drafter, set, temperature and concurrency: predicted decode_speedup by width.

    What was measured stands beside the predictions.
    """
    widths = predictions[0].widths
    table = Table(
        title="predicted decode_speedup by verification length (measured in parentheses)",
        caption="with several prompts at once, the baseline is plain decoding of as many",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for heading in ("set", "T", "drafter", "at once", *map(str, widths), "best"):
        is_text = heading in ("set", "drafter", "best")
        table.add_column(heading, justify="left" if is_text else "right", no_wrap=True)
    for row in predictions:
        table.add_row(*shown(prediction_cells(row)))
    return table


def prediction_cells(prediction: Prediction) -> list[str]:
    """Write a line of `predictions_table`."""
    speedups, measured = prediction.speedups, prediction.measured
    numbers = [
        f"{value:.2f}" + ("" if found is None else f" ({found:.2f})")
        for value, found in zip(speedups, measured, strict=True)
    ]
    width, _ = prediction_advice(prediction)
    advice = "do not use" if width is None else f"width {width}"
    start = [prediction.set, f"{prediction.temperature:g}", prediction.drafter, str(prediction.concurrency)]
    return [*start, *numbers, advice]


def prediction_advice(prediction: Prediction) -> tuple[int | None, float]:
    """Give the width that is predicted to be fastest, None where no width gains; and its decode_speedup."""
    best = max(range(len(prediction.speedups)), key=prediction.speedups.__getitem__)
    speedup = prediction.speedups[best]
    return (prediction.widths[best] if speedup > 1 else None), speedup


def servers_table(results: ServerResults) -> Table:
    """Make one line for each set, temperature and concurrency."""
    servers = ", ".join(f"{side} {server.engine} at {server.url}" for side, server in results.servers.items())
    table = Table(title=plain(f"{Path(results.target).name}: {servers}"), box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in SERVER_HEADINGS:
        table.add_column(heading, justify="left" if heading in ("set", "") else "right", no_wrap=True)
    for row in results.rows:
        table.add_row(*shown(server_cells(row)))
    return table


SERVER_HEADINGS = (
    "set",
    "T",
    "at once",
    "tau",
    "tok/s",
    "plain",
    "throughput",
    "plain",
    "TTFT s (95 %)",
    "decode_speedup",
    "same text",
    "",
)


def server_cells(row: ServerRow) -> list[str]:
    """Write a line of `servers_table`."""
    has_plain = row.num_same_text is not None
    return [
        row.set,
        f"{row.temperature:g}",
        str(row.concurrency),
        "not told" if row.tau is None else with_interval(row.tau, row.tau_interval),
        f"{row.tokens_per_second:.1f}",
        "-" if row.plain_tokens_per_second is None else f"{row.plain_tokens_per_second:.1f}",
        f"{row.throughput:.1f}",
        "-" if row.plain_throughput is None else f"{row.plain_throughput:.1f}",
        "{:.2f} ({:.2f})".format(*row.first_seconds),
        with_interval(row.decode_speedup, row.decode_speedup_interval),
        f"{row.num_same_text}/{row.num_responses}" if has_plain else "-",
        verdict(row.decode_speedup_interval) if has_plain else "",
    ]


def compare_table(results: CompareResults) -> Table:
    """Make one line for each set and objective: tau, its gain, and what training and decoding took."""
    decoded = results.decode.rows if results.decode else []
    speeds = {(row.set, row.drafter): row for row in decoded if row.temperature == 0}
    seeds = ", ".join(map(str, results.seeds))
    table = Table(
        title=plain(f"{Path(results.target).name}, reduction {results.reduction}, seeds {seeds}, T=0"),
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    gain = plain(f"over {results.baseline} [95 %]")
    for heading in ("set", "objective", "tau [95 %]", gain, "by seed", "decode_speedup [95 %]", "ms/step", "peak GiB"):
        table.add_column(heading, justify="left" if heading in ("set", "objective") else "right", no_wrap=True)
    for row in results.rows:
        speed, peak = speeds.get((row.set, row.drafter)), row.peak_memory_bytes
        table.add_row(
            *shown(compared_cells(row, results.baseline)),
            with_interval(speed.decode_speedup, speed.decode_speedup_interval) if speed else "-",
            "-" if row.step_seconds is None else f"{1000 * row.step_seconds:.0f}",
            "-" if peak is None else f"{peak / 2**30:.2f}",
        )
    return table


def compared_cells(row: ComparedRow, baseline: str) -> list[str]:
    """Write set, objective, tau and its gain: the start of a line of `compare_table`."""
    gains = ["-", "-"]
    if row.drafter != baseline:
        by_seed = ("-" if gain is None else f"{100 * gain:+.1f}" for gain in row.gain_by_seed)
        gains = [percent(row.gain), " ".join(by_seed)]
    return [row.set, row.drafter, with_interval(row.tau, row.tau_interval), *gains]


def check_table(findings: Sequence[tuple[str, str, bool, str]], title: str) -> Table:
    """Make one line for each check: name, cases, whether it passed, detail."""
    table = Table("check", "cases", "", "found", title=plain(title), box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name, cases, is_passed, detail in findings:
        table.add_row(*shown([name, cases, "pass" if is_passed else "FAIL", detail]))
    return table


def doctor_table(diagnoses: Sequence[tuple[str, str, str, str, str]], title: str) -> Table:
    """Make one line for each check: name, result, found, expected and, where it is not right, what to do."""
    table = Table("check", "", "found", "expected", "to do", title=plain(title), box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name, result, found, expected, fix in diagnoses:
        is_wrong = result in ("fails", "warns")
        style = {"fails": "bold red", "warns": "yellow", "skipped": "dim"}.get(result, "")
        words = result.upper() if result == "fails" else result
        table.add_row(*shown([name, words, found, expected if is_wrong else "", fix]), style=style)
    return table


def with_interval(value: float | None, interval: Interval = (None, None)) -> str:
    """Write `1.23 [1.20, 1.26]`, the number alone where it has no interval, or `-` for none."""
    low, high = interval
    if value is None:
        return "-"
    return f"{value:.2f}" if low is None or high is None else f"{value:.2f} [{low:.2f}, {high:.2f}]"


def percent(gain: Estimate) -> str:
    """Write a gain and the ends of its interval, `+5.6 % [+3.1, +8.3]`, or `-` where there is none."""
    value, low, high = gain
    if value is None:
        return "-"
    ends = "" if low is None or high is None else f" [{100 * low:+.1f}, {100 * high:+.1f}]"
    return f"{100 * value:+.1f} %{ends}"


def verdict(speedup_interval: Interval) -> Verdict:
    """Say whether a drafter makes decoding faster, from the interval of its decode_speedup."""
    low, high = speedup_interval
    if low is None or high is None:
        return "too few prompts"
    return "faster" if low > 1 else "slower" if high < 1 else "no clear difference"
