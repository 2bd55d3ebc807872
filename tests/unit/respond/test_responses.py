import pytest

from dpace.config import RespondConfig
from dpace.decode import generate_batch
from dpace.decode.loop import generate_plain
from dpace.prompts.prompts import Prompt
from dpace.respond import in_process
from dpace.respond.answering import write_responses
from dpace.respond.responses import read_responses
from dpace.target.chat import encode_chat
from tests.support.files import make_prompts

CONFIG = RespondConfig(max_new_tokens=12, batch_size=4)


@pytest.fixture
def prompts(language_prompts):
    return make_prompts(language_prompts[:8])


def test_batched_answers_are_those_of_one_at_a_time(language_target, prompts, tmp_path):
    """Also those of a second turn."""
    prompts[3] = Prompt("3", "s", [[{"role": "user", "content": text}] for text in ("w3 w51", "w5 w52")])
    responses = write_responses(language_target, prompts, tmp_path / "r.jsonl", CONFIG)
    for response, prompt in zip(responses, prompts, strict=True):
        token_ids = encode_chat(language_target, prompt.turns[0])
        assert response.token_ids[: response.response_spans[0][0]] == token_ids
        assert response.response_spans[-1][1] == len(response.token_ids)
        for start, end in response.response_spans:
            expected = generate_plain(language_target, response.token_ids[:start], max_new_tokens=12).token_ids
            assert response.token_ids[start:end] == expected
        assert [m["role"] for m in response.messages] == ["user", "assistant"] * len(prompt.turns)
        assert len(response.response_spans) == len(prompt.turns)


def test_a_target_on_several_devices_reads_padded_rows(language_target, prompts, monkeypatch):
    """Rows of different lengths need places on one device."""
    encoded = [encode_chat(language_target, prompt.turns[0]) for prompt in prompts[:3]]
    config = RespondConfig(max_new_tokens=6)
    answers = in_process.generate_responses(language_target, encoded, config, range(3))
    monkeypatch.setattr(language_target.model, "hf_device_map", {"model": 0, "lm_head": 1}, raising=False)
    with pytest.raises(ValueError, match="several devices"):
        generate_batch(language_target, None, encoded, max_new_tokens=6)
    assert in_process.generate_responses(language_target, encoded, config, range(3)) == answers


def test_an_interrupted_call_goes_on(language_target, prompts, tmp_path, monkeypatch):
    path = tmp_path / "r.jsonl"
    whole = write_responses(language_target, prompts, path, CONFIG)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:4]) + lines[4][:20])  # killed while writing
    answered = []
    generate = in_process.generate_responses
    monkeypatch.setattr(
        in_process, "generate_responses", lambda _, ids, *k: answered.append(len(ids)) or generate(_, ids, *k)
    )
    assert write_responses(language_target, prompts, path, CONFIG) == whole
    assert answered == [4]
    assert read_responses(path) == whole, "in the order of the prompts"


def test_a_last_line_without_its_end_is_kept(language_target, prompts, tmp_path):
    """A file written by hand is not a killed process's."""
    path = tmp_path / "r.jsonl"
    whole = write_responses(language_target, prompts, path, CONFIG)
    path.write_text(path.read_text().rstrip("\n"))
    assert read_responses(path) == whole and not path.read_text().endswith("\n"), "reading changes nothing"
    assert write_responses(language_target, prompts, path, CONFIG) == whole and path.read_text().endswith("\n")


def test_answers_to_other_texts_are_refused(language_target, prompts, tmp_path):
    write_responses(language_target, prompts, tmp_path / "r.jsonl", CONFIG)
    changed = [*make_prompts(["w9 w52"]), *prompts[1:]]
    with pytest.raises(ValueError, match="id '0', but to another text"):
        write_responses(language_target, changed, tmp_path / "r.jsonl", CONFIG)
