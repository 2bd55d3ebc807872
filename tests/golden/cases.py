"""What training, measuring and decoding give, for each kind of drafter and each objective, with fixed seeds.

`python -m tests.golden.cases NAME` writes a case into `values.json`, with which `test_golden.py` compares; without a
name, it writes all. Write one again only where its numbers are meant to change, and say so in the commit. The texts in
it are the target's own answers to random prompts; they are kept, so that all machines train on the same ones.
"""

import json
import sys
import tempfile
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from dpace.batches.dataset import ResponseDataset
from dpace.config import DrafterConfig, LossConfig, Objective, Recipe, TrainConfig
from dpace.decode import generate, generate_batch
from dpace.drafter import Drafter
from dpace.drafter.vocabulary import DraftVocabulary
from dpace.loss.objective import make_weigh, with_objective
from dpace.measure.heldout import heldout_acceptance
from dpace.metrics import Acceptance
from dpace.respond.responses import Response
from dpace.target import Target
from dpace.training.loop import TrainingLoop
from tests.support.models import make_target

VALUES = Path(__file__).with_name("values.json")
MASK = 15
"""A token that the target does not write here."""
NUM_PROMPT = 4
"""Tokens of a text that are its prompt."""
LENGTH = 32
NUM_TRAINED = 14
"""Texts that are trained on; the others are measured."""
NUM_DECODED = 2
"""Texts whose prompts are decoded."""
GREEDY = {"max_new_tokens": LENGTH - NUM_PROMPT}
SAMPLED = {**GREEDY, "temperature": 1.0, "seed": 5}
WAYS: dict[str, Any] = {
    "greedy": GREEDY,
    "sampled": SAMPLED,
    "speculative": {**SAMPLED, "verify_rule": "speculative"},
}
"""Options of decoding."""


@dataclass(frozen=True)
class Case:
    """A drafter and what it learns with."""

    drafter: dict[str, Any] = field(default_factory=dict)
    loss: LossConfig = LossConfig()
    train: dict[str, Any] = field(default_factory=dict)
    steps: int = 8
    is_decoded: bool = True
    from_anchor: bool = False
    """Whether the anchor's slot predicts the first token."""


def named(name: str, **loss: Any) -> Case:
    """A few steps with another objective."""
    return Case(loss=with_objective(LossConfig(**loss), name), steps=3, is_decoded=False)


LILICORR = {"selector": "lilicorr", "selector_candidates": 4}
KINDS = {
    "dflash": Case(),
    "convolutions": Case({"conv_kernel_size": 2}),
    "lilicorr": Case(LILICORR),
    "lilicorr seen": Case({**LILICORR, "conv_kernel_size": 2}, LossConfig(selector_penalty=0.0, vocabulary="seen")),
    "candidate selector": Case({"selector": "candidate_selector", "selector_candidates": 4, "conv_kernel_size": 2}),
    "markov head": Case({"selector": "markov_head", "selector_width": 16}),
    "markov head seen": Case({"selector": "markov_head", "selector_width": 16}, LossConfig(vocabulary="seen")),
    "from anchor": Case(from_anchor=True),
    "causal": Case({"causal": True}),
    "window": Case({"sliding_window": 9, "full_layers": (0,)}),
    "vocabulary": Case(loss=LossConfig(vocabulary="seen")),
    "growing": Case({"block_size": 8}, train={"grow_blocks": True}),
    "growing lilicorr": Case({**LILICORR, "block_size": 8}, train={"grow_blocks": True}, steps=4, is_decoded=False),
    "muon": Case(
        train={"optimizer": "muon", "batch_size": 2, "gradient_accumulation_steps": 2}, steps=4, is_decoded=False
    ),
}
OBJECTIVES = [name for name in get_args(Objective) if name != "dpace"]
OBJECTIVES += ["dpace+kl", "dpace+lk", "dpace+overlap", "dpace+kl+overlap"]
CASES = {
    **KINDS,
    **{f"objective {name}": named(name) for name in OBJECTIVES},
    **{f"reduction {name}": named("dpace", reduction=name, alpha_end=0.9) for name in ("batch", "slots", "weights")},
}


class Outcome(NamedTuple):
    """What a case gives."""

    losses: list[float]
    weights: dict[str, Tensor]
    changes: dict[str, Tensor]
    """Of the weights, since before training."""
    heldout: Acceptance
    texts: dict[str, list[list[int]]]
    """Responses, for each of `WAYS` and for a batch."""
    accepted: dict[str, list[list[int]]]
    """Their accepted lengths."""


@cache
def target() -> Target:
    return make_target("qwen3")


def run(case: Case, texts: list[list[int]]) -> Outcome:
    """Train, measure and decode."""
    train = {"batch_size": 4, "num_anchors": 10, "learning_rate": 3e-3, "warmup_ratio": 0.2, "eval_steps": 10**6}
    size = {"num_layers": 2, "num_features": 2, "block_size": 6, "mask_token_id": MASK}
    recipe = Recipe(
        drafter=DrafterConfig(**{**size, **case.drafter}),
        loss=case.loss,
        train=TrainConfig(**{**train, "max_length": LENGTH, "logging_steps": 1, "max_steps": case.steps, **case.train}),
    )
    drafter = Drafter.from_target(target(), seed=0, **vars(recipe.drafter))
    if case.from_anchor:
        drafter.config.dflash_config["sample_from_anchor"] = True
    responses = [Response(str(i), "golden", [], ids, [[NUM_PROMPT, len(ids)]]) for i, ids in enumerate(texts)]
    dataset = ResponseDataset(responses[:NUM_TRAINED], max_length=LENGTH, num_anchors=recipe.train.num_anchors, seed=42)
    heldout, none = (
        ResponseDataset(part, max_length=LENGTH, num_anchors=None, seed=42) for part in (responses[NUM_TRAINED:], [])
    )
    weigh = make_weigh(case.loss, drafter.block_size, is_growing=recipe.train.grow_blocks)
    before = {name: value.clone() for name, value in drafter.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        loop = TrainingLoop(drafter, target(), dataset, none, recipe, weigh=weigh, checkpoints=Path(folder))
        loop.run()
    losses = [entry["loss"] for entry in loop.state.log_history if "loss" in entry]
    weights = drafter.state_dict()
    changes = {name: value - before[name] for name, value in weights.items()}
    token_ids = None
    if case.loss.vocabulary == "seen":
        drafter.vocabulary = DraftVocabulary(dataset.seen_tokens.tolist())
        token_ids = drafter.vocabulary.token_ids
    measured = heldout_acceptance(drafter, target(), heldout, token_ids=token_ids)
    prompts = [ids[:NUM_PROMPT] for ids in texts[NUM_TRAINED:][:NUM_DECODED]] if case.is_decoded else []
    drafter.eval()
    found = {
        way: [generate(target(), drafter, prompt, width="full", **options) for prompt in prompts]
        for way, options in WAYS.items()
    }
    found["batch"] = generate_batch(target(), drafter, prompts, **WAYS["greedy"])
    return Outcome(
        losses,
        weights,
        changes,
        measured,
        {way: [out.token_ids for out in outs] for way, outs in found.items()},
        {way: [out.accepted_lengths for out in outs] for way, outs in found.items()},
    )


def project(change: Tensor) -> float:
    """The direction of a change: its product with a fixed vector, as large as a number of the normal distribution."""
    vector = torch.randn(change.numel(), generator=torch.Generator().manual_seed(0))
    return float(change.flatten() @ vector / change.norm().clamp_min(1e-12))


def summary(outcome: Outcome) -> dict[str, Any]:
    """What `values.json` keeps of it; tensors in the order of their names."""
    changes = [outcome.changes[name] for name in sorted(outcome.changes)]
    return {
        "losses": [float(f"{loss:.6g}") for loss in outcome.losses],
        "norms": [float(f"{change.norm():.4g}") for change in changes],
        "projections": [round(project(change), 3) for change in changes],
        "tau": [float(f"{tau:.4g}") for tau in (outcome.heldout.tau, *outcome.heldout.bounds)],
        "accepted": sum(sum(lengths) for way in outcome.accepted.values() for lengths in way),
    }


def main() -> None:
    """Write the cases that are named, or all; texts and other cases stay as they are."""
    torch.set_num_threads(1)
    kept = json.loads(VALUES.read_text())
    cases = kept["cases"] | {name: summary(run(CASES[name], kept["texts"])) for name in sys.argv[1:] or CASES}
    values = {"texts": kept["texts"], "cases": {name: cases[name] for name in CASES if name in cases}}
    VALUES.write_text(json.dumps(values, separators=(",", ":")).replace('{"losses', '\n{"losses') + "\n")


if __name__ == "__main__":
    main()
