"""What numbers of results have to fit together, beyond their types."""

from dpace.measure.rows import ComparedRow, Prediction, ResponseRecord, Row, ServerRow

MAX_COUNT = 2**53
"""Largest count that every reader of JSON keeps exactly."""


def check_rows(rows: list[Row], predictions: list[Prediction]) -> None:
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
    for number, prediction in enumerate(predictions):
        sizes = {len(prediction.widths), len(prediction.speedups), len(prediction.measured)}
        where = f"predictions[{number}].widths"
        _expect(len(sizes) == 1 and 0 not in sizes, where, prediction.widths, "as many as speedups and measured")


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
