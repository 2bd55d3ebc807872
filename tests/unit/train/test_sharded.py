"""Training is the same with whole drafters on all ranks, with sharded ones, and in one process."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dpace.cli import main
from dpace.config import Recipe
from dpace.target import Target
from dpace.target.files import open_target
from dpace.verbs import load_target
from tests.conftest import make_recipe
from tests.support import sharded
from tests.support.launch import on_ranks

RECIPE = make_recipe(max_steps=3, eval_steps=2, logging_steps=1, num_anchors=4, warmup_ratio=0.0, feature_cache_gib=0.0)
CLOSE = RECIPE.train.learning_rate / 20
"""Rounding; a step moves a weight by about the learning rate, and so does what is summed wrongly."""
LAST = Path("checkpoints", "checkpoint-3", "model.safetensors")
"""Weights before they are rounded."""


@pytest.fixture(scope="module")
def on_one_rank(language_target, language_responses, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    sharded.train_all(language_target, language_responses[:19], RECIPE, folder, sharded.JOBS)
    return folder


@pytest.mark.parametrize(
    "num_ranks", [pytest.param(2, marks=pytest.mark.wide), pytest.param(4, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("way", ["whole", "drafter", "resume", "target"])
def test_weights_are_those_of_one_process(way, num_ranks, on_one_rank, language_folder, language_responses, tmp_path):
    """Every reduction, both optimizers, growing blocks, accumulation, checkpointing, SIGTERM; shares of the target."""
    folder = tmp_path / "ranks"
    on_ranks(num_ranks, sharded.main, way, str(language_folder), language_responses[:19], RECIPE, folder)
    trained = [name for name in sharded.JOBS if (folder / way / name / "provenance.json").exists()]
    assert len(trained) == (len(sharded.JOBS) if way == "drafter" else 2)
    for name in trained:
        found, expected = (load_file(path / name / LAST) for path in (folder / way, on_one_rank))
        assert found.keys() == expected.keys()
        difference = max((value - expected[key]).abs().max() for key, value in found.items())
        print(way, name, difference)
        assert difference <= CLOSE, (way, name)


def test_shares_of_a_target_are_for_training_and_plain_weights(language_folder, capsys):
    device = torch.device("cpu")
    with pytest.raises(ValueError, match="spreads plain weights only"):
        open_target(str(language_folder), dtype=torch.float32, device=device, device_map="auto", shard="fsdp")
    assert main(["compare", "--target", str(language_folder), "--train.target-shard", "fsdp"]) == 1
    assert "decodes, which needs the whole target" in capsys.readouterr().err
    alone = load_target(Recipe(target=str(language_folder)), shard="fsdp")  # one rank has all of it
    assert type(alone) is Target
