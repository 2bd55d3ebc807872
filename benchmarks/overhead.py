"""Time a whole training step with uniform, decay and D-PACE weights, and with products in fp32 and bf16.

    python benchmarks/overhead.py [ROUNDS [TARGET]]

Uses the demo's recipe and target on random text. A step is blocks, drafter, loss, backward pass, clipping and
optimizer. The loss uses all tokens of the vocabulary, and then 1000 of them, about as many as the demo's. The same
drafter and batch take each kind of step in turn, so only the weights differ. Prints the median step, and the median
ratio to uniform weights in the same round with a 95 % bootstrap interval.

Then it prints the demo's step for each precision of products, which take turns, and the time that `dpace plan` would
say of it.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
import tyro
from rich.progress import track
from torch.utils.flop_counter import FlopCounterMode

from dpace.batches.dataset import ResponseDataset, collate
from dpace.config import TrainConfig
from dpace.drafter import Drafter
from dpace.drafter.views import blocks_hidden
from dpace.loss import block_loss, frozen_head_nll
from dpace.loss.head_scores import chunk_bytes_of
from dpace.loss.objective import make_weigh
from dpace.plan.speed import expected_step_seconds
from dpace.recipes import RECIPES
from dpace.recipes.recipe_file import read_recipe
from dpace.respond.responses import Response
from dpace.system.device import synchronize
from dpace.target import Target
from dpace.target.head import LmHead
from dpace.target.locate import find_target
from dpace.training.optimizer import make_optimizer, products_dtype

OBJECTIVES = ("uniform", "dflash", "dpace")
NUM_TOKENS, NUM_PROMPT_TOKENS, NUM_SEEN = 260, 180, 1000


class Step:
    """The demo's training step on random text."""

    def __init__(self, target: str | None) -> None:
        torch.manual_seed(0)
        self.recipe = read_recipe(RECIPES["demo-cpu"])
        self.target = Target.load(find_target(target or self.recipe.target))
        num_seen = min(NUM_SEEN, len(self.target.head.weight))
        self.drafter = Drafter.from_target(self.target, seed=0, **vars(self.recipe.drafter))
        batch_size, num_anchors = self.recipe.train.batch_size, self.recipe.train.num_anchors
        spans = [[NUM_PROMPT_TOKENS, NUM_TOKENS]]
        texts = [torch.randint(num_seen, (NUM_TOKENS,)).tolist() for _ in range(batch_size)]
        responses = [Response(str(i), "random", [], text, spans) for i, text in enumerate(texts)]
        dataset = ResponseDataset(responses, max_length=NUM_TOKENS, num_anchors=num_anchors, seed=0)
        dataset.keep_features(self.target, self.drafter.target_layer_ids, limit_bytes=float("inf"))
        batch = collate([dataset[i] for i in range(len(dataset))], self.drafter.block_size)
        self.batch = {name: value.to(self.target.device) for name, value in batch.items()}

    def use(self, products: str) -> None:
        """Choose the precision of products, with an optimizer of its own."""
        config = TrainConfig(optimizer="muon", learning_rate=1e-5, products=products)
        self.dtype = products_dtype(config, self.target.device)
        self.optimizer = make_optimizer(self.drafter, config)

    def head(self, num_tokens: int) -> LmHead:
        """Return the first rows of the target's head."""
        return self.target.head._replace(weight=self.target.head.weight[:num_tokens].contiguous())

    def weigh(self, objective: str) -> Callable:
        """Make the weights of an objective."""
        return make_weigh(replace(self.recipe.loss, objective=objective), self.drafter.block_size)

    def take(self, weigh: Callable, head: LmHead) -> float:
        """Take a step, and return its seconds."""
        device = self.target.device
        start = time.perf_counter()
        with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
            hidden, blocks = blocks_hidden(self.drafter, self.target, self.batch)[:2]
        chunk_bytes = chunk_bytes_of(self.recipe.loss, head.weight, is_cpu=device.type == "cpu")
        out = frozen_head_nll(
            hidden.float(), head, blocks.labels, blocks.is_scored, weigh=weigh, chunk_bytes=chunk_bytes
        )
        loss, _ = block_loss(out.losses, blocks.is_scored, out.weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.drafter.parameters(), self.recipe.train.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        synchronize(device)
        return time.perf_counter() - start


def compare_objectives(step: Step, num_tokens: int, rounds: int) -> None:
    """Print the seconds of a step with each objective."""
    head, weighers = step.head(num_tokens), {name: step.weigh(name) for name in OBJECTIVES}
    for weigh in weighers.values():
        step.take(weigh, head)
    seconds: dict[str, list[float]] = {name: [] for name in OBJECTIVES}
    for number in track(range(rounds), f"{num_tokens} tokens", console=None, transient=True):
        for name in OBJECTIVES[number % 3 :] + OBJECTIVES[: number % 3]:
            seconds[name].append(step.take(weighers[name], head))
    for name in OBJECTIVES:
        ratios = np.array(seconds[name]) / np.array(seconds["uniform"])
        picks = np.random.default_rng(0).integers(rounds, size=(2000, rounds))
        low, high = np.quantile(np.median(ratios[picks], axis=1), [0.025, 0.975])
        middle = 1000 * statistics.median(seconds[name])
        print(f"{num_tokens:>6} tokens  {name:<8} {middle:7.1f} ms  x {np.median(ratios):.3f} [{low:.3f}, {high:.3f}]")


def compare_products(step: Step, rounds: int) -> None:
    """Print the seconds of a step for both precisions, whose steps take turns, and those of a plan."""
    head, weigh = step.head(NUM_SEEN), step.weigh("dpace")
    seconds: dict[str, list[float]] = {"float32": [], "bfloat16": []}
    for number in range(rounds + 1):  # the first is a warm-up
        for name in seconds:
            step.use(name)
            step.take(weigh, head)  # makes the optimizer's state
            if number:
                seconds[name].append(step.take(weigh, head))
    with FlopCounterMode(display=False) as counter:
        step.take(weigh, head)
    for name in seconds:
        step.use(name)
        planned = expected_step_seconds(
            counter.get_total_flops(), step.target.device, step.dtype, step.target.model.dtype
        )
        middle = 1000 * statistics.median(seconds[name])
        print(f"products in {name:<8} {middle:7.1f} ms, planned {1000 * planned:.1f} ms")


def main(rounds: tyro.conf.Positional[int] = 60, target: tyro.conf.Positional[str | None] = None) -> None:
    """Print both tables.

    Args:
        rounds: in which each kind of step takes its turn.
        target: another one than the demo's.
    """
    step = Step(target)
    print(f"torch {torch.__version__}, {step.target.device}, {rounds} rounds")
    step.use("float32")
    for num_tokens in (len(step.target.head.weight), NUM_SEEN):
        compare_objectives(step, num_tokens, rounds)
    compare_products(step, max(1, rounds // 6))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
