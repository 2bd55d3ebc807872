"""Tools and what they return go through the chat template, from each usual layout and on each way."""

import json

import pytest

from dpace.config import RespondConfig
from dpace.prompts.formats import Prompt, read_prompts
from dpace.respond.answering import write_responses
from dpace.respond.conversation import Conversation
from dpace.target.chat import encode_chat
from tests.support.files import write_rows
from tests.support.models import make_target, make_tokenizer

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
        "tools": [json.dumps(TOOL)],
    },
    "ShareGPT": {
        "conversations": [
            {"from": "human", "value": "w1 w2"},
            {"from": "function_call", "value": json.dumps(CALL["function"])},
            {"from": "observation", "value": "w9 w8"},
        ],
        "tools": json.dumps([TOOL["function"]]),
    },
    "in a message": {"messages": [MESSAGES[0], {**MESSAGES[1], "tools": [TOOL]}, MESSAGES[2]], "tools": "[]"},
}


def read_one(path, row) -> Prompt:
    return read_prompts(write_rows(path, [row]))[0]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_gives_the_same_tokens(layout, suffix, target, tmp_path):
    prompt = read_one(tmp_path / f"x{suffix}", LAYOUTS[layout])
    assert target.tokenizer.decode(encode_chat(target, prompt.turns[0])) == WORDS


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": MESSAGES, "tools": "{"}, "`tools` is '{', expected JSON"),
        ({"messages": MESSAGES, "tools": [3]}, "an entry of `tools` is 3, expected an object"),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [{"id": "x"}]}]}, "the function's `name`"),
    ],
)
def test_what_is_no_tool_is_refused_with_its_line(row, words, tmp_path):
    with pytest.raises(ValueError, match=words) as error:
        read_one(tmp_path / "x.jsonl", row)
    assert "x.jsonl:1: " in str(error.value)


def test_a_refusal_of_the_chat_template_names_the_prompt(target):
    """Also where only the template of all turns refuses."""
    target.tokenizer.chat_template = "{% if messages[1:] %}{{ raise_exception('too many') }}{% endif %}w1"
    prompt = Prompt("p7", "s", [MESSAGES[:1]] * 2)
    with pytest.raises(ValueError, match=r"^prompt p7: the chat template of  refuses the messages \(too many\)"):
        Conversation(target, prompt, RespondConfig()).check()


def test_a_result_that_is_given_is_answered(target, tmp_path):
    row = {"turns": ["w1 w2", {"role": "tool", "content": "w9 w8"}], "tools": [TOOL]}
    prompt = read_one(tmp_path / "x.jsonl", row)
    (response,) = write_responses(target, [prompt], tmp_path / "r.jsonl", RespondConfig(max_new_tokens=6))
    text = target.tokenizer.decode(response.token_ids[: response.response_spans[-1][0]])
    assert text.startswith("w40 w30 ask w1 w2 answer ") and text.endswith("w41 w9 w8 answer")


def test_own_answers_are_trained_on_where_the_template_puts_them(target, tmp_path):
    """Two answers of a conversation have two spans, each with the stop token that the template writes."""
    config = RespondConfig(source="own")

    def answers(number, *messages):
        prompt = read_one(tmp_path / "x.jsonl", {"messages": messages})
        (response,) = write_responses(target, [prompt], tmp_path / str(number) / "r.jsonl", config)
        assert response.messages == list(messages)
        return [target.tokenizer.decode(response.token_ids[slice(*span)]) for span in response.response_spans]

    said = {"role": "assistant", "content": "w5 w6"}
    assert answers(0, *MESSAGES, said) == ["w42 w30 w7 <eos>", "w5 w6 <eos>"]
    assert answers(1, *MESSAGES[::2], MESSAGES[1]) == ["w42 w30 w7 <eos>"]
    target.tokenizer.chat_template = TEMPLATE.replace("%}answer {% endif", "%}w9 {% endif")
    assert answers(2, MESSAGES[0], said) == ["w5 w6 <eos>"], "the prompt is not the text's beginning"
    with pytest.raises(ValueError, match="prompt 1 has no reply at its end"):
        answers(3, MESSAGES[0])


@pytest.mark.parametrize(("row", "word"), [(LAYOUTS["objects"], "tools"), ({"messages": MESSAGES}, "tool_calls")])
def test_a_template_without_tools_is_refused(row, word, target, tmp_path):
    target.tokenizer = make_tokenizer()
    with pytest.raises(ValueError, match=f"^prompt 1: .* knows no `{word}`, which the prompt has"):
        Conversation(target, read_one(tmp_path / "x.jsonl", row), RespondConfig()).check()
