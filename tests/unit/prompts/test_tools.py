"""Tools and what they return go through the chat template, from each usual layout and on each way."""

import json

import pytest

from dpace.cli import main
from dpace.config import RespondConfig
from dpace.prompts.formats import Prompt, read_prompts
from dpace.prompts.prompts import hash_text
from dpace.respond.answering import write_responses
from dpace.respond.conversation import Conversation
from dpace.target.chat import encode_chat
from tests.conftest import make_target, make_tokenizer
from tests.support.files import write_rows

TEMPLATE = (
    "{% if tools %}{% for tool in tools %}w40 {{ tool.function.name }} {% endfor %}{% endif %}"
    "{% for m in messages %}{{ 'ask ' if m.role == 'user' else 'w41 ' if m.role == 'tool' else 'answer ' }}"
    "{{ m.content }} "
    "{% for call in m.tool_calls or [] %}w42 {{ call.function.name }} {{ call.function.arguments.x }} {% endfor %}"
    "{% if m.role == 'assistant' %}<eos> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}answer {% endif %}"
)
TOOL = {"type": "function", "function": {"name": "w30", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "w30", "arguments": {"x": "w7"}}}
MESSAGES = [
    {"role": "user", "content": "w1 w2"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "w9 w8"},
]
WORDS = "w40 w30 ask w1 w2 answer w42 w30 w7 <eos> w41 w9 w8 answer"


@pytest.fixture
def target():
    target = make_target("qwen3", seed=3)
    target.tokenizer = make_tokenizer()
    target.tokenizer.chat_template = TEMPLATE
    return target


AS_TEXT = {**CALL, "id": "c1", "function": {"name": "w30", "arguments": '{"x": "w7"}'}}
"""A call as OpenAI's API writes it."""
LAYOUTS = {
    "objects": {"messages": MESSAGES, "tools": [TOOL]},
    "OpenAI": {
        "messages": [
            MESSAGES[0],
            {"role": "assistant", "content": None, "tool_calls": [AS_TEXT]},
            {**MESSAGES[2], "tool_call_id": "c1"},
        ],
        "tools": json.dumps([TOOL]),
    },
    "functions as texts": {"messages": MESSAGES, "tools": [json.dumps(TOOL["function"])]},
    "ShareGPT": {
        "conversations": [
            {"from": "human", "value": "w1 w2"},
            {"from": "function_call", "value": json.dumps(CALL["function"])},
            {"from": "observation", "value": "w9 w8"},
        ],
        "tools": json.dumps([TOOL["function"]]),
    },
    "in a message": {"messages": [{**MESSAGES[0], "tools": [TOOL]}, *MESSAGES[1:]]},
}


def read_one(path, row) -> Prompt:
    return read_prompts(write_rows(path, [row]))[0]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_gives_the_same_tokens(layout, suffix, target, tmp_path):
    prompt = read_one(tmp_path / f"x{suffix}", LAYOUTS[layout])
    assert target.tokenizer.decode(encode_chat(target, prompt.turns[0])) == WORDS
    assert prompt.set == "x (tools)"


def test_tools_of_a_later_message_are_those_of_the_prompt(tmp_path):
    """Where the row's own are an empty list, and with keys in another order."""
    prompts = []
    for tool in (TOOL, dict(reversed(TOOL.items()))):
        messages = [{"role": "system", "content": "a"}, {"role": "user", "content": "b", "tools": json.dumps([tool])}]
        prompts.append(read_one(tmp_path / "x.jsonl", {"messages": messages, "tools": "[]"}))
    first, second = prompts[0].turns[0]
    assert first["tools"] == [TOOL] and "tools" not in second
    assert hash_text(prompts[0]) == hash_text(prompts[1])


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": MESSAGES, "tools": "{"}, "`tools` is '{', expected JSON"),
        ({"messages": MESSAGES, "tools": [3]}, "an entry of `tools` is 3, expected an object"),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [{"id": "x"}]}]}, "the function's `name`"),
        ({"messages": MESSAGES[:2] + [{"role": "tool", "content": " "}]}, "without a text of the user or a tool"),
    ],
)
def test_what_is_no_tool_is_refused_with_its_line(row, words, tmp_path):
    with pytest.raises(ValueError, match=words) as error:
        read_one(tmp_path / "x.jsonl", row)
    assert "x.jsonl:1: " in str(error.value)


def test_a_refusal_of_the_chat_template_names_the_prompt(target):
    """Also where only the template of all turns refuses."""
    target.tokenizer.chat_template = "{% if messages[1:] %}{{ raise_exception('too many') }}{% endif %}w1"
    turns = [[{"role": "user", "content": "w1"}]] * 2
    with pytest.raises(ValueError, match=r"^prompt p7: the chat template of  refuses the messages \(too many\)"):
        Conversation(target, Prompt("p7", "s", turns), RespondConfig()).check()
    own = Conversation(target, Prompt("p8", "s", turns[:1], "w2"), RespondConfig(source="own"))
    with pytest.raises(ValueError, match=r"^prompt p8: the chat template"):
        own.add_own_answers()


def test_a_result_that_is_given_is_answered_and_the_spans_are_the_targets_own(target, tmp_path, monkeypatch):
    row = {"turns": ["w1 w2", {"role": "tool", "content": "w9 w8"}], "tools": [TOOL]}
    prompt = read_one(tmp_path / "x.jsonl", row)
    path = tmp_path / "r" / "responses.jsonl"
    config = RespondConfig(max_new_tokens=6)
    (response,) = write_responses(target, [prompt], path, config)
    decode = target.tokenizer.decode
    start, end = response.response_spans[-1]
    assert decode(response.token_ids).startswith("w40 w30 ask w1 w2 answer ")
    assert decode(response.token_ids[:start]).endswith("w41 w9 w8 answer") and end == len(response.token_ids)
    monkeypatch.setattr("dpace.respond.answering._answer_here", lambda *_: pytest.fail("answered twice"))
    assert write_responses(target, [prompt], path, config) == [response]


def test_own_answers_with_calls_are_trained_on(target, tmp_path):
    row = {"messages": [*MESSAGES, {"role": "assistant", "content": "", "tool_calls": [CALL]}], "tools": [TOOL]}
    conversation = Conversation(target, read_one(tmp_path / "x.jsonl", row), RespondConfig(source="own"))
    conversation.add_own_answers()
    found = [target.tokenizer.decode(conversation.token_ids[start:end]) for start, end in conversation.spans]
    assert found == ["w42 w30 w7 <eos>"] * 2


@pytest.mark.parametrize(("row", "word"), [(LAYOUTS["objects"], "tools"), ({"messages": MESSAGES}, "tool_calls")])
def test_a_template_without_tools_is_refused_in_one_line(row, word, language_folder, tmp_path, capsys):
    rows = [{**row, "messages": [{"role": "user", "content": f"w{i}"}, *MESSAGES]} for i in range(20)]
    path = write_rows(tmp_path / "x.jsonl", rows)
    flags = ["--target", str(language_folder), "--prompts.path", path, "--output", str(tmp_path)]
    code = main(["respond", *flags])
    error = capsys.readouterr().err
    assert code == 1 and f"knows no `{word}`, which the prompt has" in error
    assert not (tmp_path / "responses.jsonl").exists()
