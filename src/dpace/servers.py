"""Prompts and the addresses of running servers in; their text, speed and accepted lengths, as each of them reports these, out."""

import hashlib
import json
import re
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpace.benchmark import Records
from dpace.config import BenchConfig
from dpace.metrics import Acceptance, decode_speedup
from dpace.progress import progress_bar
from dpace.prompts import Prompt, first_of_each_set
from dpace.responses import Chat, encode_chat

SCHEMA_VERSION = 1
TIMEOUT_SECONDS = 600
"""Longest silence of a server."""
GROUPS_PER_WORKER = 4
"""Requests of a group for each that runs at the same time: the last ones of a group run with fewer beside them."""


@dataclass(frozen=True)
class Counts:
    """Verifications that a server reports."""

    num_verifications: int
    num_accepted: int
    """Draft tokens."""
    histogram: list[int] | None = None
    """Verifications by accepted length, where the server tells more than the sum."""

    def __add__(self, other: "Counts") -> "Counts":
        """Pool."""
        histogram = None
        if self.histogram and other.histogram:
            longest = max(len(self.histogram), len(other.histogram))
            pairs = (np.pad(h, (0, longest - len(h))) for h in (self.histogram, other.histogram))
            histogram = np.sum(list(pairs), 0).tolist()
        return Counts(
            self.num_verifications + other.num_verifications, self.num_accepted + other.num_accepted, histogram
        )


@dataclass(frozen=True)
class Answer:
    """One response of a server."""

    token_ids: list[int]
    first_seconds: float
    """From the request to its first token."""
    seconds: float
    """From the request to its last token."""
    counts: Counts | None = None
    """Where the response itself has them."""

    @property
    def decode_tokens(self) -> int:
        """Tokens after the first."""
        return max(0, len(self.token_ids) - 1)


class Server(ABC):
    """A running server, spoken to in its own dialect; always with token ids, so that every engine gets the same prompt."""

    engine: str

    def __init__(self, url: str):
        self.url = url.rstrip("/")

    @abstractmethod
    def request(self, token_ids: Sequence[int], max_new_tokens: int, temperature: float, seed: int) -> tuple[str, dict]:
        """Path and body of a streamed request for plain sampling at a temperature, without any filter."""

    @abstractmethod
    def read(self, event: dict, token_ids: list[int]) -> Counts | None:
        """Add an event's tokens to those so far; counts where the event has them."""

    def counters(self) -> Counts | None:
        """All verifications since the server began, for servers whose responses tell nothing."""
        return None

    def answer(self, token_ids: Sequence[int], max_new_tokens: int, temperature: float, seed: int) -> Answer:
        """Send one prompt and read its response to the end.

        Raises:
            ValueError: the server refuses, breaks off, or sends no token.
        """
        path, body = self.request(token_ids, max_new_tokens, temperature, seed)
        started, first, last, counts, response = time.perf_counter(), None, 0.0, None, []
        for event in _events(self.url + path, body):
            counts = self.read(event, response) or counts
            if response:
                last = time.perf_counter() - started
                first = first or last
        if first is None:
            raise ValueError(f"{self.url} sent no token for a prompt of {len(token_ids)} tokens; see the server's log")
        return Answer(response, first, last, counts)


class VllmServer(Server):
    """vLLM: `/v1/completions`, counters in `/metrics`.

    Source: its metrics `vllm:spec_decode_*`, https://docs.vllm.ai/en/latest/design/metrics.html.
    """

    engine = "vllm"

    def __init__(self, url: str):
        super().__init__(url)
        self.model = _get(self.url + "/v1/models")["data"][0]["id"]

    def request(self, token_ids, max_new_tokens, temperature, seed):
        """See `Server`."""
        body = {
            "model": self.model,
            "prompt": list(token_ids),
            "max_tokens": max_new_tokens,
            "temperature": temperature,
            "seed": seed,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "stream": True,
            "return_token_ids": True,
        }
        return "/v1/completions", body

    def read(self, event, token_ids):
        """See `Server`."""
        for choice in event.get("choices", ()):
            token_ids += choice.get("token_ids") or []

    def counters(self):
        """See `Server`."""
        text = _get(self.url + "/metrics", is_json=False)

        def values(name: str, label: str = "") -> list[tuple[str, int]]:
            pattern = rf"^vllm:spec_decode_{name}_total(?:\{{([^}}]*)\}})? ([0-9.e+]+)$"
            found = re.findall(pattern, text, re.MULTILINE)
            return [(labels, round(float(value))) for labels, value in found]

        drafts = values("num_drafts")
        if not drafts:
            return None
        reached: dict[int, int] = {}
        for labels, value in values("num_accepted_tokens_per_pos"):
            position = re.search(r'position="(\d+)"', labels)
            if position:
                reached[int(position[1])] = reached.get(int(position[1]), 0) + value
        total = sum(value for _, value in drafts)
        reach = [total, *(reached[i] for i in sorted(reached)), 0]
        histogram = [a - b for a, b in zip(reach, reach[1:], strict=False)] if reached else None
        return Counts(total, sum(value for _, value in values("num_accepted_tokens")), histogram)


class SglangServer(Server):
    """SGLang: its native `/generate`, counts in `meta_info`.

    Source: `spec_verify_ct` and `spec_accept_histogram` of sgl-project/sglang.
    """

    engine = "sglang"

    def request(self, token_ids, max_new_tokens, temperature, seed):
        """See `Server`."""
        sampling = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "sampling_seed": seed,
            "top_p": 1.0,
            "top_k": -1,
            "min_p": 0.0,
        }
        return "/generate", {"input_ids": list(token_ids), "sampling_params": sampling, "stream": True}

    def read(self, event, token_ids):
        """See `Server`."""
        meta, new = event.get("meta_info", {}), event.get("output_ids") or []
        if len(new) == meta.get(
            "completion_tokens"
        ):  # everything so far, unless the server was told to send the rest only
            token_ids.clear()
        token_ids += new
        if not meta.get("spec_verify_ct"):
            return None
        histogram = meta.get("spec_accept_histogram") or meta.get("spec_correct_drafts_histogram")
        accepted = meta.get("spec_accept_token_num", meta.get("spec_num_correct_drafts"))
        if accepted is None:
            accepted = meta["completion_tokens"] - 1 - meta["spec_verify_ct"]
        return Counts(meta["spec_verify_ct"], accepted, histogram)


class LlamacppServer(Server):
    """llama.cpp: its native `/completion`, draft counts in `timings`.

    Source: `tools/server/README.md` of ggml-org/llama.cpp.
    """

    engine = "llama.cpp"

    def request(self, token_ids, max_new_tokens, temperature, seed):
        """See `Server`."""
        body = {
            "prompt": list(token_ids),
            "n_predict": max_new_tokens,
            "temperature": temperature,
            "seed": seed,
            "top_k": 0,
            "top_p": 1.0,
            "min_p": 0.0,
            "repeat_penalty": 1.0,
            "cache_prompt": False,
            "return_tokens": True,
            "stream": True,
        }
        return "/completion", body

    def read(self, event, token_ids):
        """See `Server`."""
        token_ids += event.get("tokens") or []
        timings = event.get("timings") or {}
        if not event.get("stop") or "draft_n" not in timings:
            return None
        accepted = timings["draft_n_accepted"]
        return Counts(
            max(1, timings["predicted_n"] - 1 - accepted), accepted
        )  # a step emits what it accepts and one more


def connect(url: str) -> Server:
    """Find out what runs at an address.

    Raises:
        ValueError: nothing answers there, or none of the servers that are known.
    """
    url = url.rstrip("/")
    probes = (("/props", LlamacppServer), ("/get_server_info", SglangServer), ("/server_info", SglangServer))
    for path, kind in (*probes, ("/version", VllmServer)):
        try:
            answer = _get(url + path)
        except ValueError as error:
            if isinstance(error.__cause__, urllib.error.HTTPError):
                continue  # a server, but not this one
            raise
        if isinstance(answer, dict) and (kind is not VllmServer or "version" in answer):
            return kind(url)
    raise ValueError(f"{url} is neither vLLM nor SGLang nor llama.cpp's server; give the address before /v1")


def bench_servers(
    chat: Chat,
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
    digest = hashlib.sha256(json.dumps([asdict(prompt) for prompt in prompts]).encode()).hexdigest()
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
    (folder / "servers.json").write_text(json.dumps(results, indent=1) + "\n")
    return results


def _groups(prompts: Sequence[Prompt], concurrency: int) -> Iterator[list[Prompt]]:
    """Prompts of one set that are sent together."""
    size = 1 if concurrency == 1 else GROUPS_PER_WORKER * concurrency
    for name in dict.fromkeys(prompt.set for prompt in prompts):
        of_set = [prompt for prompt in prompts if prompt.set == name]
        yield from (of_set[i : i + size] for i in range(0, len(of_set), size))


def _ask(
    chat: Chat,
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
    counts = None
    reported = [answer.counts for answer in answers if answer.counts]
    if reported:
        counts = sum(reported[1:], reported[0])
    elif before and after and after.num_verifications > before.num_verifications:
        counts = _difference(after, before)
    side = {
        "token_ids": [answer.token_ids for answer in answers],
        "decode_tokens": [answer.decode_tokens for answer in answers],
        "decode_seconds": [answer.seconds - answer.first_seconds for answer in answers],
        "first_seconds": [answer.first_seconds for answer in answers],
        "seconds": seconds,
        "counts": asdict(counts) if counts else None,
    }
    return side, answers


def _difference(after: Counts, before: Counts) -> Counts:
    histogram = None
    if after.histogram:
        old = (before.histogram or []) + [0] * (len(after.histogram) - len(before.histogram or []))
        histogram = [a - b for a, b in zip(after.histogram, old, strict=True)]
    return Counts(
        after.num_verifications - before.num_verifications, after.num_accepted - before.num_accepted, histogram
    )


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
        counts = [sum(parts[1:], parts[0]) for group in groups if (parts := _counts(group))]
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
    """Pooled statistics of groups."""
    if not counts:
        return {"tau": None, "tau_interval": [None, None], "num_verifications": None, "histogram": None}
    emitted = np.array([[c.num_accepted + c.num_verifications, c.num_verifications] for c in counts])
    tau, interval = emitted[:, 0].sum() / emitted[:, 1].sum(), [None, None]
    if len(counts) > 1:
        picks = np.random.default_rng(0).integers(len(counts), size=(2000, len(counts)))
        sums = emitted[picks].sum(1)
        interval = np.quantile(sums[:, 0] / sums[:, 1], [0.025, 0.975]).tolist()
    pooled = sum(counts[1:], counts[0])
    row = {"tau": float(tau), "tau_interval": interval, "num_verifications": pooled.num_verifications}
    histogram = pooled.histogram
    reach = Acceptance(histogram, len(histogram)).reach_rate.tolist() if histogram else None
    return {**row, "histogram": histogram, "reach_rate": reach}


def _events(url: str, body: dict) -> Iterator[dict]:
    """The server-sent events of a request."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as stream:
            for line in stream:
                data = line.decode().strip().removeprefix("data:").strip()
                if not line.startswith(b"data:") or data == "[DONE]":
                    continue
                event = json.loads(data)
                if "error" in event:
                    raise ValueError(f"{url} answers: {event['error']}")
                yield event
    except urllib.error.HTTPError as error:
        raise ValueError(f"{url} refuses ({error.code}): {error.read().decode(errors='replace')[:300]}") from error
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{url} broke off ({error}); is the server still running?") from error


def _get(url: str, *, is_json: bool = True) -> Any:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            text = answer.read().decode()
    except OSError as error:
        raise ValueError(f"nothing answers at {url} ({error}); start the server, or mend the address") from error
    try:
        return json.loads(text) if is_json else text
    except json.JSONDecodeError:
        return None
