"""What does a head cost, and what does it gain? A drafter with its head and the same without, in one alternating run.

    python benchmarks/head.py TARGET DRAFTER --prompts-file PROMPTS.jsonl

DRAFTER has a LiLiCorr head; without it, each slot takes its own best token. With `--without OTHER` it is compared with
another drafter, for example one that was trained without a head on the same batches. Both decode the same prompts in
turn, greedily; the first round warms up. A table for each dataset has tau and tokens a second of both, and the gains
over prompts, paired, with 95 % intervals. Before it stand the milliseconds of a draft with and without the walk.
"""

import argparse
import statistics
import time
from collections.abc import Sequence

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from dpace.config import Width
from dpace.decode import Paces, generate
from dpace.decode.costs import measure_costs
from dpace.drafter import Drafter, load_drafter
from dpace.drafter.vocabulary import DraftVocabulary
from dpace.engines.published import make_drafter, read_folder, without_head
from dpace.fast.speed_up import speed_up
from dpace.metrics import decode_speedup
from dpace.prompts.prompts import demo_path, first_of_each_set, read_prompts
from dpace.report.tables import console
from dpace.target import Target
from dpace.target.chat import encode_chat

WIDTHS: tuple[Width, ...] = ("full", "auto")


def load_both(target: Target, folder: str, other: str | None) -> dict[str, Drafter]:
    """Load the drafter with its head, and what it is compared with."""
    drafter = load_drafter(folder, target)
    if other is not None:
        return {"head": drafter, "without": load_drafter(other, target)}
    plain = make_drafter(*without_head(*read_folder(folder))).to(target.device, target.model.dtype)
    if drafter.vocabulary is not None:  # its temperature is the head's
        plain.vocabulary = DraftVocabulary(drafter.vocabulary.token_ids.tolist())
    speed_up(plain)
    return {"head": drafter, "without": plain}


def measure(
    target: Target, drafters: dict[str, Drafter], prompts: Sequence[list[int]], rounds: int, count: int, width: Width
) -> dict[str, np.ndarray]:
    """Return tokens, passes and seconds of each prompt, "prompt 3", summed over the rounds."""
    sums = {name: np.zeros((len(prompts), 3)) for name in drafters}
    paces = {name: Paces() for name in drafters}
    for number in range(rounds + 1):
        for index, ids in enumerate(prompts):
            names = list(drafters) if (number + index) % 2 else list(drafters)[::-1]
            for name in names:
                out = generate(target, drafters[name], ids, max_new_tokens=count, width=width, paces=paces[name])
                tokens = len(out.token_ids) - 1
                if number:
                    sums[name][index] += [tokens, len(out.accepted_lengths), out.decode_seconds]
    return sums


def gain(head: np.ndarray, without: np.ndarray) -> str:
    """Write the gain of a ratio of sums in percent, with an interval over prompts, the same ones on both sides."""
    value, low, high = (100 * (ratio - 1) for ratio in decode_speedup(*head.T, *without.T))
    return f"{value:+.1f} % [{low:+.1f}, {high:+.1f}]"


def main() -> None:
    """Measure both and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("drafter")
    parser.add_argument("--without", help="a drafter to compare with, instead of the same one without its head")
    parser.add_argument("--prompts-file", default=str(demo_path("heldout")), help="JSONL; the demo's by default")
    parser.add_argument("--prompts", type=int, default=12, help="number of prompts from each dataset")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=96)
    options = parser.parse_args()
    target = Target.load(options.target, dtype=torch.float32)
    drafters = load_both(target, options.drafter, options.without)
    costs = {name: [] for name in drafters}
    for _ in range(options.rounds):
        for name, drafter in drafters.items():
            costs[name].append(1000 * measure_costs(target, drafter).draft_seconds)
    seconds = {name: statistics.median(found) for name, found in costs.items()}
    print(
        f"a draft takes {seconds['head']:.2f} ms with the head and {seconds['without']:.2f} ms without: the walk costs "
        f"{seconds['head'] - seconds['without']:.2f} ms"
    )
    chosen = first_of_each_set(read_prompts(options.prompts_file), options.prompts)
    started = time.perf_counter()
    for name in dict.fromkeys(prompt.set for prompt in chosen):
        prompts = [encode_chat(target, prompt.turns[0]) for prompt in chosen if prompt.set == name]
        table = Table("width", "", "with the head", "without", "gain over prompts", title=name, box=SIMPLE_HEAD)
        for width in WIDTHS:
            sums = measure(target, drafters, prompts, options.rounds, options.tokens, width)
            passes = "tau" if width == "full" else "tokens/pass"
            for words, columns in ((passes, [0, 1]), ("tokens/s", [0, 2])):
                pair = [sums[key][:, columns] for key in ("head", "without")]
                values = [f"{part[:, 0].sum() / part[:, 1].sum():.2f}" for part in pair]
                table.add_row(str(width), words, *values, gain(*pair))
        console().print(table)
    print(f"{time.perf_counter() - started:.0f} seconds")


if __name__ == "__main__":
    main()
