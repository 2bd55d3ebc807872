"""The target's answers in this process, and what made them: a call goes on after another one of the same run only."""

import shutil
import signal
import sys
from dataclasses import replace
from unittest import mock

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dpace.cli import main
from dpace.config import RespondConfig
from dpace.respond import in_process
from dpace.respond.answering import write_responses
from dpace.respond.responses import read_meta, read_responses
from dpace.system.provenance import hash_file
from dpace.target import Target
from dpace.target.chat import encode_chat
from tests.support.files import change_json, make_prompts
from tests.support.models import EOS, PAD, make_tokenizer

CONFIG = RespondConfig(max_new_tokens=4, batch_size=3)
PROMPTS = make_prompts(f"w{i} w5" for i in range(7))


def make_small(seed: int = 0) -> Target:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    ids = {"pad_token_id": PAD, "bos_token_id": None, "eos_token_id": EOS}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **ids, num_attention_heads=2, max_position_embeddings=64))
    model.get_output_embeddings().weight.data.mul_(20)  # far from ties
    return Target(model, make_tokenizer())


@pytest.fixture
def target() -> Target:
    return make_small(seed=3)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "out" / "responses.jsonl"


@pytest.fixture
def write(target, path):
    """Let the target answer prompts."""

    def write(prompts=PROMPTS, path=path, **options):
        return write_responses(target, prompts, path, replace(CONFIG, **options))

    return write


def test_a_target_on_several_devices_reads_padded_rows(target, monkeypatch):
    """Rows of different lengths need places on one device."""
    encoded = [encode_chat(target, prompt.turns[0] * (1 + i)) for i, prompt in enumerate(PROMPTS[:3])]
    config = RespondConfig(max_new_tokens=6)
    answers = in_process.generate_responses(target, encoded, config, range(3))
    monkeypatch.setattr(target.model, "hf_device_map", {"model": 0, "lm_head": 1}, raising=False)
    monkeypatch.setattr(in_process.Batch, "steps", lambda _: pytest.fail("rows of different lengths"))
    assert in_process.generate_responses(target, encoded, config, range(3)) == answers


def test_an_interrupted_call_goes_on(write, path):
    whole = write()
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:4]) + "\n" + lines[4][:20])  # killed while writing
    with mock.patch.object(in_process, "generate_responses", side_effect=in_process.generate_responses) as answered:
        assert write() == whole
    assert [len(call.args[1]) for call in answered.call_args_list] == [3]
    assert read_responses(path) == whole, "in the order of the prompts"
    path.write_text(path.read_text().rstrip("\n"))  # written by hand
    assert read_responses(path) == whole and not path.read_text().endswith("\n"), "reading changes nothing"
    with pytest.raises(ValueError, match="id '0', but to another text"):
        write([*make_prompts(["w9 w52"]), *PROMPTS[1:]])


def test_the_meta_file_tells_what_made_the_responses(write, target, path):
    def times():
        return {file.name: file.stat().st_mtime_ns for file in path.parent.iterdir() if file.suffix}

    write()
    expected = {"complete": True, "responses_sha256": hash_file(path), "target_sha256": target.sha256}
    assert read_meta(path).items() >= expected.items()
    before = times()
    write(PROMPTS[:3], batch_size=1, seed=5)
    assert times() == before, "greedy answers do not depend on these options"


OTHERS = {
    "temperature": (0.5, "temperature 0.5, not 1.0; set this as it was, name another folder"),
    "source": ("own", 'source "own", not "target"'),
    "target_sha256": ("0", r"other weights of the target \(sha256 0, not \w{12}\)"),
    "dtype": ("bfloat16", 'dtype "bfloat16", not "float32"'),
    "chat_template_sha256": ("0", "other chat template"),
}
"""What a file may have been made with, and how the message says it."""


@pytest.mark.parametrize("fact", OTHERS)
def test_another_run_is_refused_by_name(fact, write, target, path):
    target.thinking = True
    write(temperature=1.0)
    other, words = OTHERS[fact]
    change_json(path.with_name("responses.meta.json"), **{fact: other})
    files = {file.name: file.read_bytes() for file in path.parent.iterdir()}
    with pytest.raises(ValueError, match=f"was made by '' with {words}"):
        write(temperature=1.0)
    assert files == {file.name: file.read_bytes() for file in path.parent.iterdir()}


def test_responses_that_were_changed_are_refused(write, path):
    write()
    path.write_text(path.read_text().replace(": [", ":  [", 1))
    with pytest.raises(ValueError, match="was changed after dpace wrote it"):
        write()


def test_answers_that_were_copied_are_not_answered_again(write, path, monkeypatch):
    """The file and its meta file, into another folder."""
    whole = write()
    copy = shutil.copytree(path.parent, path.with_name("copy"), ignore=shutil.ignore_patterns(".*")) / path.name
    monkeypatch.setattr("dpace.respond.answering.answer_batches", lambda *_: pytest.fail("answered again"))
    assert write(path=copy) == whole
    copy.unlink()
    with pytest.raises(ValueError, match=r"responses.meta.json was not written by dpace"):
        write(path=copy)


def test_every_turn_counts_against_the_context(write, path):
    (prompt,) = make_prompts(["w1 " * 10])
    with pytest.raises(ValueError, match="prompt 0 has 6. tokens; with 5 answers of up to 4 new tokens"):
        write([*PROMPTS, replace(prompt, turns=prompt.turns * 5)])
    (long,) = make_prompts(["w1 " * 70])
    with pytest.raises(ValueError, match="prompt 0 has 7. tokens; .* the target's limit of 64"):
        write([replace(long, answer={"role": "assistant", "content": "w2"})], source="own")
    assert not path.exists(), "refused before work starts"
    assert write([replace(prompt, turns=prompt.turns * 3)])


@pytest.mark.parametrize(
    ("verb", "words", "advice"),
    [
        ("respond", "", "; what is on disk is kept: run the same command to continue"),
        ("check", "--target x --drafter x", ""),
        ("report", "x", ""),
    ],
)
def test_sigterm_is_an_interrupt(verb, words, advice, run_line, monkeypatch):
    """Only of verbs that go on it is said that they do."""
    monkeypatch.setattr(f"dpace.verbs.{verb}.run", lambda *_: signal.raise_signal(signal.SIGTERM))
    said = run_line(f"{verb} {words}", 143).err
    assert said == f"dpace {verb}: interrupted{advice}\n" and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("word", ["respond", "--help"])
def test_a_reader_that_has_enough_is_no_failure(word, tmp_path, monkeypatch, capsys):
    """What is still to be printed goes nowhere."""

    def fill(*_):
        print("x")
        raise BrokenPipeError

    monkeypatch.setattr("dpace.verbs.respond.run", fill)
    monkeypatch.setattr("dpace.cli.print", fill, raising=False)
    with (tmp_path / "out").open("w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert main([word]) == 141
    assert (tmp_path / "out").read_text() == capsys.readouterr().err == ""
