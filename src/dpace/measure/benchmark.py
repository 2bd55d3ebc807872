"""Drafters x prompt sets x temperatures in; results.json out, measured against plain decoding of the same prompts."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from dpace.config import BenchConfig, Width
from dpace.data.chat import encode_chat
from dpace.data.ledger import write_json
from dpace.data.prompts import Prompt, first_of_each_set
from dpace.decode import Paces, generate, generate_plain
from dpace.decode.generation import Generation
from dpace.drafter import Drafter, fingerprint
from dpace.measure.predict import predict
from dpace.measure.records import Records
from dpace.measure.results import PLAIN, Engines, compare_drafters, make_examples, make_rows
from dpace.measure.timing import StepTimers
from dpace.progress import progress_bar
from dpace.provenance import find_hardware, find_versions, hash_json
from dpace.target import Target

SCHEMA_VERSION = 1


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
    meta["prompts_sha256"] = hash_json([asdict(prompt) for prompt in prompts])
    paces = Paces()
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
                    _warm_up(target, engines, prompt, temperature, paces)
                    records.is_warm = True
                for record in _measure(target, engines, prompt, temperature, config, paces, rotation=number):
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


def _decode(
    target: Target, drafter: Drafter | None, width: Width | None, token_ids, paces: Paces, **options
) -> Generation:
    if drafter is None or width is None:
        return generate_plain(target, token_ids, **options)
    return generate(target, drafter, token_ids, width=width, paces=paces, **options)


def _warm_up(target: Target, engines: Engines, prompt: Prompt, temperature: float, paces: Paces) -> None:
    token_ids = encode_chat(target, prompt.turns[0])
    for (_, width), drafter in engines.items():
        _decode(target, drafter, width, token_ids, paces, max_new_tokens=16, temperature=temperature)


def _measure(
    target: Target,
    engines: Engines,
    prompt: Prompt,
    temperature: float,
    config: BenchConfig,
    paces: Paces,
    *,
    rotation: int,
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
                paces,
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


def _provenance(target: Target, drafters: dict[str, Drafter], config: BenchConfig) -> dict:
    return {
        "target": target.name,
        "drafters": {name: fingerprint(drafter) for name, drafter in drafters.items()},
        "max_new_tokens": config.max_new_tokens,
        "seed": config.seed,
        "engine": "dpace.decode",
        "dtype": str(target.model.dtype).removeprefix("torch."),
        "hardware": find_hardware(target.device),
        "versions": find_versions(),
    }
