"""Show on one page what a drafter is trained on, and what is left out and why: `dpace data`."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.text import Text

from dpace.batches.corpus import Corpus
from dpace.measure.records import spread_evenly
from dpace.prompts.prompts import Split
from dpace.report.tables import Section, section_table
from dpace.system.progress import count, printable

NUM_SHOWN = 2
"""Conversations that are shown."""
SHOWN_CHARACTERS = 240
"""Characters of a prompt's end and of an answer's beginning that are shown."""
QUANTILES = {"shortest": 0.0, "median": 0.5, "90 %": 0.9, "99 %": 0.99, "longest": 1.0}


def prompts_page(split: Split) -> RenderableType:
    """Show how many prompts there are of each part, and what is left out and why."""
    counts = f"{len(split.train)} to train on, {len(split.validation)} for validation, {len(split.heldout)} held out"
    lines = [f"prompts: {counts}; {split.num_answers} come with an answer"]
    for reason, dropped in split.dropped.items():
        if dropped:
            name, like = next(iter(dropped.items()))
            lines.append(f"left out: {len(dropped)} {reason}, such as {name} (like {like})")
    return Text(printable("\n".join(lines)))


def responses_page(corpus: Corpus, max_length: int, meta: Mapping[str, Any], tokenizer: Any) -> RenderableType:
    """Show lengths and ends of the training answers, and some of them."""
    answers = [np.diff(corpus.spans(i), axis=1).ravel() for i in range(len(corpus))]
    num_long = int((corpus.lengths > max_length).sum())
    num_without = int((corpus.num_anchors(max_length) == 0).sum())
    facts = [
        f"{count(len(corpus), 'conversation')}, {int(corpus.lengths.sum()):,} tokens with their prompts",
        f"conversations cut at --train.max-length {max_length}: {num_long}",
        f"left out, without two tokens of an answer in a row: {num_without}",
    ]
    limit = meta.get("max_new_tokens")
    if meta.get("source") == "own":
        facts.append("the answers came with the prompts")
    elif limit is not None:
        lengths = np.concatenate(answers)
        num_cut = int((lengths == limit).sum())
        facts.append(f"answers that end at --respond.max-new-tokens {limit}: {num_cut} of {len(lengths)}")
    answered = np.array([lengths.sum() for lengths in answers])
    lengths = {"prompts": corpus.lengths - answered, "answers, all turns": answered, "conversations": corpus.lengths}
    rows = [
        {"tokens": name, **{at: f"{np.quantile(values, share):.0f}" for at, share in QUANTILES.items()}}
        for name, values in lengths.items()
    ]
    return Group(Text("\n".join(facts)), section_table(Section("", rows=rows)), *_preview(corpus, tokenizer))


def _preview(corpus: Corpus, tokenizer: Any) -> Iterator[RenderableType]:
    """Show some conversations; the tokens that are trained on stand between ⟦ and ⟧."""
    for number in spread_evenly(range(len(corpus)), NUM_SHOWN):
        yield Text(f"\n{printable(corpus.id(number))}, with what is trained on between ⟦ and ⟧:", "bold")
        tokens = corpus.token_ids(number).tolist()
        text = Text()
        end = 0
        for start, stop in corpus.spans(number).tolist():
            before = printable(tokenizer.decode(tokens[end:start]))
            text.append(f"...{before[-SHOWN_CHARACTERS:]}" if len(before) > SHOWN_CHARACTERS else before)
            answer = printable(tokenizer.decode(tokens[start:stop]))
            cut = f"{answer[:SHOWN_CHARACTERS]}..." if len(answer) > SHOWN_CHARACTERS else answer
            text.append(f"⟦{cut}⟧", "green")
            end = stop
        yield text
