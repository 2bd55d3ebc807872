"""Show on one page what a drafter is trained on, and what is left out and why: `dpace data`."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.text import Text

from dpace.prompts.prompts import PromptParts, prompts_line
from dpace.report.tables import Section, section_table
from dpace.respond.responses import Example
from dpace.system.groups import spread_evenly
from dpace.system.ledger import JsonObject
from dpace.system.progress import count, printable

NUM_SHOWN = 2
"""Conversations that are shown."""
SHOWN_CHARACTERS = 240
"""Characters of a prompt's end and of an answer's beginning that are shown."""
QUANTILES = {"shortest": 0.0, "median": 0.5, "90 %": 0.9, "99 %": 0.99, "longest": 1.0}


def prompts_page(parts: PromptParts, left_out: Mapping[str, Mapping[str, str]]) -> RenderableType:
    """Show how many prompts there are of each part, and what is left out and why, as `split_and_explain` gives it."""
    num_answers = sum(prompt.answer is not None for part in parts for prompt in part)
    lines = [f"{prompts_line(parts)}; {num_answers} come with an answer"]
    for reason, dropped in left_out.items():
        if dropped:
            name, like = next(iter(dropped.items()))  # the first prompt stands for all
            lines.append(f"left out: {len(dropped)} {reason}, such as {name} (like {like})")
    return Text(printable("\n".join(lines)))


def responses_page(examples: Sequence[Example], max_length: int, meta: JsonObject, tokenizer: Any) -> RenderableType:
    """Show lengths and ends of the training answers, and some of them."""
    answer_lengths = []
    answered = []
    for example in examples:
        lengths = [end - start for start, end in example.spans]
        answer_lengths += lengths
        answered.append(sum(lengths))
    whole = np.array([len(example.token_ids) for example in examples])
    num_without = sum(not example.num_anchors(max_length) for example in examples)
    facts = [
        f"{count(len(examples), 'conversation')}, {int(whole.sum()):,} tokens with their prompts",
        f"conversations cut at --train.max-length {max_length}: {(whole > max_length).sum()}",
        f"left out, without two tokens of an answer in a row: {num_without}",
    ]
    limit = meta.get("max_new_tokens")
    if meta.get("source") == "own":
        facts.append("the answers came with the prompts")
    elif limit is not None:
        num_cut = answer_lengths.count(limit)
        facts.append(f"answers that end at --respond.max-new-tokens {limit}: {num_cut} of {len(answer_lengths)}")
    # What is no answer is prompt: of all turns, with what the template adds.
    tokens = {"prompts": whole - answered, "answers, all turns": answered, "conversations": whole}
    rows = []
    for name, lengths in tokens.items():
        cells = {"tokens": name}
        for heading, share in QUANTILES.items():
            cells[heading] = f"{np.quantile(lengths, share):.0f}"
        rows.append(cells)
    return Group(Text("\n".join(facts)), section_table(Section("", rows=rows)), *_preview(examples, tokenizer))


def _preview(examples: Sequence[Example], tokenizer: Any) -> Iterator[RenderableType]:
    """Show some conversations; the tokens that are trained on stand between ⟦ and ⟧."""
    for example in spread_evenly(examples, NUM_SHOWN):
        yield Text(f"\n{printable(example.id)}, with what is trained on between ⟦ and ⟧:", "bold")
        tokens = example.token_ids.tolist()
        text = Text()
        prompt_start = 0
        for start, end in example.spans:
            prompt = printable(tokenizer.decode(tokens[prompt_start:start]))
            if len(prompt) > SHOWN_CHARACTERS:
                prompt = f"...{prompt[-SHOWN_CHARACTERS:]}"
            answer = printable(tokenizer.decode(tokens[start:end]))
            if len(answer) > SHOWN_CHARACTERS:
                answer = f"{answer[:SHOWN_CHARACTERS]}..."
            text.append(prompt)
            text.append(f"⟦{answer}⟧", "green")
            prompt_start = end
        yield text
