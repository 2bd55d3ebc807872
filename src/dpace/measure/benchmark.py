"""Drafters x prompt sets x temperatures in; results.json out, measured against plain decoding of the same prompts."""

import hashlib
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import transformers

import dpace
from dpace.config import BenchConfig
from dpace.data.prompts import Prompt, cut_unfinished, first_of_each_set, read_jsonl, write_json
from dpace.data.responses import encode_chat
from dpace.decode.loop import Generation, Width, generate, generate_plain
from dpace.decode.streaming import TextPieces
from dpace.drafter import Drafter
from dpace.measure.predict import StepTimers, predict
from dpace.metrics import Acceptance, decode_speedup, published_speedup, published_tau, tau_gain
from dpace.progress import progress_bar
from dpace.report.tables import acceptance_of
from dpace.target import Target

SCHEMA_VERSION = 1
PLAIN = "plain"
"""Name of decoding without a drafter."""

Engines = dict[tuple[str, Width | None], Drafter | None]
"""Ways to decode, by the drafter's name and the width."""


def bench(
    target: Target, drafters: dict[str, Drafter], prompts: Sequence[Prompt], config: BenchConfig, folder: str | Path
) -> dict:
    """Decode every prompt plainly and with each drafter and width, in turn, and write `results.json`.

    The order alternates from prompt to prompt, after a warm-up that is not counted, so that a drift of the machine's speed
    does not favour one side. Each finished response is kept in `bench.jsonl`; an interrupted call goes on after it. The
    answers to earlier turns are the plain ones, so all sides see the same prompts; above temperature 0 all sides draw with the
    same seed, which gives the same text.

    Args:
        target: the model.
        drafters: by name.
        prompts: not trained on.
        config: temperatures, lengths, how many prompts of each set.
        folder: for the two files.

    Returns:
        What `results.json` holds: `rows`, one for each drafter, width, set and temperature, and where it was measured.

    Raises:
        ValueError: a drafter for another target, or an over-long prompt.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for drafter in drafters.values():
        drafter.check_target(target)
    provenance = _provenance(target, drafters, config)
    meta = {key: provenance[key] for key in ("target", "drafters", "max_new_tokens", "seed")}
    meta["prompts_sha256"] = hashlib.sha256(json.dumps([asdict(prompt) for prompt in prompts]).encode()).hexdigest()
    records = Records(folder / "bench.jsonl", meta)
    prompts = first_of_each_set(prompts, config.num_prompts)
    engines: Engines = {(PLAIN, None): None}
    engines |= {(name, width): drafter for name, drafter in drafters.items() for width in config.widths}
    jobs = [(temperature, prompt) for temperature in config.temperatures for prompt in prompts]
    timers = StepTimers(target, drafters, prompts, config)
    with progress_bar() as bar:
        task = bar.add_task("decoding", total=len(jobs), info="")
        for number, (temperature, prompt) in enumerate(jobs):
            if not records.has(engines, temperature, prompt):
                if not records.is_warm:
                    _warm_up(target, engines, prompt, temperature)
                    records.is_warm = True
                for record in _measure(target, engines, prompt, temperature, config, rotation=number):
                    records.add(record)
                timers.run(prompt.set, temperature)
            bar.update(task, advance=1, info=_so_far(records.rows))
    rows = make_rows(records.of(config.temperatures, prompts), engines)
    for row in rows:
        row["examples"] = make_examples(target, row)
    results = {"schema_version": SCHEMA_VERSION, "rows": rows, "comparisons": compare_drafters(rows), **provenance}
    results["predictions"] = []
    write_json(folder / "results.json", results)  # so that nothing that happens while predicting loses it
    if drafters:
        results["predictions"] = predict(results, prompts, config, timers)
        write_json(folder / "results.json", results)
    return results


def _so_far(records: Sequence[dict]) -> str:
    """Tau and speed of all drafters together, for the progress bar."""
    drafted = [r for r in records if r["drafter"] != PLAIN]
    verifications = sum(len(r["accepted_lengths"]) for r in drafted)
    tokens, seconds = (sum(r[key] for r in drafted) for key in ("decode_tokens", "decode_seconds"))
    return f"tau {tokens / max(1, verifications):.2f}, {tokens / max(1e-9, seconds):.0f} tokens/s"


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


class Records:
    """Finished responses or groups of them, kept in a file whose first line says what was measured."""

    def __init__(self, path: Path, meta: dict):
        self.path, self.is_warm, self.rows = path, False, []
        if path.exists():
            cut_unfinished(path)
            lines = [row for _, row in read_jsonl(path)]
            if lines and lines[0] == meta:
                self.rows = lines[1:]
                return
        path.write_text(json.dumps(meta) + "\n")

    def of(self, temperatures: Sequence[float], prompts: Sequence[Prompt]) -> list[dict]:
        """Those of these temperatures and prompts."""
        ids = {prompt.id for prompt in prompts}
        return [row for row in self.rows if row["temperature"] in temperatures and row["id"] in ids]

    def add(self, record: dict) -> None:
        """Keep one, on disk at once."""
        self.rows.append(record)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def has(self, engines: Engines, temperature: float, prompt: Prompt) -> bool:
        """Whether a prompt is done with all engines; what there is of one that is not is dropped."""
        found = [r for r in self.rows if r["temperature"] == temperature and r["id"] == prompt.id]
        if len(found) == len(engines) * len(prompt.turns):
            return True
        self.rows = [r for r in self.rows if r not in found]
        return False


def _decode(target: Target, drafter: Drafter | None, width: Width | None, token_ids, **options) -> Generation:
    if drafter is None or width is None:
        return generate_plain(target, token_ids, **options)
    return generate(target, drafter, token_ids, width=width, **options)


def _warm_up(target: Target, engines: Engines, prompt: Prompt, temperature: float) -> None:
    token_ids = encode_chat(target, prompt.turns[0])
    for (_, width), drafter in engines.items():
        _decode(target, drafter, width, token_ids, max_new_tokens=16, temperature=temperature)


def _measure(
    target: Target, engines: Engines, prompt: Prompt, temperature: float, config: BenchConfig, *, rotation: int
):
    """Decode one prompt with every engine; yields a record for each turn and engine."""
    messages = []
    names = list(engines)
    names = names[rotation % len(names) :] + names[: rotation % len(names)]
    for turn, new_messages in enumerate(prompt.turns):
        messages += new_messages
        token_ids = encode_chat(target, messages)
        done = {
            name: _decode(
                target,
                engines[name],
                name[1],
                token_ids,
                max_new_tokens=config.max_new_tokens,
                temperature=temperature,
                seed=config.seed,
            )
            for name in names
        }
        plain = done[PLAIN, None]
        for (name, width), generation in done.items():
            yield {
                "drafter": name,
                "width": width,
                "set": prompt.set,
                "id": prompt.id,
                "turn": turn,
                "temperature": temperature,
                "prompt_tokens": len(token_ids),
                "token_ids": generation.token_ids,
                "accepted_lengths": generation.accepted_lengths,
                "widths": generation.widths,
                "num_copied": generation.num_copied,
                "histogram": [] if name == PLAIN else generation.acceptance.counts.tolist(),
                "num_without_bonus": 0 if name == PLAIN else generation.acceptance.num_missing,
                "decode_tokens": generation.num_decode_tokens,
                "decode_seconds": generation.decode_seconds,
                "prefill_seconds": generation.prefill_seconds,
                "same_text": generation.token_ids == plain.token_ids,
            }
        text = target.tokenizer.decode(plain.token_ids, skip_special_tokens=True)
        messages.append({"role": "assistant", "content": text})


def fingerprint(model: torch.nn.Module) -> str:
    """sha256 over the weights, to know a drafter again."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _provenance(target: Target, drafters: dict[str, Drafter], config: BenchConfig) -> dict:
    device = torch.cuda.get_device_name() if target.device.type == "cuda" else _processor()
    return {
        "target": target.name,
        "drafters": {name: fingerprint(drafter) for name, drafter in drafters.items()},
        "max_new_tokens": config.max_new_tokens,
        "seed": config.seed,
        "engine": "dpace.decode.loop",
        "dtype": str(target.model.dtype).removeprefix("torch."),
        "hardware": {"device": device, "cores": os.cpu_count(), "torch_threads": torch.get_num_threads()},
        "versions": {
            "dpace": dpace.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
