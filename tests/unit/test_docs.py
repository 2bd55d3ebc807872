"""The site has every page, and its generated pages have every verb, option and key. `make docs` builds it."""

import importlib.util
import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml

from dpace.cli import VERBS
from dpace.config import CompareConfig, Recipe
from dpace.measure.results import ResponseRecord, Row

ROOT = Path(__file__).parents[2]


class _Loader(yaml.SafeLoader):
    """YAML with names of Python objects, which stay texts."""


_Loader.add_multi_constructor("tag:yaml.org,2002:python/name:", lambda loader, suffix, node: suffix)


def load_hooks():
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HOOKS = load_hooks()
PAGES = HOOKS.generated_pages()


def pages_of(entry) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    return [page for item in (entry if isinstance(entry, list) else entry.values()) for page in pages_of(item)]


def test_the_menu_has_every_page():
    config = yaml.load((ROOT / "mkdocs.yml").read_text(), _Loader)
    written = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    listed = pages_of(config["nav"])
    assert len(listed) == len(set(listed))
    assert set(listed) | (written & set(config.get("not_in_nav", "").split())) == written | set(PAGES)


@pytest.mark.parametrize("verb", VERBS)
def test_the_command_line_page_has_every_option(verb):
    section = re.search(rf"\n## dpace {verb}\n(.*?)(?=\n## |\Z)", PAGES["reference/cli.md"], flags=re.DOTALL)
    kind = HOOKS.options_of(verb)
    own = {f.name for f in fields(kind)} - ({f.name for f in fields(Recipe)} if issubclass(kind, Recipe) else set())
    assert section
    assert set(re.findall(r"^\| `--([\w-]+)`", section[1], flags=re.MULTILINE)) == {
        name.replace("_", "-") for name in own
    }
    assert HOOKS.options_of("compare") is CompareConfig


def test_the_recipe_page_has_every_option():
    def names(kind: type, prefix: str = "") -> set[str]:
        inner = get_type_hints(kind)
        groups = {name for name in inner if is_dataclass(inner[name])}
        return {prefix + name for name in inner.keys() - groups}.union(
            *(names(inner[group], f"{prefix}{group}.") for group in groups)
        )

    found = re.findall(r"^\| `([\w.]+)` \| (.*) \| (.*) \| (.*) \|$", PAGES["reference/recipe.md"], flags=re.MULTILINE)
    assert {name for name, *_ in found} == names(Recipe)
    assert all(values and meaning for _, values, _, meaning in found)


def test_the_results_page_has_every_key():
    for kind in (Row, ResponseRecord):
        section = PAGES["reference/results.md"].split(f"\n## {kind.__name__}\n")[1].split("\n## ")[0]
        assert set(re.findall(r"^\| `(\w+)`", section, flags=re.MULTILINE)) == {field.name for field in fields(kind)}


def test_links_of_the_repository_become_links_of_the_site():
    text = "[a](docs/engines.md) [b](../CONTRIBUTING.md#x) [c](LICENSE) [d](https://x.org/docs/) [e](tests/unit/a.py)"
    assert HOOKS.site_links(text) == "[a](engines.md) [b](contributing.md#x) c [d](https://x.org/docs/) e"
