"""Earlier tokens to copy, found at almost no cost: in the text itself, and in the answers to earlier requests.

Both propose what followed the last tokens where these stood before. The target verifies it like a draft, so a wrong
proposal costs time and never changes the text.
"""

from collections.abc import Sequence
from itertools import cycle, islice
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

MAX_MATCH = 3
"""Largest number of last tokens that are looked up in the text."""
RECALLED_MATCHES = (6, 2)
"""Numbers of last tokens that are looked up in the answers, the largest first."""
CONTEXT_TOKENS = 16
"""Largest number of tokens that are compared, the first of which may stand before an answer."""
NUM_KINDS = MAX_MATCH + CONTEXT_TOKENS.bit_length()
"""Number of kinds of matches, with the kind for no match."""
INDEX_BYTES_PER_TOKEN = 4 + 2 * 4 * len(RECALLED_MATCHES)
"""Memory of a token of the answers: its id, and two places in the table for each length."""
_HASH_FACTORS = np.random.default_rng(0).integers(2**62, size=CONTEXT_TOKENS) * 2 + 1
"""Random odd numbers, one for each token of a context."""
_HASH_COLUMNS = np.array(RECALLED_MATCHES) - 1
_PADDING = [0] * CONTEXT_TOKENS
"""Stands before a text, so that its first tokens have a whole context too."""


class Copy(NamedTuple):
    """Proposed tokens that were copied."""

    match: int = 0
    """Kind of the match: its length in the text, 1 to `MAX_MATCH`; above, for answers, one for 2 or 3 equal tokens, the
    next for 4 to 7, and so on; 0 for none."""
    token_ids: Sequence[int] = ()


class PromptLookup:
    """An index of the most recent occurrence of every one, two and three tokens in a row.

    Memory: O(`MAX_MATCH` x tokens); time: O(`MAX_MATCH`) a token, once.

    Args:
        text: the tokens so far; the list may grow later.

    Source: prompt lookup decoding (A. Saxena, 2023), in transformers as `prompt_lookup_num_tokens`.
    """

    def __init__(self, text: list[int]):
        self.text = text
        self._places_after: dict[tuple[int, ...], int] = {}
        self._num_read = 0
        self.read()

    def read(self) -> list[tuple[int, bool]]:
        """Index the tokens added to the text since the last call.

        Returns:
            For each of these tokens, the length of the match before it, and whether copying would have been right.
        """
        text = self.text
        outcomes = []
        for end in range(self._num_read, len(text)):
            # Found before the tokens that end here are indexed, which would match themselves.
            match, start = self._find(end)
            outcomes.append((match, match > 0 and text[start] == text[end]))
            for length in range(1, min(MAX_MATCH, end) + 1):
                self._places_after[tuple(text[end - length : end])] = end
        self._num_read = len(text)
        return outcomes

    def _find(self, end: int) -> tuple[int, int]:
        """Find the longest match of the tokens before `end`.

        Returns:
            Its length, and the position after its earlier occurrence; 0 and `end` where the last token is new.
        """
        for length in range(min(MAX_MATCH, end), 0, -1):
            if start := self._places_after.get(tuple(self.text[end - length : end])):
                return length, start
        return 0, end

    def propose(self, count: int) -> Copy:
        """Propose the `count` tokens that followed the longest match; nothing where the last token is new.

        The copy may reach into the proposal itself, as in a text that repeats. Call `read` before.
        """
        length, start = self._find(len(self.text))
        # Where the text ends before `count` tokens, the copy goes on with its own first tokens.
        followers = cycle(self.text[start : start + count])
        return Copy(length, list(islice(followers, count)))


class Recall:
    """A bounded memory of answers that finds what followed the last tokens in any of them.

    The tokens stand in a ring, where new ones take the place of the oldest. A table has the place of the latest
    occurrence of the last tokens, by a hash of them, for each number of tokens in `RECALLED_MATCHES`. The tokens at
    that place are compared. Nothing is deleted and nothing is searched: time O(1) a look-up.

    Threads may share one. Where two answers end in the same moment, parts of one may be lost, and what is proposed may
    be of both.

    Memory: `INDEX_BYTES_PER_TOKEN` bytes a token, at most `mib` MiB.

    Source: SuffixDecoding (arXiv 2411.04975), which keeps suffix trees and counts.
    """

    def __init__(self, mib: float):
        capacity = max(2 * CONTEXT_TOKENS, int(mib * 2**20) // INDEX_BYTES_PER_TOKEN)
        self.tokens = np.zeros(capacity, dtype=np.int32)
        self._end = 0
        # Where the latest context with a hash begins; half empty, so that few hashes share a place.
        self._context_starts = np.zeros(2 * len(RECALLED_MATCHES) * capacity, dtype=np.int32)

    def add(self, text: list[int], start: int = 0) -> None:
        """Remember an answer: the tokens of a text from `start` on, and `CONTEXT_TOKENS` before them."""
        # Token `start` of the padded text is `CONTEXT_TOKENS` before token `start` of the text.
        new = np.array((_PADDING + text)[start:][-len(self.tokens) :])
        begin = self._end
        if begin + len(new) > len(self.tokens):
            begin = 0
        self._end = end = begin + len(new)
        self.tokens[begin:end] = new
        # (context, CONTEXT_TOKENS), without the last context, after which nothing stands
        contexts = np.lib.stride_tricks.sliding_window_view(new, CONTEXT_TOKENS)[:-1]
        # Of equal keys the last counts.
        self._context_starts[self._keys(contexts)] = begin + np.arange(len(contexts))[:, None]

    def _keys(self, contexts: Int[np.ndarray, "context token"]) -> Int[np.ndarray, "context length"]:
        """Hash the ends of contexts, for each length that is looked up."""
        # Sums from the last token on, so that column `length - 1` is a hash of the last `length` tokens. The products
        # overflow, and that is meant.
        hashes = np.cumsum(contexts[:, ::-1] * _HASH_FACTORS, axis=1)
        # High bits depend on all tokens, the lowest ones hardly.
        return (hashes[:, _HASH_COLUMNS] >> 20) % len(self._context_starts)

    def propose(self, text: list[int], count: int) -> Copy:
        """Propose the `count` tokens that followed the longest match; nothing where the last two tokens are new."""
        context = np.array((_PADDING + text[-CONTEXT_TOKENS:])[-CONTEXT_TOKENS:])
        for start in self._context_starts[self._keys(context[None])[0]].tolist():
            end = start + CONTEXT_TOKENS
            is_other = self.tokens[start:end] != context
            # Number of equal tokens before the end: the first other one from there, or all where none is.
            match = int(np.append(is_other[::-1], True).argmax())
            if match >= min(RECALLED_MATCHES):
                return Copy(MAX_MATCH - 1 + match.bit_length(), self.tokens[end : end + count].tolist())
        return Copy()
