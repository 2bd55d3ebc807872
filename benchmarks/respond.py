"""Measure `dpace respond`: answers of servers at several concurrencies, and of this process by shared beginnings.

    python benchmarks/respond.py [--seconds 0.05]
    python benchmarks/respond.py --beginnings [--prompts 220] [--tokens 128] [--batch-size 64] [--rounds 1]

The server is a stub in a process of its own that speaks as llama.cpp does and waits before it answers, so that what is
measured is how `dpace respond --server` keeps requests on their way. The last column is the ratio to concurrency 1; it
is at least 6 at concurrency 8.

With `--beginnings` a target answers the demo's prompts in this process: with beginnings that prompts share read once,
as `dpace respond` does, and with each prompt read whole. Both take turns; the last lines are of random prompts that
share nothing. Seconds of the processor are less noisy on a busy machine than those of the clock.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
import tyro

from dpace.config import RespondConfig
from dpace.prompts.prompts import Prompt, demo_path, read_prompts
from dpace.respond.answering import answer_prompts
from dpace.respond.in_process import generate_responses
from dpace.target import Target, beginnings
from dpace.target.chat import ChatTokenizer, encode_chat
from dpace.target.locate import TARGET_ID, find_target

NUM_PROMPTS = 40
"""Prompts for each request that is on its way."""


class Tokenizer:
    """As many tokens as letters; what tokenizing costs is not measured here."""

    chat_template = None

    def __len__(self):
        return 256

    def __call__(self, text, **_):
        """Encode."""
        return {"input_ids": list(text.encode())}

    def decode(self, token_ids, **_):
        """Decode."""
        return bytes(token_ids).decode()

    def get_vocab(self):
        """Return nothing that could differ."""
        return {}


def measure(url: str, concurrency: int) -> float:
    """Return answers a second."""
    count = NUM_PROMPTS * concurrency
    prompts = [Prompt(str(i), "s", [[{"role": "user", "content": f"prompt {i}"}]]) for i in range(count)]
    config = RespondConfig(max_new_tokens=64, batch_size=concurrency, server=(url,))
    chat = ChatTokenizer("stub", Tokenizer(), stop_token_ids=[0])
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        assert not answer_prompts(chat, prompts, Path(folder) / "responses.jsonl", config)
        return count / (time.perf_counter() - started)


def measure_servers(seconds: float, concurrencies: tuple[int, ...]) -> None:
    """Print answers a second of the stub at several concurrencies."""
    command = [sys.executable, Path(__file__).with_name("respond_server.py"), str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            url = process.stdout.readline().strip()
            first = measure(url, 1)  # what is loaded at the first use is not measured
            print("concurrency  answers/s  ratio")
            for concurrency in concurrencies:
                speed = measure(url, concurrency)
                first = speed if concurrency == 1 else first
                print(f"{concurrency:11d} {speed:10.1f} {speed / first:6.2f}")
        finally:
            process.kill()


def compare(target: Target, prompts: list[list[int]], tokens: int, batch_size: int, rounds: int) -> None:
    """Answer all prompts both ways, in turns, and print what each took."""
    config = RespondConfig(max_new_tokens=tokens)
    order = beginnings.find_shared(prompts)[0]
    ways = {"whole": lambda texts: (list(range(len(texts))), []), "shared": beginnings.find_shared}
    seconds = {name: [0.0, 0.0] for name in ways}
    texts: dict[str, list[list[int]]] = {}
    for _ in range(rounds):
        for name, find_shared in ways.items():
            started = time.perf_counter(), time.process_time()
            texts[name] = []
            with mock.patch.object(beginnings, "find_shared", find_shared):
                for start in range(0, len(order), batch_size):
                    batch = [prompts[i] for i in order[start : start + batch_size]]
                    texts[name] += generate_responses(target, batch, config, range(len(batch)))
            seconds[name][0] += time.perf_counter() - started[0]
            seconds[name][1] += time.process_time() - started[1]
    for name, (clock, processor) in seconds.items():
        print(f"{name}: {clock / rounds:.1f} seconds, {processor / rounds:.1f} of the processor")
    clock, processor = (a / b for a, b in zip(seconds["shared"], seconds["whole"], strict=True))
    same = sum(a == b for a, b in zip(*texts.values(), strict=True))
    print(f"shared / whole: {clock:.2f} (processor {processor:.2f}); {same} of {len(prompts)} texts equal")


def measure_beginnings(target: Target, num_prompts: int, tokens: int, batch_size: int, rounds: int) -> None:
    """Compare both ways on the demo's prompts, and on prompts that share nothing."""
    prompts = [encode_chat(target, prompt.turns[0]) for prompt in read_prompts(demo_path("train"))]
    chosen = [prompts[i * len(prompts) // num_prompts] for i in range(num_prompts)]
    generate_responses(target, chosen[:2], RespondConfig(max_new_tokens=2), range(2))  # what is made at the first use
    print(f"{len(chosen)} prompts of the demo, batches of {batch_size}, {torch.get_num_threads()} threads")
    compare(target, chosen, tokens, batch_size, rounds)
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(20, 240, (max(2, num_prompts // 4),), generator=generator).tolist()
    num_tokens = len(target.head.weight)
    apart = [torch.randint(num_tokens // 2, num_tokens, (size,), generator=generator).tolist() for size in sizes]
    print(f"{len(apart)} prompts that share nothing")
    compare(target, apart, tokens, batch_size, rounds)


def main(
    seconds: float = 0.05,
    concurrencies: tuple[int, ...] = (1, 2, 4, 8, 16, 32),
    beginnings: bool = False,
    target: str = TARGET_ID,
    prompts: int = 220,
    tokens: int = 128,
    batch_size: int = 64,
    rounds: int = 1,
) -> None:
    """Measure servers, or shared beginnings.

    Args:
        seconds: in which the stub answers.
        concurrencies: numbers of requests on their way.
        beginnings: compare shared beginnings with whole prompts.
        target: that answers then.
        prompts: number of the demo's prompts, of 220.
        tokens: longest answer.
        batch_size: prompts that are answered together.
        rounds: in which both take turns.
    """
    if beginnings:
        measure_beginnings(Target.load(find_target(target)), prompts, tokens, batch_size, rounds)
    else:
        measure_servers(seconds, concurrencies)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
