"""Measure drafters against plain decoding, by prompt sets and temperatures, and write results.json."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dpace import ranks
from dpace.config import BenchConfig, Width
from dpace.data.chat import encode_chat, tokenizer_hashes
from dpace.data.prompts import Prompt, first_of_each_set
from dpace.decode import Paces, generate, generate_plain
from dpace.decode.generation import Generation
from dpace.drafter import Drafter
from dpace.ledger import claim
from dpace.loading import fingerprint
from dpace.measure.compiled import CompiledPlain, find_compiled
from dpace.measure.pooling import compare_drafters, make_rows
from dpace.measure.predict import predict
from dpace.measure.records import ResponseRecords
from dpace.measure.results import SEED_RULE, BenchResults, Provenance, write_results
from dpace.measure.rows import COMPILED, PLAIN, ResponseRecord
from dpace.measure.timing import StepTimers
from dpace.progress import progress_bar
from dpace.provenance import find_hardware, find_versions, hash_json
from dpace.target import Target

Engines = dict[tuple[str, Width | None], Drafter | CompiledPlain | None]
"""Ways to decode, by the drafter's name and the width; plainly without a drafter."""


def bench(
    target: Target, drafters: dict[str, Drafter], prompts: Sequence[Prompt], config: BenchConfig, folder: str | Path
) -> BenchResults:
    """Decode every prompt plainly and with each drafter and width, in turn, and write `results.json`.

    The order alternates from prompt to prompt, after a warm-up that is not counted, so that a drift of the machine's
    speed does not favour one side. Each finished response is kept in `bench-*.jsonl`, a file for each way to measure;
    an interrupted call goes on after it. The answers to earlier turns are the plain ones, so all sides see the same
    prompts. Prompt `i` draws with `seed + i` on all sides, which gives the same text above temperature 0 too. Several
    ranks measure a share of the prompts each, and the first one writes the results.

    Args:
        target: the model.
        drafters: by name.
        prompts: not trained on.
        config: temperatures, lengths, how many prompts of each set.
        folder: for these files.

    Returns:
        What `results.json` holds.

    Raises:
        ValueError: a drafter for another target, or an over-long prompt.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for drafter in drafters.values():
        drafter.check_target(target)
    ranks.from_first(lambda: claim(folder, "results.json"))
    about = _provenance(target, drafters, config)
    records, paces = ResponseRecords(folder / "bench.jsonl", about, prompts), Paces()
    seeds = {prompt.id: config.seed + number for number, prompt in enumerate(prompts)}
    prompts = first_of_each_set(prompts, config.num_prompts)
    drafted: dict[tuple[str, Width], Drafter] = {
        (name, width): drafter for name, drafter in drafters.items() for width in config.widths
    }
    engines: Engines = {(PLAIN, None): None, **drafted, **_compiled(target, config)}
    jobs = [(temperature, prompt) for temperature in config.temperatures for prompt in prompts]
    timers, is_warm = StepTimers(target, drafters, prompts, config), False
    mine = ranks.share(list(enumerate(jobs)))
    with progress_bar() as bar:
        task = bar.add_task("decoding", total=len(mine), info="")
        for number, (temperature, prompt) in mine:
            if not records.has(engines, temperature, prompt) and not is_warm:
                _warm_up(target, engines, prompt, temperature, paces, config.max_new_tokens)
                is_warm = True
            if not records.has(engines, temperature, prompt):
                options: dict[str, Any] = {"max_new_tokens": config.max_new_tokens, "seed": seeds[prompt.id]}
                for record in _measure(target, engines, prompt, temperature, paces, options, rotation=number):
                    records.add(record)
                timers.run(prompt.set, temperature)
            bar.update(task, advance=1, info=_so_far(records.rows))
    records.collect()
    block_sizes = {way: drafter.block_size for way, drafter in drafted.items()}
    rows = make_rows(target, records.of(config.temperatures, prompts), block_sizes)
    results = BenchResults(**vars(about), rows=rows, comparisons=compare_drafters(rows), predictions=[])
    return ranks.from_first(lambda: _write(results, folder / "results.json", prompts, config, timers))


def _write(
    results: BenchResults, path: Path, prompts: Sequence[Prompt], config: BenchConfig, timers: StepTimers
) -> BenchResults:
    """Write results, and once more with the predictions: nothing that happens while predicting loses them."""
    write_results(path, results)
    if timers.drafters:
        results = replace(results, predictions=predict(results, prompts, config, timers))
        write_results(path, results)
    return results


def _compiled(target: Target, config: BenchConfig) -> Engines:
    """Give the second baseline where there is one."""
    compiled = find_compiled(target, config)
    return {} if compiled is None else {(COMPILED, None): compiled}


def _so_far(records: Sequence[ResponseRecord]) -> str:
    """Tau and speed of all drafters together, for the progress bar."""
    drafted = [r for r in records if r.width is not None]
    verifications = sum(len(r.accepted_lengths) for r in drafted)
    tokens, seconds = sum(r.decode_tokens for r in drafted), sum(r.decode_seconds for r in drafted)
    return f"tau {tokens / max(1, verifications):.2f}, {tokens / max(1e-9, seconds):.0f} tokens/s"


def _decode(
    target: Target, drafter: Drafter | CompiledPlain | None, width: Width | None, token_ids, paces: Paces, **options
) -> Generation:
    if isinstance(drafter, CompiledPlain):
        return drafter.decode(token_ids, **options)
    if drafter is None or width is None:
        return generate_plain(target, token_ids, **options)
    return generate(target, drafter, token_ids, width=width, paces=paces, **options)


def _warm_up(
    target: Target, engines: Engines, prompt: Prompt, temperature: float, paces: Paces, max_new_tokens: int
) -> None:
    """Decode some tokens in every way; leave out compiled steps where they cannot be had."""
    token_ids = encode_chat(target, prompt.turns[0])
    compiled = engines.get((COMPILED, None))
    if isinstance(compiled, CompiledPlain) and not compiled.can_decode(token_ids, max_new_tokens):
        del engines[COMPILED, None]
    for (_, width), drafter in engines.items():
        if isinstance(drafter, CompiledPlain):
            continue
        _decode(target, drafter, width, token_ids, paces, max_new_tokens=16, temperature=temperature)


def _measure(
    target: Target,
    engines: Engines,
    prompt: Prompt,
    temperature: float,
    paces: Paces,
    options: dict[str, Any],
    *,
    rotation: int,
) -> Iterator[ResponseRecord]:
    """Decode one prompt with every engine, and yield a record for each turn and engine."""
    messages = []
    names = list(engines)
    names = names[rotation % len(names) :] + names[: rotation % len(names)]
    for turn, new_messages in enumerate(prompt.turns):
        messages += new_messages
        token_ids = encode_chat(target, messages)
        done = {
            name: _decode(target, engines[name], name[1], token_ids, paces, temperature=temperature, **options)
            for name in names
        }
        plain = done[PLAIN, None]
        for (name, width), generation in done.items():
            yield ResponseRecord(
                drafter=name,
                width=width,
                set=prompt.set,
                id=prompt.id,
                turn=turn,
                temperature=temperature,
                prompt_tokens=len(token_ids),
                token_ids=generation.token_ids,
                accepted_lengths=generation.accepted_lengths,
                widths=generation.widths,
                num_copied=generation.num_copied,
                histogram=[] if width is None else generation.acceptance.counts.tolist(),
                num_without_bonus=0 if width is None else generation.acceptance.total_without_bonus,
                decode_tokens=generation.num_decode_tokens,
                decode_seconds=generation.decode_seconds,
                prefill_seconds=generation.prefill_seconds,
                same_text=generation.token_ids == plain.token_ids,
            )
        text = target.tokenizer.decode(plain.token_ids, skip_special_tokens=True)
        messages.append({"role": "assistant", "content": text})


def _provenance(target: Target, drafters: dict[str, Drafter], config: BenchConfig) -> Provenance:
    """Say all that the responses depend on, apart from the prompts."""
    return Provenance(
        target=target.name,
        drafters={name: fingerprint(drafter) for name, drafter in drafters.items()},
        max_new_tokens=config.max_new_tokens,
        seed=config.seed,
        prompt_seeds=SEED_RULE,
        target_weights_sha256=target.sha256,
        drafter_configs={name: _hash_config(drafter) for name, drafter in drafters.items()},
        thinking=target.thinking,
        **tokenizer_hashes(target),
        engine="dpace.decode",
        dtype=str(target.model.dtype).removeprefix("torch."),
        hardware=find_hardware(target.device),
        versions=find_versions(),
    )


def _hash_config(drafter: Drafter) -> str:
    """Hash what the drafter's config says about decoding."""
    spec = {name: value for name, value in vars(drafter.spec).items() if name not in ("record", "special_token_ids")}
    other: dict[str, Any] = {} if drafter.confidence == "softmax" else {"confidence": drafter.confidence}
    if drafter.vocabulary is not None:
        other["draft_vocabulary"] = drafter.vocabulary.token_ids.tolist()
    return hash_json(spec | {"confidence_temperature": drafter.confidence_temperature} | other)
