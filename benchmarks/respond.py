"""Time how a target in this process answers: beginnings that prompts share read once, and each prompt read whole.

    python benchmarks/respond.py [--prompts 220] [--tokens 128] [--batch-size 64] [--rounds 1]

The prompts are the demo's. Both ways take turns, and give the same texts; `dpace respond` shares beginnings. The last
lines are of random prompts that share nothing. Seconds of the processor are less noisy on a busy machine than those of
the clock.
"""

import time
from unittest import mock

import torch
import tyro

from dpace.config import RespondConfig
from dpace.prompts.prompts import demo_path, read_prompts
from dpace.respond.in_process import generate_responses
from dpace.target import Target, beginnings
from dpace.target.chat import encode_chat
from dpace.target.locate import TARGET_ID, find_target


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


def main(target: str = TARGET_ID, prompts: int = 220, tokens: int = 128, batch_size: int = 64, rounds: int = 1) -> None:
    """Compare both ways on the demo's prompts, and on prompts that share nothing.

    Args:
        target: that answers.
        prompts: number of the demo's prompts, of 220.
        tokens: longest answer.
        batch_size: prompts that are answered together.
        rounds: in which both take turns.
    """
    loaded = Target.load(find_target(target))
    demo = [encode_chat(loaded, prompt.turns[0]) for prompt in read_prompts(demo_path("train"))]
    chosen = [demo[i * len(demo) // prompts] for i in range(prompts)]
    generate_responses(loaded, chosen[:2], RespondConfig(max_new_tokens=2), range(2))  # what is made at the first use
    print(f"{len(chosen)} prompts of the demo, batches of {batch_size}, {torch.get_num_threads()} threads")
    compare(loaded, chosen, tokens, batch_size, rounds)
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(20, 240, (max(2, prompts // 4),), generator=generator).tolist()
    num_tokens = len(loaded.head.weight)
    apart = [torch.randint(num_tokens // 2, num_tokens, (size,), generator=generator).tolist() for size in sizes]
    print(f"{len(apart)} prompts that share nothing")
    compare(loaded, apart, tokens, batch_size, rounds)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
