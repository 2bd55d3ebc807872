"""The target's answers in this process, and what made them: a call goes on after another one of the same run only."""

import copy
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dpace.config import RespondConfig
from dpace.decode.loop import generate_plain
from dpace.respond import in_process
from dpace.respond.answering import write_responses
from dpace.respond.responses import read_meta, read_responses
from dpace.system.provenance import hash_file
from dpace.target import Target
from dpace.target.chat import encode_chat
from tests.conftest import EOS, PAD, make_tokenizer
from tests.support.files import make_prompts

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


def test_batched_answers_are_those_of_one_at_a_time(target, path):
    """Also those of a second turn."""
    prompts = [*PROMPTS[:4], replace(PROMPTS[4], turns=[*PROMPTS[0].turns, *PROMPTS[1].turns])]
    responses = write_responses(target, prompts, path, CONFIG)
    for response, prompt in zip(responses, prompts, strict=True):
        assert response.token_ids[: response.response_spans[0][0]] == encode_chat(target, prompt.turns[0])
        assert response.response_spans[-1][1] == len(response.token_ids)
        assert [m["role"] for m in response.messages] == ["user", "assistant"] * len(prompt.turns)
        assert len(response.response_spans) == len(prompt.turns)
        for start, end in response.response_spans:
            expected = generate_plain(target, response.token_ids[:start], max_new_tokens=4).token_ids
            assert response.token_ids[start:end] == expected


def test_a_target_on_several_devices_reads_padded_rows(target, monkeypatch):
    """Rows of different lengths need places on one device."""
    encoded = [encode_chat(target, prompt.turns[0] * (1 + i)) for i, prompt in enumerate(PROMPTS[:3])]
    config = RespondConfig(max_new_tokens=6)
    answers = in_process.generate_responses(target, encoded, config, range(3))
    monkeypatch.setattr(target.model, "hf_device_map", {"model": 0, "lm_head": 1}, raising=False)
    monkeypatch.setattr(in_process.Batch, "steps", lambda _: pytest.fail("rows of different lengths"))
    assert in_process.generate_responses(target, encoded, config, range(3)) == answers


def test_an_interrupted_call_goes_on(target, path, monkeypatch):
    whole = write_responses(target, PROMPTS, path, CONFIG)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:4]) + lines[4][:20])  # killed while writing
    answered = []
    generate = in_process.generate_responses
    monkeypatch.setattr(
        in_process, "generate_responses", lambda _, ids, *k: answered.append(len(ids)) or generate(_, ids, *k)
    )
    assert write_responses(target, PROMPTS, path, CONFIG) == whole
    assert answered == [3]
    assert read_responses(path) == whole, "in the order of the prompts"
    path.write_text(path.read_text().rstrip("\n"))  # written by hand
    assert read_responses(path) == whole and not path.read_text().endswith("\n"), "reading changes nothing"
    with pytest.raises(ValueError, match="id '0', but to another text"):
        write_responses(target, [*make_prompts(["w9 w52"]), *PROMPTS[1:]], path, CONFIG)


def test_the_meta_file_tells_what_made_the_responses(target, path):
    write_responses(target, PROMPTS[:4], path, CONFIG)
    first = path.read_bytes()
    write_responses(target, PROMPTS, path, CONFIG)
    assert path.read_bytes().startswith(first)
    meta = read_meta(path)
    assert meta["complete"] is True
    assert meta["responses_sha256"] == hash_file(path) and meta["target_sha256"] == target.sha256
    before = {file.name: file.stat().st_mtime_ns for file in path.parent.iterdir() if file.suffix}
    others = replace(CONFIG, batch_size=1, seed=5)  # greedy answers do not depend on them
    write_responses(target, PROMPTS, path, others)
    write_responses(target, PROMPTS[:3], path, CONFIG)
    assert before == {file.name: file.stat().st_mtime_ns for file in path.parent.iterdir() if file.suffix}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"temperature": 0.5}, "temperature 1.0, not 0.5; set --respond.temperature as it was"),
        ({"max_new_tokens": 5}, "max_new_tokens 4, not 5; set --respond.max-new-tokens as it was"),
        ({"seed": 1}, "seed 0, not 1; set --respond.seed as it was"),
        ({"source": "own"}, 'source "target", not "own"; set --respond.source and --respond.server as they were'),
        ("thinking", "thinking false, not true; set --thinking as it was"),
        ("one weight", r"other weights of the target \(sha256 \w{12}, not \w{12}\); name another folder"),
        ("dtype", 'dtype "torch.float32", not "torch.bfloat16"; set --dtype as it was'),
        ("template", "other chat template"),
        ("tokenizer", "other tokenizer"),
    ],
)
def test_another_run_is_refused_by_name(target, path, change, words):
    config = replace(CONFIG, temperature=1.0)
    write_responses(target, PROMPTS[:2], path, config)
    files = {file.name: file.read_bytes() for file in path.parent.iterdir()}
    if change == "thinking":
        target.thinking = True
    elif change == "one weight":
        target = copy.deepcopy(target)
        target.model.model.norm.weight.data[0] += 1
    elif change == "dtype":
        target = Target(make_small().model.to(torch.bfloat16), target.tokenizer)
    elif change == "template":
        target.tokenizer.chat_template += " "
    elif change == "tokenizer":
        target.tokenizer.add_tokens(["more"])
    else:
        config = replace(config, **change)
    with pytest.raises(ValueError, match=f"was made by '' with {words}"):
        write_responses(target, PROMPTS[:2], path, config)
    assert files == {file.name: file.read_bytes() for file in path.parent.iterdir()}


def test_responses_of_unknown_origin_are_refused(target, path):
    write_responses(target, PROMPTS, path, CONFIG)
    whole = path.read_text()
    path.write_text(whole.replace(": [", ":  [", 1))
    with pytest.raises(ValueError, match="was changed after dpace wrote it"):
        write_responses(target, PROMPTS, path, CONFIG)
    path.write_text(whole)
    path.with_name("responses.meta.json").unlink()
    with pytest.raises(ValueError, match="has no responses.meta.json that tells"):
        write_responses(target, PROMPTS, path, CONFIG)


def test_answers_that_were_copied_are_not_answered_again(target, path, monkeypatch):
    """The file and its meta file, into another folder; what was changed there may be another program's."""
    whole = write_responses(target, PROMPTS, path, CONFIG)
    for name in ("same", "changed"):
        shutil.copytree(path.parent, path.with_name(name), ignore=shutil.ignore_patterns(".*"))
    monkeypatch.setattr("dpace.respond.answering._answer_here", lambda *_: pytest.fail("answered again"))
    assert write_responses(target, PROMPTS, path.with_name("same") / path.name, CONFIG) == whole
    changed = path.with_name("changed") / path.name
    changed.write_bytes(changed.read_bytes() + b"\n")
    with pytest.raises(ValueError, match="was not written by dpace"):
        write_responses(target, PROMPTS, changed, CONFIG)


def test_every_turn_counts_against_the_context(target, path):
    (prompt,) = make_prompts(["w1 " * 10])
    with pytest.raises(ValueError, match="prompt 0 has 6. tokens; with 5 answers of up to 4 new tokens"):
        write_responses(target, [*PROMPTS, replace(prompt, turns=prompt.turns * 5)], path, CONFIG)
    assert not path.exists(), "refused before work starts"
    assert write_responses(target, [replace(prompt, turns=prompt.turns * 3)], path, CONFIG)


def start_verb(body: str) -> subprocess.Popen:
    """`dpace respond`, whose work is `body`."""
    work = f"import sys, time, types, dpace.cli\ndef run(args):\n    print('ready', flush=True)\n    {body}\n"
    work += "sys.modules['dpace.verbs.respond'] = types.SimpleNamespace(run=run)\nsys.exit(dpace.cli.main(['respond']))"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", work], **pipes)


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_sigterm_is_an_interrupt(number, expected):
    with start_verb("time.sleep(60)") as process:
        assert process.stdout and process.stdout.readline() == "ready\n"
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
    assert process.returncode == expected
    assert err == "dpace respond: interrupted; what is on disk is kept: run the same command to continue\n"


def test_a_reader_that_has_enough_is_no_failure():
    with start_verb("while True: print('x' * 99)") as process:
        assert process.stdout and process.stderr and process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait(timeout=30) == 141
