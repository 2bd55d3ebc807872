import random
from collections.abc import Sequence

import pytest

from dpace.decode.copies import MAX_MATCH, PromptLookup


def search(text: list[int], count: int) -> tuple[int, Sequence[int]]:
    """The definition: the longest match, of these the last, and copying token by token."""
    for length in range(MAX_MATCH, 0, -1):
        for start in range(len(text) - 1, length - 1, -1):
            if len(text) >= length and text[start - length : start] == text[-length:]:
                longer = list(text)
                for k in range(count):
                    longer.append(longer[start + k])
                return length, longer[len(text) :]
    return 0, ()


@pytest.mark.parametrize("num_words", [2, 5, 40])
def test_proposals_are_what_followed_the_last_longest_match(num_words):
    rng = random.Random(0)
    text = [rng.randrange(num_words)]
    lookup = PromptLookup(text)
    for _ in range(150):
        count = rng.randrange(0, 9)
        assert lookup.propose(count) == search(text, count)
        text += [rng.randrange(num_words) for _ in range(rng.randrange(3))]


def test_it_finds_out_whether_copying_would_have_been_right():
    lookup = PromptLookup([1, 2, 3, 4])
    assert lookup.read() == []
    lookup.text += [2, 3, 9, 1, 2]
    assert lookup.read() == [(0, False), (1, True), (2, False), (0, False), (1, True)]
    assert lookup.propose(2) == (2, [3, 4])
