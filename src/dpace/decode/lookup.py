"""Prompt lookup: drafts for nothing, from where the last tokens stood in the text before."""

MAX_MATCH = 3
"""Last tokens, at most, that are looked for."""


class PromptLookup:
    """Knows what followed the most recent occurrence of every one, two and three tokens in a row.

    Memory: O(`MAX_MATCH` x tokens); time: O(`MAX_MATCH`) a token, once.

    Args:
        text: the tokens so far; the list may grow later.

    Source: prompt lookup decoding (A. Saxena, 2023), in transformers as `prompt_lookup_num_tokens`.
    """

    def __init__(self, text: list[int]):
        self.text = text
        self._after: list[dict[tuple[int, ...], int]] = [{} for _ in range(MAX_MATCH)]
        self._num_read = 1
        self.read()

    def read(self) -> list[tuple[int, bool]]:
        """Take in the tokens that the text has grown by: for each, the length of the match before it, and whether it is what followed there."""
        text, seen = self.text, []
        for position in range(self._num_read, len(text)):
            match, start = self._find(position)
            seen.append((match, start is not None and text[start] == text[position]))
            for length in range(1, min(MAX_MATCH, position) + 1):
                self._after[length - 1][tuple(text[position - length : position])] = position
        self._num_read = max(1, len(text))
        return seen

    def _find(self, end: int) -> tuple[int, int | None]:
        """The longest match of the tokens before `end`, and where it ended; 0 and None where the last of them is new."""
        for length in range(min(MAX_MATCH, end), 0, -1):
            start = self._after[length - 1].get(tuple(self.text[end - length : end]))
            if start is not None:
                return length, start
        return 0, None

    def propose(self, count: int) -> tuple[int, list[int]]:
        """The next tokens as they were after the longest match, which may reach into the proposal itself, as in a text that repeats.

        Returns:
            Length of the match, and `count` tokens; 0 and none where the last token is new.
        """
        self.read()
        length, start = self._find(len(self.text))
        if start is None:
            return 0, []
        found = self.text[start : start + count]
        while len(found) < count:
            found.append(found[start - len(self.text)])
        return length, found
