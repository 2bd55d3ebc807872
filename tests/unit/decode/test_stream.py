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


@pytest.mark.parametrize("width", ["auto", "full"])
def test_pieces_are_the_text(width, language_target, language_drafter, question):
    steps = []
    options = {"max_new_tokens": 20, "width": width}
    pieces = list(stream(language_target, language_drafter, question, **options, on_step=steps.append))
    whole = generate(language_target, language_drafter, question, **options)
    assert "".join(pieces) == language_target.tokenizer.decode(whole.token_ids, skip_special_tokens=True)
    assert len(pieces) > 3 and [t for step in steps for t in step.token_ids] == whole.token_ids


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def decode(self, token_ids, skip_special_tokens):
        return bytes(token_ids).decode("utf-8", errors="replace")


def test_characters_are_whole():
    pieces, text = TextPieces(Bytes()), "a\u00e9\u4e2d\U0001f600!"
    shown = [pieces.add([byte]) for byte in text.encode()]
    assert "".join(shown) == text and all("\ufffd" not in piece for piece in shown)
    cut = TextPieces(Bytes())
    assert [cut.add([byte]) for byte in "\u4e2d".encode()[:2]] == ["", ""] and cut.flush() == "\ufffd"


class Words:
    """A tokenizer of words that strips the first space; token 0 is special."""

    def decode(self, token_ids, skip_special_tokens):
        return " ".join(f"w{token}" for token in token_ids if token)


def test_a_space_behind_a_special_token_is_kept():
    pieces = TextPieces(Words())
    assert "".join([pieces.add([1]), pieces.add([0]), pieces.add([2])]) == "w1 w2"


@pytest.mark.filterwarnings("ignore:.*:FutureWarning", "ignore:.*:UserWarning")
@pytest.mark.parametrize(
    "settings",
    [{}, {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "min_new_tokens": 12, "bad_words_ids": [[9], [12]]}],
)
def test_custom_generate_is_generate(settings):
    """Processors that look at the text too."""
    target = make_target("qwen3")
    ids = torch.tensor([[4, 9, 12, 7]])
    options = {"max_new_tokens": 24, "do_sample": False, **settings}
    expected = target.model.generate(ids, **options)
    for width in ("auto", "full"):
        decode = custom_generate(target, make_drafter(target), width=width)
        found = target.model.generate(ids, custom_generate=decode, **options)
        assert found.tolist() == expected.tolist()
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}  # what a tokenizer gives
        assert target.model.generate(**inputs, custom_generate=decode, **options).tolist() == expected.tolist()


def test_stop_strings_are_given_as_the_page_says():
    letters = {letter: number for number, letter in enumerate(f"{string.ascii_letters}{string.digits}+/")}
    words = Tokenizer(BPE(letters, []))
    words.decoder = Fuse()
    target, tokenizer = make_target("qwen3"), PreTrainedTokenizerFast(tokenizer_object=words)
    ids = torch.tensor([[4, 9, 12, 7]])
    text = tokenizer.decode(target.model.generate(ids, max_new_tokens=12, do_sample=False)[0, 4:])
    criteria = StoppingCriteriaList([StopStringCriteria(tokenizer, [text[2:4]])])
    options = {"max_new_tokens": 12, "do_sample": False, "stopping_criteria": criteria}
    expected = target.model.generate(ids, **options)
    found = target.model.generate(ids, custom_generate=custom_generate(target, make_drafter(target)), **options)
    assert found.tolist() == expected.tolist() and found.shape[1] < 16


def test_what_cannot_be_followed_is_refused_in_custom_generate():
    target = make_target("qwen3")
    ids = torch.tensor([[4, 9]])
    options = {"custom_generate": custom_generate(target, make_drafter(target)), "max_new_tokens": 3}
    with pytest.raises(ValueError, match=r"guidance_scale is 1.5"):
        target.model.generate(ids, guidance_scale=1.5, **options)
    watermark = SynthIDTextWatermarkingConfig(ngram_len=2, keys=[1, 2, 3])
    with pytest.raises(ValueError, match="SynthID"):
        target.model.generate(ids, watermarking_config=watermark, **options)
    with pytest.raises(ValueError, match="images or embeddings"):
        target.model.generate(ids, inputs_embeds=target.embed(ids), **options)


class StopAt(StoppingCriteria):
    """After so many tokens."""

    def __init__(self, count):
        self.count = count

    def __call__(self, input_ids, scores, **_):
        return torch.full((1,), input_ids.shape[1] >= self.count, dtype=torch.bool)


@pytest.mark.filterwarnings("ignore:.*:FutureWarning", "ignore:.*:UserWarning")
def test_custom_generate_stops_and_streams(language_target, language_drafter, question, capsys):
    model, tokenizer = language_target.model, language_target.tokenizer
    options = {
        "custom_generate": custom_generate(language_target, language_drafter, width="full"),
        "do_sample": False,
        "max_new_tokens": 20,
    }
    whole = model.generate(torch.tensor([question]), **options)
    for count in range(len(question) + 1, len(question) + 9):
        criteria = StoppingCriteriaList([StopAt(count)])
        cut = model.generate(torch.tensor([question]), stopping_criteria=criteria, **options)
        assert cut[0].tolist() == whole[0, :count].tolist()
    streamer = TextStreamer(tokenizer, skip_prompt=True)
    options["custom_generate"] = custom_generate(language_target, language_drafter, streamer=streamer)
    model.generate(torch.tensor([question]), **options)
    assert capsys.readouterr().out.split() == tokenizer.decode(whole[0, len(question) :]).split()
    for wrong in ({"inputs": torch.tensor([question, question])}, {"inputs": torch.tensor([question]), "num_beams": 2}):
        with pytest.raises(ValueError, match="one prompt without beams"):
            model.generate(**wrong, **options)
    with pytest.raises(ValueError, match="another model"):
        make_target("qwen3").model.generate(torch.tensor([question]), **options)


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
    assert asked[0] == ["w3 w51"]
    assert len(asked[1]) == 3 and "w4 w5 w6" in asked[1][1] and asked[1][2] == "w5 w51"
    sentence = r"^\d+ tokens?(?: at [\d.]+ tokens/s; each pass of the target gave [\d.]+ \(tau\))?$"
    ends = re.findall(sentence, printed.err, re.M)
    assert len(ends) == 2
    assert main(["generate", *flags, "--prompt", "w3 w51"]) == 0
    assert "w4 w5 w6" in capsys.readouterr().out
    assert main(["generate", "--target", str(language_folder)]) == 1
