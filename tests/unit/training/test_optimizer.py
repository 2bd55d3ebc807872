import copy

import pytest
import torch
from torch import nn

from dpace.config import TrainConfig
from dpace.training.optimizer import make_optimizer, orthogonalize, products_dtype
from tests.support.models import make_target, make_with_markov_head


def test_steps_are_those_of_torch_optimizers():
    """Matrices against torch.optim.Muon (bf16, hence the tolerance), vectors against AdamW."""
    ours = nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.Linear(32, 8))
    theirs = copy.deepcopy(ours)
    optimizer = make_optimizer(ours, TrainConfig(optimizer="muon", learning_rate=0.02, weight_decay=2.0))
    matrices = [p for p in theirs.parameters() if p.ndim == 2]
    vectors = [p for p in theirs.parameters() if p.ndim != 2]
    references = [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=2.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(vectors, lr=0.02, weight_decay=0.0),
    ]
    start = copy.deepcopy(ours)
    inputs = torch.randn(5, 64, 16)
    for model, optimizers in ((ours, [optimizer]), (theirs, references)):
        for batch in inputs:
            model(batch).square().sum().backward()
            for each in optimizers:
                each.step()
                each.zero_grad()
    for mine, reference, before in zip(ours.parameters(), theirs.parameters(), start.parameters(), strict=True):
        moved = (reference - before).norm()
        assert moved > 0 and (mine - reference).norm() / moved < 0.05


@pytest.mark.parametrize("shape", [(24, 24), (24, 40), (24, 48), (100, 24)])
@pytest.mark.parametrize("smallest", [1.0, 1e-3, 1e-9])
def test_steps_on_the_gram_matrix_are_those_on_the_matrix(shape, smallest):
    """Square, wide and tall, with singular values from 1 down; in fp64 all take their steps on the matrix."""
    left, _, right = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    matrix = left * torch.logspace(0, float(torch.tensor(smallest).log10()), 24) @ right
    expected = orthogonalize(matrix, torch.float64)
    assert (orthogonalize(matrix.float(), torch.float32) - expected).norm() / expected.norm() < 1e-3


@pytest.mark.parametrize(("optimizer", "of_tables"), [("adamw", 0.5), ("muon", 1.0)])
def test_each_parameter_has_the_decay_of_its_kind(optimizer, of_tables):
    """None for vectors; with Muon, matrices alone have its momentum, and tables of tokens a decay of their own."""
    drafter = make_with_markov_head(make_target("qwen3"))
    groups = make_optimizer(drafter, TrainConfig(optimizer=optimizer, weight_decay=0.5)).param_groups
    found = {id(p): (group["weight_decay"], group.get("momentum")) for group in groups for p in group["params"]}
    assert len(found) == sum(len(group["params"]) for group in groups)
    for name, parameter in drafter.named_parameters():
        is_table = name.startswith("markov_head.")
        decay = (of_tables if is_table else 0.5) if parameter.ndim > 1 else 0.0
        has_momentum = optimizer == "muon" and parameter.ndim > 1 and not is_table
        assert found[id(parameter)] == (decay, 0.95 if has_momentum else None), name


def test_products_are_rounded_where_that_is_fast_or_asked_for(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for is_fast in (True, False):
        monkeypatch.setattr("dpace.training.optimizer.has_fast_bf16", lambda is_fast=is_fast: is_fast)
        rounded = [products_dtype(TrainConfig(products=name), cpu) for name in ("auto", "bfloat16", "float32")]
        assert rounded == [torch.bfloat16 if is_fast else torch.float32, torch.bfloat16, torch.float32]
        assert products_dtype(TrainConfig(products="float32"), gpu) == torch.bfloat16
