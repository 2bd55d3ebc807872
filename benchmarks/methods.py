"""Try one change of a short training on the answers of a study: growing blocks with D-PACE are the base.

    python benchmarks/methods.py STUDY NAME STEPS SEED

STUDY is the folder of `study.py --prompts`, with its answers. The first 24 answers of each kind, in a fixed random
order, are measured; 2,000 others are trained on. Appends a line to STUDY/methods.jsonl, with the accepted lengths of
each measured answer. What gained nothing has a row in docs/results.md, and this script stays at this commit.
"""

import json
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from study import make_plan
from torch.optim.lr_scheduler import LambdaLR

import dpace.training.loop
from dpace.batches.dataset import ResponseDataset
from dpace.batches.feature_files import keep_on_disk
from dpace.config import Recipe
from dpace.drafter import Drafter
from dpace.loss.objective import make_weigh, with_objective
from dpace.measure.heldout import heldout_acceptance
from dpace.prompts.prompts import Prompt
from dpace.respond.answering import write_responses
from dpace.respond.responses import Example, Response
from dpace.studies.compare import heldout_set
from dpace.target import Target
from dpace.target.target import Features
from dpace.training.loop import TrainingLoop
from dpace.verbs import load_target

LAYERS = [1, 8, 14, 20, 21, 24, 27]
"""All target layers that a method reads; their hidden states are computed once."""
NUM_VALIDATION, NUM_TRAIN = 24, 2000


def scale_layers(drafter: Drafter, target: Target, factor: float, *, attention: bool) -> None:
    """Copy layers of the target, evenly spaced, into the drafter's, times a factor; norms as they are."""
    sources: Any = target.layers
    layers: Any = drafter.layers
    for number, layer in enumerate(layers, start=1):
        source = sources[number * len(sources) // (len(layers) + 1)]
        weights = dict(source.named_parameters())
        with torch.no_grad():
            for name, weight in layer.named_parameters():
                if name in weights and (attention or "self_attn" not in name):
                    weight.copy_(weights[name] * (1 if "norm" in name else factor))


def start_branches_at_zero(drafter: Drafter, target: Target) -> None:
    """Let each layer add nothing at first."""
    layers: Any = drafter.layers
    for layer in layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)


def warmup_stable_decay(loop: TrainingLoop) -> LambdaLR:
    """Keep the learning rate until 30 % of the steps are left, and lower it to 0 in a straight line."""
    num_steps = loop.state.max_steps
    warmup = loop.config.warmup_ratio * num_steps
    return LambdaLR(loop.optimizer, lambda step: min(1.0, step / warmup, (num_steps - step) / (0.3 * num_steps)))


@dataclass(frozen=True)
class Method:
    """What differs from the base."""

    options: dict[str, Any] = field(default_factory=dict)
    """Of the recipe."""
    objective: str = "dpace"
    layer_ids: Sequence[int] = (1, 14, 27)
    start: Callable[[Drafter, Target], None] = lambda drafter, target: None
    make_schedule: Callable[[TrainingLoop], LambdaLR] | None = None
    is_scaled: bool = False
    """Whether each feature is divided by its root mean square, which `fc` could take over."""
    num_sampled: int = 0
    """Answers of each prompt at temperature 0.7, beside the greedy one."""
    limit: int = NUM_TRAIN
    """Answers to train on."""


def rate(learning_rate: float, **options: Any) -> Method:
    """Make a method that changes the learning rate."""
    return Method({"train.learning_rate": learning_rate}, **options)


WHOLE = {"train.grow_blocks": False}
METHODS = {
    "base": Method(),
    "decay": Method(WHOLE, "dflash"),
    "rate 6e-3": rate(6e-3),
    "rate 12e-3": rate(12e-3),
    "rate 6e-3, features scaled": rate(6e-3, is_scaled=True),
    "decay, rate 6e-3": Method(WHOLE | {"train.learning_rate": 6e-3}, "dflash"),
    "layers 14 21 27": Method(layer_ids=(14, 21, 27)),
    "layers 20 24 27": Method(layer_ids=(20, 24, 27)),
    "five layers": Method(layer_ids=(1, 8, 14, 20, 27)),
    "features scaled": Method(is_scaled=True),
    "one layer": Method({"drafter.num_layers": 1}),
    "three layers": Method({"drafter.num_layers": 3}),
    "branches from zero": Method(start=start_branches_at_zero),
    "target's layers": Method(start=lambda *pair: scale_layers(*pair, 0.3, attention=True)),
    "target's MLP and norms": Method(start=lambda *pair: scale_layers(*pair, 1.0, attention=False)),
    "constant rate, then decay": Method(make_schedule=warmup_stable_decay),
    "half the batch": Method({"train.batch_size": 6}),
    "selector": Method({"drafter.selector": "candidate_selector"}),
    "300 answers, whole blocks": Method(WHOLE, limit=300),
    "300 answers": Method(limit=300),
    "300 answers, rate 6e-3": rate(6e-3, limit=300),
    "300 answers and 300 sampled": Method(limit=300, num_sampled=1),
}


class Columns(Sequence[Features]):
    """Features of some of `LAYERS`, scaled where a scale is given."""

    def __init__(self, features: Sequence[Features], layer_ids: Sequence[int]):
        self.features = features
        self.places = [LAYERS.index(layer) for layer in layer_ids]
        self.scale = torch.ones(())

    def __len__(self) -> int:
        """Count the conversations."""
        return len(self.features)

    def __getitem__(self, index: Any) -> Any:
        """Read a conversation."""
        rows = self.features[index].layers.float().unflatten(-1, (len(LAYERS), -1))
        return Features(rows[:, self.places].flatten(1) * self.scale, None)


def read_answers(study: Path, limit: int) -> tuple[list[Response], list[Response]]:
    """Read the answers to train on, and to measure."""
    rows = [json.loads(line) for line in (study / "responses.jsonl").read_text(encoding="utf-8").splitlines()]
    heldout = {json.loads(line)["id"] for line in (study / "heldout.jsonl").read_text(encoding="utf-8").splitlines()}
    answers = [Response(**row) for row in rows if row["id"] not in heldout]
    random.Random(0).shuffle(answers)
    train, validation, count = [], [], Counter()
    for answer in answers:
        count[answer.set] += 1
        (validation if count[answer.set] <= NUM_VALIDATION else train).append(answer)
    return train[:limit], validation


def sample_answers(
    target: Target, study: Path, train: Sequence[Response], recipe: Recipe, number: int
) -> list[Example]:
    """Let the target answer the prompts of some answers again, at temperature 0.7."""
    prompts = [Prompt(answer.id, answer.set, [answer.messages[:-1]]) for answer in train]
    config = replace(recipe.respond, temperature=0.7, seed=number)
    answers = write_responses(target, prompts, study / f"sampled-{number}" / "responses.jsonl", config)
    return [Example.of(replace(answer, id=f"{answer.id}#{number}")) for answer in answers]


def main(study: Path, name: str, steps: int, seed: int, /) -> None:
    """Train with a method, and measure tau on the validation answers."""
    method = METHODS[name]
    recipe = make_plan(study, None, 1.0, "bfloat16", max_new_tokens=128).recipe
    options = {"train.max_steps": steps, "train.eval_steps": steps, "train.seed": seed, "train.grow_blocks": True}
    options |= {"drafter.block_size": 16, "drafter.num_features": None, "drafter.target_layer_ids": method.layer_ids}
    options |= {"train.feature_files": str(study / "method-features"), "train.feature_dtype": "bfloat16"}
    for option, value in (options | method.options).items():
        group, _, key = option.partition(".")
        recipe = replace(recipe, **{group: replace(getattr(recipe, group), **{key: value})})
    recipe = replace(recipe, loss=with_objective(recipe.loss, method.objective))
    target = load_target(recipe)
    train, validation = read_answers(study, method.limit)
    examples = [Example.of(answer) for answer in train]
    for number in range(1, method.num_sampled + 1):
        examples += sample_answers(target, study, train, recipe, number)
    sizes = {"max_length": recipe.train.max_length, "num_anchors": recipe.train.num_anchors}
    dataset = ResponseDataset(examples, **sizes, seed=seed)
    measured = heldout_set(validation, recipe)
    for part in (dataset, measured):
        keep_on_disk(target, part, LAYERS, recipe.train)
        assert part.features is not None
        part.use_features(Columns(part.features, method.layer_ids), method.layer_ids, False)
    if method.is_scaled:
        rows = torch.cat([dataset.features[number].layers for number in range(0, len(dataset), 20)])
        for part in (dataset, measured):
            part.features.scale = 1 / rows.square().mean(0).sqrt()
    drafter = Drafter.from_target(target, seed=seed, **vars(recipe.drafter))
    method.start(drafter, target)
    if method.make_schedule:
        dpace.training.loop.TrainingLoop._make_schedule = method.make_schedule
    nothing = ResponseDataset([], max_length=recipe.train.max_length, num_anchors=None, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        weigh = make_weigh(recipe.loss, 16)
        loop = TrainingLoop(drafter, target, dataset, nothing, recipe, weigh=weigh, checkpoints=Path(folder))
        started = time.process_time()
        loop.run()
        seconds = time.process_time() - started
    acceptance = heldout_acceptance(drafter.eval(), target, measured, token_ids=loop.scorer.rows.token_ids)
    step = statistics.median(entry["step_seconds"] for entry in loop.state.log_history if "step_seconds" in entry)
    row = {"name": name, "steps": steps, "seed": seed, "tau": acceptance.tau, "step_seconds": step, "seconds": seconds}
    row |= {"histogram": acceptance.rows.tolist(), "without_bonus": acceptance.without_bonus.tolist()}
    with (study / "methods.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(f"{name}, {steps} steps: tau {acceptance.tau:.3f}, {step:.2f} s a step")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
