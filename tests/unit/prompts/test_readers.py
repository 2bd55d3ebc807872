"""Properties of every reader of text files: what was written comes back, and anything else is a ValueError."""

import json
from dataclasses import asdict, fields

import pytest
from hypothesis import given, settings, strategies as st

from dpace.config import PromptsConfig, Recipe
from dpace.prompts.prompts import read_prompts
from dpace.recipes.recipe_file import read_recipe, write_recipe
from dpace.respond.responses import Response, read_responses
from dpace.system.progress import printable

SETTINGS = settings(deadline=None, max_examples=60)
UNICODE = st.characters(exclude_categories=["Cs"])  # as by default, where hypothesis tries each character for seconds
TEXT = st.text(UNICODE, max_size=30)
SAID = TEXT.filter(str.strip)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(UNICODE, max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(UNICODE, max_size=5), inner, max_size=3),
    max_leaves=8,
)
MESSAGE = st.fixed_dictionaries({"role": SAID, "content": TEXT})
RESPONSE = st.tuples(SAID, SAID, st.lists(MESSAGE), st.lists(st.integers(0, 2**31 - 1), min_size=1))
ODD = st.sampled_from(
    [*"{}[]\"\\\n\r\0:,'&*!|>-#%@`", "\u2028", "\u0085", "prompt", "turns", "id", "train", "seed", "null", "1e9"]
)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("readers") / "x.jsonl"


@SETTINGS
@given(value=JSON, key=st.sampled_from(["prompt", "turns", "messages", "id", "set", "tools"]))
def test_other_prompts_are_refused_with_their_line(path, value, key):
    path.write_text(json.dumps({key: value} if key in ("prompt", "turns", "messages") else {"prompt": "a", key: value}))
    try:
        prompts = read_prompts(path)
    except ValueError as error:
        assert str(error).startswith(f"{path}:1: ") and ";" in str(error)
    else:
        assert all(m["content"].encode() for turn in prompts[0].turns for m in turn[-1:])


@pytest.mark.parametrize("read", [read_prompts, read_responses, read_recipe], ids=lambda read: read.__name__)
@SETTINGS
@given(parts=st.lists(ODD | st.text(UNICODE, max_size=2), max_size=12), data=st.binary(max_size=8))
def test_any_bytes_are_read_or_refused(path, read, parts, data):
    path.write_bytes("".join(parts).encode("utf-8", "surrogatepass") + data)
    try:
        read(path)
    except ValueError as error:
        assert str(path) in str(error) and ";" in str(error)


@SETTINGS
@given(rows=st.lists(RESPONSE, max_size=3, unique_by=lambda row: row[0]), cut=st.integers(1, 200))
def test_responses_come_back(path, rows, cut):
    """Also where the last line was cut, which then is left out; the file stays as it is."""
    responses = [Response(*row, [[len(row[3]) // 2, len(row[3])]]) for row in rows]
    data = "".join(json.dumps(asdict(response), ensure_ascii=False) + "\n" for response in responses).encode()
    path.write_bytes(data)
    assert read_responses(path) == responses
    last = data[: len(data) - 1].rfind(b"\n") + 1
    path.write_bytes(data[: max(last, len(data) - 1 - cut)])
    assert read_responses(path) == responses[:-1]
    assert path.read_bytes() == data[: max(last, len(data) - 1 - cut)]


@SETTINGS
@given(key=st.sampled_from([entry.name for entry in fields(Response)]), value=JSON)
def test_other_responses_are_refused_with_their_line(path, key, value):
    row = {"id": "a", "set": "s", "messages": [], "token_ids": [1, 2, 3], "response_spans": [[1, 3]], key: value}
    path.write_text(json.dumps(row) + "\n")
    try:
        (response,) = read_responses(path)
    except ValueError as error:
        assert str(error).startswith(f"{path}:1: ") and ";" in str(error)
    else:
        assert all(start <= end <= len(response.token_ids) for start, end in response.response_spans)


@pytest.mark.parametrize("output", [*"1e-3 1:30 010 no ~ 2024-01-01 <<".split(), ' \u2028\n:"'])
def test_recipes_come_back(path, output):
    recipe = Recipe(output=output, prompts=PromptsConfig(limit=9))
    write_recipe(recipe, path)
    assert read_recipe(path) == recipe


@SETTINGS
@given(text=st.text(UNICODE))
def test_nothing_steers_a_terminal(text):
    shown = printable(text)
    assert not any(character < " " and character not in "\n\t" or "\x7f" <= character < "\xa0" for character in shown)
    assert "\u202e" not in shown and shown == shown.encode().decode()
    if text.isprintable():
        assert shown == text
