"""What a window saves in long contexts: tau, time and memory of a drafter with a window and of one without.

    python benchmarks/windows.py TARGET --data FOLDER --output /tmp/windows

FOLDER has JSONL files of rows with `turns` and a text as `reference`; files named `*_train.jsonl` are taken where there
are any. Two drafters, equal but for the window, are trained on conversations of several questions, which the target
answers. They are then measured behind contexts of several lengths: earlier questions with their references, and a last
question. All ways decode from one reading of each prompt, in rotating order. Plain decoding is the first way; the text
of the others must be its own.

With its defaults it takes about 40 minutes on two CPU cores with SmolLM2-135M, 10 of them to measure. The same command
goes on where it was interrupted; `--drafters` takes two trained drafters instead, which must read the same layers of
the target.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from dpace.config import DrafterConfig, LossConfig, Recipe, RespondConfig, TrainConfig
from dpace.decode.loop import Speculation
from dpace.decode.request import Continuation, make_continuation
from dpace.drafter import Drafter, load_drafter
from dpace.fast.cache import TextCache
from dpace.prompts.prompts import Prompt
from dpace.report.tables import console
from dpace.respond.answering import write_responses
from dpace.target import Target
from dpace.target.chat import encode_chat
from dpace.train.run import make_datasets, train

NUM_LAYERS, BLOCK_SIZE = 2, 8
PLAIN, FULL, WINDOWED = "plain", "no window", "window"


def read_pairs(folder: Path) -> list[tuple[str, str]]:
    """Read questions and references, in random order."""
    paths = sorted(folder.glob("*_train.jsonl")) or sorted(folder.glob("*.jsonl"))
    rows = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    pairs = [(row["turns"][0], row["reference"]) for row in rows if isinstance(row.get("reference"), str)]
    if not pairs:
        raise SystemExit(f"{folder} has no JSONL rows with `turns` and a text as `reference`; name another with --data")
    random.Random(0).shuffle(pairs)
    return pairs


def train_drafters(target: Target, pairs: Iterator[tuple[str, str]], options: argparse.Namespace) -> list[Path]:
    """Let the target answer conversations, and train both drafters on them; what is finished is kept."""
    prompts = []
    for number in range(options.conversations):
        turns = [[{"role": "user", "content": next(pairs)[0]}] for _ in range(options.turns)]
        prompts.append(Prompt(str(number), "windows", turns))
    respond = RespondConfig(max_new_tokens=options.tokens, batch_size=8)
    responses = write_responses(target, prompts, options.output / "responses.jsonl", respond)
    settings = TrainConfig(
        max_steps=options.steps,
        learning_rate=3e-3,
        optimizer="muon",
        num_anchors=96,
        eval_steps=options.steps,
    )
    folders = []
    for name, window in ((FULL, None), (WINDOWED, options.window)):
        drafter = DrafterConfig(num_layers=NUM_LAYERS, block_size=BLOCK_SIZE, sliding_window=window)
        recipe = Recipe(target=options.target, drafter=drafter, loss=LossConfig(vocabulary="seen"), train=settings)
        folder = options.output / name.replace(" ", "-")
        if not (folder / "provenance.json").exists():
            train(target, *make_datasets(target, responses, [], recipe), recipe, folder)
        folders.append(folder)
    return folders


def make_prompt(target: Target, pairs: Iterator[tuple[str, str]], num_tokens: int) -> list[int]:
    """Encode earlier questions with their references, and a last question, in at most so many tokens."""
    history: list[dict[str, str]] = []
    token_ids: list[int] = []
    while True:
        question, reference = next(pairs)
        longer = encode_chat(target, [*history, {"role": "user", "content": question}])
        if len(longer) > num_tokens and token_ids:
            return token_ids
        token_ids = longer
        history += [{"role": "user", "content": question}, {"role": "assistant", "content": reference}]


@dataclass
class Found:
    """What a way did behind the contexts of one length."""

    emitted: int = 0
    verifications: int = 0
    draft_seconds: list[float] = field(default_factory=list)
    first_seconds: list[float] = field(default_factory=list)
    """Of drafts that also read the prompt."""
    cache_bytes: int = 0
    texts: list[list[int]] = field(default_factory=list)


class Behind:
    """A prompt that the target has read once; ways of decoding take turns behind it."""

    def __init__(self, target: Target, drafter: Drafter, token_ids: list[int], count: int):
        self.target = target
        self.token_ids = token_ids
        self.count = count
        self.cache = TextCache(target.config, len(token_ids) + count + drafter.block_size)
        self.cache.activate_past_recording()
        with torch.inference_mode():
            prompt = torch.tensor([token_ids], device=target.device)
            hidden, self.features = target.read(prompt, self.cache, drafter.target_layer_ids)
            self.first = int(target.logits(hidden[0, -1:]).argmax())

    def start(self) -> Continuation:
        """Return the prompt with its first token, and the cache as it was behind the prompt."""
        self.cache.crop(len(self.token_ids) - self.cache.get_seq_length())
        text = make_continuation(self.target, self.token_ids, max_new_tokens=self.count, stop_token_ids=[])
        text.take(0, [self.first], width=0)
        return text

    @torch.inference_mode()
    def decode_plainly(self, found: Found) -> None:
        """Decode one token at a time."""
        text = self.start()
        while not text.is_done:
            inputs = torch.tensor([text.token_ids[-1:]], device=self.target.device)
            text.take(0, text.draw(self.target.logits(self.target.hidden(inputs, self.cache)[0])).tolist(), width=1)
        found.texts.append(text.token_ids[len(self.token_ids) :])

    @torch.inference_mode()
    def decode(self, drafter: Drafter, found: Found) -> None:
        """Decode with whole drafts."""
        text = self.start()
        speculation = Speculation(self.target, drafter, text, width="full")
        speculation.cache = self.cache
        speculation.unread.append(self.features)
        seconds = found.first_seconds
        while not text.is_done:
            plan = speculation.plan()
            begin = time.perf_counter()
            proposal = speculation.propose(plan)
            seconds.append(time.perf_counter() - begin)
            seconds = found.draft_seconds
            step = speculation.emit(plan, proposal, *speculation.verify(proposal), begin)
            found.emitted += len(step.token_ids)
            found.verifications += 1
        layers: Any = speculation.drafter_cache.layers
        found.cache_bytes = sum(buffer.nbytes for layer in layers for buffer in layer.buffers)
        found.texts.append(text.token_ids[len(self.token_ids) :])


def measure(target: Target, drafters: dict[str, Drafter], prompts: list[list[int]], rounds: int, count: int) -> dict:
    """Decode all prompts of one length in all ways, in rotating order; the first round warms up."""
    results = {name: Found() for name in (PLAIN, *drafters)}
    names = list(results)
    for token_ids in prompts:
        behind = Behind(target, next(iter(drafters.values())), token_ids, count)
        for number in range(rounds + 1):
            start = number % len(names)
            for name in names[start:] + names[:start]:
                found = results[name] if number else Found()
                if name == PLAIN:
                    behind.decode_plainly(found)
                else:
                    behind.decode(drafters[name], found)
    return results


def main() -> None:
    """Train or read the drafters, measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, help="folder for answers, drafters and windows.json")
    parser.add_argument("--drafters", nargs=2, type=Path, help="trained drafters: one without a window, one with")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 2048, 6144])
    parser.add_argument("--conversations", type=int, default=24, help="number to train on")
    parser.add_argument("--turns", type=int, default=5, help="questions in each of them")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--prompts", type=int, default=3, help="number behind each length of context")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=80, help="longest answer, in training and measuring")
    options = parser.parse_args()
    pairs = read_pairs(options.data)
    target = Target.load(options.target, dtype=torch.float32)
    folders = options.drafters or train_drafters(target, iter(pairs), options)
    drafters = {name: load_drafter(path, target) for name, path in zip((FULL, WINDOWED), folders, strict=True)}
    ids, others = (drafter.target_layer_ids for drafter in drafters.values())
    if ids != others:
        raise SystemExit(f"the drafters read layers {ids} and {others} of the target; name two that read the same")
    fresh = iter(pairs[options.conversations * options.turns :])
    table = Table("context", "drafter", "tau", "ms a draft", "ms the first", "cache", "same text", box=SIMPLE_HEAD)
    rows = []
    for context in options.contexts:
        prompts = [make_prompt(target, fresh, context) for _ in range(options.prompts)]
        results = measure(target, drafters, prompts, options.rounds, options.tokens)
        for name in drafters:
            found = results[name]
            same = sum(a == b for a, b in zip(found.texts, results[PLAIN].texts, strict=True))
            row = {
                "context": round(statistics.mean(map(len, prompts))),
                "drafter": name,
                "tau": found.emitted / found.verifications,
                "draft_ms": 1000 * statistics.median(found.draft_seconds or found.first_seconds),
                "first_draft_ms": 1000 * statistics.median(found.first_seconds),
                "cache_bytes": found.cache_bytes,
                "same_text": f"{same}/{len(found.texts)}",
            }
            rows.append(row)
            numbers = [f"{row[key]:.2f}" for key in ("tau", "draft_ms", "first_draft_ms")]
            size = f"{row['cache_bytes'] / 2**20:.1f} MiB"
            table.add_row(f"{row['context']:,}", name, *numbers, size, row["same_text"])
    (options.output / "windows.json").write_text(json.dumps(rows, indent=2) + "\n")
    console().print(table)


if __name__ == "__main__":
    main()
