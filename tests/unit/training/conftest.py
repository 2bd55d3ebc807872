"""A training loop on the synthetic language, for one step or a few."""

import pytest

from dpace.drafter import Drafter
from dpace.loss.objective import make_weigh
from dpace.training.loop import TrainingLoop
from dpace.training.run import choose_conversations


@pytest.fixture
def make_loop(language_target, language_responses, tmp_path):
    """Make the loop of a recipe without validation."""

    def make(recipe):
        datasets = choose_conversations(language_responses[:21], [], recipe)
        drafter = Drafter.from_target(language_target, seed=recipe.train.seed, **vars(recipe.drafter))
        weigh = make_weigh(recipe.loss, drafter.block_size, is_growing=recipe.train.grow_blocks)
        return TrainingLoop(drafter, language_target, *datasets, recipe, weigh=weigh, checkpoints=tmp_path)

    return make
