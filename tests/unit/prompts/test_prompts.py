"""Prompts of every format say the same, and no prompt is in two parts."""

import math
import re
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import box_prompts
import pytest

from dpace.config import PromptsConfig
from dpace.prompts.overlap import _split_words, find_repeats
from dpace.prompts.prompts import (
    Prompt,
    demo_path,
    find_prompt,
    hash_text,
    read_prompts,
    split_prompts,
)
from tests.support.files import write_prompts, write_rows


def user(text: str) -> dict:
    return {"role": "user", "content": text}


SYSTEM = {"role": "system", "content": "s"}
REPLY = {"role": "assistant", "content": "a"}
SHAREGPT = [("system", "s"), ("human", "q"), ("gpt", "a")]
FORMS = [
    ({"prompt": "q"}, [[user("q")]], None),
    ({"turns": ["q", "and?"]}, [[user("q")], [user("and?")]], None),
    ({"messages": [SYSTEM, user("q"), REPLY]}, [[SYSTEM, user("q")]], REPLY),
    ({"messages": [user("q"), {**REPLY, "reason": "r"}]}, [[user("q")]], {**REPLY, "reason": "r"}),
    ({"conversations": [{"from": a, "value": b, "weight": None} for a, b in SHAREGPT]}, [[SYSTEM, user("q")]], REPLY),
    ({"instruction": "Sort.", "input": "2", "output": "a"}, [[user("Sort.\n\nInput:\n2")]], REPLY),
    ({"instruction": "Sort.", "input": "", "output": ""}, [[user("Sort.")]], None),
]


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize(("row", "turns", "answer"), FORMS)
def test_forms_of_a_row(ending, row, turns, answer, tmp_path):
    path = write_rows(tmp_path / f"p.{ending}", [{"id": "x", "set": "other", **row}, row])
    first, second = read_prompts(path)
    assert first == Prompt("x", "other", turns, answer) and second == Prompt("2", "p", turns, answer)


def test_tables_are_taken_as_they_are(tmp_path):
    """Several kinds, ids twice, keys that only some messages have, and values that JSON does not have."""
    messages = [user("q"), {**user("q2"), "name": "n"}]
    logged = [messages[0] | {"at": datetime(2020, 1, 1), "score": math.nan}]
    rows = [
        {"id": "x", "prompt": "other", "messages": messages},
        {"id": "x", "prompt": "p", "messages": None},
        {"messages": logged},
    ]
    first, second, third = read_prompts(write_rows(tmp_path / "p.parquet", rows))
    assert (first.id, second.id) == ("x", "x#2") and first.turns == [messages]
    assert second.turns == [[user("p")]]
    assert third.turns == [[user("q") | {"at": "2020-01-01 00:00:00"}]]


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("p.parquet", "PAR1", "p.parquet: .*; name a parquet file"),
        ("p.json", "[1]", "p.json, row 1: expected a JSON object, found int"),
        ("p.jsonl", '\n{"prompt": "a", "turns": ["b"]}', "p.jsonl:2: expected .*, found `turns` and `prompt`"),
        ("p.jsonl", '{"conversations": [{"from": "gpt", "value": 3}]}', "p.jsonl:1: a message is .* 3}, expected"),
        ("p.jsonl", '{"messages": [{"role": "assistant", "content": "a"}]}', "without a text of the user"),
        ("p.jsonl", '{"prompt": "a", "id": []}', "`id` is .*, expected a text or a number"),
        ("p.jsonl", r'{"prompt": "a", "id": "\ud800"}', "p.jsonl:1: .*surrogates"),
        ("p.jsonl", '{"prompt": "a", "id": 1}\n{"prompt": "b", "id": 1}', "p.jsonl:2: the id '1' occurs twice"),
        ("p.jsonl", "", "holds no prompt"),
    ],
)
def test_other_files_are_refused_in_one_line(name, data, words, tmp_path):
    (tmp_path / name).write_text(data)
    with pytest.raises(ValueError, match=words) as error:
        read_prompts(tmp_path / name)
    assert "\n" not in str(error.value) and ";" in str(error.value)


def test_one_prompt_of_a_file(tmp_path):
    path = write_rows(tmp_path / "p.jsonl", [{"prompt": "a", "id": "x"}, {"prompt": "b", "id": "y"}])
    assert find_prompt(f"{path}#y") == find_prompt(f"{path}#heldout/y") == [user("b")]
    for text in ("what is 3 # 4?", "explain a.jsonl"):
        assert find_prompt(text) == [user(text)]
    assert len(find_prompt("demo#notes/heldout/1")) == 5
    with pytest.raises(ValueError, match="id 'z'; name one that it has, such as 'x'"):
        find_prompt(f"{path}#z")


def test_a_fixed_share_is_held_out(tmp_path):
    config = PromptsConfig(path=write_prompts(tmp_path / "p.jsonl", (f"q{i}" for i in range(40))))
    parts = split_prompts(config)
    assert [len(part) for part in parts] == [33, 3, 4]
    assert len({prompt.id for part in parts for prompt in part}) == 40
    assert split_prompts(config) == parts
    few = split_prompts(replace(config, num_validation=0, num_heldout=2, limit=5))
    assert [len(part) for part in few] == [5, 0, 2]


def test_copies_stay_in_one_part(tmp_path, capsys):
    """Under other ids, with keys in another order, and with white space around."""
    rows = []
    for i in range(40):
        first = {**user(f"q{i}"), "more": {"a": 1, "b": 2}}
        rows.append({"messages": [first]})
        rows.append({"messages": [{"more": {"b": 2, "a": 1}, "content": f" q{i}\n", "role": "user"}]})
        rows.append({"turns": [first, "and then?"]})
    parts = split_prompts(PromptsConfig(path=write_rows(tmp_path / "p.jsonl", rows)))
    texts = [{hash_text(prompt) for prompt in part} for part in parts]
    assert len(set.union(*texts)) == sum(map(len, texts)) == 40
    assert [len(part) for part in parts] == [3 * 33, 3, 4], (
        "a copy is measured once and trained on as often as it is there"
    )
    assert "14 prompts left out: copies of held-out or validation prompts" in capsys.readouterr().err


def test_held_out_prompts_of_a_file_have_ids_of_their_own_and_each_text_once(tmp_path):
    train = write_rows(tmp_path / "p.jsonl", [{"id": i, "prompt": f"q{i}"} for i in ("x", "heldout/x", *range(9))])
    heldout = [{"id": "x", "prompt": "h1"}, {"id": "heldout/heldout/x", "prompt": "h2"}, {"id": "y", "prompt": "h1"}]
    config = PromptsConfig(path=train, heldout_path=write_rows(tmp_path / "h.jsonl", heldout))
    parts = split_prompts(config)
    ids = [prompt.id for part in parts for prompt in part]
    assert len(set(ids)) == len(ids) == 13 and [p.turns[0][0]["content"] for p in parts.heldout] == ["h1", "h2"]


def test_demo_parts_are_what_the_script_writes_and_share_no_text_and_no_value(tmp_path):
    for kind in ("notes", "problems"):
        pools = box_prompts.POOLS[kind]
        for name, values in pools["train"].items():
            assert not set(values.split(" | ")) & set(pools["heldout"][name].split(" | ")), name
    box_prompts.main(Path("demo"), tmp_path)
    files = {part: tmp_path / f"{part}.jsonl" for part in ("train", "heldout", "tuning")}
    train, heldout, tuning = ({p.turns[-1][-1]["content"] for p in read_prompts(path)} for path in files.values())
    for part in ("train", "heldout"):
        assert files[part].read_text() == demo_path(part).read_text()
    assert (len(heldout), len(tuning)) == (100, 32) and not heldout & (train | tuning)
    numbers = [set(re.findall(r"\d+", " ".join(texts))) for texts in (train, heldout)]
    assert not numbers[0] & numbers[1]


@pytest.mark.parametrize(
    ("text", "count"),
    [("हिन्दी में बताओ", 3), ("日本語 now", 4), ("cafe\u0301 au lait", 3)],
)
def test_words_of_all_scripts(text, count):
    assert len(_split_words(text)) == count


PUBLIC = "Seven tall dwarfs walked over the green hill and sang about their silver hammers all day long"


def test_prompts_of_public_sets_are_left_out(tmp_path, capsys):
    """Where 13 words in a row are the same; a phrase of two public prompts counts only alone."""
    phrase = "please think about it step by step and then put your answer into a box"
    public = write_prompts(tmp_path / "public.jsonl", [f"{PUBLIC} {phrase}", "How many?", "Why?", phrase])
    rows = [f"q{i} {phrase}" for i in range(40)] + [f"Note: {PUBLIC.upper()}!", "why", "Why not?", phrase, "Not many?"]
    path = write_prompts(tmp_path / "p.jsonl", rows)
    config = PromptsConfig(path=path, decontaminate=(public,), num_heldout=1, num_validation=0)
    parts = split_prompts(config)
    assert sorted((prompt.id for part in parts for prompt in part), key=int) == [*map(str, (*range(1, 41), 43, 45))]
    assert "3 prompts left out: in the public sets" in capsys.readouterr().err


def test_held_out_prompts_of_a_public_set_stay(tmp_path):
    texts = [" ".join(f"word{i}of{number}" for i in range(15)) for number in range(40)]
    path = write_prompts(tmp_path / "p.jsonl", texts)
    public = write_prompts(tmp_path / "public.jsonl", texts[:30])
    config = PromptsConfig(path=path, decontaminate=(public,))
    assert split_prompts(config).heldout == split_prompts(replace(config, decontaminate=())).heldout


def test_a_prompt_of_two_public_sets_is_found(tmp_path):
    """Word for word, and in other words around it."""
    both = [write_prompts(tmp_path / name, [PUBLIC]) for name in ("a.jsonl", "b.jsonl")]
    more = write_prompts(tmp_path / "c.jsonl", [f"Please answer. {PUBLIC}"])
    prompt = Prompt("a", "s", [[user(f"A note says: {PUBLIC}.")]])
    assert find_repeats([prompt], both) == find_repeats([prompt], [*both, more]) == {"a"}
    twelve = " ".join(PUBLIC.split()[-12:])
    assert not find_repeats([Prompt("a", "s", [[user(twelve)]])], both), "13 words in a row count"


def test_all_that_the_user_says_in_a_chat_with_replies_counts(tmp_path):
    public = [write_prompts(tmp_path / "a.jsonl", [PUBLIC])]
    chat = [user(PUBLIC), REPLY, user("Go on.")]
    assert find_repeats([Prompt("a", "s", [chat], REPLY)], public) == {"a"}, "a reply to it is trained on"
    assert not find_repeats([Prompt("a", "s", [chat])], public), "only the last message is answered"
    result = {"role": "tool", "content": PUBLIC}
    assert not find_repeats([Prompt("a", "s", [[user("Go on."), result]])], public), "which the user did not say"
