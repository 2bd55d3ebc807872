"""Time the layers as transformers runs them, fused, and fused without weights in 16 bits.

    python benchmarks/layers.py TARGET DRAFTER [--dtype bfloat16]

All three run on packed weights, in alternating rounds after a context of 128 tokens. Prints medians, and whether fused
results equal those of transformers bitwise.
"""

import argparse
import statistics
import time

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

import dpace.fast.packing
import dpace.fast.speed_up
from dpace.drafter import load_drafter
from dpace.fast.cache import TextCache
from dpace.report.tables import console
from dpace.target import Target

CONTEXT = 128


def main() -> None:
    """Load all three, time them and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("drafter")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)

    def load():
        target = Target.load(options.target, dtype=dtype)
        return target, load_drafter(options.drafter, target)

    fused, in_16_bits = load(), dpace.fast.packing._pack_in_16_bits
    dpace.fast.packing._pack_in_16_bits = lambda *_: None
    wide = load()
    dpace.fast.packing._pack_in_16_bits = in_16_bits
    dpace.fast.speed_up.fuse_layers = lambda _: False
    sides = {"transformers": load(), "fused": fused, "fused, not in 16 bits": wide}
    table = Table("pass", *(f"{name}, ms" for name in sides), "bits", box=SIMPLE_HEAD)
    vocab_size = len(fused[0].head.weight)
    tokens = torch.randint(vocab_size, (1, CONTEXT + 200), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        for width in (1, 4, 8, 200):
            runs = []
            for target, _ in sides.values():
                cache = TextCache(target.config, CONTEXT + width)
                target.hidden(tokens[:, :CONTEXT], cache=cache)

                def run(target=target, cache=cache, width=width):
                    hidden = target.hidden(tokens[:, CONTEXT : CONTEXT + width], cache=cache)
                    cache.crop(-width)
                    return hidden

                runs.append(run)
            table.add_row(f"target, {width} tokens", *_compare(runs, options.rounds if width < 200 else 5))
        size, num_features = fused[1].block_size, len(fused[1].target_layer_ids) * fused[0].hidden_size
        noise = torch.randn(1, size, fused[0].hidden_size).to(dtype)
        features = torch.randn(1, 3, num_features).to(dtype)
        runs = [
            lambda drafter=drafter: drafter(noise, features, torch.arange(3 + size)[None]).last_hidden_state
            for _, drafter in sides.values()
        ]
        table.add_row(f"drafter, a block of {size}", *_compare(runs, options.rounds))
        for width in (1, 8):
            rows = torch.randn(width, fused[0].hidden_size).to(dtype)
            runs = [lambda target=target, rows=rows: target.logits(rows) for target, _ in sides.values()]
            table.add_row(f"LM head, {width} rows", *_compare(runs, options.rounds))
    console().print(table)


def _compare(runs: list, rounds: int) -> list[str]:
    seconds: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds + 1):
        for run, run_seconds in zip(runs, seconds, strict=True):
            start = time.perf_counter()
            run()
            run_seconds.append(time.perf_counter() - start)
    bits = "equal" if torch.equal(runs[0](), runs[1]()) else "differ"
    return [*(f"{1000 * statistics.median(run_seconds[1:]):.1f}" for run_seconds in seconds), bits]


if __name__ == "__main__":
    main()
