"""Text piece by piece."""

from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from dpace.decode.loop import generate, stream
from dpace.drafter import Drafter
from dpace.target import Target


def test_pieces_are_the_text(language_target, language_drafter, questions):
    question, steps = questions[0], []
    options = {"max_new_tokens": 20, "width": "full"}
    pieces = list(stream(language_target, language_drafter, question, **options, on_step=steps.append))
    whole = generate(language_target, language_drafter, question, **options)
    assert "".join(pieces) == language_target.tokenizer.decode(whole.token_ids, skip_special_tokens=True)
    assert len(pieces) > 3 and [t for step in steps for t in step.token_ids] == whole.token_ids


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
        return list(stream(Mock(spec=Target, tokenizer=tokenizer), Mock(spec=Drafter), []))

    return pieces


def test_characters_are_whole_and_spaces_are_kept(pieces_of):
    text = "a\u00e9\u4e2d\U0001f600!"
    assert pieces_of(BYTES, [[byte] for byte in text.encode()]) == list(text)
    assert pieces_of(BYTES, [[byte] for byte in "\u4e2d".encode()[:2]]) == ["\ufffd"], "at its end"
    assert "".join(pieces_of(WORDS, [[1], [0], [2]])) == "w1 w2"  # after a special token
