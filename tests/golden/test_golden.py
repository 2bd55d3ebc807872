"""Training, measuring and decoding give what they gave when `values.json` was written, on any CPU."""

import json
from functools import cache

import pytest

from dpace.decode import generate_plain
from tests.golden.cases import CASES, NUM_PROMPT, NUM_TRAINED, VALUES, WAYS, Outcome, run, summary, target
from tests.support.cases import wide

TEXTS = json.loads(VALUES.read_text())["texts"]
EXPECTED = json.loads(VALUES.read_text())["cases"]


def test_every_case_has_values():
    assert list(EXPECTED) == list(CASES)


@cache
def plain(number: int, way: str) -> list[int]:
    """The target's own text."""
    return generate_plain(target(), TEXTS[NUM_TRAINED + number][:NUM_PROMPT], **WAYS[way]).token_ids


def check_texts(outcome: Outcome) -> None:
    """What is decoded is the target's own, but for speculative sampling, which draws in its own way."""
    for way, own in (("greedy", "greedy"), ("batch", "greedy"), ("sampled", "sampled")):
        for number, text in enumerate(outcome.texts[way]):
            assert text == plain(number, own), way
    assert outcome.accepted["batch"] == outcome.accepted["greedy"]


LIKE_OTHERS = {"convolutions", "lilicorr seen", "markov head seen", "window", "causal", "vocabulary", "from anchor"}
"""Others and the tests of these parts take the same branches."""


@pytest.mark.parametrize("name", wide(CASES, *(CASES.keys() - LIKE_OTHERS)))
def test_it_gives_what_it_gave(name):
    outcome = run(CASES[name], TEXTS)
    found, expected = summary(outcome), EXPECTED[name]
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-4)
    assert found["norms"] == pytest.approx(expected["norms"], rel=0.03, abs=1e-8)
    assert found["projections"] == pytest.approx(expected["projections"], abs=0.1)
    assert found["tau"] == pytest.approx(expected["tau"], rel=0.05)
    assert found["accepted"] == pytest.approx(expected["accepted"], rel=0.2)
    num_emitted = sum(len(text) - NUM_PROMPT - 1 for text in TEXTS[NUM_TRAINED:])
    assert outcome.heldout.emitted_tokens.sum() == num_emitted
    check_texts(outcome)
