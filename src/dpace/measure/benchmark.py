"""Measure drafters against plain decoding, by prompt sets and temperatures, and write results.json.

Every prompt is decoded plainly, and with each drafter and verification length. `dpace.measure.records` keeps the
responses; rows with tau, speeds and their intervals are pooled from them.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import chain, product
from operator import attrgetter
from pathlib import Path
from typing import Any

from dpace.config import BenchConfig, VerifyRule, Width
from dpace.decode import Generation, Paces, generate, generate_plain
from dpace.drafter import Drafter
from dpace.measure.records import PLAIN, Records, ask_in_turn, setup_of, speedup, tokens_per_second
from dpace.measure.results import (
    BenchRecord,
    BenchResults,
    Estimate,
    Provenance,
    ResponseRecord,
    Row,
    nullable,
    write_profile,
    write_results,
)
from dpace.metrics import Acceptance, tau_estimate, tau_gain
from dpace.prompts.prompts import Prompt, first_of_each_set
from dpace.respond.conversation import refuse_long_prompts
from dpace.system import ranks
from dpace.system.groups import group_by
from dpace.system.ledger import JsonObject, register_files
from dpace.system.progress import track
from dpace.system.provenance import find_hardware, find_versions, fingerprint, hash_json
from dpace.target import Target
from dpace.target.chat import encode_chat

WARM_UP_TOKENS = 16
"""Tokens that each way decodes before answers are timed."""
Way = tuple[str, Width | None]
"""A way to decode: the drafter's name or `PLAIN`, and the width."""
Ways = dict[Way, Callable[..., Generation]]
"""What decodes in each way: it gets token ids and the options of `generate_plain`."""


def bench(
    target: Target, drafters: dict[str, Drafter], prompts: Sequence[Prompt], config: BenchConfig, folder: Path
) -> BenchResults:
    """Decode every prompt plainly and with each drafter and width, in turn, and write `results.json`.

    The order alternates from prompt to prompt, after a warm-up that is not counted, so that a drift of the machine's
    speed does not favour one side. Each finished prompt is kept in `bench-*.jsonl`, a file for each way to measure: an
    interrupted call goes on after it, and the same call again decodes nothing. The answers to earlier turns are the
    plain ones, so all sides see the same prompts. Prompt `i` draws with `seed + i` on all sides, which gives the same
    text above temperature 0 too. Several ranks measure a share of the prompts each, and the first one writes the
    results.

    Returns:
        What `results.json` holds.

    Raises:
        ValueError: a drafter for another target, or an over-long prompt.
    """
    ranks.from_first(lambda: register_files(folder, "results.json", "speculation_profile.json"))
    drafters_by_row: dict[str, Drafter] = {}
    rules: dict[str, VerifyRule] = {}
    ways: Ways = {(PLAIN, None): partial(generate_plain, target)}
    for rule, (name, drafter) in product(config.verify_rules, drafters.items()):
        row_name = f"{name}, speculative" if rule == "speculative" else name
        drafters_by_row[row_name] = drafter
        rules[row_name] = rule
        for width in config.widths:
            ways[row_name, width] = partial(generate, target, drafter, width=width, verify_rule=rule, paces=Paces())
    setup = Provenance(
        **setup_of(target, config),
        drafters={name: fingerprint(drafter) for name, drafter in drafters_by_row.items()},
        target_weights_sha256=target.sha256,
        drafter_configs={name: hash_config(drafter) for name, drafter in drafters_by_row.items()},
        widths=list(config.widths),
        engine="dpace.decode",
        dtype=target.dtype_name,
        hardware=find_hardware(target.device),
        versions=find_versions(),
    )
    # All prompts name the file, so that a call with a lower limit finds what one with more prompts has kept.
    records = Records(folder / "bench.jsonl", BenchRecord, setup, prompts)
    prompts = first_of_each_set(prompts, config.num_prompts)
    refuse_long_prompts(target, prompts, config.max_new_tokens)
    jobs = list(product(config.temperatures, prompts))
    missing = ranks.share(records.missing(jobs))
    for _, (temperature, prompt) in missing[:1]:
        token_ids = encode_chat(target, prompt.turns[0])
        for decode in ways.values():  # each is warm then
            decode(token_ids, max_new_tokens=min(WARM_UP_TOKENS, config.max_new_tokens), temperature=temperature)
    for number, (temperature, prompt) in track(missing, "decoding"):
        options = {"max_new_tokens": config.max_new_tokens, "temperature": temperature}
        responses = _decode_prompt(target, ways, prompt, rotation=number, seed=records.seeds[prompt.id], **options)
        records.add(BenchRecord(set=prompt.set, id=prompt.id, temperature=temperature, responses=list(responses)))
    records.read()
    results = BenchResults(**vars(setup), rows=make_rows(records.of(jobs), rules))
    ranks.from_first(lambda: write_results(folder / "results.json", results))
    spec = next(iter(drafters.values())).spec
    ranks.from_first(lambda: write_profile(folder, spec, results.rows, target.name))
    return results


def hash_config(drafter: Drafter) -> str:
    """Hash what the drafter's config and draft vocabulary say about decoding."""
    spec = asdict(drafter.spec)
    spec["confidence_temperature"] = drafter.confidence_temperature
    if drafter.vocabulary is not None:
        spec["draft_vocabulary"] = drafter.vocabulary.token_ids.tolist()
    return hash_json(spec)


def _decode_prompt(target: Target, ways: Ways, prompt: Prompt, **options: Any) -> Iterator[ResponseRecord]:
    """Decode one prompt in every way, and yield each response; `ask_in_turn` has the options."""
    for turn, (token_ids, generations) in enumerate(ask_in_turn(target, prompt, ways, **options)):
        plain_text = generations[PLAIN, None].token_ids
        for (name, width), generation in generations.items():
            yield ResponseRecord(
                **vars(generation),
                drafter=name,
                width=width,
                id=prompt.id,
                turn=turn,
                prompt_tokens=len(token_ids),
                same_text=generation.token_ids == plain_text,
            )


def make_rows(records: Iterable[BenchRecord], rules: Mapping[str, VerifyRule]) -> list[Row]:
    """Pool prompts into one row for each temperature, set, drafter and width.

    Args:
        records: of the prompts.
        rules: that verified the drafts, by the drafter's name, in the order of the rows; all drafters are compared with
            the first one, width by width.
    """
    rows = []
    names = list(rules)
    groups = group_by(records, attrgetter("temperature", "set"))
    for temperature, set_name in sorted(groups):
        responses = chain.from_iterable(record.responses for record in groups[temperature, set_name])
        by_way = group_by(responses, attrgetter("drafter", "width"))
        plain = by_way.pop((PLAIN, None))
        # Sorting is stable, so the widths of a drafter stay in the order of the command.
        for name, width in sorted(by_way, key=lambda way: names.index(way[0])):
            row = _pool_responses(
                by_way[name, width],
                plain,
                by_way[names[0], width],
                set=set_name,
                temperature=temperature,
                drafter=name,
                verify_rule=rules[name],
                width=width,
            )
            rows.append(row)
    return rows


def acceptance_of(responses: Iterable[ResponseRecord]) -> Acceptance:
    """Put the verifications of a drafter's responses together, one histogram a prompt."""
    prompts = []
    for turns in group_by(responses, attrgetter("id")).values():
        prompts.append(Acceptance.pooled([turn.acceptance for turn in turns]))
    return Acceptance.of_prompts(prompts)


def _pool_responses(
    drafted: list[ResponseRecord],
    plain: list[ResponseRecord],
    of_first: list[ResponseRecord],
    **way: Any,
) -> Row:
    """Make the row of a drafter, from its responses, the plain ones and the first drafter's to the same prompts."""
    acceptance = acceptance_of(drafted)
    num_copied = sum(response.num_copied for response in drafted)
    num_decoded = sum(response.num_decode_tokens for response in drafted)
    return Row(
        **way,
        num_responses=len(drafted),
        **drafted_facts([acceptance]),
        tau_gain=nullable(tau_gain([acceptance], [acceptance_of(of_first)])),
        speed_ratio=_speedup(drafted, of_first),
        share_copied=num_copied / max(1, num_decoded),
        tokens_per_second=tokens_per_second(drafted),
        plain_tokens_per_second=tokens_per_second(plain),
        decode_speedup=_speedup(drafted, plain),
        num_same_text=sum(response.same_text for response in drafted),
        responses=drafted,
        plain_responses=plain,
    )


def drafted_facts(seeds: Sequence[Acceptance]) -> JsonObject:
    """Return what a `DraftedRow` says of the same prompts with one seed or several."""
    pooled = Acceptance.pooled(seeds)
    return {
        "block_size": pooled.block_size,
        "histogram": pooled.counts.tolist(),
        "tau": nullable(tau_estimate([seeds])),
        "reach_rate": pooled.reach_rate.tolist(),
    }


def _speedup(drafted: Sequence[ResponseRecord], baseline: Sequence[ResponseRecord]) -> Estimate:
    """Divide the tokens a second of one side by the other side's; the turns of a prompt are drawn together."""
    by_id = attrgetter("id")
    return speedup(group_by(drafted, by_id).values(), group_by(baseline, by_id).values())
