"""What a page says about results: a section each, made from their rows."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from dpace.measure.results import RESULT_FILES, BenchResults, CompareResults, ServerResults
from dpace.report.advice import advice
from dpace.report.cells import (
    PAIR_COLUMNS,
    SERVER_COLUMNS,
    compared_columns,
    copied_note,
    prediction_columns,
    result_columns,
    rows_of,
    verdict,
    with_interval,
)
from dpace.report.contexts import CONTEXT_COLUMNS, find_parts
from dpace.report.figures import Section
from dpace.report.plots import describe_errors


def headline(results: BenchResults) -> Section:
    """Say in one sentence a set what a user gets."""
    lines = []
    for name in dict.fromkeys(row.set for row in results.rows):
        greedy = [row for row in results.rows if row.set == name and row.temperature == 0]
        if not greedy:
            continue
        as_used = [row for row in greedy if row.width == "auto"] or greedy  # not the best of all that was tried
        best = max(as_used, key=lambda row: row.decode_speedup or 0)
        speed = with_interval(best.decode_speedup, best.decode_speedup_interval)
        copied = f"; {best.share_copied:.0%} of the tokens were copied from the text" if best.share_copied else ""
        found = verdict(best.decode_speedup_interval)
        lines.append(
            f"{name}: {found}, decode_speedup {speed} with {best.drafter}, width {best.width}, at temperature 0{copied}"
        )
    lines.append(f"Altogether: {advice(results)}")
    lines.append(f"{results.num_same_text} of {results.num_responses} responses are exactly the target's own text")
    return Section(f"Decoding {Path(results.target).name}", ". ".join(lines) + ".")


def speeds(results: BenchResults) -> Section:
    """Make the table by set and temperature."""
    text = (
        "tau is the mean acceptance length: the tokens that one pass of the target emits, averaged over verifications. "
        "With width auto, passes without a draft count too"
        + copied_note(results.rows, start="; ")
        + ". decode_speedup divides the tokens a second with the drafter by those of plain decoding; reading the "
        "prompt is not counted. Brackets hold 95 % intervals, by bootstrap over prompts. The starred columns follow "
        "published tables: the mean over responses of their means, and the ratio of mean seconds a token."
    )
    return Section("Speed", text, rows_of(result_columns(results.rows), results.rows))


def contexts(benchmarks: Sequence[BenchResults]) -> Section:
    """Make the table by category and by length of the context, with thinking on and off side by side."""
    text = (
        "tau of whole drafts, with 95 % intervals by bootstrap over prompts. A set's categories come first, then all "
        "prompts of the drafter by their length in tokens (1k is 1024), earlier turns included."
    )
    return Section("Category and context length", text, rows_of(CONTEXT_COLUMNS, find_parts(benchmarks)))


def concurrency(results: BenchResults) -> Section:
    """Make the table of predicted speeds with several prompts at once."""
    text = (
        "Predicted decode_speedup by the number of tokens verified at once. The baseline is plain decoding of as many "
        "prompts at once. Numbers in parentheses were measured."
    )
    several = [prediction for prediction in results.predictions if prediction.concurrency > 1]
    text += describe_errors(several, "predictions for several prompts")
    return Section(
        "Prompts at once", text, rows_of(prediction_columns(results.predictions[0].widths, ()), results.predictions)
    )


def paired(results: BenchResults) -> Section:
    """Make the table of drafters against the first one."""
    rows = rows_of(PAIR_COLUMNS, results.comparisons)
    title = f"Compared with {results.comparisons[0].baseline}"
    return Section(title, "Differences on the same prompts, with 95 % intervals of the paired difference.", rows)


def servers(results: ServerResults) -> Section:
    """Make the table of a benchmark of running servers."""
    names = ", ".join(f"{side}: {server.engine}" for side, server in results.servers.items())
    text = (
        f"{names}. tau is the mean acceptance length that the server reports. tok/s counts the tokens of a request "
        "after its first one. Throughput counts all requests together, with the time to read their prompts. TTFT is "
        "the time to the first token, as median and 95th percentile."
    )
    rows = rows_of(SERVER_COLUMNS, results.rows)
    return Section(f"Servers, {Path(results.target).name}", text, rows)


def examples(results: BenchResults) -> list[Section]:
    """Show the fastest and the slowest response of each set, with what came from the drafter."""
    first = results.rows[0].drafter
    rows = [row for row in results.whole_blocks if row.temperature == 0 and row.drafter == first]
    chosen = [(row.set, example) for row in rows for example in row.examples]
    if not chosen:
        return []
    text = (
        "Marked text was proposed by the drafter and accepted, one mark a verification. All other text is the target's "
        "own next token."
    )
    return [Section("Best and slowest responses", text, examples=chosen)]


def comparison(results: CompareResults) -> Section:
    """Make the table of `dpace compare`."""
    seeds = ", ".join(map(str, results.seeds))
    text = (
        f"Mean acceptance length (tau) on held-out prompts at temperature 0, reduction {results.reduction}, seeds "
        f"{seeds}. Intervals are 95 %, by paired bootstrap over prompts and seeds."
    )
    decoded = results.decode.rows if results.decode else []
    speeds = {(row.set, row.drafter): row for row in decoded if row.temperature == 0}
    rows = rows_of(compared_columns(results.baseline, speeds), results.rows)
    return Section(f"Objectives, {Path(results.target).name}", text, rows)


def heldout(results: BenchResults) -> Section:
    """Make the table of the demo's objectives on all held-out prompts."""
    text = (
        "Mean acceptance length (tau) on all held-out prompts at temperature 0: a walk through the target's own "
        "answers, which gives what decoding whole drafts would. Intervals are 95 %, by paired bootstrap over prompts."
    )
    return Section("All held-out prompts", text, rows_of(compared_columns("dflash", {}), results.heldout or ()))


def provenance(results: BenchResults | None, target: str, folder: Path) -> Section:
    """List what made the numbers."""
    written = max((folder / name).stat().st_mtime for name in RESULT_FILES if (folder / name).exists())
    date = datetime.fromtimestamp(written, UTC).strftime("%Y-%m-%d")
    rows = [["", ""], ["folder", str(folder)], ["results written", date], ["target", target]]
    if results:
        rows += [["dtype", results.dtype], ["engine", results.engine], ["seed", _seed(results)]]
        rows.append(["max_new_tokens", str(results.max_new_tokens)])
        for name, facts in (("hardware", vars(results.hardware)), ("versions", vars(results.versions))):
            rows.append([name, ", ".join(f"{key} {value}" for key, value in facts.items())])
        if results.target_weights_sha256:
            rows.append(["sha256 of the target's weights", results.target_weights_sha256[:16]])
        rows += [[f"sha256 of {name}", digest[:16]] for name, digest in results.drafters.items()]
    return Section("Provenance", "", rows)


def _seed(results: BenchResults) -> str:
    """Say which seed each prompt had."""
    return f"{results.seed}" + (f"; {results.prompt_seeds}" if results.prompt_seeds else "")
