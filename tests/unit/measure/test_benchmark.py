"""A benchmark of two drafters with several widths, and what its rows say."""

import pytest

from dpace.config import BenchConfig
from dpace.measure.benchmark import bench
from dpace.prompts.prompts import Prompt
from tests.conftest import make_drafter


@pytest.fixture(scope="module")
def results(language_target, language_drafter, language_prompts, tmp_path_factory):
    drafters = {"good": language_drafter, "bad": make_drafter(language_target, block_size=language_drafter.block_size)}
    prompts = [
        Prompt(str(i), "s", [[{"role": "user", "content": text}]]) for i, text in enumerate(language_prompts[50:56])
    ]
    config = BenchConfig(max_new_tokens=24, temperatures=(0.0,), widths=("full", 2, 3))
    return bench(language_target, drafters, prompts, config, tmp_path_factory.mktemp("bench"))


def test_a_narrow_verification_accepts_less(results):
    rows = {row.width: row for row in results.rows if row.drafter == "good"}
    for width in (2, 3):
        assert rows[width].num_same_text == rows[width].num_responses == 6
        assert sum(rows[width].histogram[width:]) == 0 < sum(rows[width].histogram[1:width])
        assert rows[width].tau <= rows["full"].tau


def test_drafters_are_compared_with_the_first(results):
    assert {(c.drafter, c.baseline) for c in results.comparisons} == {("bad", "good")}
    assert all(c.tau_gain[0] < 0 and c.tau_gain[2] < 0 for c in results.comparisons)
