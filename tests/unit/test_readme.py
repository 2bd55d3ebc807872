"""What the pages tell people to type runs, in order and in one folder, and what they point to exists."""

import json
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from dpace.cli import VERBS, main
from dpace.prompts.prompts import read_prompts

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PARSED_ONLY = "<!-- parsed only"
"""Stands before a block that needs the network, a server, a GPU or hours."""
GENERATED = ("reference/cli.md", "reference/recipe.md", "reference/results.md")
"""Pages that `docs/hooks.py` makes."""
TINY = {
    "respond": {"max_new_tokens": 32},
    "drafter": {"num_layers": 2, "num_features": 2, "block_size": 6},
    "train": {"learning_rate": 5e-3, "max_steps": 30, "batch_size": 8, "num_anchors": 12, "eval_steps": 15},
    "bench": {"max_new_tokens": 16, "num_prompts": 2, "temperatures": [0.0]},
}
"""What the recipe of the README gets in addition."""
SHORTER = {
    "compare": ["--train.max-steps", "4", "--train.eval-steps", "2", "--seeds", "0"],
    "check": ["--num-prompts", "2", "--max-new-tokens", "12"],
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
        return [line for line in self.text.replace("\\\n", "").splitlines() if shlex.split(line, comments=True)]

    @property
    def promised(self) -> list[str]:
        """Files that its comments say it writes."""
        found = re.findall(r"[\w.-]+/[\w./-]+\.\w+", " ".join(re.findall(r"# (.*)", self.text)))
        return [path for path in found if not path.startswith("docs/")]


def read_blocks(page: Path) -> list[Block]:
    found = re.findall(r"(<!--.*?-->\n)?```(\w+)\n(.*?)```", page.read_text(), flags=re.DOTALL)
    return [Block(page.name, language, text, not comment.startswith(PARSED_ONLY)) for comment, language, text in found]


BLOCKS = [block for page in PAGES for block in read_blocks(page)]
COMMANDS = [command for block in BLOCKS if block.language == "bash" for command in block.commands]


def block_of(language: str) -> str:
    """The README's only block in a language."""
    (text,) = (block.text for block in BLOCKS if block.page == "README.md" and block.language == language)
    return text


def write_recipe(folder: Path) -> None:
    """The README's recipe, for a tiny drafter."""
    recipe = yaml.safe_load(block_of("yaml"))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe | TINY))


class ParsedError(Exception):
    """Ends a verb once its arguments are understood."""


@pytest.mark.parametrize("command", dict.fromkeys(COMMANDS))
def test_commands_are_understood(command, tmp_path, monkeypatch):
    words = shlex.split(command, comments=True)
    words = words[words.index("dpace.cli") :] if words[0] in ("torchrun", "accelerate") else words
    if words[0] == "make":
        assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text()
    elif words[0] == "python" and words[1] == "-m":
        assert words[2] == "venv" or (ROOT / "src" / words[2].replace(".", "/")).with_suffix(".py").exists()
    elif words[0] == "python":
        assert (ROOT / words[1]).exists()
    elif words[0] == "vllm":
        assert words[1] == "serve" and all(json.loads(word) for word in words if word.startswith("{"))
    elif words[0] in ("sbatch", "sky"):
        assert all((ROOT / word).exists() for word in words if word.startswith("examples/"))
    elif words[0] in ("dpace", "dpace.cli"):
        import dpace.recipes.flags
        import dpace.verbs.import_

        def parse(config_class, verb, args):
            raise ParsedError(real_parse(config_class, verb, args))

        real_parse = dpace.recipes.flags.parse
        name = f"dpace.verbs.{'import_' if words[1] == 'import' else words[1]}"
        __import__(name)
        monkeypatch.setattr(f"{name}.parse", parse)
        monkeypatch.chdir(tmp_path)
        write_recipe(tmp_path)
        with pytest.raises(ParsedError):
            main(words[1:])
    else:
        assert words[0] == "source" or words[0].endswith("/pip")


def test_every_verb_is_shown():
    assert {command.split()[1] for command in COMMANDS if command.startswith("dpace ")} == set(VERBS) - {"demo"}
    assert "make demo" in COMMANDS


def test_lines_of_prompts_are_read(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(block_of("json"))
    assert [len(prompt.turns) for prompt in read_prompts(path)] == [1, 2, 1]


def test_the_pages_run(language_folder, target_gguf, language_prompts, tmp_path, monkeypatch, capsys):
    """All blocks of the README and then of docs/, each with what those before it wrote."""
    monkeypatch.chdir(tmp_path)
    write_recipe(tmp_path)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in language_prompts))
    names = {"Qwen/Qwen3-4B": str(language_folder), "Qwen3-4B.gguf": str(target_gguf)}

    def renamed(text: str) -> str:
        for name, tiny in names.items():
            text = text.replace(name, tiny)
        return text

    (tmp_path / "recipe.yaml").write_text(renamed((tmp_path / "recipe.yaml").read_text()))
    variables: dict = {}
    for block in BLOCKS:
        if block.language == "python" and block.is_run:
            exec(compile(renamed(block.text), block.page, "exec"), variables)
        if block.language != "bash" or not block.is_run:
            continue
        for command in block.commands:
            words = shlex.split(renamed(command), comments=True)
            if words[0] == "dpace":
                code = main([*words[1:], *SHORTER.get(words[1], [])])
                assert code == 0, f"{block.page}: {command}\n{capsys.readouterr().err[-2000:]}"
        for path in block.promised:
            assert Path(path).exists(), f"{block.page} promises {path}"


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_what_a_page_points_to_exists(page):
    text = page.read_text()
    prose = re.sub(r"`[^`\n]*`|^    .*$", "", text, flags=re.M)  # formulas have brackets too
    for link in re.findall(r"\]\(((?!http)[^)#]+)", prose):
        made = page.parent == ROOT / "docs" and link in GENERATED
        assert made or (page.parent / link).exists(), link
    for path in re.findall(r"`((?:src/dpace|tests|benchmarks|docs|examples)/[^` ]*)`", text):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"`make ([a-z]+)", text):
        assert f"\n{name}:" in (ROOT / "Makefile").read_text(), name
    assert all(len(line) <= 120 for line in text.splitlines())
    assert not re.search(r"(?<![\w.])/(?!tmp/)[a-z]+/[a-z]+/", text), "an absolute path, which only one machine has"
