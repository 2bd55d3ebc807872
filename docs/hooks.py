"""Pages of the site that are made when it is built: from the options of the code, and from README.md and its like.

mkdocs calls `on_files` and `on_page_markdown`; `generated_pages` gives the pages by path.
"""

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

ROOT = Path(__file__).parent.parent
COPIED = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
"""Pages that are files of the repository's root."""
ELSEWHERE = ("LICENSE", "SECURITY.md", "CITATION.cff", "Makefile", "recipes", "examples", "benchmarks", "src", "tests")
"""Places of the repository that the site does not have; links to them become plain text."""
ENGINE_COMMANDS = "<!-- commands of the engines -->"
"""Stands in a page where the commands of `engine_commands` go."""


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages."""
    from mkdocs.structure.files import File

    for path, text in generated_pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links of the repository be links of the site; refuse paths of the repository that are not there."""
    from mkdocs.exceptions import PluginError

    for path in repository_paths(markdown):
        if not (ROOT / path).exists():
            raise PluginError(f"{page.file.src_path} names {path}, which does not exist")
    if ENGINE_COMMANDS in markdown:
        markdown = markdown.replace(ENGINE_COMMANDS, engine_commands())
    return site_links(markdown)


def repository_paths(text: str) -> list[str]:
    """Find the paths of the repository that a page names, in links and as `path`."""
    linked = re.findall(rf"\]\((?:\.\./)*((?:{'|'.join(map(re.escape, ELSEWHERE))})[^)#]*)", text)
    return linked + re.findall(r"`((?:src/dpace|tests|benchmarks|examples|docker|docs)/[^` ]*)`", text)


def site_links(text: str) -> str:
    """Turn links that work in the repository into links that work on the site."""
    for page, source in COPIED.items():
        text = re.sub(rf"\]\((?:\.\./)?{re.escape(source)}(#[^)]*)?\)", rf"]({page}\1)", text)
    text = text.replace("](docs/", "](")
    places = "|".join(map(re.escape, ELSEWHERE))
    return re.sub(rf"\[([^\]]+)\]\((?:\.\./)*(?:{places})[^)]*\)", r"\1", text)


def generated_pages() -> dict[str, str]:
    """Write all generated pages, by path below docs/."""
    return {
        **{page: (ROOT / source).read_text() for page, source in COPIED.items()},
        "reference/cli.md": cli_page(),
        "reference/recipe.md": recipe_page(),
        "reference/results.md": results_page(),
        "reference/recipes.md": recipes_page(),
    }


def engine_commands() -> str:
    """Write how each engine serves a drafter, as model cards say it."""
    from dpace.drafter.spec import DrafterSpec
    from dpace.publish.card import engine_sections

    spec = DrafterSpec(
        block_size=16,
        mask_token_id=151669,
        target_layer_ids=(1, 17, 33),
        num_target_layers=36,
        vocab_size=151936,
        hidden_size=2560,
        intermediate_size=9728,
        num_layers=3,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        max_position_embeddings=40960,
    )
    published = engine_sections("published", spec, "dpace-out/drafter", "Qwen/Qwen3-4B")
    text = "\n\n".join([*published.values(), *engine_sections("gguf", spec, "drafter.gguf", "Qwen/Qwen3-4B").values()])
    return re.sub(r"^\*\*([^*]+)\*\* ?(.*)$", r"### \1\n\n\2", text, flags=re.MULTILINE)


def cli_page() -> str:
    """Write the verbs with their options."""
    from dpace.cli import USAGE
    from dpace.config import Recipe
    from dpace.recipes import VERBS

    parts = ["# Command line", f"```text\n{USAGE.strip()}\n```"]
    for verb, line in VERBS.items():
        kind = options_of(verb)
        parts += [f"## dpace {verb}", f"{line[0].upper()}{line[1:]}."]
        if issubclass(kind, Recipe):
            parts.append("It takes a recipe, and all [options of a recipe](recipe.md) as flags.")
            own = [f for f in fields(kind) if f.name not in {other.name for other in fields(Recipe)}]
        else:
            parts += [inspect.cleandoc(kind.__doc__ or "").partition("\n\n")[2].replace("<", "&lt;")]
            own = list(fields(kind))
        if own:
            parts.append(options_table(kind, own, prefix="--", join="-"))
    return "\n\n".join(part for part in parts if part) + "\n"


def options_of(verb: str) -> type:
    """Find the dataclass of a verb's options."""
    return importlib.import_module(f"dpace.verbs.{'import_' if verb == 'import' else verb}").ARGUMENTS.options


def recipe_page() -> str:
    """Write the options of a recipe, group by group."""
    from dpace.config import Recipe

    kinds = get_type_hints(Recipe)
    plain = [field for field in fields(Recipe) if not is_dataclass(kinds[field.name])]
    parts = [
        "# Options of a recipe",
        "A recipe is a YAML file of options. A flag overrides it: `train.max_steps` is `--train.max-steps`. "
        "[CONTRIBUTING.md](../contributing.md) says how to add one.",
        options_table(Recipe, plain),
    ]
    documented = meanings(Recipe)
    for field in fields(Recipe):
        kind = kinds[field.name]
        if is_dataclass(kind):
            parts += [f"## {field.name}", documented[field.name]]
            parts.append(options_table(kind, list(fields(kind)), prefix=f"{field.name}."))
    return "\n\n".join(parts) + "\n"


def recipes_page() -> str:
    """Show the recipes that come with dpace, to copy."""
    from dpace.recipes import RECIPES

    parts = ["# Recipes of dpace", "Save one as a file, change it, and name the file in place of the recipe's name."]
    for name, path in RECIPES.items():
        parts += [f"## {name}", f"```yaml\n{path.read_text().strip()}\n```"]
    return "\n\n".join(parts) + "\n"


def results_page() -> str:
    """Write the keys of the files that measuring writes."""
    from dpace.measure.results import BenchResults, CompareResults, Heldout, ServerResults

    parts = [
        "# Keys of result files",
        "Each table is a JSON object. [measure.md](../measure.md#files) says which file holds which. "
        "Where a value is `null`, its meaning says why.",
    ]
    waiting, seen = [BenchResults, CompareResults, ServerResults, Heldout], []
    while waiting:
        kind = waiting.pop(0)
        seen.append(kind)
        hints, texts = get_type_hints(kind), meanings(kind)
        rows = [[f"`{f.name}`", type_words(hints[f.name]), texts.get(f.name, "")] for f in fields(kind)]
        parts += [f"## {kind.__name__}", inspect.cleandoc(kind.__doc__ or "").partition("\n\n")[0]]
        parts.append(table(["key", "type", "meaning"], rows))
        inner = [other for name in hints for other in dataclasses_in(hints[name])]
        waiting += [other for other in dict.fromkeys(inner) if other not in (*seen, *waiting)]
    return "\n\n".join(parts) + "\n"


def options_table(kind: type, chosen: list, prefix: str = "", join: str = "_") -> str:
    """Write options as a table; refuse one that does not say what it means."""
    hints, texts, rows = get_type_hints(kind, include_extras=True), meanings(kind), []
    for field in chosen:
        name = prefix + field.name.replace("_", join)
        if not texts[field.name]:
            raise ValueError(f"option {name} has no docstring beneath it that says what it means")
        rows.append([f"`{name}`", type_words(hints[field.name]), default_of(field), texts[field.name]])
    return table(["option", "values", "default", "meaning"], rows)


def table(headings: list[str], rows: list[list[str]]) -> str:
    """Write a Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def meanings(kind: type) -> dict[str, str]:
    """Read what stands beneath the fields of a dataclass and of those it extends."""
    found = {}
    for parent in reversed(kind.__mro__[:-1]):
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(parent))).body
        body = tree.body if isinstance(tree, ast.ClassDef) else []
        for node, after in zip(body, [*body[1:], None], strict=True):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                text = str(after.value.value) if is_text else ""
                found[node.target.id] = " ".join(text.split()).replace("<", "&lt;")
    return found


def type_words(kind: Any) -> str:
    """Return what a value is in words of JSON, with its range."""
    limits = limit_words(kind)
    kind = kind.__origin__ if hasattr(kind, "__metadata__") else kind
    options, origin = get_args(kind), get_origin(kind)
    if origin is Literal:
        return ", ".join(f"`{option}`" for option in options)
    if origin in (Union, UnionType):
        return " or ".join(type_words(option) for option in options if option is not NoneType) + (
            " or null" if NoneType in options else ""
        )
    if origin is dict:
        return f"object of {type_words(options[1])}"
    if origin in (list, tuple):
        kinds = dict.fromkeys(type_words(option) for option in options if option is not Ellipsis)
        return f"list: {', '.join(kinds)}"
    if is_dataclass(kind):
        return f"[{kind.__name__}](#{kind.__name__.lower()})"
    words = {int: "integer", float: "number", bool: "true or false", str: "text"}.get(kind, "")
    return " ".join([words, *limits])


def limit_words(kind: Any) -> list[str]:
    """Write the range that the annotations of a type give."""
    from dpace.config import LARGEST

    limits = []
    for note in getattr(kind, "__metadata__", ()):
        for limit in getattr(note, "metadata", ()):
            for name, words in (("gt", "above"), ("ge", "from"), ("le", "to")):
                if getattr(limit, name, LARGEST) != LARGEST:
                    limits.append(f"{words} {getattr(limit, name)}")
    return limits


def default_of(field: Any) -> str:
    """Write an option's default as a recipe has it."""
    if field.default is MISSING:
        return "required" if field.default_factory is MISSING else ""
    if isinstance(field.default, tuple):
        return ", ".join(f"`{value}`" for value in field.default) or "none"
    words = {None: "none", True: "`true`", False: "`false`"}
    is_word = field.default is None or isinstance(field.default, bool)
    return words[field.default] if is_word else f"`{field.default}`"


def dataclasses_in(kind: Any) -> Iterator[type]:
    """Yield the dataclasses that a type holds."""
    if is_dataclass(kind) and isinstance(kind, type):
        yield kind
    for option in get_args(kind):
        yield from dataclasses_in(option)
