import re

import make_prompts
import pytest

from dpace.cli import main
from dpace.config import PromptsConfig
from dpace.prompts.overlap import _split_words
from dpace.prompts.prompts import demo_path, find_prompt, read_prompts, split_ids, split_prompts
from tests.support.files import write_prompts, write_rows


def test_three_forms_of_a_line(tmp_path):
    messages = [{"role": "system", "content": "short"}, {"role": "user", "content": "c"}]
    path = tmp_path / "p.jsonl"
    write_rows(path, [{"prompt": "a"}, {"turns": ["b", "b2"], "id": "x"}, {"messages": messages, "set": "s"}])
    path.write_text(path.read_text().replace("\n", "\n\n"))
    first, second, third = read_prompts(path)
    assert (first.id, first.set, first.turns) == ("1", "p", [[{"role": "user", "content": "a"}]])
    assert second.id == "x" and [t[0]["content"] for t in second.turns] == ["b", "b2"]
    assert third.set == "s" and third.turns == [messages]


def test_all_that_a_reply_says_is_kept(tmp_path):
    reply = {"role": "assistant", "content": "b", "reasoning_content": "c"}
    rows = [{"messages": [{"role": "user", "content": "a"}, answer]} for answer in (reply, {**reply, "content": "d"})]
    del rows[1]["messages"][1]["reasoning_content"]
    assert [prompt.answer for prompt in read_prompts(write_rows(tmp_path / "p.jsonl", rows))] == [reply, "d"]


def test_held_out_prompts_of_a_public_set_stay_and_are_not_counted_as_left_out(tmp_path):
    texts = [" ".join(f"word{i}of{number}" for i in range(15)) for number in range(40)]
    path = write_prompts(tmp_path / "p.jsonl", texts)
    public = write_prompts(tmp_path / "public.jsonl", texts[:30])
    split = split_ids(PromptsConfig(path=path, decontaminate=(public,)))
    left_out = split.dropped["in the public sets"]
    kept = {*split.train, *split.validation, *split.heldout}
    assert left_out and not kept & left_out.keys() and len(kept) + len(left_out) == 40


def test_one_prompt_of_a_file(tmp_path):
    path = write_rows(tmp_path / "p.jsonl", [{"prompt": "a", "id": "x"}, {"prompt": "b", "id": "y"}])
    assert find_prompt(f"{path}#y") == [{"role": "user", "content": "b"}]
    assert find_prompt("what is 3 # 4?") == [{"role": "user", "content": "what is 3 # 4?"}]
    assert find_prompt("explain a.jsonl") == [{"role": "user", "content": "explain a.jsonl"}]
    assert len(find_prompt("demo#notes/heldout/1")) == 5
    with pytest.raises(ValueError, match="id 'z'; name one that it has, such as 'x'"):
        find_prompt(f"{path}#z")


def test_answers_to_other_prompts_are_no_data(tmp_path, capsys):
    path = write_prompts(tmp_path / "p.jsonl", (f"q{i}" for i in range(40)))
    row = {"id": "other", "set": "s", "messages": [], "token_ids": [1, 2, 3], "response_spans": [[1, 3]]}
    write_rows(tmp_path / "responses.jsonl", [row])
    assert main(["data", "--output", str(tmp_path), "--prompts.path", path]) == 0
    out = capsys.readouterr().out
    assert "responses.jsonl has no answers to these prompts" in out and "next: dpace respond" in out


def test_a_fixed_share_is_held_out(tmp_path):
    path = write_prompts(tmp_path / "p.jsonl", (f"q{i}" for i in range(40)))
    parts = split_prompts(PromptsConfig(path=path))
    assert [len(part) for part in parts] == [33, 3, 4]
    assert len({prompt.id for part in parts for prompt in part}) == 40
    assert split_prompts(PromptsConfig(path=path)) == parts
    assert [len(part) for part in split_prompts(PromptsConfig(path=path, num_validation=0))] == [36, 0, 4]
    with pytest.raises(ValueError, match="at least 10"):
        split_prompts(PromptsConfig(path=write_prompts(tmp_path / "few.jsonl", "a")))


def test_demo_parts_share_no_text_and_no_value():
    for pools in (make_prompts.NOTES, make_prompts.PROBLEMS):
        for name, values in pools["train"].items():
            assert not set(values.split("|")) & set(pools["heldout"][name].split("|")), name
    parts = [{p.turns[-1][-1]["content"] for p in read_prompts(demo_path(part))} for part in ("train", "heldout")]
    assert not parts[0] & parts[1]
    numbers = [{n for text in part for n in re.findall(r"\d+", text)} for part in parts]
    assert not numbers[0] & numbers[1]


def test_demo_files_are_what_the_script_writes(tmp_path):
    make_prompts.main([str(tmp_path), "train", "heldout", "tuning"])
    texts = {}
    for part in ("train", "heldout", "tuning"):
        texts[part] = {p.turns[-1][-1]["content"] for p in read_prompts(tmp_path / f"{part}.jsonl")}
        if part != "tuning":
            assert (tmp_path / f"{part}.jsonl").read_text() == demo_path(part).read_text()
    assert len(texts["heldout"]) == 100 and not texts["heldout"] & (texts["train"] | texts["tuning"])


@pytest.mark.parametrize(
    ("text", "count"),
    [("हिन्दी में बताओ", 3), ("ภาษา", 4), ("日本語 now", 4), ("café au lait", 3), ("cafe\u0301 au lait", 3)],
)
def test_words_of_all_scripts(text, count):
    assert len(_split_words(text)) == count
