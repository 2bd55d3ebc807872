"""What the README tells people to type is understood, and what it points to exists."""

import re
import shlex
from pathlib import Path

import pytest

from dpace.cli import USAGE
from dpace.config import CheckConfig, CompareConfig, Recipe
from dpace.flags import first_as, parse
from dpace.verbs.doctor import DoctorConfig
from dpace.verbs.export import ExportConfig
from dpace.verbs.generate import GenerateConfig
from dpace.verbs.import_ import ImportConfig

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^(?:dpace) .*$", README, flags=re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text("train:\n  max_steps: 5\n")
    _, verb, *args = shlex.split(command)
    assert f"  {verb} " in USAGE
    if verb == "report":  # takes folders only
        assert args == ["dpace-out"]
        return
    classes = {"generate": GenerateConfig, "check": CheckConfig, "compare": CompareConfig}
    classes |= {"doctor": DoctorConfig, "export": ExportConfig, "import": ImportConfig}
    first = {"doctor": "drafter", "export": "drafter", "import": "source"}
    if verb in first:
        args = first_as(first[verb], args)
    config = parse(classes.get(verb, Recipe), verb, args)
    assert config.target == "Qwen/Qwen3-4B"


def test_make_targets_files_and_modules_exist():
    makefile = (ROOT / "Makefile").read_text()
    for name in re.findall(r"`?make ([a-z]+)", README):
        assert f"\n{name}:" in makefile, name
    for path in re.findall(r"`((?:tests|benchmarks|docs|recipes)/[^`]*)`", README):
        assert (ROOT / path).exists(), path
    assert len(COMMANDS) >= 4


def test_python_in_the_readme_compiles():
    for code in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL):
        compile(code, "README.md", "exec")
