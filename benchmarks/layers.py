"""Seconds of a pass of the target's and the drafter's layers, as transformers runs them on packed weights and fused (`dpace.fusion`).

    python benchmarks/layers.py TARGET DRAFTER [--dtype bfloat16]

Medians of alternating rounds after a context of 128 tokens, and whether the results are equal bit by bit.
"""

import argparse
import statistics
import time

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

import dpace.drafter
import dpace.target
from dpace.cache import make_cache
from dpace.drafter import load_drafter
from dpace.report import console
from dpace.target import Target

CONTEXT = 128


def main() -> None:
    """Load both twice, run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("drafter")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    fused = Target.load(options.target, dtype=dtype)
    fused_drafter = load_drafter(options.drafter, fused)
    dpace.target.fuse_layers = dpace.drafter.fuse_layers = lambda _: False
    plain = Target.load(options.target, dtype=dtype)
    plain_drafter = load_drafter(options.drafter, plain)
    table = Table("pass", "transformers, ms", "fused, ms", "ratio", "bits", box=SIMPLE_HEAD)
    tokens = torch.randint(len(fused.head.weight), (1, CONTEXT + 200), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        for width in (1, 4, 8, 200):
            sides = []
            for target in (plain, fused):
                cache = make_cache(target.config, CONTEXT + width)
                target.hidden(tokens[:, :CONTEXT], cache=cache)

                def run(target=target, cache=cache, width=width):
                    found = target.hidden(tokens[:, CONTEXT : CONTEXT + width], cache=cache)
                    cache.crop(-width)
                    return found

                sides.append(run)
            table.add_row(f"target, {width} tokens", *_compare(sides, options.rounds if width < 200 else 5))
        size, num_features = fused_drafter.block_size, len(fused_drafter.target_layer_ids) * fused.hidden_size
        noise, features = torch.randn(1, size, fused.hidden_size).to(dtype), torch.randn(1, 3, num_features).to(dtype)
        sides = [
            lambda drafter=drafter: drafter(noise, features, torch.arange(3 + size)[None]).last_hidden_state
            for drafter in (plain_drafter, fused_drafter)
        ]
        table.add_row(f"drafter, a block of {size}", *_compare(sides, options.rounds))
    console().print(table)


def _compare(sides: list, rounds: int) -> list[str]:
    seconds: list[list[float]] = [[], []]
    for _ in range(rounds + 1):
        for run, of_side in zip(sides, seconds, strict=True):
            start = time.perf_counter()
            run()
            of_side.append(time.perf_counter() - start)
    old, new = (statistics.median(of_side[1:]) for of_side in seconds)
    bits = "equal" if torch.equal(*(run() for run in sides)) else "differ"
    return [f"{1000 * old:.1f}", f"{1000 * new:.1f}", f"{new / old:.2f}", bits]


if __name__ == "__main__":
    main()
