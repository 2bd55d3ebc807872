"""Train a drafter of the study with a method that dpace does not have.

    python benchmarks/methods.py STUDY NAME STEPS SEED

STUDY is a folder of `study.py --products bfloat16`, with its answers. The cell stands beside those of the study, whose
`growing-blocks` is the base. docs/results.md has what the methods gave, and this script stays at this commit.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import study
import torch
import tyro
from study import CANDIDATES, GROWING, Cell, make_plan, refuse_other_study, run_cells
from transformers import get_wsd_schedule

import dpace.drafter.drafter
import dpace.loss.head_scores
from dpace.drafter import Drafter
from dpace.fast.top import argmax
from dpace.loss.head_scores import _Scores
from dpace.prompts.prompts import Prompt
from dpace.respond.answering import write_responses
from dpace.respond.responses import Response
from dpace.target import Target
from dpace.training.loop import TrainingLoop
from dpace.verbs import load_target

TARGET_FACTOR = 0.3
"""Of the target's matrices that a drafter begins with: Muon's steps have one length, and those matrices are long."""
SAMPLED_SEEDS = (0, 1)
"""Each gives one more answer of every prompt, at temperature 0.7."""
FALL = 0.2
"""Share of the steps in which a constant learning rate falls to 0."""


def narrow_mlp(_: Path) -> None:
    """Give the drafter an MLP half as wide as the target's."""
    sizes_of = dpace.drafter.drafter.sizes_of

    def narrow(config: Any) -> dict[str, Any]:
        sizes = sizes_of(config)
        return sizes | {"intermediate_size": sizes["intermediate_size"] // 2}

    dpace.drafter.drafter.sizes_of = narrow


def target_layers(_: Path) -> None:
    """Begin with layers of the target, evenly spaced: matrices times `TARGET_FACTOR`, norms as they are."""
    from_target = Drafter.from_target

    def begin(target: Target, **options: Any) -> Drafter:
        drafter: Any = from_target(target, **options)
        sources: Any = target.layers
        for number, layer in enumerate(drafter.layers, start=1):
            weights = dict(sources[number * len(sources) // (len(drafter.layers) + 1)].named_parameters())
            for name, weight in layer.named_parameters():
                if name in weights:
                    weight.data.copy_(weights[name] * (1 if "norm" in name else TARGET_FACTOR))
        return drafter

    Drafter.from_target = begin


def dpard_loss(_: Path) -> None:
    """Let the token loss be `-2 log sum sqrt(p q)`, p and q being the target's and the drafter's probabilities."""

    def soft_scores(rows: Any, target_rows: Any, head: Any, labels: Any, _: str, needs_grad: bool) -> _Scores:
        logits = head.logits(rows).float()
        log_probs = logits.log_softmax(-1)
        log_target = head.logits(target_rows).float().log_softmax(-1)
        overlap = torch.minimum(log_probs, log_target).exp().sum(-1, keepdim=True)
        roots = ((log_probs + log_target) / 2).exp()
        total = roots.sum(-1, keepdim=True)
        # With respect to the logits.
        grad = log_probs.exp() - roots / total
        assert head.slope(logits) is None
        rows_grad = (grad.to(head.weight.dtype) @ head.weight) * head.multiplier if needs_grad else None
        nll = -log_probs.gather(-1, labels)
        return _Scores(-2 * total.log(), nll, overlap, argmax(logits)[:, None], rows_grad)

    dpace.loss.head_scores._soft_scores = soft_scores


def sampled_answers(folder: Path) -> None:
    """Train on sampled answers too."""
    choose = study.choose_conversations

    def choose_more(train: list[Response], validation: list[Response], recipe: Any) -> Any:
        prompts = [Prompt(answer.id, answer.set, [answer.messages[:-1]]) for answer in train]
        target = load_target(recipe)
        more = list(train)
        for seed in SAMPLED_SEEDS:
            config = replace(recipe.respond, temperature=0.7, seed=seed)
            path = folder / f"sampled-{seed}" / "responses.jsonl"
            more += [
                replace(answer, id=f"{answer.id}#{seed}") for answer in write_responses(target, prompts, path, config)
            ]
        return choose(more, validation, recipe)

    study.choose_conversations = choose_more


def constant_rate(_: Path) -> None:
    """Keep the learning rate until the last steps, in which it falls in a straight line."""

    def make_schedule(loop: TrainingLoop) -> Any:
        num_steps = loop.state.max_steps
        warmup = round(loop.config.warmup_ratio * num_steps)
        fall = round(FALL * num_steps)
        return get_wsd_schedule(loop.optimizer, warmup, fall, num_steps, decay_type="linear")

    TrainingLoop._make_schedule = make_schedule


METHODS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "narrow-mlp": ("dpace", narrow_mlp),
    "target-layers": ("dpace", target_layers),
    "dpard-loss": ("dpace+lk+overlap", dpard_loss),
    "sampled-answers": ("dpace", sampled_answers),
    "constant-rate": ("dpace", constant_rate),
}


def main(folder: Path, name: str, steps: int, seed: int, /) -> None:
    """Train one drafter, and measure it."""
    plan = make_plan(folder, None, 1.0, "bfloat16")
    refuse_other_study(plan)
    if name in METHODS:
        objective, change = METHODS[name]
        CANDIDATES[name] = (objective, GROWING)
        change(folder)
    run_cells(plan, [Cell(name, 16, steps, seed)])


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
