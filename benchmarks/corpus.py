"""Time how long responses take until they are ready to train on, and the memory that this takes.

    python benchmarks/corpus.py [NUM]          # 100,000 by default; 9 kB a response in a temporary folder

Writes prompts and responses of random tokens, 600 each on average, as `dpace respond` does. A process of its own reads
them as `dpace train` does, up to the first batch of 8: first without `corpus.arrow`, then with it. Prints the seconds,
and the peak of resident memory above that of the imports. The part of it that is mapped from files, which ranks share,
is printed too. Then it prints the padding of an epoch, in batches of 8 in random order and by length.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from dpace.config import PromptsConfig

WORDS = "the water of life \u2028 grows 水 and \U0001f40b falls \u0085 slowly \\boxed{} over seven hills".split(" ")


def write(folder: Path, num: int) -> None:
    """Write prompts and responses."""
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.normal([4.5, 5.9], [0.6, 0.7], (num, 2))).astype(int) + 8
    pool, words = rng.integers(0, 150_000, 10**6).tolist(), rng.choice(WORDS, 10**6).tolist()
    starts = rng.integers(0, 900_000, (num, 2)).tolist()
    prompts, responses = (
        (folder / f"{name}.jsonl").open("w", encoding="utf-8", newline="\n") for name in ("prompts", "responses")
    )
    with prompts, responses:
        for i, (before, answer) in enumerate(lengths.tolist()):
            first, second = starts[i]
            said = f"question {i}: " + " ".join(words[first : first + before])
            token_ids = pool[second : second + before + answer]
            text = " ".join(words[second : second + answer])
            messages = [{"role": "user", "content": said}, {"role": "assistant", "content": text}]
            spans = [[before, before + answer]]
            response = {"id": str(i), "set": "x", "messages": messages, "token_ids": token_ids, "response_spans": spans}
            prompts.write(json.dumps({"id": str(i), "prompt": said}, ensure_ascii=False) + "\n")
            responses.write(json.dumps(response, ensure_ascii=False) + "\n")


def status(key: str) -> float:
    """Read a number of /proc/self/status, in GB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024 / 1e9


def padding(lengths, steps: list[list[int]]) -> float:
    """Compute the share of padding in steps of conversations, 0 to 1."""
    read = sum(int(lengths[step].max()) * len(step) for step in steps)
    return 1 - int(lengths.sum()) / max(1, read)


def read(folder: Path) -> None:
    """Read them up to the first batch, and say what it took."""
    from dpace.batches.corpus import load_corpus
    from dpace.batches.dataset import ResponseDataset, collate
    from dpace.train.identity import data_facts

    before, start, used = status("VmRSS"), time.perf_counter(), time.process_time()
    parts = load_corpus(folder / "responses.jsonl", PromptsConfig(path=str(folder / "prompts.jsonl")))
    loaded = time.perf_counter() - start
    train, validation = (ResponseDataset(part, max_length=3072, num_anchors=512, seed=42) for part in parts)
    data_facts(train, validation)
    steps = train.steps(8, seed=0, is_grouped=True)
    batch = collate([train[i] for i in steps[0]], 16)
    seconds = time.perf_counter() - start
    print(
        f"{len(train):,} + {len(validation)} conversations, {train.lengths.sum() / 1e6:.0f} million tokens: "
        f"{seconds:.1f} s ({time.process_time() - used:.1f} s of processor time) to a batch of shape "
        f"{tuple(batch['token_ids'].shape)}, the corpus {loaded:.1f} s; peak "
        f"{status('VmHWM') - before:.2f} GB above the imports; now {status('RssAnon') - before:.2f} GB of its own and "
        f"{status('RssFile'):.2f} GB mapped",
        flush=True,
    )
    shares = [padding(train.lengths, train.steps(8, seed=0, is_grouped=is_grouped)) for is_grouped in (False, True)]
    print(f"padding in batches of 8: {shares[0]:.1%} in random order, {shares[1]:.1%} by length")


def main(num: int) -> None:
    with tempfile.TemporaryDirectory() as work:
        write(Path(work), num)
        size = sum(path.stat().st_size for path in Path(work).iterdir())
        print(f"{num:,} responses, {size / 1e9:.2f} GB of JSON", flush=True)
        for name in ("without corpus.arrow", "with it"):
            print(f"{name}: ", end="", flush=True)
            subprocess.run([sys.executable, __file__, "--read", work], check=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--read"]:
        read(Path(sys.argv[2]))
    else:
        main(int(sys.argv[1]) if sys.argv[1:] else 100_000)
