"""What the memory of answers gains: decoding with it over width `auto` without it, and the time of a look-up.

    python benchmarks/recall.py dpace-demo [--requests 200] [--tokens 64] [--per-set 25]

The folder is that of `dpace demo`. Three streams of requests are decoded in order: the demo's held-out notes, its
held-out problems, and notes that `make_prompts.py` writes. Each request is decoded without a memory, with one that is
empty at the start of the stream (cold), and with one that starts from the answers that the drafter was trained on
(warm); by the demo's drafter, and by a random one, which shows what copies give without a drafter. The three take
turns, each with its own experience. Printed are tokens a second after the first token, and the median over requests of
the ratio to no memory, with its 95 % bootstrap interval.

Bars: at least 1.15 warm on notes, at least 0.99 on problems, and at most 0.1 ms a look-up among a million tokens.
"""

import argparse
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from make_prompts import make
from rich.box import SIMPLE_HEAD
from rich.table import Table

from dpace.decode import Generation, Paces, generate
from dpace.decode.copies import BYTES_PER_TOKEN, CONTEXT_TOKENS, Recall
from dpace.drafter import Drafter, load_drafter
from dpace.fast.packing import pack_linears
from dpace.prompts.prompts import demo_path, first_of_each_set, read_prompts
from dpace.report.tables import console
from dpace.respond.responses import read_responses
from dpace.system.progress import progress_bar
from dpace.target import Target
from dpace.target.chat import encode_chat
from dpace.target.locate import TARGET_ID, find_target

WAYS = ("no memory", "cold", "warm")
RECALL_MIB = 64.0
NUM_RESAMPLES = 2000


class Result(NamedTuple):
    """One request, decoded in one way."""

    seconds: float
    token_ids: list[int]
    num_copied: int

    @classmethod
    def of(cls, generation: Generation) -> "Result":
        """Keep what is compared."""
        return cls(generation.decode_seconds, generation.token_ids, generation.num_copied)

    @property
    def speed(self) -> float:
        """Tokens a second after the first."""
        return (len(self.token_ids) - 1) / self.seconds


def find_answers(folder: Path, target: Target) -> list[int]:
    """Return the demo's answers to its prompts for training, for a drafter without `answers.json`."""
    heldout = {prompt.id for prompt in read_prompts(demo_path("heldout"))}
    responses = read_responses(folder / "responses.jsonl", len(target.head.weight))
    trained = [response for response in responses if response.id not in heldout]
    return [token for r in trained for start, end in r.response_spans for token in r.token_ids[start:end]]


def make_paces(drafter: Drafter, answers: list[int], way: str) -> Paces:
    """Make what a way knows at the start of a stream."""
    paces = Paces(0.0 if way == "no memory" else RECALL_MIB)
    drafter.answers = answers if way == "warm" else []
    paces.recall(drafter)
    return paces


def measure(
    target: Target, drafter: Drafter, answers: list[int], stream: Sequence[list[int]], num_tokens: int, title: str
) -> dict[str, list[Result]]:
    """Decode the requests of a stream in order, each in all ways, which take turns at being the first."""
    paces = {way: make_paces(drafter, answers, way) for way in WAYS}
    for known in paces.values():
        known.get(target, drafter)  # measures the machine
    results: dict[str, list[Result]] = {way: [] for way in WAYS}
    with progress_bar() as bar:
        task = bar.add_task(title, total=len(stream), info="")
        for number, token_ids in enumerate(stream):
            for turn in range(len(WAYS)):
                way = WAYS[(number + turn) % len(WAYS)]
                generation = generate(target, drafter, token_ids, max_new_tokens=num_tokens, paces=paces[way])
                results[way].append(Result.of(generation))
            bar.update(task, advance=1)
    return results


def row_of(results: dict[str, list[Result]], way: str) -> list[str]:
    """Write tokens a second, the ratio to no memory, the share of copied tokens, and the number of equal texts."""
    found, base = results[way], results[WAYS[0]]
    pairs = [(a, b) for a, b in zip(found, base, strict=True) if len(a.token_ids) > 1]
    ratios = np.array([a.speed / b.speed for a, b in pairs])
    draws = np.random.default_rng(0).integers(len(ratios), size=(NUM_RESAMPLES, len(ratios)))
    low, high = np.quantile(np.median(ratios[draws], axis=1), [0.025, 0.975])
    tokens = sum(len(a.token_ids) - 1 for a, _ in pairs)
    same = sum(a.token_ids == b.token_ids for a, b in pairs)
    return [
        f"{tokens / sum(a.seconds for a, _ in pairs):.1f}",
        f"{np.median(ratios):.3f}",
        f"{low:.3f} to {high:.3f}",
        f"{sum(a.num_copied for a, _ in pairs) / tokens:.0%}",
        f"{same}/{len(pairs)}",
    ]


def look_up_times(answers: Sequence[int], num_tokens: int) -> tuple[float, float]:
    """Time look-ups in a memory of a number of tokens: real answers, of which every eighth token is another.

    Returns:
        Median and 99th percentile, in milliseconds.
    """
    rng, recall = random.Random(0), Recall(num_tokens * BYTES_PER_TOKEN / 2**20)
    while recall._end + len(answers) + CONTEXT_TOKENS <= len(recall.tokens):
        recall.add([token if rng.random() > 1 / 8 else rng.choice(answers) for token in answers])
    milliseconds = []
    for _ in range(2000):
        end = rng.randrange(1, len(answers) + 1)
        text = list(answers[:end])
        started = time.perf_counter()
        recall.propose(text, 7)
        milliseconds.append(1000 * (time.perf_counter() - started))
    return statistics.median(milliseconds), float(np.quantile(milliseconds, 0.99))


def main() -> None:
    """Decode the streams in all ways and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="results of dpace demo")
    parser.add_argument("--target", default=TARGET_ID)
    parser.add_argument("--requests", type=int, default=200, help="length of the stream of similar requests")
    parser.add_argument("--per-set", type=int, default=25, help="held-out prompts of each set of the demo")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--memory", type=int, default=2**20, help="tokens of the memory whose look-ups are timed")
    options = parser.parse_args()
    target = Target.load(find_target(options.target))
    trained: Any = load_drafter(options.folder / "dpace" / "seed-42", target)
    answers = trained.answers or find_answers(options.folder, target)
    torch.manual_seed(0)
    untrained: Any = Drafter(trained.config).eval().requires_grad_(False)
    pack_linears(untrained)
    streams: dict[str, list[list[int]]] = {}
    for prompt in first_of_each_set(read_prompts(demo_path("heldout")), options.per_set):
        streams.setdefault(prompt.set, []).append(encode_chat(target, prompt.turns[0]))
    requests = make("notes", "tuning", options.requests)
    streams["similar"] = [encode_chat(target, request["messages"]) for request in requests]
    headings = ("requests", "drafter", "memory", "tokens/s", "ratio", "95 %", "copied", "same\ntext")
    table = Table(*headings, box=SIMPLE_HEAD, padding=0)  # of at most 80 columns
    for title, stream in streams.items():
        for name, drafter in (("demo's", trained), ("random", untrained)):
            results = measure(target, drafter, answers, stream, options.tokens, f"{title}, {name} drafter")
            for way in WAYS:
                table.add_row(f"{title} ({len(stream)})", name, way, *row_of(results, way))
    console().print(table)
    middle, slow = look_up_times(answers, options.memory)
    console().print(f"look-up among {options.memory} tokens: median {middle:.3f} ms, 99 % within {slow:.3f} ms")


if __name__ == "__main__":
    main()
