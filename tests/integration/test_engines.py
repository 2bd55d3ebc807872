r"""Engines that need an environment of their own, which is named by a variable:

    DPACE_VLLM_PYTHON=/tmp/vllm/bin/python DPACE_MLX_PYTHON=/tmp/mlx/bin/python DPACE_SPECULATORS_PYTHON=/tmp/spec/bin/python \
        pytest -m slow tests/integration/test_engines.py

The head of benchmarks/engines.py has the commands that make them.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest

from dpace.decode import generate
from dpace.drafter import load_drafter
from dpace.formats import export, import_drafter
from dpace.layout import Layout, read_folder
from tests.integration.conftest import MAX_NEW_TOKENS

CHILD = Path(__file__).parents[2] / "benchmarks" / "engines_child.py"


def python_of(engine: str) -> str:
    """The engine's environment; skips the test where none is named."""
    variable = f"DPACE_{engine.upper()}_PYTHON"
    if variable not in os.environ:
        pytest.skip(f"{variable} does not name an environment with {engine}")
    return os.environ[variable]


def ask(engine: str, folder: Path, **request) -> dict:
    """What an engine says in its environment."""
    files = folder / "request.json", folder / "answer.json"
    files[0].write_text(json.dumps(request))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([python_of(engine), CHILD, engine, *files], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(files[1].read_text())


@pytest.mark.slow
@pytest.mark.network
def test_vllm_verifies_as_often_as_we_do(real_pair, tmp_path):
    """With a drafter that has seen a little: enough for accepted tokens, not for layers off by one, which change no count here."""
    python_of("vllm")
    name = real_pair.target.name
    for to in ("vllm", "speculators"):
        out = tmp_path / f"dflash-{to}"
        export(real_pair.drafter_folder, real_pair.target, to=to, output=out, name="x", target_name=name)
        request = {"target": name, "drafter": str(out), "prompts": real_pair.encoded, "max_new_tokens": MAX_NEW_TOKENS}
        found = ask("vllm", tmp_path, **request, rounds=1, num_draft_tokens=7)
        assert found["texts"] == [mine.token_ids for mine in real_pair.ours]
        for steps, mine in zip(found["steps"], real_pair.ours, strict=True):
            assert abs(steps - len(mine.widths)) <= 1


@pytest.mark.slow
def test_mlx_verifies_as_often_as_we_do(
    language_target, language_folder, language_drafter_folder, language_prompts, tmp_path
):
    """With neighbouring layers as controls: the text stays, the number of verifications does not."""
    python_of("mlx")
    prompts = [language_target.tokenizer(f"ask {text} answer")["input_ids"] for text in language_prompts[50:56]]
    request = {"target": str(language_folder), "prompts": prompts, "max_new_tokens": 40, "rounds": 1}
    steps = {}
    for offset in (-1, 0, 1):
        out = tmp_path / f"dflash{offset}"
        export(language_drafter_folder, language_target, to="zlab", output=out, name="x", target_name="x")
        config = json.loads((out / "config.json").read_text())
        config["target_layer_ids"] = [i + offset for i in config["target_layer_ids"]]
        config["dflash_config"]["target_layer_ids"] = config["target_layer_ids"]
        (out / "config.json").write_text(json.dumps(config))
        drafter = load_drafter(out, language_target)
        ours = [generate(language_target, drafter, ids, max_new_tokens=40, width="full") for ids in prompts]
        found = ask("mlx", tmp_path, **request, drafter=str(out))
        assert found["texts"] == [mine.token_ids for mine in ours]
        steps[offset] = found["steps"], [len(mine.widths) for mine in ours]
    assert steps[0][0] == steps[0][1]
    assert steps[0][0] not in (steps[-1][0], steps[1][0])


@pytest.mark.slow
def test_speculators_loads_and_converts_to_the_same(
    language_target, language_folder, language_drafter_folder, tmp_path
):
    """What the package reads of our export, and what it writes from our folder, is the drafter."""
    python_of("speculators")
    name = str(language_folder)
    for to in ("zlab", "speculators"):
        export(language_drafter_folder, language_target, to=to, output=tmp_path / to, name="x", target_name=name)
    request = {"target": name, "drafter": str(tmp_path / "speculators")}
    found = ask("speculators", tmp_path, **request, published=str(tmp_path / "zlab"), output=str(tmp_path / "theirs"))
    assert found["equal"] == [25, 25] and found["tensors"] == 25
    ours, theirs = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("speculators", "theirs"))
    same = ("speculators_model_type", "aux_hidden_state_layer_ids", "mask_token_id", "block_size", "draft_vocab_size")
    assert {name: ours[name] for name in same} == {name: theirs[name] for name in same}
    again = import_drafter(tmp_path / "theirs", tmp_path / "again", target=str(language_folder))
    assert Layout.of(again) == read_folder(language_drafter_folder)[0]
