"""What the target's hidden states cost: computed, in memory, and on disk in each dtype.

    python benchmarks/features.py --answers 200

Reads of all ways alternate; the table has bytes and tokens a second, the median of the rounds. Files that were just
written are read from memory by the system: `--drop-caches` (as root) empties that before each round.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from dpace.batches.dataset import ResponseDataset
from dpace.batches.feature_files import keep_on_disk
from dpace.config import TrainConfig
from dpace.drafter import Drafter
from dpace.respond.responses import Response
from dpace.target import Target
from dpace.target.locate import find_target

ROUNDS = 3
LIMIT = 2.0**40


def texts(target: Target, count: int, length: int) -> list[Response]:
    """Make texts of random tokens: what they say does not matter."""
    rows = torch.randint(1000, target.config.vocab_size, (count, length), generator=torch.Generator().manual_seed(0))
    return [Response(str(i), "x", [], row.tolist(), [(length // 2, length)]) for i, row in enumerate(rows)]


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def drop_caches() -> None:
    """Let the system forget the files that it has in memory."""
    Path("/proc/sys/vm/drop_caches").write_text("3")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--answers", type=int, default=200)
    parser.add_argument("--length", type=int, default=256, help="tokens of a text")
    parser.add_argument("--num-features", type=int, default=3)
    parser.add_argument("--drop-caches", action="store_true")
    args = parser.parse_args()
    target = Target.load(find_target(args.target))
    layers = Drafter.layer_ids(target, num_layers=2, num_features=args.num_features)
    responses = texts(target, args.answers, args.length)
    tokens = sum(len(one.token_ids) for one in responses)

    def dataset() -> ResponseDataset:
        return ResponseDataset(responses, max_length=args.length, num_anchors=8, seed=0)

    in_memory = dataset()
    rows = {}
    made = seconds(lambda: in_memory.keep_features(target, layers, limit_bytes=LIMIT))
    per_token = sum(row.nbytes for row in in_memory.features or ()) / tokens
    rows["memory"] = (in_memory, per_token, made)
    with tempfile.TemporaryDirectory() as folder:
        for dtype in ("target", "bfloat16", "float8"):
            stored = dataset()
            place = Path(folder) / dtype
            config = TrainConfig(feature_files=str(place), feature_dtype=dtype, feature_files_gib=LIMIT)
            made = seconds(lambda: keep_on_disk(target, stored, layers, config))  # noqa: B023
            bytes_on_disk = sum(path.stat().st_size for path in place.rglob("*.safetensors"))
            rows[f"disk, {dtype}"] = (stored, bytes_on_disk / tokens, made)
        found: dict[str, list[float]] = {name: [] for name in rows}
        for _ in range(ROUNDS):
            for name, (one, _, _) in rows.items():
                if args.drop_caches:
                    drop_caches()
                found[name].append(seconds(lambda: [row.sum() for row in one.features]))  # noqa: B023
    print(f"{args.target}, {str(target.model.dtype).removeprefix('torch.')}, {len(layers)} layers, {tokens:,} tokens\n")
    print("| hidden states | a token | made, tokens/s | read, tokens/s |\n|---|---|---|---|")
    for name, (_, per_token, made) in rows.items():
        read = tokens / statistics.median(found[name])
        print(f"| {name} | {per_token / 1024:.1f} KiB | {tokens / made:,.0f} | {read:,.0f} |")


if __name__ == "__main__":
    main()
