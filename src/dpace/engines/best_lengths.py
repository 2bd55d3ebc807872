"""Say the best verification length in each engine that was measured, or that nothing is gained."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from dpace.measure.results import BenchResults, ServerResults
from dpace.measure.rows import Row
from dpace.report.cells import prediction_advice, verdict, with_interval

NO_GAIN, UNKNOWN = "no gain", "too few prompts to tell"
DEMO_DRAFTER = "dpace"
"""Name of the drafter that `dpace demo` runs in llama.cpp."""


class Advice(NamedTuple):
    """The best verification length in one situation."""

    engine: str
    set: str
    temperature: float
    concurrency: int
    best: str
    """A number of tokens, the known one included; or `auto`, `no gain`, or why it is not known."""
    speedup: str
    """decode_speedup there; of the fastest length where nothing is gained."""


def best_lengths(results: BenchResults, drafters: Sequence[str]) -> Iterator[Advice]:
    """Choose among what `dpace bench` and `dpace demo` measured and predicted.

    Args:
        results: of the benchmark.
        drafters: names in `results` of the drafter.
    """
    rows = [row for row in results.rows if row.drafter in drafters]
    for name, temperature in dict.fromkeys((row.set, row.temperature) for row in rows):
        yield _measured([row for row in rows if (row.set, row.temperature) == (name, temperature)])
    for prediction in results.predictions:
        if prediction.drafter in drafters and prediction.concurrency > 1:
            width, speedup = prediction_advice(prediction)
            best = f"{NO_GAIN if width is None else width} (predicted)"
            yield Advice(
                "dpace", prediction.set, prediction.temperature, prediction.concurrency, best, f"{speedup:.2f}"
            )
    for row in results.llamacpp or () if DEMO_DRAFTER in drafters else ():
        ratio, size = row.tokens_per_second / row.plain_tokens_per_second, rows[0].block_size
        best = f"{size if ratio > 1 else NO_GAIN} ({row.num_responses} prompts)"
        yield Advice("llama.cpp", row.set, 0.0, 1, best, f"{ratio:.2f}")


def _measured(rows: Sequence[Row]) -> Advice:
    """Choose among rows of one set and temperature; only an interval above 1 is a gain."""
    found = {id(row): verdict(row.decode_speedup_interval) for row in rows}
    faster = [row for row in rows if found[id(row)] == "faster"]
    row = max(faster or rows, key=lambda row: row.decode_speedup or 0)
    best = f"{row.block_size}, whole drafts" if row.width == "full" else str(row.width)
    if not faster:
        best = UNKNOWN if "too few prompts" in found.values() else NO_GAIN
    speedup = with_interval(row.decode_speedup, row.decode_speedup_interval)
    return Advice("dpace", row.set, row.temperature, 1, best, speedup)


def served_lengths(results: ServerResults) -> Iterator[Advice]:
    """Say what servers gained with the length that they ran with; nothing where there was no plain server."""
    engine = results.servers["drafter"].engine
    for row in results.rows:
        if row.decode_speedup is None:
            continue
        found = verdict(row.decode_speedup_interval)
        ran = str(len(row.histogram)) if row.histogram else "as it was started"
        best = ran if found == "faster" else UNKNOWN if found == "too few prompts" else NO_GAIN
        speedup = with_interval(row.decode_speedup, row.decode_speedup_interval)
        yield Advice(engine, row.set, row.temperature, row.concurrency, best, speedup)
