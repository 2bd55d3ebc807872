"""Time drafts that are all refused over plain steps: the tau above which drafts pay, in this process.

    python benchmarks/break_even.py TARGET DRAFTER [--contexts 128 1024 4096] [--requests 1 2 4 8]

The method is that of vllm-project/vllm#54691: every draft is made and verified, and one token comes out. Steps take
turns, and the least of the rounds counts. What the caches hold does not change the time, so no prompt is read. `dpace
bench` has the break-even of one request from its responses, and `dpace bench --server` that of servers.
"""

import argparse
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from dpace.decode.batch import RowCaches, draft_and_verify
from dpace.decode.generation import read_clock
from dpace.decode.steps import Ends, State
from dpace.drafter import Drafter, load_drafter
from dpace.drafter.vocabulary import DraftHead
from dpace.report.tables import console
from dpace.target import Target

NUM_ROUNDS = 8


@torch.inference_mode()
def time_refused_drafts(target: Target, drafter: Drafter, num_tokens: int, num_requests: int) -> float:
    """Divide the seconds of a step with refused drafts by those of a plain one, for requests of `num_tokens` tokens."""
    size = drafter.block_size
    starts = torch.full((num_requests, 1), num_tokens, device=target.device)
    last_ids = torch.full_like(starts, drafter.mask_token_id)
    features = target.features(last_ids, drafter.target_layer_ids)
    state = State(Ends(last_ids, starts, starts + size), features, starts - 1)
    caches = RowCaches(target, drafter, num_tokens + size)
    head = DraftHead(target, drafter.vocabulary)
    seconds: dict[int, list[float]] = {size: [], 1: []}
    for _ in range(NUM_ROUNDS + 1):  # the first one warms up
        for width, model in ((size, drafter), (1, None)):
            started = read_clock(target.device)
            draft_and_verify(target, model, head, caches, state, width=width, is_greedy=True)
            seconds[width].append(read_clock(target.device) - started)
    return min(seconds[size][1:]) / min(seconds[1][1:])


def main() -> None:
    """Print a table: a row for each length of the context, a column for each number of requests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("drafter", type=Path)
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 1024, 4096])
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 2, 4, 8])
    arguments = parser.parse_args()
    target = Target.load(arguments.target)
    drafter = load_drafter(arguments.drafter, target)
    title = f"break-even tau, blocks of {drafter.block_size}, {torch.get_num_threads()} threads"
    table = Table("context", *map(str, arguments.requests), title=title, box=SIMPLE_HEAD)
    for context in arguments.contexts:
        ratios = [time_refused_drafts(target, drafter, context, count) for count in arguments.requests]
        table.add_row(str(context), *(f"{ratio:.2f}" for ratio in ratios))
    console().print(table)


if __name__ == "__main__":
    main()
