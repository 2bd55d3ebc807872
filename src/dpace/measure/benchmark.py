"""Measure drafters against plain decoding, by prompt sets and temperatures, and write results.json.

Plain decoding with compiled steps: the baseline that a drafter has to beat where compiling pays.

Pool single responses into the rows of results.json, compare drafters, and choose examples.

Keep finished responses on disk, so that an interrupted benchmark goes on after them.
"""

import json
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from dpace.config import BenchConfig, Width
from dpace.decode import Decoder, Generation, Paces, generate, generate_plain
from dpace.decode.batch import compiled_columns
from dpace.decode.streaming import TextPieces
from dpace.drafter import Drafter
from dpace.measure.results import (
    COMPILED,
    PLAIN,
    SEED_RULE,
    BenchResults,
    ComparedRow,
    Comparison,
    CompiledBaseline,
    Example,
    GroupRecord,
    Provenance,
    Published,
    ResponseRecord,
    Row,
    ServerSetup,
    acceptance_of,
    defined,
    nullable,
    tau_interval_of,
    write_results,
)
from dpace.metrics import Acceptance, decode_speedup, published_speedup, published_tau, tau_gain
from dpace.prompts.prompts import Prompt, first_of_each_set
from dpace.recipes.validation import from_json, to_json
from dpace.system import ranks
from dpace.system.ledger import cut_unfinished_line, read_jsonl, register_files, write_text
from dpace.system.loading import fingerprint
from dpace.system.progress import printable, progress_bar
from dpace.system.provenance import find_hardware, find_versions, hash_json
from dpace.target import Target
from dpace.target.chat import encode_chat, tokenizer_hashes

WARM_UP_TOKENS = 6
"""Tokens that are decoded after steps of other shapes were compiled: CUDA graphs are recorded in the first ones."""
RECOMPILE_LIMIT = 256
"""Shapes that may be compiled; past torch's own limit of 8, steps would not be compiled, and nothing says so."""


class CompiledPlain:
    """Decodes plainly with `torch.compile`; what compiling takes is not counted.

    Steps are compiled for each length of a text, rounded up, see `dpace.decode.batch.compiled_columns`.
    """

    def __init__(self, target: Target):
        self.target, self.decoder = target, Decoder(target, None, compile=True)
        self._ready: set[int] = set()

    def can_decode(self, token_ids: Sequence[int], max_new_tokens: int) -> bool:
        """Compile the steps of a prompt; say why that cannot be done where it is so."""
        from torch._dynamo.exc import TorchDynamoException

        try:
            self.prepare(token_ids, max_new_tokens)
        except (ValueError, torch.OutOfMemoryError, TorchDynamoException) as error:
            reason = " ".join(str(error).split())[:300]
            print(printable(f"plain decoding with compiled steps is left out: {reason}"), file=sys.stderr)
            return False
        return True

    def prepare(self, token_ids: Sequence[int], max_new_tokens: int) -> None:
        """Compile the steps of a prompt, if they are not yet, by decoding its first tokens."""
        columns = compiled_columns(len(token_ids) + max_new_tokens)
        if columns in self._ready:
            return
        tokens = generate_plain(
            self.target, token_ids, max_new_tokens=min(2 * WARM_UP_TOKENS, max_new_tokens)
        ).token_ids
        ends = set(tokens[WARM_UP_TOKENS:]) - set(tokens[:WARM_UP_TOKENS])  # the texts' longest length is kept
        stops = [*ends, *self.target.stop_token_ids]
        self._decode(token_ids, max_new_tokens=max_new_tokens, stop_token_ids=stops)
        self._ready.add(columns)

    def decode(self, token_ids: Sequence[int], *, max_new_tokens: int, **options: Any) -> Generation:
        """Decode a prompt; options are those of `generate_plain`."""
        self.prepare(token_ids, max_new_tokens)
        return self._decode(token_ids, max_new_tokens=max_new_tokens, **options)

    def _decode(self, token_ids: Sequence[int], **options: Any) -> Generation:
        import torch._dynamo

        with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
            return self.decoder.generate(token_ids, **options)


def find_compiled(target: Target, config: BenchConfig) -> CompiledPlain | None:
    """Give compiled plain decoding where the options ask for it: by default on an accelerator only."""
    is_wanted = config.compiled == "always" or (config.compiled == "auto" and target.device.type != "cpu")
    return CompiledPlain(target) if is_wanted else None


def make_rows(
    target: Target, records: Sequence[ResponseRecord], block_sizes: Mapping[tuple[str, Width], int]
) -> list[Row]:
    """Pool records into one row for each set, temperature, drafter and width.

    Args:
        target: whose tokenizer writes the examples.
        records: of the same prompts for `PLAIN` and every drafter, and maybe for `COMPILED`.
        block_sizes: by the drafter's name and the width.
    """
    rows = []
    for temperature, name in sorted({(r.temperature, r.set) for r in records}):
        of_group = [r for r in records if (r.temperature, r.set) == (temperature, name)]
        plain, compiled = ([r for r in of_group if r.drafter == name] for name in (PLAIN, COMPILED))
        for (drafter, width), block_size in block_sizes.items():
            by_prompt = {(r.id, r.turn): r for r in of_group if (r.drafter, r.width) == (drafter, width)}
            row = _make_row(target, [by_prompt[r.id, r.turn] for r in plain], plain, block_size)
            rows.append(replace(row, compiled=_compare_compiled(row.responses, compiled)))
    return rows


def _compare_compiled(ours: Sequence[ResponseRecord], compiled: Sequence[ResponseRecord]) -> CompiledBaseline | None:
    """Compare with compiled plain decoding; None where it did not decode all of these prompts."""
    by_prompt = {(r.id, r.turn): r for r in compiled}
    if not all((r.id, r.turn) in by_prompt for r in ours):
        return None
    theirs = [by_prompt[r.id, r.turn] for r in ours]
    tokens, seconds = _tokens_and_seconds(theirs)
    speedup, low, high = decode_speedup(*_tokens_and_seconds(ours), tokens, seconds)
    return CompiledBaseline(
        tokens_per_second=sum(tokens) / sum(seconds),
        decode_speedup=defined(speedup),
        decode_speedup_interval=nullable((low, high)),
        num_same_text=sum(r.same_text for r in theirs),
    )


def _make_row(target: Target, ours: list[ResponseRecord], plain: list[ResponseRecord], block_size: int) -> Row:
    acceptance, first = acceptance_of(ours, block_size), ours[0]
    assert first.width is not None  # only plain decoding has none
    sides = _tokens_and_seconds(ours), _tokens_and_seconds(plain)
    speedup, *ends = decode_speedup(*sides[0], *sides[1])
    published = Published(
        tau=defined(published_tau([r.accepted_lengths for r in ours])),
        decode_speedup=defined(published_speedup(*sides[0], *sides[1])),
    )
    return Row(
        drafter=first.drafter,
        width=first.width,
        set=first.set,
        temperature=first.temperature,
        num_responses=len(ours),
        block_size=block_size,
        histogram=acceptance.counts.tolist(),
        num_without_bonus=acceptance.total_without_bonus,
        tau=defined(acceptance.tau),
        tau_interval=tau_interval_of(ours, block_size),
        acceptance_rate=defined(acceptance.acceptance_rate),
        reach_rate=acceptance.reach_rate.tolist(),
        slot_acceptance_rate=[defined(x) for x in acceptance.slot_acceptance_rate.tolist()],
        share_copied=sum(r.num_copied for r in ours) / max(1, sum(sides[0][0])),
        tokens_per_second=sum(sides[0][0]) / sum(sides[0][1]),
        plain_tokens_per_second=sum(sides[1][0]) / sum(sides[1][1]),
        decode_speedup=defined(speedup),
        decode_speedup_interval=nullable(ends),
        published=published,
        num_same_text=sum(r.same_text for r in ours),
        responses=ours,
        plain_responses=plain,
        examples=make_examples(target, ours, plain),
    )


def _tokens_and_seconds(responses: Sequence[ResponseRecord]) -> tuple[list[int], list[float]]:
    return [r.decode_tokens for r in responses], [r.decode_seconds for r in responses]


def compare_drafters(rows: Sequence[Row]) -> list[Comparison]:
    """Compare every drafter with the first on the same prompts: gain of tau, ratio of tokens a second."""
    first = {(row.set, row.temperature, row.width): row for row in reversed(rows)}
    comparisons = []
    for row in rows:
        base = first[row.set, row.temperature, row.width]
        if base is row:
            continue
        ratio = decode_speedup(*_tokens_and_seconds(row.responses), *_tokens_and_seconds(base.responses))
        comparisons.append(
            Comparison(
                set=row.set,
                temperature=row.temperature,
                width=row.width,
                drafter=row.drafter,
                baseline=base.drafter,
                tau_gain=nullable(tau_gain([row.acceptance], [base.acceptance])),
                speed_ratio=nullable(ratio),
            )
        )
    return comparisons


def pool_seeds(
    set_name: str,
    name: str,
    num_prompts: int,
    ours: Sequence[Acceptance],
    theirs: Sequence[Acceptance],
    costs: tuple[float | None, int | None] = (None, None),
) -> ComparedRow:
    """Pool the seeds of one objective, beside those of the baseline.

    Args:
        set_name: of the prompts.
        name: of the objective.
        num_prompts: in the set.
        ours: held-out acceptance of each seed.
        theirs: the baseline's, for the same seeds and prompts.
        costs: seconds of a training step and peak bytes, where they are known.
    """
    pooled, step_seconds, peak_memory_bytes = Acceptance.pooled(ours), *costs
    taus = [(defined(a.tau), defined(b.tau)) for a, b in zip(ours, theirs, strict=True)]
    return ComparedRow(
        set=set_name,
        drafter=name,
        temperature=0.0,
        num_prompts=num_prompts,
        block_size=pooled.block_size,
        histogram=pooled.counts.tolist(),
        tau=defined(pooled.tau),
        tau_interval=nullable(pooled.interval()),
        tau_by_seed=[tau for tau, _ in taus],
        reach_rate=pooled.reach_rate.tolist(),
        gain=nullable(tau_gain(ours, theirs)),
        gain_by_seed=[tau / base - 1 if tau and base else None for tau, base in taus],
        step_seconds=step_seconds,
        peak_memory_bytes=peak_memory_bytes,
    )


def make_examples(target: Target, ours: Sequence[ResponseRecord], plain: Sequence[ResponseRecord]) -> list[Example]:
    """Choose the fastest and the slowest response, and mark what came from the drafter."""
    speedups = [(a.speedup_over(b), a) for a, b in zip(ours, plain, strict=True) if a.accepted_lengths]
    order = sorted(((speedup, a) for speedup, a in speedups if speedup is not None), key=lambda pair: pair[0])
    chosen = {"fastest": order[-1], "slowest": order[0]} if len(order) > 1 else {}
    return [
        Example(
            id=response.id,
            what=what,
            tau=response.published_tau,
            speedup=speedup,
            pieces=_pieces(target, response),
        )
        for what, (speedup, response) in chosen.items()
    ]


def _pieces(target: Target, response: ResponseRecord) -> list[tuple[str, bool]]:
    """A response's text in pieces, and whether each came from the drafter."""
    text, tokens, position = TextPieces(target.tokenizer), response.token_ids, 1
    pieces = [(text.add(tokens[:1]), False)]
    for accepted in response.accepted_lengths:
        for length, is_draft in ((accepted, True), (1, False)):
            pieces.append((text.add(tokens[position : position + length]), is_draft and length > 0))
            position += length
    pieces.append((text.flush(), False))
    return [(piece, is_draft) for piece, is_draft in pieces if piece]


Record = TypeVar("Record", ResponseRecord, GroupRecord)


class Records(Generic[Record]):
    """Finished responses or groups of them, kept in a file whose first line says all that changes them.

    Each way to measure has a file of its own, which its name tells by a hash of that line. So records of other weights,
    servers or settings are neither taken for new ones nor lost. Each rank of a command adds to a file of its own until
    `collect`.

    Args:
        path: of the files, without the hash.
        setup: what is measured, and how.
        prompts: their hash is kept with the setup.
        kind: of the records.

    Raises:
        ValueError: a line that holds no record; names it.
    """

    rows: list[Record]

    def __init__(self, path: Path, setup: Provenance | ServerSetup, prompts: Iterable[Prompt], kind: type[Record]):
        first = to_json(setup) | {"prompts_sha256": hash_json([asdict(prompt) for prompt in prompts])}
        self.path, self.kind = path.with_stem(f"{path.stem}-{hash_json(first)[:8]}"), kind
        self.own = self.path.with_suffix(f".rank-{ranks.rank()}.jsonl") if ranks.num_ranks() > 1 else self.path
        ranks.from_first(lambda: self._open(first))
        self.rows = self._read_all()

    def _open(self, first: dict[str, Any]) -> None:
        """Begin the file, or take it up with what several ranks have left."""
        register_files(self.path.parent, self.path.name)
        cut_unfinished_line(self.path)
        lines = list(read_jsonl(self.path)) if self.path.exists() else []
        if not lines:
            write_text(self.path, json.dumps(first) + "\n")
        elif lines[0][1] != first:
            raise ValueError(f"{self.path}:1: it is of another measurement; move the file away")
        self._collect_parts()

    def _collect_parts(self) -> None:
        """Append what ranks have measured; a kill in between leaves lines twice, of which the last count."""
        for part in sorted(self.path.parent.glob(f"{self.path.stem}.rank-*.jsonl")):
            cut_unfinished_line(part)
            with self.path.open("ab") as file:
                file.write(part.read_bytes())
            part.unlink()

    def collect(self) -> None:
        """Let all ranks have the records of all of them, in one file."""
        if ranks.num_ranks() > 1:
            ranks.barrier()
            ranks.from_first(self._collect_parts)
            self.rows = self._read_all()

    def _read_all(self) -> list[Record]:
        return [self._read(self.kind, number, line) for number, line in list(read_jsonl(self.path))[1:]]

    def _read(self, kind: type[Record], number: int, line: dict) -> Record:
        try:
            return from_json(kind, line)
        except ValueError as error:
            raise ValueError(f"{self.path}:{number}: {error}; remove the line, and it is measured again") from error

    def add(self, record: Record) -> None:
        """Keep one, on disk at once."""
        self.rows.append(record)
        with self.own.open("a", encoding="utf-8") as file:
            file.write(json.dumps(to_json(record), allow_nan=False) + "\n")


class ResponseRecords(Records[ResponseRecord]):
    """Responses of a benchmark; of one that was measured twice, after an interruption, the last counts."""

    def __init__(self, path: Path, setup: Provenance, prompts: Iterable[Prompt]):
        super().__init__(path, setup, prompts, ResponseRecord)

    def of(self, temperatures: Collection[float], prompts: Sequence[Prompt]) -> list[ResponseRecord]:
        """Those of these temperatures and prompts, in the order of the prompts, whoever measured them."""
        place = {prompt.id: number for number, prompt in enumerate(prompts)}
        chosen = (r for r in self.rows if r.temperature in temperatures and r.id in place)
        last = {(r.drafter, r.width, r.temperature, r.id, r.turn): r for r in chosen}
        return sorted(last.values(), key=lambda r: place[r.id])

    def has(self, ways: Iterable[tuple[str, Width | None]], temperature: float, prompt: Prompt) -> bool:
        """Whether a prompt is done in all ways, by the drafter's name and the width."""
        found = {(r.drafter, r.width, r.turn) for r in self.of([temperature], [prompt])}
        return all((*way, turn) in found for way in ways for turn in range(len(prompt.turns)))


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
    ranks.from_first(lambda: register_files(folder, "results.json"))
    about = _provenance(target, drafters, config)
    records, paces = ResponseRecords(folder / "bench.jsonl", about, prompts), Paces()
    seeds = {prompt.id: config.seed + number for number, prompt in enumerate(prompts)}
    prompts = first_of_each_set(prompts, config.num_prompts)
    drafted: dict[tuple[str, Width], Drafter] = {
        (name, width): drafter for name, drafter in drafters.items() for width in config.widths
    }
    engines: Engines = {(PLAIN, None): None, **drafted, **_compiled(target, config)}
    jobs = [(temperature, prompt) for temperature in config.temperatures for prompt in prompts]
    is_warm = False
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
            bar.update(task, advance=1, info=_so_far(records.rows))
    records.collect()
    block_sizes = {way: drafter.block_size for way, drafter in drafted.items()}
    rows = make_rows(target, records.of(config.temperatures, prompts), block_sizes)
    results = BenchResults(**vars(about), rows=rows, comparisons=compare_drafters(rows))
    ranks.from_first(lambda: write_results(folder / "results.json", results))
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
    spec["confidence_temperature"] = drafter.confidence_temperature
    if drafter.vocabulary is not None:
        spec["draft_vocabulary"] = drafter.vocabulary.token_ids.tolist()
    return hash_json(spec)
