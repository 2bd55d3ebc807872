"""Records and rows of results with everything that a test does not care about filled in."""

from dataclasses import replace
from functools import partial
from typing import Any

from dpace.measure.results import (
    BenchResults,
    ComparedRow,
    CompareResults,
    ResponseRecord,
    Row,
    ServerAddress,
    ServerResults,
    ServerRow,
)
from dpace.system.provenance import Hardware, Versions

_RESPONSE = ResponseRecord(
    drafter="dpace",
    width="full",
    id="0",
    turn=0,
    prompt_tokens=5,
    token_ids=[1, 2, 3, 4, 5],
    block_size=3,
    accepted_lengths=[0, 2],
    emitted_lengths=[1, 3],
    widths=[3, 3],
    num_copied=0,
    decode_seconds=1.0,
    prefill_seconds=0.5,
    same_text=True,
)
_DRAFTED: dict[str, Any] = {
    "set": "s",
    "drafter": "dpace",
    "temperature": 0.0,
    "block_size": 3,
    "histogram": [1, 0, 1],
    "tau": (2.0, 1.5, 2.5),
    "reach_rate": [0.5, 0.5],
}
_ROW = Row(
    **_DRAFTED,
    verify_rule="equality",
    width="full",
    num_responses=1,
    tau_gain=(0.0, None, None),
    speed_ratio=(1.0, None, None),
    share_copied=0.0,
    tokens_per_second=4.0,
    plain_tokens_per_second=2.0,
    decode_speedup=(2.0, None, None),
    num_same_text=1,
    responses=[],
    plain_responses=[],
)
_COMPARED = ComparedRow(
    **_DRAFTED,
    num_prompts=1,
    tau_by_seed=[2.0],
    gain=(0.1, 0.0, 0.2),
)
_SETUP: dict[str, Any] = {
    "target": "t",
    "seed": 0,
    "tokenizer_sha256": "1" * 64,
    "chat_template_sha256": "2" * 64,
    "thinking": False,
}
_UNKNOWN = (None, None, None)
_SERVED = ServerRow(
    set="s",
    temperature=0.0,
    depth=None,
    num_responses=1,
    tau=_UNKNOWN,
    num_verifications=None,
    num_drafted=None,
    tau_here=_UNKNOWN,
    tau_over_here=_UNKNOWN,
    tokens_per_second=1.0,
    plain_tokens_per_second=None,
    decode_speedup=_UNKNOWN,
    num_same_text=None,
    control_same_text=None,
)


make_response = partial(replace, _RESPONSE)
make_plain = partial(
    replace, _RESPONSE, drafter="plain", width=None, accepted_lengths=[], emitted_lengths=[], widths=[]
)
make_row = partial(replace, _ROW, responses=[make_response()], plain_responses=[make_plain()])
make_compared = partial(replace, _COMPARED)
make_served = partial(replace, _SERVED)


def make_compare(*rows: ComparedRow, **changes: Any) -> CompareResults:
    results = CompareResults(
        target="t", baseline="dflash", seeds=[0], reduction="mean", rows=list(rows) or [_COMPARED], decode=None
    )
    return replace(results, **changes)


def make_servers(*rows: ServerRow) -> ServerResults:
    address = ServerAddress(url="http://localhost:8001", engine="vllm", model=None, version=None)
    return ServerResults(
        **_SETUP,
        servers={row.depth or "drafter": address for row in rows},
        max_new_tokens=9,
        tau_in_training=None,
        drafter_sha256=None,
        hardware=None,
        rows=list(rows),
    )


def make_bench(*rows: Row, **changes: Any) -> BenchResults:
    results = BenchResults(
        **_SETUP,
        drafters={"dpace": "0" * 64},
        target_weights_sha256="3" * 64,
        drafter_configs={"dpace": "4" * 64},
        widths=["full"],
        max_new_tokens=16,
        engine="dpace.decode.loop",
        dtype="float32",
        hardware=Hardware(device="a processor", cores=2, torch_threads=2),
        versions=Versions(dpace="0.1.0", torch="2", transformers="5", python="3.11"),
        rows=list(rows) or [make_row()],
    )
    return replace(results, **changes)
