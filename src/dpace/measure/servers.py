"""Ask running servers, and pool their text, speed and accepted lengths, as each of them reports these."""

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from dpace.config import BenchConfig
from dpace.measure.benchmark import Records
from dpace.measure.results import (
    PLAIN,
    SEED_RULE,
    GroupRecord,
    ServerAddress,
    ServerResults,
    ServerRow,
    ServerSetup,
    SideRecord,
    nullable,
    write_results,
)
from dpace.metrics import Acceptance, decode_speedup, ratio_interval
from dpace.prompts.prompts import Prompt, first_of_each_set
from dpace.servers.apis import Answer, Counts, Server, connect
from dpace.system.ledger import register_files
from dpace.system.progress import progress_bar
from dpace.target.chat import ChatTokenizer, encode_chat, tokenizer_hashes

DRAFTER = "drafter"
"""Name of the side with the drafter; the other one is `PLAIN`."""
SERVERS_FILE = "servers.json"
GROUPS_PER_WORKER = 4
"""Requests of a group for each that runs at the same time: the last ones of a group run with fewer beside them."""


def bench_servers(
    chat: ChatTokenizer,
    drafter_url: str,
    plain_url: str | None,
    prompts: Sequence[Prompt],
    config: BenchConfig,
    folder: str | Path,
) -> ServerResults:
    """Send every prompt to a server with a drafter and to one without, and write `servers.json`.

    Both get the same token ids. The sides alternate: prompt by prompt at concurrency 1, by groups of requests at
    others. Prompt `i` draws with `seed + i` on both. Each finished group is kept in `servers-*.jsonl`, a file for each
    way to measure; an interrupted call goes on after it.

    Args:
        chat: the target's tokenizer with what belongs to it.
        drafter_url: address of the server with the drafter, `http://host:port`.
        plain_url: of one that serves the same model without; None leaves out what needs a baseline.
        prompts: not trained on.
        config: temperatures, lengths, concurrencies, how many prompts of each set.
        folder: for these files.

    Returns:
        What `servers.json` holds.

    Raises:
        ValueError: a server that does not answer, refuses a request, or is of no known kind.
    """
    vocab_size = len(chat.tokenizer)
    urls = {DRAFTER: drafter_url} | ({PLAIN: plain_url} if plain_url else {})
    sides = {side: connect(url, vocab_size) for side, url in urls.items()}
    setup = _setup(chat, sides, config)
    register_files(folder, SERVERS_FILE)
    records = Records(Path(folder) / "servers.jsonl", setup, prompts, GroupRecord)
    seeds = {prompt.id: config.seed + number for number, prompt in enumerate(prompts)}
    prompts = first_of_each_set(prompts, config.num_prompts)
    done = {(r.temperature, r.concurrency, tuple(r.ids)): r for r in records.rows}
    jobs = [
        (temperature, concurrency, group)
        for concurrency in config.concurrencies
        for temperature in config.temperatures
        for group in _groups(prompts, concurrency)
    ]
    is_warm, chosen = False, []
    with progress_bar() as bar:
        task = bar.add_task("asking servers", total=sum(len(group) for *_, group in jobs), info="")
        for number, (temperature, concurrency, group) in enumerate(jobs):
            key = temperature, concurrency, tuple(prompt.id for prompt in group)
            if key not in done:
                if not is_warm:
                    for server in sides.values():
                        server.answer(encode_chat(chat, group[0].turns[0]), 16, temperature, config.seed)
                    is_warm = True
                done[key] = _ask(chat, sides, group, temperature, concurrency, config, seeds, rotation=number)
                records.add(done[key])
            chosen.append(done[key])
            bar.update(task, advance=len(group), info=f"concurrency {concurrency}")
    results = ServerResults(**vars(setup), rows=make_rows(chosen))
    write_results(Path(folder) / SERVERS_FILE, results)
    return results


def _setup(chat: ChatTokenizer, sides: dict[str, Server], config: BenchConfig) -> ServerSetup:
    """Say all that the answers depend on, apart from the prompts."""
    return ServerSetup(
        target=chat.name,
        servers={side: ServerAddress(url=s.url, engine=s.engine, model=s.model) for side, s in sides.items()},
        max_new_tokens=config.max_new_tokens,
        seed=config.seed,
        prompt_seeds=SEED_RULE,
        thinking=chat.thinking,
        **tokenizer_hashes(chat),
    )


def _groups(prompts: Sequence[Prompt], concurrency: int) -> Iterator[list[Prompt]]:
    """Prompts of one set that are sent together."""
    size = 1 if concurrency == 1 else GROUPS_PER_WORKER * concurrency
    for name in dict.fromkeys(prompt.set for prompt in prompts):
        of_set = [prompt for prompt in prompts if prompt.set == name]
        yield from (of_set[i : i + size] for i in range(0, len(of_set), size))


def _ask(
    chat: ChatTokenizer,
    sides: dict[str, Server],
    group: Sequence[Prompt],
    temperature: float,
    concurrency: int,
    config: BenchConfig,
    seeds: Mapping[str, int],
    *,
    rotation: int,
) -> GroupRecord:
    """Send a group to all sides, turn by turn; the answers to earlier turns are the plain server's."""
    messages: list[list[dict[str, str]]] = [[] for _ in group]
    names = list(sides)
    names = names[rotation % len(names) :] + names[: rotation % len(names)]
    turns = []
    for turn in range(max(len(prompt.turns) for prompt in group)):
        here = [i for i, prompt in enumerate(group) if turn < len(prompt.turns)]
        for i in here:
            messages[i] += group[i].turns[turn]
        encoded = [encode_chat(chat, messages[i]) for i in here]
        jobs = [(ids, seeds[group[i].id]) for i, ids in zip(here, encoded, strict=True)]
        asked = {name: _ask_side(sides[name], jobs, temperature, concurrency, config) for name in names}
        turns.append({name: side for name, (side, _) in asked.items()})
        answers = asked[PLAIN if PLAIN in asked else DRAFTER][1]
        for i, answer in zip(here, answers, strict=True):
            text = chat.tokenizer.decode(answer.token_ids, skip_special_tokens=True)
            messages[i].append({"role": "assistant", "content": text})
    return GroupRecord(
        set=group[0].set,
        ids=[prompt.id for prompt in group],
        temperature=temperature,
        concurrency=concurrency,
        turns=turns,
    )


def _ask_side(
    server: Server, jobs: Sequence[tuple[list[int], int]], temperature: float, concurrency: int, config: BenchConfig
) -> tuple[SideRecord, list[Answer]]:
    """Send prompts, each with its seed, to one server, so many at a time."""
    before, started = server.counters(), time.perf_counter()
    with ThreadPoolExecutor(concurrency) as pool:
        answers = list(pool.map(lambda job: server.answer(job[0], config.max_new_tokens, temperature, job[1]), jobs))
    seconds, after = time.perf_counter() - started, server.counters()
    counts = Counts.pooled([answer.counts for answer in answers if answer.counts])
    if before and after and after.num_verifications > before.num_verifications:
        counts = after - before
    side = SideRecord(
        token_ids=[answer.token_ids for answer in answers],
        decode_tokens=[answer.decode_tokens for answer in answers],
        decode_seconds=[answer.seconds - answer.first_seconds for answer in answers],
        first_seconds=[answer.first_seconds for answer in answers],
        seconds=seconds,
        counts=counts,
    )
    return side, answers


def make_rows(records: Sequence[GroupRecord]) -> list[ServerRow]:
    """Pool groups into one row for each set, temperature and concurrency."""
    keys = sorted({(r.temperature, r.set, r.concurrency) for r in records})
    return [_make_row([r for r in records if (r.temperature, r.set, r.concurrency) == key]) for key in keys]


def _make_row(groups: Sequence[GroupRecord]) -> ServerRow:
    """Pool groups of one set, temperature and concurrency.

    `tau` is tokens emitted a verification, from the accepted counts that the server reports; None where it reports
    none. Its interval resamples groups, which are prompts at concurrency 1.
    """
    turns = [turn for group in groups for turn in group.turns]
    ours, plain = _Pooled([turn[DRAFTER] for turn in turns]), None
    speedup, ends, num_same_text = None, (None, None), None
    if all(PLAIN in turn for turn in turns):
        plain = _Pooled([turn[PLAIN] for turn in turns])
        speedup, *ends = nullable(
            decode_speedup(ours.decode_tokens, ours.decode_seconds, plain.decode_tokens, plain.decode_seconds)
        )
        num_same_text = sum(a == b for a, b in zip(ours.token_ids, plain.token_ids, strict=True))
    by_group = [Counts.pooled([c for turn in group.turns if (c := turn[DRAFTER].counts)]) for group in groups]
    counts = [pooled for pooled in by_group if pooled]
    pooled = Counts.pooled(counts)
    verifications = [c.num_verifications for c in counts]
    emitted = [c.num_accepted + c.num_verifications for c in counts]
    tau_interval = ratio_interval(emitted, verifications)
    histogram = pooled.histogram if pooled else None
    first = groups[0]
    return ServerRow(
        set=first.set,
        temperature=first.temperature,
        concurrency=first.concurrency,
        tokens_per_second=ours.tokens_per_second,
        throughput=ours.throughput,
        first_seconds=ours.first_quantiles,
        plain_tokens_per_second=plain and plain.tokens_per_second,
        plain_throughput=plain and plain.throughput,
        plain_first_seconds=plain and plain.first_quantiles,
        num_responses=len(ours.token_ids),
        tau=pooled.num_accepted / pooled.num_verifications + 1 if pooled and pooled.num_verifications else None,
        tau_interval=nullable(tau_interval),
        num_verifications=pooled.num_verifications if pooled else None,
        histogram=histogram,
        reach_rate=Acceptance(histogram, len(histogram)).reach_rate.tolist() if histogram else None,
        decode_speedup=speedup,
        decode_speedup_interval=(ends[0], ends[1]),
        num_same_text=num_same_text,
    )


class _Pooled:
    """All requests to one side."""

    def __init__(self, sides: Sequence[SideRecord]):
        self.token_ids = [ids for side in sides for ids in side.token_ids]
        self.decode_tokens = [tokens for side in sides for tokens in side.decode_tokens]
        self.decode_seconds = [seconds for side in sides for seconds in side.decode_seconds]
        self.tokens_per_second = sum(self.decode_tokens) / max(1e-9, sum(self.decode_seconds))
        self.throughput = sum(map(len, self.token_ids)) / max(1e-9, sum(side.seconds for side in sides))
        first_seconds = [seconds for side in sides for seconds in side.first_seconds]
        median, late = np.quantile(first_seconds, [0.5, 0.95]).tolist()
        self.first_quantiles: tuple[float, float] = median, late
