"""Measure `dpace respond`: answers of servers at several concurrencies, and of this process by shared beginnings.

    python benchmarks/respond.py [--seconds 0.05]
    python benchmarks/respond.py --beginnings [--prompts 220] [--tokens 128] [--batch-size 64] [--rounds 1]

The server is a stub in a process of its own that speaks as llama.cpp does and waits before it answers, so that what is
measured is how `dpace respond --server` keeps requests on their way. The last column is the ratio to concurrency 1; it
is at least 6 at concurrency 8.

With `--beginnings` SmolLM2 answers the demo's prompts in this process. "before" sorts them by length, pads them on the
left, reads the beginning that all prompts of a batch share, and runs transformers' loop, as it was first done. "tree"
is what `dpace respond` does now. Both take turns; the last lines are of random prompts that share nothing. Seconds are
those of the clock; those of the CPU are less noisy on a busy machine.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from os.path import commonprefix
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig, StaticCache

from dpace.config import RespondConfig
from dpace.prompts.prompts import Prompt, demo_path, read_prompts
from dpace.respond.answering import answer_prompts
from dpace.respond.in_process import generate_responses
from dpace.target import Target
from dpace.target.beginnings import find_shared
from dpace.target.chat import ChatTokenizer, encode_chat
from dpace.target.locate import TARGET_ID, find_target

CONCURRENCIES = (1, 2, 4, 8, 16, 32)
NUM_PROMPTS = {1: 40, 2: 80, 4: 160, 8: 320, 16: 640, 32: 1280}
NUM_TOKENS = 64


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


def serve(seconds: float) -> None:
    """Serve until this process is ended; the first line has the address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def send(self, value):
            data = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self):
            self.send({"model_alias": "stub"})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            time.sleep(seconds)
            tokens = [65] * body["n_predict"]
            self.send({"content": "", "tokens": tokens, "stop": True, "stop_type": "limit"})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.request_queue_size = 128
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


def measure(url: str, concurrency: int) -> float:
    """Return answers a second."""
    count = NUM_PROMPTS[concurrency]
    prompts = [Prompt(str(i), "s", [[{"role": "user", "content": f"prompt {i}"}]]) for i in range(count)]
    config = RespondConfig(max_new_tokens=NUM_TOKENS, batch_size=concurrency, server=(url,))
    chat = ChatTokenizer("stub", Tokenizer(), stop_token_ids=[0])
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        assert not answer_prompts(chat, prompts, Path(folder) / "responses.jsonl", config)
        return count / (time.perf_counter() - started)


@torch.inference_mode()
def answer_padded(target: Target, prompts: list[list[int]], max_new_tokens: int) -> tuple[list[list[int]], int]:
    """Answer a batch as it was first done; return the answers and the number of prompt tokens that were read."""
    width = max(map(len, prompts))
    stops = target.stop_token_ids
    cache = StaticCache(config=target.config, max_cache_len=width + max_new_tokens)
    shared = min(len(commonprefix(prompts)), min(map(len, prompts)) - 1)
    if shared >= 16 and len(prompts) > 1:
        first: Any = DynamicCache(config=target.config)
        target.model(torch.tensor([prompts[0][:shared]]), cache=first, logits_to_keep=1)
        for number, layer in enumerate(first.layers):
            keys, values = (x.expand(len(prompts), -1, -1, -1) for x in (layer.keys, layer.values))
            cache.update(keys, values, number)
    else:
        shared = 0
    rows = [ids[:shared] + stops[:1] * (width - len(ids)) + ids[shared:] for ids in prompts]
    mask = [[1] * shared + [0] * (width - len(ids)) + [1] * (len(ids) - shared) for ids in prompts]
    target.model.generation_config = GenerationConfig()
    out = target.model.generate(
        torch.tensor(rows),
        attention_mask=torch.tensor(mask),
        max_new_tokens=max_new_tokens,
        pad_token_id=stops[0],
        eos_token_id=stops,
        cache=cache,
        disable_compile=True,
    )
    target.model.generation_config = GenerationConfig(eos_token_id=stops)
    answers = []
    for row in out[:, width:].tolist():
        end = next((i + 1 for i, token in enumerate(row) if token in stops), len(row))
        answers.append(row[:end])
    return answers, shared + len(prompts) * (width - shared)


def answer_tree(target: Target, prompts: list[list[int]], max_new_tokens: int) -> tuple[list[list[int]], int]:
    """Answer a batch as `dpace respond` does; return the same as `answer_padded`."""
    num_read = 0
    read = target.read

    def count(token_ids, *args, **kwargs):
        nonlocal num_read
        num_read += token_ids.numel() if token_ids.shape[1] > 1 else 0
        return read(token_ids, *args, **kwargs)

    target.read = count
    try:
        config = RespondConfig(max_new_tokens=max_new_tokens)
        return generate_responses(target, prompts, config, range(len(prompts))), num_read
    finally:
        target.read = read


def compare(target: Target, prompts: list[list[int]], options: argparse.Namespace) -> None:
    """Answer all prompts both ways, in turns, and print what each took."""
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    ways: dict[str, tuple[Callable, list[int]]] = {
        "before": (answer_padded, by_length),
        "tree": (answer_tree, find_shared(prompts)[0]),
    }
    totals = {name: [0.0, 0.0, 0] for name in ways}
    texts: dict[str, dict[int, list[int]]] = {name: {} for name in ways}
    for _ in range(options.rounds):
        for name, (answer, order) in ways.items():
            for start in range(0, len(order), options.batch_size):
                batch = order[start : start + options.batch_size]
                clocks = time.perf_counter(), time.process_time()
                answers, num_read = answer(target, [prompts[i] for i in batch], options.tokens)
                totals[name][0] += time.perf_counter() - clocks[0]
                totals[name][1] += time.process_time() - clocks[1]
                totals[name][2] += num_read
                texts[name] |= dict(zip(batch, answers, strict=True))
    print("way      seconds  of CPU  prompt tokens read")
    for name, (seconds, cpu, num_read) in totals.items():
        print(f"{name:7s} {seconds:8.1f} {cpu:7.1f} {num_read // options.rounds:8d}")
    same = sum(texts["before"][i] == texts["tree"][i] for i in by_length)
    ratios = [totals["tree"][i] / totals["before"][i] for i in range(2)]
    print(f"tree / before: {ratios[0]:.2f} (CPU {ratios[1]:.2f}); {same} of {len(prompts)} texts equal")


def measure_beginnings(options: argparse.Namespace) -> None:
    """Compare both ways on the demo's prompts, and on prompts that share nothing."""
    target = Target.load(find_target(options.target))
    prompts = [encode_chat(target, prompt.turns[0]) for prompt in read_prompts(demo_path("train"))]
    chosen = [prompts[i * len(prompts) // options.prompts] for i in range(options.prompts)]
    answer_tree(target, chosen[:2], 2)  # what is made at the first use is not measured
    print(f"{len(chosen)} prompts of the demo, batches of {options.batch_size}, {torch.get_num_threads()} threads")
    compare(target, chosen, options)
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(20, 240, (max(2, options.prompts // 4),), generator=generator).tolist()
    num_tokens = len(target.head.weight)
    apart = [torch.randint(num_tokens // 2, num_tokens, (size,), generator=generator).tolist() for size in sizes]
    print(f"{len(apart)} prompts that share nothing")
    compare(target, apart, options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=0.05)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--beginnings", action="store_true", help="compare with answers before the tree")
    parser.add_argument("--target", default=TARGET_ID)
    parser.add_argument("--prompts", type=int, default=220, help="number of the demo's prompts, of 220")
    parser.add_argument("--tokens", type=int, default=128, help="longest answer")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    if options.beginnings:
        return measure_beginnings(options)
    if options.serve:
        return serve(options.seconds)
    command = [sys.executable, __file__, "--serve", "--seconds", str(options.seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            url = process.stdout.readline().strip()
            measure(url, 1)  # what is loaded at the first use is not measured
            speeds = {concurrency: measure(url, concurrency) for concurrency in CONCURRENCIES}
        finally:
            process.kill()
    print("concurrency  answers/s  ratio")
    for concurrency, speed in speeds.items():
        print(f"{concurrency:11d} {speed:10.1f} {speed / speeds[1]:6.2f}")


if __name__ == "__main__":
    main()
