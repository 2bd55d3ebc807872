"""Time the target's layers on a CPU with `dpace.fast.attention` and with transformers' `sdpa`.

    OMP_NUM_THREADS=1 python benchmarks/attention.py TARGET [ROUNDS]

The two alternate. The target reads 1, 4 and 8 tokens after contexts of random tokens, in fp32 and bf16. Prints medians
and their ratio.
"""

import statistics
import sys
import time

import torch

from dpace.fast import attention
from dpace.fast.cache import TextCache
from dpace.target import Target

CONTEXTS, WIDTHS = (128, 512, 1500), (1, 4, 8)


@torch.inference_mode()
def main(name: str, rounds: int) -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {rounds} rounds")
    for dtype in (torch.float32, torch.bfloat16):
        target = Target.load(name, dtype=dtype)
        if target.config._attn_implementation != attention.NAME:
            raise SystemExit(
                f"{name} uses {target.config._attn_implementation} here, not dpace.fast.attention; "
                "give a target with sdpa attention and run on a CPU"
            )
        for context in CONTEXTS:
            token_ids = torch.randint(1000, (1, context))
            cache = TextCache(target.config, context + max(WIDTHS))
            target.hidden(token_ids, cache=cache)
            for width in WIDTHS:
                times: dict[str, list[float]] = {"sdpa": [], attention.NAME: []}
                for _ in range(rounds + 1):
                    for implementation, seconds in times.items():
                        target.decoder.set_attn_implementation(implementation)
                        start = time.perf_counter()
                        target.hidden(token_ids[:, :width], cache=cache)
                        seconds.append(time.perf_counter() - start)
                        cache.crop(-width)
                theirs, ours = (1000 * statistics.median(seconds[1:]) for seconds in times.values())
                print(
                    f"{dtype}, {width} tokens after {context}: sdpa {theirs:.1f} ms, ours {ours:.1f} ms, "
                    f"ratio {ours / theirs:.2f}"
                )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 15)
