"""What the pages tell people to type is understood, and runs in order in one folder."""

import importlib
import json
import re
import shlex
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import yaml

from dpace.cli import main
from dpace.engines import engine_of
from dpace.prompts.prompts import read_prompts
from dpace.recipes import RECIPES, VERBS
from tests.support.files import write_adapter, write_prompts

ROOT = Path(__file__).parents[2]
CARDS = sorted((ROOT / "src" / "dpace" / "target" / "drafters").rglob("README.md"))
TRIED = ROOT / "benchmarks" / "tried.md"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *CARDS, TRIED]
PARSED_ONLY = "<!-- parsed only"
"""Stands before a block that needs the network, a server, a GPU or hours."""
TINY = {
    "respond": {"max_new_tokens": 32},
    "drafter": {"num_layers": 2, "num_features": 2, "block_size": 6},
    "train": {"learning_rate": 5e-3, "max_steps": 10, "batch_size": 8, "num_anchors": 12, "eval_steps": 5},
    "bench": {"max_new_tokens": 8, "num_prompts": 1, "temperatures": [0.0]},
}
"""What the recipe of the README gets in addition."""
SHORTER = {
    "compare": "--train.max-steps 2 --train.eval-steps 2 --seeds 0 --bench.num-prompts 1 --bench.widths full",
    "check": "--num-prompts 1 --max-new-tokens 6",
}
"""Flags that keep a command within seconds."""


class Block(NamedTuple):
    """A block of code in a page."""

    page: str
    language: str
    text: str
    is_run: bool

    @property
    def commands(self) -> list[str]:
        """The commands of a shell block, a line each."""
        if self.language != "bash":
            return []
        return [line for line in self.text.replace("\\\n", "").splitlines() if shlex.split(line, comments=True)]

    @property
    def promised(self) -> list[str]:
        """Files that its comments say it writes."""
        return re.findall(r"(?<!\S)(?!docs/)[\w.-]+/[\w./-]+\.\w+", " ".join(re.findall(r"# (.*)", self.text)))


def read_blocks(page: Path) -> list[Block]:
    found = re.findall(r"(<!--.*?-->\n)?```(\w+)\n(.*?)```", page.read_text(), flags=re.DOTALL)
    return [Block(page.name, language, text, not comment.startswith(PARSED_ONLY)) for comment, language, text in found]


BLOCKS = [block for page in PAGES for block in read_blocks(page)]
COMMANDS = {command: None for block in BLOCKS for command in block.commands}
INLINE = [command for page in PAGES for command in re.findall(r"`(dpace \w+ recipe\.yaml[^`]*)`", page.read_text())]
COMMANDS |= dict.fromkeys(INLINE)
"""Also those within a sentence; others there only name a verb and an option."""
CLUSTER = "\n".join(path.read_text() for path in (ROOT / "examples" / "cluster").iterdir())
STARTED = re.findall(r'dpace(?:\.cli)? ((?:respond|train) "\$RECIPE".*)', CLUSTER)
COMMANDS |= {
    f"dpace {words.replace('$RECIPE', 'recipe.yaml').replace('${URLS[@]}', 'http://a:8000')}": None for words in STARTED
}


def block_of(language: str) -> str:
    """The README's only block in a language."""
    (text,) = (block.text for block in BLOCKS if block.page == "README.md" and block.language == language)
    return text


def write_recipe(folder: Path, **names: str) -> None:
    """The README's recipe, for a tiny drafter."""
    (folder / "recipe.yaml").write_text(yaml.safe_dump(yaml.safe_load(block_of("yaml")) | TINY | names))


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command, tmp_path, monkeypatch):
    words = shlex.split(command, comments=True)
    words = words[words.index("dpace.cli") :] if words[0] in ("torchrun", "accelerate") else words
    if words[0] == "make":
        assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text()
    elif words[0] == "vllm":
        assert words[1] == "serve" and all(json.loads(word) for word in words if word.startswith("{"))
    elif words[0] in ("dpace", "dpace.cli"):
        run = mock.Mock()
        monkeypatch.setattr(f"dpace.verbs.{'import_' if words[1] == 'import' else words[1]}.run", run)
        monkeypatch.chdir(tmp_path)
        (tmp_path / "dpace-served").mkdir()  # as `dpace serve --learn` writes it
        for folder in (tmp_path, tmp_path / "dpace-served"):
            write_recipe(folder)
        assert main(words[1:]) == 0
        run.assert_called_once()
    assert all((ROOT / word).exists() for word in words if word.startswith(("benchmarks/", "examples/")))


def test_the_table_of_targets_is_that_of_the_code():
    text = (ROOT / "docs" / "serve.md").read_text()
    known, refused = re.findall(r"^\| (.*) \| (?:inputs are handed out|refused) \|$", text, flags=re.MULTILINE)
    assert not any(engine_of("gguf").target_fault(kind) for kind in re.findall("`(.+?)`", known))
    assert all(engine_of("gguf").target_fault(kind) for kind in re.findall("`(.+?)`", refused))


def test_the_recipes_of_dpace_can_be_copied(monkeypatch):
    """From a page of the site, and by the command of a page."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    page = importlib.import_module("hooks").generated_pages()["reference/recipes.md"]
    assert all(f"```yaml\n{path.read_text().strip()}\n```" in page for path in RECIPES.values())
    (code,) = re.findall(r"`python -c \"(.*?)\" > recipe.yaml`", (ROOT / "docs" / "laptop.md").read_text())
    exec(compile(code, "laptop.md", "exec"), {})


def test_every_verb_is_shown():
    assert {command.split()[1] for command in COMMANDS if command.startswith("dpace ")} == set(VERBS)
    assert {"make demo", "pip install ."} <= set(COMMANDS) and len(STARTED) == 4


def test_lines_of_prompts_are_read(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(block_of("json"))
    assert [len(prompt.turns) for prompt in read_prompts(path)] == [1, 2, 1]


def test_the_pages_run(language_folder, target_gguf, language_prompts, tmp_path, monkeypatch, capsys):
    """All blocks of the README and then of docs/, each with what those before it wrote."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dpace.metrics.LEAST_TAU", 99.0)  # train and compare then say so in any case
    write_recipe(tmp_path, target=str(language_folder))
    for name in ("prompts", "heldout"):
        write_prompts(tmp_path / f"{name}.jsonl", language_prompts[:30])

    write_adapter(language_folder, tmp_path / "my-adapter", width=48)

    def renamed(text: str) -> str:
        text = text.replace("Qwen/Qwen3-4B", str(language_folder)).replace("Qwen3-4B.gguf", str(target_gguf))
        return text.replace("z-lab/Qwen3-4B-DFlash-b16", "dpace-out/drafter")

    variables: dict = {}
    for block in BLOCKS:
        if not block.is_run:
            continue
        if block.language == "python":
            exec(compile(renamed(block.text), block.page, "exec"), variables)
        for command in block.commands:
            words = shlex.split(renamed(command), comments=True)
            if words[0] == "dpace":
                code = main([*words[1:], *SHORTER.get(words[1], "").split()])
                said = capsys.readouterr().err
                assert code == 0, f"{block.page}: {command}\n{said[-2000:]}"
                assert ("no drafter accepts anything yet" in said) == (words[1] in ("train", "compare")), said
        for path in block.promised if block.language == "bash" else ():
            assert Path(path).exists(), f"{block.page} promises {path}"
