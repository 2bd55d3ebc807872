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

    def propose(self, count: int) -> tuple[int, list[int]]:
        """The next tokens as they were after the longest match, which may reach into the proposal itself, as in a text that repeats.

        Returns:
            Length of the match, and `count` tokens; 0 and none where the last token is new.
        """
        text = self.text
        for position in range(self._num_read, len(text)):
            for length in range(1, min(MAX_MATCH, position) + 1):
                self._after[length - 1][tuple(text[position - length : position])] = position
        self._num_read = max(1, len(text))
        for length in range(min(MAX_MATCH, len(text)), 0, -1):
            start = self._after[length - 1].get(tuple(text[-length:]))
            if start is not None:
                found = text[start : start + count]
                while len(found) < count:
                    found.append(found[start - len(text)])
                return length, found
        return 0, []
