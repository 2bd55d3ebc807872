"""Find prompts that say what other prompts say: of public sets word for word, of each other nearly."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from dpace.prompts.formats import Prompt, read_prompts
from dpace.prompts.public_sets import SETS, read_sets

RUN_WORDS = 13
"""Words in a row that two texts have in common only where one is copied (GPT-3, arXiv 2005.14165, appendix C)."""
SHINGLE_WORDS = 5
"""Words in a row that near duplicates are compared by."""


class PublicTexts:
    """The word runs of public sets, each with the prompt that has it.

    A run that several of their prompts have, such as "Please reason step by step", tells nothing and is left out.
    """

    def __init__(self, names: Sequence[str]):
        sets = [read_sets([name], is_whole=True) if name in SETS else read_prompts(name) for name in names]
        prompts = [prompt for of_set in sets for prompt in of_set]
        runs_by_id = [(prompt.id, _runs(_user_text(prompt), RUN_WORDS)) for prompt in prompts]
        counts = Counter(run for _, runs in runs_by_id for run in runs)
        self._owners = {run: owner for owner, runs in runs_by_id for run in runs if counts[run] == 1}
        self._whole = {_split_words(_user_text(prompt)): prompt.id for prompt in prompts}

    def find(self, prompt: Prompt) -> str | None:
        """Return the id of the public prompt that shares a run of words with a prompt; None where there is none."""
        text = _user_text(prompt)
        if owner := self._whole.get(_split_words(text)):
            return owner
        return next((self._owners[run] for run in _runs(text, RUN_WORDS) if run in self._owners), None)


def sign(prompt: Prompt) -> Any:
    """Compute the MinHash signature of a prompt's words.

    Raises:
        ImportError: datasketch is not installed.
    """
    from datasketch import MinHash

    signature = MinHash(num_perm=128, seed=1)
    signature.update_batch([" ".join(run).encode() for run in _runs(_user_text(prompt), SHINGLE_WORDS)])
    return signature


def find_near(signed: Iterable[tuple[str, Any]], threshold: float) -> dict[str, str]:
    """Find prompts that nearly repeat an earlier one that is kept.

    Args:
        signed: ids and what `sign` computes; those to be kept in any case come first.
        threshold: least share of the word runs of both that both have (Jaccard), as MinHash estimates it.

    Returns:
        For each such prompt, the id of the earlier one.
    """
    from datasketch import MinHashLSH

    index = MinHashLSH(threshold=threshold, num_perm=128)
    kept = {}
    near = {}
    for name, signature in signed:
        alike = [str(other) for other in index.query(signature) if kept[other].jaccard(signature) >= threshold]
        if alike:
            near[name] = min(alike)
        else:
            index.insert(name, signature)
            kept[name] = signature
    return near


def _user_text(prompt: Prompt) -> str:
    """Join what the user says; system prompts and examples are alike in many prompts."""
    return "\n".join(turn[-1]["content"] for turn in prompt.turns)


def _split_words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\w+", text.lower()))


def _runs(text: str, size: int) -> set[tuple[str, ...]]:
    """Return all runs of words; the whole text where it is shorter."""
    words = _split_words(text)
    return {words[i : i + size] for i in range(max(1, len(words) - size + 1))}
