"""Prompt lookup: proposals copied from earlier in the text, at almost no cost."""

MAX_MATCH = 3
"""Largest number of last tokens that are looked up."""


class PromptLookup:
    """An index of the most recent occurrence of every one, two and three tokens in a row.

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
        """Index the tokens added to the text since the last call.

        Returns:
            For each of these tokens, the length of the match before it, and whether copying would have been right.
        """
        text, outcomes = self.text, []
        for position in range(self._num_read, len(text)):
            match, start = self._find(position)
            outcomes.append((match, start is not None and text[start] == text[position]))
            for length in range(1, min(MAX_MATCH, position) + 1):
                self._after[length - 1][tuple(text[position - length : position])] = position
        self._num_read = max(1, len(text))
        return outcomes

    def _find(self, end: int) -> tuple[int, int | None]:
        """Find the longest match of the tokens before `end`.

        Returns:
            Its length, and the position after its earlier occurrence; 0 and None where the last token is new.
        """
        for length in range(min(MAX_MATCH, end), 0, -1):
            start = self._after[length - 1].get(tuple(self.text[end - length : end]))
            if start is not None:
                return length, start
        return 0, None

    def propose(self, count: int) -> tuple[int, list[int]]:
        """Propose the tokens that followed the longest match.

        The copy may reach into the proposal itself, as in a text that repeats.

        Returns:
            Length of the match, and `count` tokens; 0 and an empty list where the last token is new.
        """
        self.read()
        length, start = self._find(len(self.text))
        if start is None:
            return 0, []
        proposal = self.text[start : start + count]
        while len(proposal) < count:
            proposal.append(proposal[start - len(self.text)])
        return length, proposal
