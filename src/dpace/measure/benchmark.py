"""Measure drafters against plain decoding, by prompt sets and temperatures, and write results.json.

Every prompt is decoded plainly, with each drafter and verification length, and maybe plainly with compiled steps, which
is the baseline that a drafter has to beat where compiling pays. `dpace.measure.records` keeps the responses, and
`dpace.measure.pooling` makes rows from them.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.exc import TorchDynamoException

from dpace.config import BenchConfig, Width
from dpace.decode import Decoder, Generation, Paces, generate, generate_plain
from dpace.drafter import Drafter
from dpace.measure.pooling import compare_drafters, make_rows
from dpace.measure.records import (
    COMPILED,
    PLAIN,
    Provenance,
    Records,
    ResponseRecord,
    ask_in_turn,
    setup_of,
)
from dpace.measure.results import BenchResults, Row, read_results, write_results
from dpace.prompts.prompts import Prompt, first_of_each_set
from dpace.recipes.validation import to_json
from dpace.respond.conversation import refuse_long_prompts
from dpace.system import ranks
from dpace.system.device import dtype_name
from dpace.system.ledger import register_files
from dpace.system.progress import one_line, track
from dpace.system.provenance import find_hardware, find_versions, fingerprint, hash_json
from dpace.target import Target
from dpace.target.chat import encode_chat

WARM_UP_TOKENS = 8
"""Tokens that are decoded before an answer is timed: of steps that are compiled, CUDA graphs are recorded in them."""
RECOMPILE_LIMIT = 256
"""Shapes that may be compiled; past torch's own limit of 8, steps would not be compiled, and nothing says so."""

SPECULATIVE = ", speculative"
"""How the name of a drafter ends whose drafts that rule verified."""
HASHED_AS = {
    "num_attention_heads": "num_heads",
    "rope_parameters": "rope",
    "input_embedding_scale": "embed_scale",
    "output_multiplier": "logit_scale",
    "final_logit_softcapping": "softcap",
}
"""Names of a spec's values in the hash of a config, which say whether answers of an earlier call are taken."""
WAY = attrgetter("set", "temperature", "drafter", "width")
"""What tells rows of the same results from one another."""
Way = tuple[str, Width | None]
"""A way to decode: the drafter's name, `PLAIN` or `COMPILED`, and the width."""
Ways = dict[Way, Callable[..., Generation]]
"""What decodes in each way: it gets token ids and the options of `generate_plain`."""


def bench(
    target: Target, drafters: dict[str, Drafter], prompts: Sequence[Prompt], config: BenchConfig, folder: str | Path
) -> BenchResults:
    """Decode every prompt plainly and with each drafter and width, in turn, and write `results.json`.

    Rows that it has of other sets, temperatures, widths, rules and drafters stay, where all else is the same.

    The order alternates from prompt to prompt, after a warm-up that is not counted, so that a drift of the machine's
    speed does not favour one side. Each finished response is kept in `bench-*.jsonl`, a file for each way to measure;
    an interrupted call goes on after it. The answers to earlier turns are the plain ones, so all sides see the same
    prompts. Prompt `i` draws with `seed + i` on all sides, which gives the same text above temperature 0 too. Several
    ranks measure a share of the prompts each, and the first one writes the results.

    Returns:
        What `results.json` holds.

    Raises:
        ValueError: a drafter for another target, or an over-long prompt.
    """
    folder = Path(folder)
    for drafter in drafters.values():
        drafter.check_target(target)
    ranks.from_first(lambda: register_files(folder, "results.json"))
    named: dict[str, Drafter] = {}
    ways: Ways = {(PLAIN, None): partial(generate_plain, target)}
    for rule, (name, drafter) in product(config.verify_rules, drafters.items()):
        way = name if rule == "equality" else name + SPECULATIVE
        named[way] = drafter
        for width in config.widths:
            ways[way, width] = partial(generate, target, drafter, width=width, verify_rule=rule, paces=Paces())
    setup = _bench_setup(target, named, config)
    records = Records(folder / "bench.jsonl", ResponseRecord, setup, prompts)
    prompts = first_of_each_set(prompts, config.num_prompts)
    refuse_long_prompts(target, prompts, config.max_new_tokens)
    if config.compiled == "always" or (config.compiled == "auto" and target.device.type != "cpu"):
        ways[COMPILED, None] = partial(decode_compiled, Decoder(target, None, compile=True))

    def is_done(temperature: float, prompt: Prompt) -> bool:
        turns = range(len(prompt.turns))
        return all((temperature, prompt.id, turn, *way) in records.rows for turn, way in product(turns, ways))

    mine = ranks.share(list(enumerate(product(config.temperatures, prompts))))
    missing = [(number, job) for number, job in mine if not is_done(*job)]
    if missing:
        _warm_up(target, ways, missing[0][1], config.max_new_tokens)
    for number, (temperature, prompt) in track(missing, "decoding", done=len(mine) - len(missing)):
        options = {
            "max_new_tokens": config.max_new_tokens,
            "temperature": temperature,
            "seed": records.seeds[prompt.id],
        }
        for record in _decode_prompt(target, ways, prompt, rotation=number, **options):
            records.add(record)
    records.read()
    rows = make_rows(records.rows, prompts, config, setup.drafters)
    return ranks.from_first(lambda: _write_with_earlier(folder / "results.json", setup, rows))


def _write_with_earlier(path: Path, setup: Provenance, rows: list[Row]) -> BenchResults:
    """Write results, with the rows of earlier calls for other sets, temperatures, widths, rules or drafters.

    Where anything else of an earlier call differs, also the weights of a drafter, its file gets another name, which a
    message says.
    """
    earlier = None
    with suppress(ValueError, OSError):
        earlier = read_results(path)
    if isinstance(earlier, BenchResults):
        same = replace(setup, drafters=earlier.drafters, drafter_configs=earlier.drafter_configs)
        before, now = _weights(earlier), _weights(setup)
        if vars(same).items() <= vars(earlier).items() and before | now == now | before:
            measured = {WAY(row) for row in rows}
            rows = [*(row for row in earlier.rows if WAY(row) not in measured), *rows]
            setup = replace(
                setup,
                drafters=earlier.drafters | setup.drafters,
                drafter_configs=(earlier.drafter_configs or {}) | (setup.drafter_configs or {}),
            )
        else:
            aside = path.with_stem(f"{path.stem}-{hash_json(to_json(earlier))[:8]}")
            register_files(path.parent, aside.name)
            path.replace(aside)
            print(f"{path} had results of other settings, which are now in {aside.name}", file=sys.stderr)
    results = BenchResults(**vars(setup), rows=rows, comparisons=list(compare_drafters(rows)))
    write_results(path, results)
    return results


def _weights(setup: Provenance) -> dict[str, str]:
    """Return the hashes of the drafters' weights, by their names without the rule."""
    return {name.removesuffix(SPECULATIVE): sha256 for name, sha256 in setup.drafters.items()}


def _bench_setup(target: Target, drafters: dict[str, Drafter], config: BenchConfig) -> Provenance:
    """Return all that the responses depend on, apart from the prompts."""
    return Provenance(
        **setup_of(target, config),
        drafters={name: fingerprint(drafter) for name, drafter in drafters.items()},
        target_weights_sha256=target.sha256,
        drafter_configs={name: hash_config(drafter) for name, drafter in drafters.items()},
        engine="dpace.decode",
        dtype=dtype_name(target.model.dtype),
        hardware=find_hardware(target.device),
        versions=find_versions(),
    )


def hash_config(drafter: Drafter) -> str:
    """Hash what the drafter's config says about decoding."""
    values = asdict(drafter.spec)
    del values["record"], values["special_token_ids"]
    spec = {HASHED_AS.get(name, name): value for name, value in values.items()}
    spec["confidence_temperature"] = drafter.confidence_temperature
    if drafter.vocabulary is not None:
        spec["draft_vocabulary"] = drafter.vocabulary.token_ids.tolist()
    return hash_json(spec)


def _warm_up(target: Target, ways: Ways, job: tuple[float, Prompt], max_new_tokens: int) -> None:
    """Decode a prompt in every way, and compile steps; leave those out where they cannot be had."""
    temperature, prompt = job
    token_ids = encode_chat(target, prompt.turns[0])
    compiled = ways.pop((COMPILED, None), None)
    for decode in ways.values():
        decode(token_ids, max_new_tokens=min(16, max_new_tokens), temperature=temperature)
    if compiled:
        print("compiling the steps of plain decoding, which takes a minute or more", file=sys.stderr)
        try:
            compiled(token_ids, max_new_tokens=max_new_tokens, temperature=temperature)
            ways[COMPILED, None] = compiled
        except (ValueError, torch.OutOfMemoryError, TorchDynamoException) as error:
            print(f"plain decoding with compiled steps is left out: {one_line(error)[:300]}", file=sys.stderr)


def _decode_prompt(target: Target, ways: Ways, prompt: Prompt, **options: Any) -> Iterator[ResponseRecord]:
    """Decode one prompt in every way, and yield a record for each turn and way; options are those of `ask_in_turn`."""
    for turn, (token_ids, done) in enumerate(ask_in_turn(target, prompt, ways, **options)):
        for (name, width), generation in done.items():
            yield ResponseRecord(
                drafter=name,
                width=width,
                set=prompt.set,
                id=prompt.id,
                turn=turn,
                temperature=options["temperature"],
                prompt_tokens=len(token_ids),
                token_ids=generation.token_ids,
                accepted_lengths=generation.accepted_lengths,
                widths=generation.widths,
                num_copied=generation.num_copied,
                histogram=[] if width is None else generation.acceptance.counts.tolist(),
                num_without_bonus=generation.acceptance.total_without_bonus,
                decode_tokens=generation.num_decode_tokens,
                decode_seconds=generation.decode_seconds,
                prefill_seconds=generation.prefill_seconds,
                same_text=generation.token_ids == done[PLAIN, None].token_ids,
            )


def decode_compiled(decoder: Decoder, token_ids: Sequence[int], *, max_new_tokens: int, **options: Any) -> Generation:
    """Decode plainly with compiled steps; options are those of `generate_plain`.

    The first tokens are decoded twice. Steps are compiled for each length of a text, rounded up, see
    `Decoder.make_room`, so what compiling takes is not counted.
    """
    decoder.make_room(len(token_ids) + max_new_tokens + 1)  # of the whole text, of which the beginning follows
    first: Any = options | {"max_new_tokens": min(WARM_UP_TOKENS, max_new_tokens), "stop_token_ids": ()}
    with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
        decoder.generate(token_ids, **first)
        return decoder.generate(token_ids, max_new_tokens=max_new_tokens, **options)
