"""Text piece by piece, chats, and decoding inside of transformers' `generate`."""

import copy
import string
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from transformers import (
    PreTrainedTokenizerFast,
    StoppingCriteriaList,
    StopStringCriteria,
    SynthIDTextWatermarkingConfig,
    TextStreamer,
)

from dpace.decode.loop import custom_generate, generate, stream
from dpace.drafter import Drafter
from dpace.target import Target
from tests.support.models import make_drafter, make_target


def test_pieces_are_the_text(language_target, language_drafter, questions):
    question, steps = questions[0], []
    options = {"max_new_tokens": 20, "width": "full"}
    pieces = list(stream(language_target, language_drafter, question, **options, on_step=steps.append))
    whole = generate(language_target, language_drafter, question, **options)
    assert "".join(pieces) == language_target.tokenizer.decode(whole.token_ids, skip_special_tokens=True)
    assert len(pieces) > 3 and [t for step in steps for t in step.token_ids] == whole.token_ids
    assert (steps[0].accepted, steps[0].width) == (0, 0)


BYTES = SimpleNamespace(decode=lambda ids, skip_special_tokens: bytes(ids).decode("utf-8", errors="replace"))
"""A tokenizer whose tokens are bytes."""
WORDS = SimpleNamespace(
    decode=lambda ids, skip_special_tokens: " ".join(f"w{i}" for i in ids if i or not skip_special_tokens)
)
"""One of words that strips the first space; token 0 is special."""


@pytest.fixture
def pieces_of(monkeypatch):
    """The pieces of a response that comes in these groups of tokens."""

    def pieces(tokenizer, groups) -> list[str]:
        text = SimpleNamespace(token_ids=[], num_prompt=0, is_done=False)

        def steps():
            for number, group in enumerate(groups, start=1):
                text.token_ids += group
                text.is_done = number == len(groups)
                yield group

        monkeypatch.setattr("dpace.decode.loop.make_continuation", lambda *_: text)
        monkeypatch.setattr("dpace.decode.loop.Speculation", lambda *_, **__: SimpleNamespace(steps=steps))
        return list(filter(None, stream(Mock(spec=Target, tokenizer=tokenizer), Mock(spec=Drafter), [])))

    return pieces


def test_characters_are_whole_and_spaces_are_kept(pieces_of):
    text = "a\u00e9\u4e2d\U0001f600!"
    assert pieces_of(BYTES, [[byte] for byte in text.encode()]) == list(text)
    assert pieces_of(BYTES, [[byte] for byte in "\u4e2d".encode()[:2]]) == ["\ufffd"], "at its end"
    assert "".join(pieces_of(WORDS, [[1], [0], [2]])) == "w1 w2"  # after a special token


IDS = torch.tensor([[4, 9, 12, 7]])


@pytest.mark.filterwarnings("ignore:.*:FutureWarning", "ignore:.*:UserWarning")
@pytest.mark.parametrize(
    "settings",
    [{}, {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "min_new_tokens": 12, "bad_words_ids": [[9], [12]]}],
)
def test_custom_generate_is_generate(settings):
    """Processors that look at the text too, and weights that have changed since the last text."""
    target = make_target("qwen3")
    options = {"max_new_tokens": 24, "do_sample": False, **settings}
    drafter = make_drafter(target)
    before = generate(target, drafter, IDS[0].tolist(), max_new_tokens=1)
    with torch.no_grad():
        target.model.get_output_embeddings().weight.mul_(-1)
    expected = Target(copy.deepcopy(target.model)).model.generate(IDS, **options).tolist()
    assert expected[0][len(IDS[0])] != before.token_ids[0]
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}  # what a tokenizer gives
    for width in ("auto", "full"):
        decode = custom_generate(target, drafter, width=width)
        assert target.model.generate(**inputs, custom_generate=decode, **options).tolist() == expected


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
        ("another model", {}),
    ],
)
def test_what_cannot_be_followed_is_refused_in_custom_generate(match, options):
    target, other = make_target("qwen3"), make_target("qwen3")
    decode = custom_generate(target, make_drafter(target))
    call = {"inputs": IDS, "custom_generate": decode, "max_new_tokens": 3, **options}
    with pytest.raises(ValueError, match=f"the call has [^;]*{match}[^;]*; a drafter"):
        (target if options else other).model.generate(**call)


@pytest.mark.filterwarnings("ignore:.*:FutureWarning", "ignore:.*:UserWarning")
def test_custom_generate_stops_and_streams(language_target, language_drafter, questions, capsys):
    """At a stop string, as the page says, which ends the text anywhere in a block."""
    model, tokenizer = language_target.model, language_target.tokenizer
    letters = {letter: number for number, letter in enumerate(f"{string.ascii_letters}{string.digits}+/")}
    words = Tokenizer(BPE(letters, []))
    words.decoder = Fuse()
    spelled = PreTrainedTokenizerFast(tokenizer_object=words)
    ids = torch.tensor(questions[:1])
    streamer = TextStreamer(tokenizer, skip_prompt=True)
    decode = custom_generate(language_target, language_drafter, width="full", streamer=streamer)
    options = {"custom_generate": decode, "do_sample": False, "max_new_tokens": 20}
    whole = model.generate(ids, **options)[0].tolist()
    assert capsys.readouterr().out.split() == tokenizer.decode(whole[ids.numel() :]).split()
    text = spelled.decode(whole)
    for end in range(ids.numel() + 1, ids.numel() + 9):
        criteria = StoppingCriteriaList([StopStringCriteria(spelled, [text[end - 2 : end]])])
        assert model.generate(ids, stopping_criteria=criteria, **options)[0].tolist() == whole[:end]
