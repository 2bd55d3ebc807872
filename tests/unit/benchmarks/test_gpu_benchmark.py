"""benchmarks/gpu.py at tiny size, on a CPU."""

import gpu
import gpu_step
import pytest

from dpace.drafter import Drafter
from dpace.target import Target
from tests.support.models import make_recipe, make_target

TINY = {"batch_size": 2, "num_anchors": 6, "max_length": 40}


def test_parts_of_a_step_add_up():
    """Also where a step has several micro-batches, and every part took some time."""
    drafter, found = gpu.time_training(
        make_target("qwen3"), make_recipe(**TINY, gradient_accumulation_steps=2), 4, peak=1e12
    )
    assert isinstance(drafter, Drafter) and found["steps"] == 2
    assert set(found["part_seconds"]) == set(gpu_step.PARTS)
    assert all(seconds > 0 for seconds in found["part_seconds"].values())
    assert found["step_seconds"] == pytest.approx(sum(found["part_seconds"].values()))  # medians of two are means
    assert found["tokens_per_second"] == pytest.approx(2 * 2 * 40 / found["step_seconds"])
    assert found["mfu"] == pytest.approx(found["tflops_per_step"] / found["step_seconds"])
    assert 0 < found["planned_memory_bytes"] < found["peak_memory_bytes"]  # which is the whole process on a CPU


@pytest.mark.wide
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of the loops of others
def test_a_report_has_all_tables(monkeypatch, language_folder):
    monkeypatch.setattr(gpu, "ROUNDS", 1)
    monkeypatch.setattr(gpu, "NUM_PROMPTS", 1)
    found = gpu.measure_all(Target.load(str(language_folder)), make_recipe(**TINY), steps=2, tokens=6)
    page = gpu.markdown({"target": "tiny", "tests": {"passed": True, "summary": "3 passed"}, **found})
    for part in (
        *found["training"]["part_seconds"],
        "3 passed",
        "planned",
        "| plain |",
        "| dpace, auto |",
        "--peak-tflops",
    ):
        assert part in page
