"""Records and rows of results with everything that a test does not care about filled in."""

from dataclasses import replace
from typing import Any

from dpace.measure.records import ResponseRecord, ServerAddress
from dpace.measure.results import (
    BenchResults,
    ComparedRow,
    CompareResults,
    Published,
    Row,
    ServerResults,
    ServerRow,
)
from dpace.system.provenance import Hardware, Versions

_RESPONSE = ResponseRecord(
    drafter="dpace",
    width="full",
    set="s",
    id="0",
    turn=0,
    temperature=0.0,
    prompt_tokens=5,
    token_ids=[1, 2, 3, 4, 5],
    accepted_lengths=[0, 2],
    widths=[3, 3],
    num_copied=0,
    histogram=[1, 0, 1],
    num_without_bonus=0,
    decode_tokens=4,
    decode_seconds=1.0,
    prefill_seconds=0.5,
    same_text=True,
)
_ROW = Row(
    drafter="dpace",
    width="full",
    set="s",
    temperature=0.0,
    num_responses=1,
    block_size=3,
    histogram=[1, 0, 1],
    num_without_bonus=0,
    tau=2.0,
    tau_interval=(1.5, 2.5),
    reach_rate=[0.5, 0.5],
    share_copied=0.0,
    tokens_per_second=4.0,
    plain_tokens_per_second=2.0,
    decode_speedup=2.0,
    decode_speedup_interval=(None, None),
    published=Published(tau=2.0, decode_speedup=2.0),
    num_same_text=1,
    responses=[],
    plain_responses=[],
)
_COMPARED = ComparedRow(
    set="s",
    drafter="dpace",
    temperature=0.0,
    num_prompts=1,
    block_size=3,
    histogram=[1, 0, 1],
    tau=2.0,
    tau_interval=(1.5, 2.5),
    tau_by_seed=[2.0],
    reach_rate=[0.5, 0.5],
    gain=(0.1, 0.0, 0.2),
    gain_by_seed=[0.1],
    step_seconds=0.5,
    peak_memory_bytes=None,
)
_SERVED = ServerRow(
    set="s",
    temperature=0.0,
    num_responses=1,
    tau=None,
    tau_interval=(None, None),
    num_verifications=None,
    histogram=None,
    tau_here=(None, None, None),
    tau_over_here=(None, None, None),
    tokens_per_second=1.0,
    plain_tokens_per_second=None,
    num_same_text=None,
    control_same_text=None,
    same_text_gain=(None, None, None),
)


def make_response(**changes: Any) -> ResponseRecord:
    return replace(_RESPONSE, **changes)


def make_plain(**changes: Any) -> ResponseRecord:
    nothing = {"accepted_lengths": [], "widths": [], "histogram": []}
    return replace(_RESPONSE, **{"drafter": "plain", "width": None, **nothing, **changes})


def make_row(**changes: Any) -> Row:
    return replace(_ROW, **{"responses": [make_response()], "plain_responses": [make_plain()], **changes})


def make_compared(**changes: Any) -> ComparedRow:
    return replace(_COMPARED, **changes)


def make_served(**changes: Any) -> ServerRow:
    return replace(_SERVED, **changes)


def make_compare(*rows: ComparedRow, **changes: Any) -> CompareResults:
    results = CompareResults(
        target="t", baseline="dflash", seeds=[0], reduction="mean", rows=list(rows) or [_COMPARED], decode=None
    )
    return replace(results, **changes)


def make_servers(*rows: ServerRow) -> ServerResults:
    servers = {"drafter": ServerAddress(url="http://localhost:8001", engine="vllm")}
    return ServerResults(target="t", servers=servers, max_new_tokens=9, seed=0, tau_in_training=None, rows=list(rows))


def make_bench(*rows: Row, **changes: Any) -> BenchResults:
    results = BenchResults(
        target="t",
        drafters={"dpace": "0" * 64},
        max_new_tokens=16,
        seed=0,
        engine="dpace.decode.loop",
        dtype="float32",
        hardware=Hardware(device="a processor", cores=2, torch_threads=2),
        versions=Versions(dpace="0.1.0", torch="2", transformers="5", python="3.11"),
        rows=list(rows) or [make_row()],
        comparisons=[],
    )
    return replace(results, **changes)
