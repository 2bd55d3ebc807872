"""The rows of results.json: made here, and read by tables, plots and model cards."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dpace.config import Width
from dpace.decode.streaming import TextPieces
from dpace.drafter import Drafter
from dpace.metrics import Acceptance, decode_speedup, published_speedup, published_tau, tau_gain
from dpace.target import Target


def whole_blocks(results: dict) -> list[dict]:
    """The rows where whole drafts were verified, which say what the drafter can do; all where there is none."""
    return [row for row in results["rows"] if row.get("width", "full") == "full"] or results["rows"]


def acceptance_of(row: dict) -> Acceptance:
    """The statistics of a row of results.json, one histogram a response."""
    responses = row["responses"]
    return Acceptance(
        [r["histogram"] for r in responses], row["block_size"], [r["num_without_bonus"] for r in responses]
    )


def read_log(folder: str | Path) -> list[dict]:
    """The training log of a drafter's folder."""
    return json.loads((Path(folder) / "trainer_state.json").read_text())["log_history"]


PLAIN = "plain"
"""Name of decoding without a drafter."""
Engines = dict[tuple[str, Width | None], Drafter | None]
"""Ways to decode, by the drafter's name and the width."""


def make_rows(records: Sequence[dict], engines: Engines) -> list[dict]:
    """Pool records of single responses into one row for each drafter, width, set and temperature."""
    by_key = {(r["drafter"], r["width"], r["temperature"], r["id"], r["turn"]): r for r in records}
    rows = []
    groups = dict.fromkeys((r["temperature"], r["set"]) for r in records)
    for temperature, name in sorted(groups):
        plain = [r for r in records if (r["drafter"], r["temperature"], r["set"]) == (PLAIN, temperature, name)]
        for (drafter, width), model in engines.items():
            if model is None:
                continue
            ours = [by_key[drafter, width, temperature, r["id"], r["turn"]] for r in plain]
            block_size = model.block_size
            acceptance = Acceptance([r["histogram"] for r in ours], block_size, [r["num_without_bonus"] for r in ours])
            sides = [[r[key] for r in side] for side in (ours, plain) for key in ("decode_tokens", "decode_seconds")]
            speedup = decode_speedup(*sides)
            rows.append(
                {
                    "drafter": drafter,
                    "width": width,
                    "set": name,
                    "temperature": temperature,
                    "num_responses": len(ours),
                    "block_size": block_size,
                    "histogram": acceptance.counts.tolist(),
                    "num_without_bonus": sum(r["num_without_bonus"] for r in ours),
                    "tau": acceptance.tau,
                    "tau_interval": acceptance.interval(),
                    "acceptance_rate": acceptance.acceptance_rate,
                    "reach_rate": acceptance.reach_rate.tolist(),
                    "slot_acceptance_rate": [
                        None if np.isnan(x) else x for x in acceptance.slot_acceptance_rate.tolist()
                    ],
                    "share_copied": sum(r.get("num_copied", 0) for r in ours) / max(1, sum(sides[0])),
                    "tokens_per_second": sum(sides[0]) / sum(sides[1]),
                    "plain_tokens_per_second": sum(sides[2]) / sum(sides[3]),
                    "decode_speedup": speedup[0],
                    "decode_speedup_interval": speedup[1:],
                    "published": {
                        "tau": published_tau([r["accepted_lengths"] for r in ours]),
                        "decode_speedup": published_speedup(*sides),
                    },
                    "num_same_text": sum(r["same_text"] for r in ours),
                    "responses": ours,
                    "plain_responses": plain,
                }
            )
    return rows


def compare_drafters(rows: Sequence[dict]) -> list[dict]:
    """Every drafter against the first one, for the same prompts: gain of tau and ratio of tokens a second, with paired intervals."""
    first = {(r["set"], r["temperature"], r["width"]): r for r in reversed(rows)}
    comparisons = []
    for row in rows:
        key = {name: row[name] for name in ("set", "temperature", "width")}
        base = first[tuple(key.values())]
        if base is row:
            continue
        sides = [[r[k] for r in side["responses"]] for side in (row, base) for k in ("decode_tokens", "decode_seconds")]
        comparisons.append(
            {
                **key,
                "drafter": row["drafter"],
                "baseline": base["drafter"],
                "tau_gain": tau_gain([acceptance_of(row)], [acceptance_of(base)]),
                "speed_ratio": decode_speedup(*sides),
            }
        )
    return comparisons


def make_examples(target: Target, row: dict) -> list[dict]:
    """The fastest and the slowest response of a row, as pieces of text and whether they came from the drafter."""

    def speedup(i: int) -> float:
        ours, plain = row["responses"][i], row["plain_responses"][i]
        return ours["decode_tokens"] * plain["decode_seconds"] / (ours["decode_seconds"] * plain["decode_tokens"])

    order = sorted((i for i, r in enumerate(row["responses"]) if r["accepted_lengths"]), key=speedup)
    chosen = {"fastest": order[-1], "slowest": order[0]} if len(order) > 1 else {}
    examples = []
    for what, i in chosen.items():
        response, text = row["responses"][i], TextPieces(target.tokenizer)
        tokens, position = response["token_ids"], 1
        pieces = [(text.add(tokens[:1]), False)]
        for accepted in response["accepted_lengths"]:
            for length, is_draft in ((accepted, True), (1, False)):
                pieces.append((text.add(tokens[position : position + length]), is_draft and length > 0))
                position += length
        pieces.append((text.flush(), False))
        tau = float(np.mean(response["accepted_lengths"])) + 1
        shown = [[piece, is_draft] for piece, is_draft in pieces if piece]
        examples.append({"id": response["id"], "what": what, "tau": tau, "speedup": speedup(i), "pieces": shown})
    return examples
