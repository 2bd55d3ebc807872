"""Responses are of one run: what made them is kept, and other ones are refused with the setting that differs."""

import copy
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dpace.cli import main
from dpace.config import RespondConfig
from dpace.respond.answering import write_responses
from dpace.respond.responses import read_meta
from dpace.system.provenance import hash_file
from dpace.target import Target
from tests.conftest import EOS, PAD, make_tokenizer
from tests.support.files import make_prompts, write_prompts

CONFIG = RespondConfig(max_new_tokens=4, batch_size=3)
PROMPTS = make_prompts(f"w{i} w5" for i in range(7))


def make_small(seed: int = 0) -> Target:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    config = LlamaConfig(
        **sizes,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=EOS,
    )
    return Target(LlamaForCausalLM(config), make_tokenizer())


@pytest.fixture
def target() -> Target:
    return make_small()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "out" / "responses.jsonl"


def test_the_meta_file_tells_what_made_the_responses(target, path):
    write_responses(target, PROMPTS[:4], path, CONFIG)
    first = path.read_bytes()
    write_responses(target, PROMPTS, path, CONFIG)
    assert path.read_bytes().startswith(first)
    meta = read_meta(path)
    assert meta["complete"] is True and meta["num_prompts"] == 7
    assert meta["responses_sha256"] == hash_file(path) and meta["target_sha256"] == target.sha256
    before = {file.name: file.stat().st_mtime_ns for file in path.parent.iterdir() if file.suffix}
    others = replace(CONFIG, batch_size=1, seed=5)  # greedy answers do not depend on them
    write_responses(target, PROMPTS, path, others)
    write_responses(target, PROMPTS[:3], path, CONFIG)
    assert before == {file.name: file.stat().st_mtime_ns for file in path.parent.iterdir() if file.suffix}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"temperature": 0.5}, r"temperature 0.0, not 0.5; set --respond.temperature as it was"),
        ({"max_new_tokens": 5}, r"max_new_tokens 4, not 5; set --respond.max-new-tokens as it was"),
        ("thinking", r"thinking false, not true; set --thinking as it was"),
        ("one weight", r"other weights of the target \(sha256 \w{12}, not \w{12}\); name another folder"),
        ("dtype", r'dtype "torch.float32", not "torch.bfloat16"; set --dtype as it was'),
        ("template", "other chat template"),
        ("tokenizer", "other tokenizer"),
    ],
)
def test_another_run_is_refused_by_name(target, path, change, words):
    write_responses(target, PROMPTS, path, CONFIG)
    files = {file.name: file.read_bytes() for file in path.parent.iterdir()}
    config = replace(CONFIG, **change) if isinstance(change, dict) else CONFIG
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
    with pytest.raises(ValueError, match=f"was made by '' with {words}"):
        write_responses(target, PROMPTS, path, config)
    assert files == {file.name: file.read_bytes() for file in path.parent.iterdir()}


def test_another_seed_is_another_run_when_sampling(target, path):
    config = replace(CONFIG, temperature=1.0)
    write_responses(target, PROMPTS, path, config)
    with pytest.raises(ValueError, match="seed 0, not 1; set --respond.seed as it was"):
        write_responses(target, PROMPTS, path, replace(config, seed=1))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda path: path.write_text(path.read_text().replace(": [", ":  [", 1)), "was changed after dpace wrote it"),
        (lambda path: path.with_name("responses.meta.json").unlink(), "has no responses.meta.json that tells"),
    ],
)
def test_responses_of_unknown_origin_are_refused(change, words, target, path):
    write_responses(target, PROMPTS, path, CONFIG)
    change(path)
    with pytest.raises(ValueError, match=words):
        write_responses(target, PROMPTS, path, CONFIG)


def test_the_commands_train_on_answers_that_were_copied(
    language_folder, language_prompts, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    write_prompts(tmp_path / "prompts.jsonl", language_prompts[:20])
    flags = f"--target {language_folder} --prompts.path prompts.jsonl --respond.max-new-tokens 8 --seeds 0"
    flags += " --drafter.num-layers 1 --drafter.num-features 1 --drafter.block-size 4 --drafter.mask-token-id 3"
    flags += " --train.max-steps 2 --train.eval-steps 2 --bench.max-new-tokens 4 --bench.num-prompts 1"
    assert main(["respond", *flags.replace("--seeds 0", "").split(), "--output", "first"]) == 0
    for verb in ("train", "compare", "respond"):
        shutil.copytree("first", verb, ignore=shutil.ignore_patterns(".*"))
        path = tmp_path / verb / "responses.jsonl"
        if is_changed := verb == "respond":
            path.write_bytes(path.read_bytes() + b"\n")
        before = hash_file(path)
        own = f"{flags} --dry-run" if verb == "compare" else flags.replace("--seeds 0", "")
        assert main([verb, *own.split(), "--output", verb]) == is_changed
        assert hash_file(path) == before
    assert "was not written by dpace" in capsys.readouterr().err


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


def test_sigterm_is_an_interrupt():
    for number, expected in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
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
