"""Prompts that the target writes: its own draws as a user, each text once, and a call that goes on."""

import itertools
import json
import random
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dpace.config import PromptsWriterConfig
from dpace.decode.sampling import Sampler
from dpace.prompts.prompts import read_prompts
from dpace.respond.prompt_writer import user_turn, write_prompts
from tests.support.models import BYTE_TOKENS, make_target, make_tokenizer

CONFIG = PromptsWriterConfig(target="x", count=5, max_new_tokens=24, batch_size=4, temperature=8.0, seed=3)


@pytest.fixture
def target():
    target = make_target("qwen3")
    target.tokenizer = make_tokenizer()
    return target


@pytest.fixture
def write(target, tmp_path):
    def write(**options):
        path, num_prompts = write_prompts(target, replace(CONFIG, output=str(tmp_path / "out"), **options))
        assert num_prompts == len(read_prompts(path))
        return path

    return write


def draw(target, number: int) -> str:
    """What the target writes between `ask` and `answer`, where each token reads the whole text anew."""
    (start, end) = target.tokenizer("ask answer")["input_ids"]
    sampler = Sampler(CONFIG.temperature, seed=random.Random(f"{CONFIG.seed}/{number}").getrandbits(31))
    tokens = [start]
    for position in range(CONFIG.max_new_tokens):
        with torch.inference_mode():
            logits = target.model(torch.tensor([tokens])).logits[0, -1:]
        tokens += sampler.draw(sampler.scores(logits, tokens), position).tolist()
        if tokens[-1] == end:
            return target.tokenizer.decode(tokens[1:-1], skip_special_tokens=True).strip()
        if tokens[-1] in target.stop_token_ids:
            break
    return ""


def test_prompts_are_what_the_target_draws_as_a_user(target, write):
    """In order, without those that have no end, no word, or a text that was there before."""
    texts: dict[str, str] = {}
    for number in itertools.count():
        text = draw(target, number)
        if text:
            texts.setdefault(text, f"written/3/{number}")
        if len(texts) == CONFIG.count:
            break
    assert number + 1 > CONFIG.count, "some are left out"
    prompts = read_prompts(write())
    assert [prompt.id for prompt in prompts] == list(texts.values())
    assert [prompt.turns for prompt in prompts] == [[[{"role": "user", "content": text}]] for text in texts]
    assert {prompt.set for prompt in prompts} == {"written"}


def test_a_call_goes_on_where_one_ended(target, write):
    """With a larger number too; tests/unit/system/test_crash.py kills it."""
    path = write()
    whole = path.read_bytes()
    assert write(count=7).read_bytes().startswith(whole) and len(read_prompts(path)) == 7
    target.model.config._name_or_path = "elsewhere/the-same-weights"
    assert len(read_prompts(write())) == 7, "nothing is cut off"


def test_a_call_goes_on_with_a_file_that_its_user_has_changed(write):
    """A line is gone and another one is new: what was drawn once is not drawn again."""
    path = write()
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:3], lines[4], '{"prompt": "w1 w1"}\n']))
    before = path.read_text()
    assert write(count=6).read_text().startswith(before)
    prompts = read_prompts(path)
    assert prompts[-1].id not in [prompt.id for prompt in prompts[:-1]] and len(prompts) == 6
    assert lines[3] not in path.read_text()


def test_prompts_of_another_run_are_left_alone(write):
    before = write().read_bytes()
    with pytest.raises(ValueError, match="holds prompts with temperature .*name another folder with --output"):
        write(temperature=1.0)
    assert write().read_bytes() == before


def test_the_template_says_where_a_text_begins_and_ends(target):
    """By a special token, or by all the words before one."""
    ends = {"<|reserved_0|> w9": "<|reserved_0|>", " w9 w5 <|reserved_0|> w1": "w9 w5", " w9 w4": "w9 w4"}
    for after, end in ends.items():
        target.tokenizer.chat_template = f"w7 w8 {{{{ messages[0].content }}}}{after}"
        opening, found = user_turn(target)
        assert target.tokenizer.decode(opening) == "w7 w8" and found == end


@pytest.mark.parametrize("end", ["### Response:", " ASSISTANT:", "[/INST]"])
def test_ordinary_words_end_a_text_only_together(end, tmp_path, monkeypatch):
    """However they are split after a text, and what only begins alike is the user's."""
    target = make_target("qwen3", vocab_size=len(BYTE_TOKENS))
    bpe = models.BPE({token: number for number, token in enumerate(BYTE_TOKENS)}, [("a", "b")])
    inner = Tokenizer(bpe)
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    target.tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    target.tokenizer.chat_template = f"User: {{{{ messages[0].content }}}}{end}"
    texts = ["Explain a[3] ### A [/", "Say ASS"]
    drawn = itertools.chain.from_iterable(["No end", f"{text}{end} and more"] for text in texts)
    draw = iter([target.tokenizer(text)["input_ids"] for text in drawn])
    generate = "dpace.respond.prompt_writer.generate_responses"
    monkeypatch.setattr(generate, lambda _, openings, *rest: [next(draw) for _ in openings])
    path, _ = write_prompts(target, replace(CONFIG, output=str(tmp_path), count=2))
    assert [prompt.turns[0][0]["content"] for prompt in read_prompts(path)] == texts


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (None, "has no chat template"),
        ("{{ messages[0].content }} w1", "has nothing before or after the user's text"),
        ("{{ raise_exception('no') }}", r"refuses the messages \(no\)"),
    ],
)
def test_a_template_without_a_users_turn_is_refused(template, reason, target, write, tmp_path):
    target.tokenizer.chat_template = template
    with pytest.raises(ValueError, match=f"{reason}.*(name a|change the)"):
        write()
    assert not (tmp_path / "out").exists()


def test_a_target_that_writes_nothing_new_ends_the_call(write):
    with pytest.raises(
        ValueError, match="wrote 0 prompts, and 260 texts after them gave none that is new; raise --max"
    ):
        write(max_new_tokens=1)


def test_the_prompts_are_answered_and_trained_on(target, run_line, tmp_path, monkeypatch):
    """Through the command lines of docs/data.md: written, put beside others, answered, and trained on."""
    monkeypatch.chdir(tmp_path)
    target.model.save_pretrained("target")
    target.tokenizer.save_pretrained("target")
    options = "--max-new-tokens 24 --temperature 8"
    printed = run_line(f"prompts --target target --count 20 {options}").out
    assert printed.splitlines() == [
        "20 prompts in dpace-prompts/prompts.jsonl",
        "next: dpace respond --target target --prompts.path dpace-prompts/prompts.jsonl",
    ]
    mine = "".join(json.dumps({"prompt": f"w{i} w9", "set": "mine"}) + "\n" for i in range(20))
    (tmp_path / "all.jsonl").write_text(mine + (tmp_path / "dpace-prompts" / "prompts.jsonl").read_text())
    recipe = "--target target --prompts.path all.jsonl --respond.max-new-tokens 8"
    assert "40 responses in dpace-out/responses.jsonl" in run_line(f"respond {recipe}").out
    tiny = "--drafter.num-layers 1 --drafter.num-features 2 --drafter.block-size 4 --train.max-steps 2"
    assert "written" in run_line(f"plan {recipe}").out
    run_line(f"train {recipe} {tiny}")
