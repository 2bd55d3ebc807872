"""Say in a sentence what a user gets from a measured drafter, and what to do where that is nothing."""

from dpace.measure.results import BenchResults
from dpace.report.cells import verdict


def faster_sets(results: BenchResults) -> list[str]:
    """Name the sets where some drafter, width or temperature is faster than plain decoding."""
    return list(dict.fromkeys(r.set for r in results.rows if verdict(r.decode_speedup_interval) == "faster"))


def advice(results: BenchResults) -> str:
    """Say on which sets decoding is faster; where that is none, say so and what can be done."""
    names, faster = list(dict.fromkeys(row.set for row in results.rows)), faster_sets(results)
    others = [name for name in names if name not in faster]
    if faster:
        rest = f", but not on {' and '.join(others)}: decode that without the drafter" if others else ""
        return f"faster than plain decoding on {' and '.join(faster)}{rest}"
    found = {verdict(row.decode_speedup_interval) for row in results.rows}
    if found <= {"slower"}:
        start = "nothing here is faster than plain decoding: decode without this drafter, or"
    else:
        start = "nothing here is clearly faster than plain decoding: measure more prompts, or"
    return f"{start} train longer or on more prompts (docs/training.md)"
