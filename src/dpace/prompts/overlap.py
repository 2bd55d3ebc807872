"""Find prompts that repeat a prompt of a public set."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain

from dpace.prompts.formats import Prompt, read_prompts
from dpace.prompts.public_sets import SETS, read_sets

RUN_WORDS = 13
"""Words in a row that two texts have in common only where one is copied (GPT-3, arXiv 2005.14165, appendix C)."""

NO_SPACES = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
"""Characters of scripts that put no spaces between words: Thai, Lao, Burmese, Khmer, kana, and Chinese characters."""
MARKS = "\u0300-\u036f\u0591-\u05c7\u064b-\u065f\u0900-\u0dff"
"""Accents and vowel signs that are parts of words, with the scripts of India."""


def find_repeats(prompts: Iterable[Prompt], names: Sequence[str]) -> set[str]:
    """Find the prompts that share a run of words with a prompt of public sets; return their ids.

    A run that several prompts of a set have, such as "Please reason step by step", tells nothing and is left out.
    """
    public_runs = set()
    # Whole texts too: a short one is no run of a longer prompt that begins with it.
    whole = set()
    common = set()
    for name in names:
        public = read_sets([name], is_whole=True) if name in SETS else read_prompts(name)
        # Prompts with the same words count once, so that their runs are not taken for a set's common ones.
        texts = {_split_words(_user_text(prompt)) for prompt in public}
        counts = Counter(chain.from_iterable(map(_runs, texts)))
        public_runs.update(counts)
        common.update(run for run, count in counts.items() if count > 1)
        whole |= texts
    public_runs -= common
    repeats = set()
    for prompt in prompts:
        words = _split_words(_user_text(prompt))
        if words in whole or not public_runs.isdisjoint(_runs(words)):
            repeats.add(prompt.id)
    return repeats


def _user_text(prompt: Prompt) -> str:
    """Join what the user says at the end of each turn: system prompts and examples are alike in many prompts.

    Of a chat that comes with a reply, and so with replies to train on, all that the user says.
    """
    said = []
    for turn in prompt.turns:
        texts = [message["content"] for message in turn if message["role"] == "user"]
        if prompt.answer is None:
            texts = texts[-1:]
        said += texts
    return "\n".join(said)


def _split_words(text: str) -> tuple[str, ...]:
    """Split a text into words; characters of scripts without spaces between words are words of their own."""
    return tuple(re.findall(f"[{NO_SPACES}]|(?:[^\\W{NO_SPACES}]|[{MARKS}])+", text.lower()))


def _runs(words: tuple[str, ...]) -> set[tuple[str, ...]]:
    """Return all runs of `RUN_WORDS` words; the whole text where it is shorter."""
    return {words[i : i + RUN_WORDS] for i in range(max(1, len(words) - RUN_WORDS + 1))}
