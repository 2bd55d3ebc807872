"""Measure running servers, one with a drafter and one without, and write servers.json.

In come their addresses and prompts. Both get the same token ids; out come rows with text, speed and accepted lengths,
as each server reports these.
"""

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dpace.config import BenchConfig
from dpace.measure.records import (
    PLAIN,
    SEED_RULE,
    GroupRecord,
    GroupRecords,
    ServerAddress,
    ServerSetup,
    SideRecord,
    rotated,
)
from dpace.measure.results import Estimate, ServerResults, ServerRow, nullable, write_results
from dpace.metrics import Acceptance, decode_speedup, estimate
from dpace.prompts.prompts import Prompt, first_of_each_set
from dpace.servers.apis import Counts, Server, connect
from dpace.system.ledger import register_files
from dpace.system.progress import progress_bar
from dpace.target.chat import ChatTokenizer, encode_chat, tokenizer_hashes

DRAFTER = "drafter"
"""Name of the side with the drafter; the other one is `PLAIN`."""
SERVERS_FILE = "servers.json"
"""What the rows are written to."""
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
    setup = ServerSetup(
        target=chat.name,
        servers={side: ServerAddress(url=s.url, engine=s.engine, model=s.model) for side, s in sides.items()},
        max_new_tokens=config.max_new_tokens,
        seed=config.seed,
        prompt_seeds=SEED_RULE,
        thinking=chat.thinking,
        **tokenizer_hashes(chat),
    )
    register_files(folder, SERVERS_FILE)
    records = GroupRecords(Path(folder) / "servers.jsonl", setup, prompts)
    seeds = {prompt.id: config.seed + number for number, prompt in enumerate(prompts)}
    prompts = first_of_each_set(prompts, config.num_prompts)
    done = {(r.temperature, r.concurrency, tuple(r.ids)): r for r in records.rows}
    jobs = list(_make_jobs(prompts, config))
    missing = next((job for job in jobs if job.key not in done), None)
    if missing:  # a warm-up, which is not counted
        first_turn = encode_chat(chat, missing.prompts[0].turns[0])
        for server in sides.values():
            server.answer(first_turn, 16, missing.temperature, config.seed)
    with progress_bar() as bar:
        task = bar.add_task("asking servers", total=sum(len(job.prompts) for job in jobs), info="")
        for number, job in enumerate(jobs):
            if job.key not in done:
                done[job.key] = _ask_servers(
                    chat, sides, job, max_new_tokens=config.max_new_tokens, seeds=seeds, rotation=number
                )
                records.add(done[job.key])
            bar.update(task, advance=len(job.prompts), info=f"concurrency {job.concurrency}")
    results = ServerResults(**vars(setup), rows=make_rows([done[job.key] for job in jobs], prompts))
    write_results(Path(folder) / SERVERS_FILE, results)
    return results


class _Job(NamedTuple):
    """Prompts of one set that are sent together."""

    temperature: float
    concurrency: int
    prompts: list[Prompt]

    @property
    def key(self) -> tuple[float, int, tuple[str, ...]]:
        """What tells it from the others."""
        return self.temperature, self.concurrency, tuple(prompt.id for prompt in self.prompts)


def _make_jobs(prompts: Sequence[Prompt], config: BenchConfig) -> Iterator[_Job]:
    """Yield the groups of prompts for each concurrency and temperature."""
    for concurrency, temperature in itertools.product(config.concurrencies, config.temperatures):
        size = 1 if concurrency == 1 else GROUPS_PER_WORKER * concurrency
        for name in dict.fromkeys(prompt.set for prompt in prompts):
            of_set = [prompt for prompt in prompts if prompt.set == name]
            for start in range(0, len(of_set), size):
                yield _Job(temperature, concurrency, of_set[start : start + size])


def _ask_servers(
    chat: ChatTokenizer,
    sides: dict[str, Server],
    job: _Job,
    *,
    max_new_tokens: int,
    seeds: Mapping[str, int],
    rotation: int,
) -> GroupRecord:
    """Send a group to all sides, turn by turn; the answers to earlier turns are the plain server's."""
    messages: list[list[dict[str, str]]] = [[] for _ in job.prompts]
    turns = []
    for turn in range(max(len(prompt.turns) for prompt in job.prompts)):
        asked = [i for i, prompt in enumerate(job.prompts) if turn < len(prompt.turns)]
        requests = []
        for i in asked:
            messages[i] += job.prompts[i].turns[turn]
            requests.append((encode_chat(chat, messages[i]), seeds[job.prompts[i].id]))
        answers = {name: _ask_server(sides[name], requests, job, max_new_tokens) for name in rotated(sides, rotation)}
        turns.append(answers)
        plain = answers[PLAIN if PLAIN in answers else DRAFTER]
        for i, token_ids in zip(asked, plain.token_ids, strict=True):
            text = chat.tokenizer.decode(token_ids, skip_special_tokens=True)
            messages[i].append({"role": "assistant", "content": text})
    return GroupRecord(
        set=job.prompts[0].set,
        ids=[prompt.id for prompt in job.prompts],
        temperature=job.temperature,
        concurrency=job.concurrency,
        turns=turns,
    )


def _ask_server(
    server: Server, requests: Sequence[tuple[list[int], int]], job: _Job, max_new_tokens: int
) -> SideRecord:
    """Send prompts, each with its seed, to one server, as many at a time as the job says."""
    before = server.counters()
    started = time.perf_counter()
    with ThreadPoolExecutor(job.concurrency) as pool:
        answers = list(
            pool.map(lambda request: server.answer(request[0], max_new_tokens, job.temperature, request[1]), requests)
        )
    seconds = time.perf_counter() - started
    after = server.counters()
    counts = Counts.pooled([answer.counts for answer in answers if answer.counts])
    if before and after and after.num_verifications > before.num_verifications:
        counts = after - before
    return SideRecord(
        token_ids=[answer.token_ids for answer in answers],
        decode_tokens=[answer.decode_tokens for answer in answers],
        decode_seconds=[answer.seconds - answer.first_seconds for answer in answers],
        first_seconds=[answer.first_seconds for answer in answers],
        seconds=seconds,
        counts=counts,
    )


def make_rows(records: Sequence[GroupRecord], prompts: Sequence[Prompt]) -> list[ServerRow]:
    """Pool groups of these prompts into one row for each set, temperature and concurrency."""
    num_turns = {prompt.id: len(prompt.turns) for prompt in prompts}
    rows: dict[tuple[float, str, int], list[GroupRecord]] = {}
    for r in records:
        rows.setdefault((r.temperature, r.set, r.concurrency), []).append(r)
    return [_pool_groups(rows[key], num_turns) for key in sorted(rows)]


def _pool_groups(groups: Sequence[GroupRecord], num_turns: Mapping[str, int]) -> ServerRow:
    """Pool groups of one set, temperature and concurrency.

    `tau` is tokens emitted a verification, from the accepted counts that the server reports; None where it reports
    none. Its interval resamples groups, which are prompts at concurrency 1; that of the speedup resamples prompts.
    """
    first = groups[0]
    ids = [i for group in groups for turn in range(len(group.turns)) for i in group.ids if turn < num_turns[i]]
    ours = _pool_side(groups, DRAFTER)
    counts = ours.counts
    histogram = counts.histogram if counts else None
    by_group = [of_group for group in groups if (of_group := _pool_side([group], DRAFTER).counts)]
    emitted = [of_group.num_accepted + of_group.num_verifications for of_group in by_group]
    verifications = [of_group.num_verifications for of_group in by_group]
    tau, *tau_ends = nullable(estimate(np.array([[[emitted]], [[verifications]]], float)))
    plain = _pool_side(groups, PLAIN) if all(PLAIN in turn for group in groups for turn in group.turns) else None
    speedup: Estimate = (None, None, None)
    if plain:
        of_sides = (ours.decode_tokens, ours.decode_seconds, plain.decode_tokens, plain.decode_seconds)
        speedup = nullable(decode_speedup(*(_by_prompt(values, ids) for values in of_sides)))
    return ServerRow(
        set=first.set,
        temperature=first.temperature,
        concurrency=first.concurrency,
        tokens_per_second=_tokens_per_second(ours),
        throughput=_throughput(ours),
        first_seconds=_first_quantiles(ours),
        plain_tokens_per_second=plain and _tokens_per_second(plain),
        plain_throughput=plain and _throughput(plain),
        plain_first_seconds=plain and _first_quantiles(plain),
        num_responses=len(ours.token_ids),
        tau=tau,
        tau_interval=tuple(tau_ends),
        num_verifications=counts.num_verifications if counts else None,
        histogram=histogram,
        reach_rate=Acceptance(histogram, len(histogram)).reach_rate.tolist() if histogram else None,
        decode_speedup=speedup[0],
        decode_speedup_interval=speedup[1:],
        num_same_text=sum(a == b for a, b in zip(ours.token_ids, plain.token_ids, strict=True)) if plain else None,
    )


def _by_prompt(values: Sequence[int | float], ids: Sequence[str]) -> list[int | float]:
    """Add up the values of the requests of each prompt."""
    totals: dict[str, int | float] = dict.fromkeys(ids, 0)
    for prompt_id, value in zip(ids, values, strict=True):
        totals[prompt_id] += value
    return list(totals.values())


def _pool_side(groups: Sequence[GroupRecord], name: str) -> SideRecord:
    """Put all requests to one side together, one after the other."""
    sides = [turn[name] for group in groups for turn in group.turns]
    return SideRecord(
        token_ids=[ids for side in sides for ids in side.token_ids],
        decode_tokens=[tokens for side in sides for tokens in side.decode_tokens],
        decode_seconds=[seconds for side in sides for seconds in side.decode_seconds],
        first_seconds=[seconds for side in sides for seconds in side.first_seconds],
        seconds=sum(side.seconds for side in sides),
        counts=Counts.pooled([side.counts for side in sides if side.counts]),
    )


def _tokens_per_second(side: SideRecord) -> float:
    return sum(side.decode_tokens) / max(1e-9, sum(side.decode_seconds))


def _throughput(side: SideRecord) -> float:
    return sum(map(len, side.token_ids)) / max(1e-9, side.seconds)


def _first_quantiles(side: SideRecord) -> tuple[float, float]:
    median, late = np.quantile(side.first_seconds, [0.5, 0.95]).tolist()
    return median, late
