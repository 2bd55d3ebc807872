"""Text piece by piece, chats, and decoding inside of transformers' `generate`."""

import io
import re
import string

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from transformers import (
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
    SynthIDTextWatermarkingConfig,
    TextStreamer,
)

from dpace.cli import main
from dpace.decode.loop import generate
from dpace.decode.streaming import TextPieces, custom_generate, stream
from dpace.target import chat
from tests.conftest import make_drafter, make_target


@pytest.fixture
def question(language_target) -> list[int]:
    return language_target.tokenizer("ask w3 w51 answer")["input_ids"]


def test_pieces_are_the_text(language_target, language_drafter, question):
    steps = []
    options = {"max_new_tokens": 20, "width": "full"}
    pieces = list(stream(language_target, language_drafter, question, **options, on_step=steps.append))
    whole = generate(language_target, language_drafter, question, **options)
    assert "".join(pieces) == language_target.tokenizer.decode(whole.token_ids, skip_special_tokens=True)
    assert len(pieces) > 3 and [t for step in steps for t in step.token_ids] == whole.token_ids


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def decode(self, token_ids, skip_special_tokens):
        return bytes(token_ids).decode("utf-8", errors="replace")


class Words:
    """A tokenizer of words that strips the first space; token 0 is special."""

    def decode(self, token_ids, skip_special_tokens):
        return " ".join(f"w{token}" for token in token_ids if token)


def test_characters_are_whole_and_spaces_are_kept():
    pieces, text = TextPieces(Bytes()), "a\u00e9\u4e2d\U0001f600!"
    shown = [pieces.add([byte]) for byte in text.encode()]
    assert "".join(shown) == text and all("\ufffd" not in piece for piece in shown)
    cut = TextPieces(Bytes())
    first, second = "\u4e2d".encode()[:2]
    assert [cut.add([first]), cut.add([second], is_last=True)] == ["", "\ufffd"]
    words = TextPieces(Words())
    assert "".join([words.add([1]), words.add([0]), words.add([2])]) == "w1 w2"  # behind a special token


IDS = torch.tensor([[4, 9, 12, 7]])


@pytest.mark.filterwarnings("ignore:.*:FutureWarning", "ignore:.*:UserWarning")
@pytest.mark.parametrize(
    "settings",
    [{}, {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "min_new_tokens": 12, "bad_words_ids": [[9], [12]]}],
)
def test_custom_generate_is_generate(settings):
    """Processors that look at the text too."""
    target = make_target("qwen3")
    options = {"max_new_tokens": 24, "do_sample": False, **settings}
    expected = target.model.generate(IDS, **options).tolist()
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}  # what a tokenizer gives
    for width in ("auto", "full"):
        decode = custom_generate(target, make_drafter(target), width=width)
        assert target.model.generate(**inputs, custom_generate=decode, **options).tolist() == expected


def test_stop_strings_are_given_as_the_page_says():
    letters = {letter: number for number, letter in enumerate(f"{string.ascii_letters}{string.digits}+/")}
    words = Tokenizer(BPE(letters, []))
    words.decoder = Fuse()
    target, tokenizer = make_target("qwen3"), PreTrainedTokenizerFast(tokenizer_object=words)
    text = tokenizer.decode(target.model.generate(IDS, max_new_tokens=12, do_sample=False)[0, 4:])
    criteria = StoppingCriteriaList([StopStringCriteria(tokenizer, [text[2:4]])])
    options = {"max_new_tokens": 12, "do_sample": False, "stopping_criteria": criteria}
    expected = target.model.generate(IDS, **options)
    found = target.model.generate(IDS, custom_generate=custom_generate(target, make_drafter(target)), **options)
    assert found.tolist() == expected.tolist() and found.shape[1] < 16


WATERMARK = SynthIDTextWatermarkingConfig(ngram_len=2, keys=[1, 2, 3])


@pytest.mark.filterwarnings("ignore")  # of transformers
@pytest.mark.parametrize(
    ("match", "options"),
    [
        ("several prompts", {"inputs": IDS.expand(2, -1)}),
        ("beams", {"num_beams": 2}),
        ("return_dict", {"return_dict_in_generate": True}),
        ("a padded prompt", {"attention_mask": torch.tensor([[0, 1, 1, 1]])}),
        ("images or embeddings", {"inputs_embeds": torch.zeros(1, 4, 48)}),
        ("guidance_scale", {"guidance_scale": 1.5}),
        ("SynthID", {"watermarking_config": WATERMARK}),
    ],
)
def test_what_cannot_be_followed_is_refused_in_custom_generate(match, options):
    target = make_target("qwen3")
    decode = custom_generate(target, make_drafter(target))
    with pytest.raises(ValueError, match=f"the call has [^;]*{match}[^;]*; a drafter"):
        target.model.generate(**{"inputs": IDS, "custom_generate": decode, "max_new_tokens": 3, **options})
    if "num_beams" in options:
        with pytest.raises(ValueError, match="another model"):
            make_target("qwen3").model.generate(IDS, custom_generate=decode, max_new_tokens=3)


class StopAt(StoppingCriteria):
    """After so many tokens."""

    def __init__(self, count):
        self.count = count

    def __call__(self, input_ids, scores, **_):
        return torch.full((1,), input_ids.shape[1] >= self.count, dtype=torch.bool)


@pytest.mark.filterwarnings("ignore:.*:FutureWarning", "ignore:.*:UserWarning")
def test_custom_generate_stops_and_streams(language_target, language_drafter, question, capsys):
    model, tokenizer = language_target.model, language_target.tokenizer
    ids = torch.tensor([question])
    streamer = TextStreamer(tokenizer, skip_prompt=True)
    decode = custom_generate(language_target, language_drafter, width="full", streamer=streamer)
    options = {"custom_generate": decode, "do_sample": False, "max_new_tokens": 20}
    whole = model.generate(ids, **options)
    assert capsys.readouterr().out.split() == tokenizer.decode(whole[0, len(question) :]).split()
    for count in range(len(question) + 1, len(question) + 9):
        cut = model.generate(ids, stopping_criteria=StoppingCriteriaList([StopAt(count)]), **options)
        assert cut[0].tolist() == whole[0, :count].tolist()


def test_chat(language_folder, language_drafter, tmp_path, capsys, monkeypatch):
    """Two turns from standard input; the second prompt has the first answer."""
    language_drafter.save_pretrained(tmp_path / "drafter")
    monkeypatch.setattr("sys.stdin", io.StringIO("w3 w51\n\nw5 w51\n"))
    asked = []
    encode = chat.encode_chat

    def note(target, messages):
        asked.append([message["content"] for message in messages])
        return encode(target, messages)

    monkeypatch.setattr(chat, "encode_chat", note)
    flags = f"--target {language_folder} --drafter {tmp_path / 'drafter'} --stream --max-new-tokens 20".split()
    assert main(["generate", *flags]) == 0
    printed = capsys.readouterr()
    assert printed.out.count("> ") == 4 and "w4 w5 w6" in printed.out
    (first,), (again, answer, second) = asked
    assert first == again == "w3 w51" and "w4 w5 w6" in answer and second == "w5 w51"
    sentence = r"^\d+ tokens?(?: at [\d.]+ tokens/s; each pass of the target gave [\d.]+ \(tau\))?$"
    assert len(re.findall(sentence, printed.err, re.M)) == 2
    assert main(["generate", *flags, "--prompt", "w3 w51"]) == 0
    assert "w4 w5 w6" in capsys.readouterr().out
    assert main(["generate", "--target", str(language_folder)]) == 1
