"""Prompts and the addresses of running servers in; their text, speed and accepted lengths, as each of them reports these, out."""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from dpace.config import BenchConfig
from dpace.data.chat import ChatTokenizer, encode_chat
from dpace.data.ledger import write_json
from dpace.data.prompts import Prompt, first_of_each_set
from dpace.measure.records import Records
from dpace.measure.server_apis import Answer, Counts, Server, connect
from dpace.metrics import Acceptance, decode_speedup
from dpace.progress import progress_bar
from dpace.provenance import hash_json

SCHEMA_VERSION = 1
GROUPS_PER_WORKER = 4
"""Requests of a group for each that runs at the same time: the last ones of a group run with fewer beside them."""


def bench_servers(
    chat: ChatTokenizer,
    drafter_url: str,
    plain_url: str | None,
    prompts: Sequence[Prompt],
    config: BenchConfig,
    folder: str | Path,
) -> dict:
    """Send every prompt to a server with a drafter and to one without, and write `servers.json`.

    Both get the same token ids. The sides alternate: prompt by prompt at concurrency 1, by groups of requests at others. Each
    finished group is kept in `servers.jsonl`; an interrupted call goes on after it.

    Args:
        chat: the target's tokenizer with what belongs to it.
        drafter_url: address of the server with the drafter, `http://host:port`.
        plain_url: of one that serves the same model without; None leaves out what needs a baseline.
        prompts: not trained on.
        config: temperatures, lengths, concurrencies, how many prompts of each set.
        folder: for the two files.

    Returns:
        What `servers.json` holds: `rows`, one for each set, temperature and concurrency.

    Raises:
        ValueError: a server that does not answer, refuses a request, or is of no known kind.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sides = {"drafter": connect(drafter_url)} | ({"plain": connect(plain_url)} if plain_url else {})
    prompts = first_of_each_set(prompts, config.num_prompts)
    meta = {
        "target": chat.name,
        "servers": {side: {"url": server.url, "engine": server.engine} for side, server in sides.items()},
        "max_new_tokens": config.max_new_tokens,
        "seed": config.seed,
    }
    digest = hash_json([asdict(prompt) for prompt in prompts])
    records = Records(folder / "servers.jsonl", {**meta, "prompts_sha256": digest})
    done = {(r["temperature"], r["concurrency"], tuple(r["ids"])) for r in records.rows}
    jobs = [
        (temperature, concurrency, group)
        for concurrency in config.concurrencies
        for temperature in config.temperatures
        for group in _groups(prompts, concurrency)
    ]
    is_warm = False
    with progress_bar() as bar:
        task = bar.add_task("asking servers", total=sum(len(group) for *_, group in jobs), info="")
        for number, (temperature, concurrency, group) in enumerate(jobs):
            if (temperature, concurrency, tuple(prompt.id for prompt in group)) not in done:
                if not is_warm:
                    for server in sides.values():
                        server.answer(encode_chat(chat, group[0].turns[0]), 16, temperature, config.seed)
                    is_warm = True
                records.add(_ask(chat, sides, group, temperature, concurrency, config, rotation=number))
            bar.update(task, advance=len(group), info=f"concurrency {concurrency}")
    results = {"schema_version": SCHEMA_VERSION, "rows": make_rows(records.rows, config), **meta}
    write_json(folder / "servers.json", results)
    return results


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
    *,
    rotation: int,
) -> dict:
    """Send a group to all sides, turn by turn; the answers to earlier turns are the plain server's."""
    messages: list[list[dict[str, str]]] = [[] for _ in group]
    record = {"set": group[0].set, "ids": [p.id for p in group], "temperature": temperature, "concurrency": concurrency}
    names = list(sides)
    names = names[rotation % len(names) :] + names[: rotation % len(names)]
    turns = []
    for turn in range(max(len(prompt.turns) for prompt in group)):
        here = [i for i, prompt in enumerate(group) if turn < len(prompt.turns)]
        for i in here:
            messages[i] += group[i].turns[turn]
        encoded = [encode_chat(chat, messages[i]) for i in here]
        asked = {name: _ask_side(sides[name], encoded, temperature, concurrency, config) for name in names}
        turns.append({name: side for name, (side, _) in asked.items()})
        answers = asked["plain" if "plain" in asked else "drafter"][1]
        for i, answer in zip(here, answers, strict=True):
            text = chat.tokenizer.decode(answer.token_ids, skip_special_tokens=True)
            messages[i].append({"role": "assistant", "content": text})
    return {**record, "turns": turns}


def _ask_side(
    server: Server, encoded: Sequence[list[int]], temperature: float, concurrency: int, config: BenchConfig
) -> tuple[dict, list[Answer]]:
    """Send prompts to one server, so many at a time."""
    before, started = server.counters(), time.perf_counter()
    with ThreadPoolExecutor(concurrency) as pool:
        answers = list(
            pool.map(lambda ids: server.answer(ids, config.max_new_tokens, temperature, config.seed), encoded)
        )
    seconds, after = time.perf_counter() - started, server.counters()
    counts = Counts.pooled([answer.counts for answer in answers if answer.counts])
    if before and after and after.num_verifications > before.num_verifications:
        counts = after - before
    side = {
        "token_ids": [answer.token_ids for answer in answers],
        "decode_tokens": [answer.decode_tokens for answer in answers],
        "decode_seconds": [answer.seconds - answer.first_seconds for answer in answers],
        "first_seconds": [answer.first_seconds for answer in answers],
        "seconds": seconds,
        "counts": asdict(counts) if counts else None,
    }
    return side, answers


def make_rows(records: Sequence[dict], config: BenchConfig) -> list[dict]:
    """Pool groups into one row for each set, temperature and concurrency.

    `tau` is tokens emitted a verification, from the accepted counts that the server reports; where it reports none, None. Its
    interval resamples groups, which are prompts at concurrency 1.
    """
    rows = []
    keys = dict.fromkeys((r["temperature"], r["set"], r["concurrency"]) for r in records)
    for temperature, name, concurrency in sorted(keys):
        if temperature not in config.temperatures or concurrency not in config.concurrencies:
            continue
        key = (temperature, name, concurrency)
        groups = [r["turns"] for r in records if (r["temperature"], r["set"], r["concurrency"]) == key]
        row: dict[str, Any] = {"set": name, "temperature": temperature, "concurrency": concurrency}
        of_side = {}
        for side in groups[0][0]:
            turns = [turn[side] for group in groups for turn in group]
            flat = {
                k: [x for turn in turns for x in turn[k]] for k in ("decode_tokens", "decode_seconds", "first_seconds")
            }
            of_side[side] = flat
            prefix = "" if side == "drafter" else "plain_"
            row[f"{prefix}tokens_per_second"] = sum(flat["decode_tokens"]) / max(1e-9, sum(flat["decode_seconds"]))
            row[f"{prefix}throughput"] = sum(len(ids) for turn in turns for ids in turn["token_ids"]) / sum(
                turn["seconds"] for turn in turns
            )
            row[f"{prefix}first_seconds"] = np.quantile(flat["first_seconds"], [0.5, 0.95]).tolist()
        counts = [pooled for group in groups if (pooled := Counts.pooled(_counts(group)))]
        row |= {"num_responses": len(of_side["drafter"]["decode_tokens"]), **_tau(counts)}
        row["decode_speedup"], row["decode_speedup_interval"], row["num_same_text"] = None, [None, None], None
        if "plain" in of_side:
            sides = [of_side[side][k] for side in ("drafter", "plain") for k in ("decode_tokens", "decode_seconds")]
            row["decode_speedup"], *row["decode_speedup_interval"] = decode_speedup(*sides)
            pairs = [zip(t["drafter"]["token_ids"], t["plain"]["token_ids"], strict=True) for g in groups for t in g]
            row["num_same_text"] = sum(a == b for pair in pairs for a, b in pair)
        rows.append(row)
    return rows


def _counts(group: Sequence[dict]) -> list[Counts]:
    return [Counts(**turn["drafter"]["counts"]) for turn in group if turn["drafter"]["counts"]]


def _tau(counts: Sequence[Counts]) -> dict:
    """Pooled statistics of groups; None for what servers do not tell."""
    pooled, interval = Counts.pooled(counts), [None, None]
    if len(counts) > 1:
        emitted = np.array([[c.num_accepted + c.num_verifications, c.num_verifications] for c in counts])
        picks = np.random.default_rng(0).integers(len(counts), size=(2000, len(counts)))
        sums = emitted[picks].sum(1)
        interval = np.quantile(sums[:, 0] / sums[:, 1], [0.025, 0.975]).tolist()
    histogram = pooled and pooled.histogram
    return {
        "tau": pooled and pooled.num_accepted / pooled.num_verifications + 1,
        "tau_interval": interval,
        "num_verifications": pooled and pooled.num_verifications,
        "histogram": histogram,
        "reach_rate": Acceptance(histogram, len(histogram)).reach_rate.tolist() if histogram else None,
    }
