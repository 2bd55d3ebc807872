"""Measure running servers, one with a drafter and one without, and write servers.json.

In come their addresses and prompts. Both get the same token ids; out come rows with text, speed and accepted lengths,
as each server reports these.
"""

import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dpace.config import BenchConfig
from dpace.measure.break_even import PAIRED, find_break_even, prompt_totals
from dpace.measure.records import (
    PLAIN,
    SEED_RULE,
    GroupRecord,
    GroupRecords,
    ServerAddress,
    ServerSetup,
    SideRecord,
    group_by,
    rotated,
)
from dpace.measure.results import PairedResponse, ServerResults, ServerRow, nullable, write_results
from dpace.metrics import Acceptance, decode_speedup, estimate
from dpace.prompts.prompts import Prompt, first_of_each_set
from dpace.respond.conversation import refuse_long_prompts
from dpace.servers.apis import Answer, Counts, Server, connect
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
        ValueError: a server that does not answer, refuses a request, or is of no known kind; or an over-long prompt.
    """
    urls = {DRAFTER: drafter_url} | ({PLAIN: plain_url} if plain_url else {})
    sides = {side: connect(url, len(chat.tokenizer)) for side, url in urls.items()}
    setup = ServerSetup(
        target=chat.name,
        servers={
            side: ServerAddress(url=s.url, engine=s.engine, model=s.model, version=s.version)
            for side, s in sides.items()
        },
        salted=True,
        max_new_tokens=config.max_new_tokens,
        seed=config.seed,
        prompt_seeds=SEED_RULE,
        thinking=chat.thinking,
        **tokenizer_hashes(chat),
    )
    register_files(folder, SERVERS_FILE)
    records = GroupRecords(Path(folder) / "servers.jsonl", setup, prompts)
    prompts = first_of_each_set(prompts, config.num_prompts)
    refuse_long_prompts(chat, prompts, config.max_new_tokens)
    by_id = {prompt.id: prompt for prompt in prompts}
    done = {_Job(r.temperature, r.concurrency, r.prefix, tuple(r.ids)): r for r in records.rows}
    jobs = list(_make_jobs(prompts, config))
    missing = next((job for job in jobs if job not in done), None)
    if missing:  # a warm-up, which is not counted
        first_turn = encode_chat(chat, by_id[missing.ids[0]].turns[0])
        for server in sides.values():
            server.answer(first_turn, 16, missing.temperature, config.seed)
    else:
        print(f"nothing is asked: {records.path} has all answers; remove it to measure again", file=sys.stderr)
    with progress_bar() as bar:
        task = bar.add_task("asking servers", total=sum(len(job.ids) for job in jobs), info="")
        for number, job in enumerate(jobs):
            if job not in done:
                asked = [by_id[name] for name in job.ids]
                done[job] = _ask_servers(
                    chat, sides, job, asked, max_new_tokens=config.max_new_tokens, seeds=records.seeds, rotation=number
                )
                records.add(done[job])
            bar.update(task, advance=len(job.ids), info=f"concurrency {job.concurrency}")
    rows = make_rows([done[job] for job in jobs], by_id)
    measured = (
        ((sides[DRAFTER].engine, row.temperature, row.concurrency), response)
        for row in rows
        if row.prefix == config.prefixes[0]
        for response in row.responses or ()
    )
    results = ServerResults(**vars(setup), rows=rows, break_even=list(find_break_even(measured)))
    write_results(Path(folder) / SERVERS_FILE, results)
    return results


class _Job(NamedTuple):
    """Prompts of one set that are sent together, and how."""

    temperature: float
    concurrency: int
    prefix: str
    ids: tuple[str, ...]


def _make_jobs(prompts: Sequence[Prompt], config: BenchConfig) -> Iterator[_Job]:
    """Yield the groups of prompts for each concurrency, temperature and state of the cache.

    No more requests are open at a time than a set has prompts.
    """
    for name in dict.fromkeys(prompt.set for prompt in prompts):
        of_set = tuple(prompt.id for prompt in prompts if prompt.set == name)
        numbers = dict.fromkeys(min(number, len(of_set)) for number in config.concurrencies)
        for concurrency, temperature, prefix in product(numbers, config.temperatures, config.prefixes):
            size = 1 if concurrency == 1 else GROUPS_PER_WORKER * concurrency
            for start in range(0, len(of_set), size):
                yield _Job(temperature, concurrency, prefix, of_set[start : start + size])


def _ask_servers(
    chat: ChatTokenizer,
    sides: dict[str, Server],
    job: _Job,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    seeds: Mapping[str, int],
    rotation: int,
) -> GroupRecord:
    """Send a group to all sides, turn by turn; the answers to earlier turns are the plain server's."""
    messages: list[list[dict[str, Any]]] = [[] for _ in prompts]
    turns = []
    prompt_tokens = []
    for turn in range(max(len(prompt.turns) for prompt in prompts)):
        asked = [i for i, prompt in enumerate(prompts) if turn < len(prompt.turns)]
        requests = []
        for i in asked:
            messages[i] += prompts[i].turns[turn]
            requests.append((encode_chat(chat, messages[i]), seeds[prompts[i].id], uuid.uuid4().hex))
        answers = {name: _ask_server(sides[name], requests, job, max_new_tokens) for name in rotated(sides, rotation)}
        turns.append(answers)
        prompt_tokens.append([len(request[0]) for request in requests])
        plain = answers[PLAIN if PLAIN in answers else DRAFTER]
        for i, token_ids in zip(asked, plain.token_ids, strict=True):
            text = chat.tokenizer.decode(token_ids, skip_special_tokens=True)
            messages[i].append({"role": "assistant", "content": text})
    return GroupRecord(
        set=prompts[0].set,
        ids=list(job.ids),
        temperature=job.temperature,
        concurrency=job.concurrency,
        prefix=job.prefix,
        prompt_tokens=prompt_tokens,
        turns=turns,
    )


def _ask_server(
    server: Server, requests: Sequence[tuple[list[int], int, str]], job: _Job, max_new_tokens: int
) -> SideRecord:
    """Send prompts, each with its seed and salt, to one server, as many at a time as the job says.

    No request had the salt before, so the prompts are new to the server's cache. Where it is to be warm, all are sent
    once before they are counted.
    """

    def send(*, is_warm: bool) -> list[Answer]:
        def ask(token_ids: list[int], seed: int, salt: str) -> Answer:
            more = server.measured(salt, is_warm=is_warm)
            return server.answer(token_ids, max_new_tokens, job.temperature, seed, more=more)

        with ThreadPoolExecutor(job.concurrency) as pool:
            return list(pool.map(ask, *zip(*requests, strict=True)))

    if job.prefix == "warm":
        send(is_warm=False)
    before = server.counters()
    started = time.perf_counter()
    answers = send(is_warm=job.prefix == "warm")
    seconds = time.perf_counter() - started
    after = server.counters()
    known = [answer.counts for answer in answers if answer.counts]
    counts = Counts.pooled(known)
    if len(known) < len(answers) and before and after and after.num_verifications > before.num_verifications:
        counts = after - before
        known = [counts] if counts else []
    return SideRecord(
        token_ids=[answer.token_ids for answer in answers],
        decode_tokens=[answer.decode_tokens for answer in answers],
        decode_seconds=[answer.seconds - answer.first_seconds for answer in answers],
        first_seconds=[answer.first_seconds for answer in answers],
        seconds=seconds,
        counts=counts,
        request_counts=known if len(known) == len(answers) else None,
    )


def make_rows(records: Sequence[GroupRecord], prompts: Mapping[str, Prompt]) -> list[ServerRow]:
    """Pool groups of these prompts into one row for each set, temperature, concurrency and state of the cache."""
    rows = group_by(records, attrgetter("temperature", "set", "concurrency", "prefix"))
    return [_pool_groups(rows[key], prompts) for key in sorted(rows)]


def _pool_groups(groups: Sequence[GroupRecord], prompts: Mapping[str, Prompt]) -> ServerRow:
    """Pool groups of one row.

    `tau` is tokens emitted a verification, from the accepted counts that the server reports; None where it reports
    none. Intervals resample prompts; that of tau resamples groups where counts of requests are not known.
    """
    first = groups[0]
    responses = [response for group in groups for response in _pair_sides(group, prompts)]
    ours = _sides(groups, DRAFTER)
    plain = _sides(groups, PLAIN)
    counts = _pool_counts(ours)
    histogram = counts and counts.histogram
    emitted = prompt_totals(responses, "num_emitted", "num_verifications")
    if np.isnan(emitted).any():  # a server that tells the sum of all requests only
        by_group = [of_group for group in groups if (of_group := _pool_counts(_sides([group], DRAFTER)))]
        emitted = np.array([[c.num_emitted, c.num_verifications] for c in by_group] or [[0, 0]]).T
    tau, *tau_ends = nullable(estimate(emitted[:, None, None]))
    speedup, *ends = nullable(decode_speedup(*prompt_totals(responses, *PAIRED)))
    pairs = [pair for a, b in zip(ours, plain, strict=False) for pair in zip(a.token_ids, b.token_ids, strict=True)]
    return ServerRow(
        set=first.set,
        temperature=first.temperature,
        concurrency=first.concurrency,
        prefix=first.prefix,
        **_rates(ours),
        **({f"plain_{name}": value for name, value in _rates(plain).items()} if plain else {}),
        num_responses=len(responses),
        tau=tau,
        tau_interval=tuple(tau_ends),
        num_verifications=counts and counts.num_verifications,
        histogram=histogram,
        reach_rate=Acceptance(histogram, len(histogram)).reach_rate.tolist() if histogram else None,
        decode_speedup=speedup,
        decode_speedup_interval=tuple(ends),
        num_same_text=sum(a == b for a, b in pairs) if plain else None,
        responses=responses,
    )


def _pair_sides(group: GroupRecord, prompts: Mapping[str, Prompt]) -> Iterator[PairedResponse]:
    """Yield the requests of a group, each with what all sides gave."""
    for turn, sides in enumerate(group.turns):
        ours = sides[DRAFTER]
        for i, name in enumerate(name for name in group.ids if turn < len(prompts[name].turns)):
            counts = ours.request_counts[i] if ours.request_counts else None
            plain = sides.get(PLAIN)
            yield PairedResponse(
                id=name,
                prompt_tokens=group.prompt_tokens[turn][i],
                decode_tokens=ours.decode_tokens[i],
                decode_seconds=ours.decode_seconds[i],
                num_verifications=counts and counts.num_verifications,
                num_emitted=counts and counts.num_emitted,
                plain_tokens=plain and plain.decode_tokens[i],
                plain_seconds=plain and plain.decode_seconds[i],
            )


def _sides(groups: Sequence[GroupRecord], name: str) -> list[SideRecord]:
    """Return what one server answered, turn by turn; nothing where there is no such server."""
    return [turn[name] for group in groups for turn in group.turns if name in turn]


def _pool_counts(sides: Sequence[SideRecord]) -> Counts | None:
    return Counts.pooled([side.counts for side in sides if side.counts])


def _rates(sides: Sequence[SideRecord]) -> dict[str, Any]:
    """Compute the fields of a row that tell how fast one server was."""
    seconds = sum(sum(side.decode_seconds) for side in sides)
    num_tokens = sum(len(token_ids) for side in sides for token_ids in side.token_ids)
    first = [seconds for side in sides for seconds in side.first_seconds]
    return {
        "tokens_per_second": sum(sum(side.decode_tokens) for side in sides) / max(1e-9, seconds),
        "throughput": num_tokens / max(1e-9, sum(side.seconds for side in sides)),
        "first_seconds": tuple(np.quantile(first, [0.5, 0.95]).tolist()),
    }
