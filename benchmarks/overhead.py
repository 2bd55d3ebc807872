"""Time a whole training step with uniform, decay and D-PACE weights.

    python benchmarks/overhead.py [ROUNDS]

Uses the demo's recipe and target on random text. A step is blocks, drafter, loss, backward pass, clipping and
optimizer. The loss uses all 49,152 tokens of the vocabulary, and then 1000 of them as the demo does. The same drafter
and batch take each kind of step in turn, so only the weights differ. Prints the median step, and the median ratio to
uniform weights in the same round with a 95 % bootstrap interval.
"""

import platform
import statistics
import sys
import time
from dataclasses import replace

import numpy as np
import torch
from rich.progress import track

from dpace.batches.dataset import ResponseDataset, collate
from dpace.config import TrainConfig
from dpace.drafter import Drafter
from dpace.drafter.views import blocks_hidden
from dpace.loss import block_loss, frozen_head_nll
from dpace.loss.objective import make_weigh
from dpace.recipes import RECIPES
from dpace.recipes.recipe_file import read_recipe
from dpace.respond.responses import Response
from dpace.system.device import synchronize
from dpace.target import Target
from dpace.target.locate import find_target
from dpace.train.optimizer import make_optimizer

OBJECTIVES = ("uniform", "dflash", "dpace")
NUM_TOKENS, NUM_PROMPT_TOKENS = 260, 180


def main(rounds: int) -> None:
    torch.manual_seed(0)
    recipe = read_recipe(RECIPES["demo-cpu"])
    target, config = Target.load(find_target(recipe.target)), recipe.train
    drafter = Drafter.from_target(target, seed=0, **vars(recipe.drafter))
    spans = [[NUM_PROMPT_TOKENS, NUM_TOKENS]]
    responses = [
        Response(str(i), "random", [], torch.randint(1000, (NUM_TOKENS,)).tolist(), spans)
        for i in range(config.batch_size)
    ]
    dataset = ResponseDataset(responses, max_length=NUM_TOKENS, num_anchors=config.num_anchors, seed=0)
    dataset.keep_features(target, drafter.target_layer_ids, limit_bytes=float("inf"))
    batch = collate([dataset[i] for i in range(len(dataset))], drafter.block_size)
    batch = {name: value.to(target.device) for name, value in batch.items()}
    optimizer = make_optimizer(drafter, TrainConfig(optimizer="muon", learning_rate=1e-5))
    weighers = {name: make_weigh(replace(recipe.loss, objective=name), drafter.block_size) for name in OBJECTIVES}
    print(f"torch {torch.__version__}, {target.device}, {platform.processor() or platform.machine()}, {rounds} rounds")

    for vocab in (len(target.head.weight), 1000):
        head = target.head._replace(weight=target.head.weight[:vocab].contiguous())

        def step(weigh, head=head) -> float:
            start = time.perf_counter()
            hidden, blocks = blocks_hidden(drafter, target, batch)[:2]
            out = frozen_head_nll(hidden, head, blocks.labels, blocks.is_scored, weigh=weigh)
            block_loss(out.losses, blocks.is_scored).backward()
            torch.nn.utils.clip_grad_norm_(drafter.parameters(), config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            synchronize(target.device)
            return time.perf_counter() - start

        for weigh in weighers.values():
            step(weigh)
        seconds: dict[str, list[float]] = {name: [] for name in OBJECTIVES}
        for number in track(range(rounds), f"{vocab} tokens", console=None, transient=True):
            for name in OBJECTIVES[number % 3 :] + OBJECTIVES[: number % 3]:
                seconds[name].append(step(weighers[name]))
        for name in OBJECTIVES:
            ratios = np.array(seconds[name]) / np.array(seconds["uniform"])
            picks = np.random.default_rng(0).integers(rounds, size=(2000, rounds))
            low, high = np.quantile(np.median(ratios[picks], axis=1), [0.025, 0.975])
            middle = 1000 * statistics.median(seconds[name])
            print(f"{vocab:>6} tokens  {name:<8} {middle:7.1f} ms  x {np.median(ratios):.3f} [{low:.3f}, {high:.3f}]")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 60)
