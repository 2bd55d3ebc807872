"""Check that a drafter does not change the text: `dpace check`.

Greedy and sampled texts of every way of decoding have to be the target's own. In fp32, sampled text is also tested for
the target's distribution, by Rosenblatt's transform and chi-square; nothing may leak from the future; and training has
to measure what decoding does.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from dpace.batches.dataset import ResponseDataset, collate
from dpace.config import RespondConfig, VerifyRule, Width
from dpace.decode import Paces, generate, generate_plain
from dpace.decode.batch import batch_fault, generate_batch
from dpace.decode.generation import Generation
from dpace.drafter import Drafter
from dpace.drafter.views import Inputs, blocks_hidden, draft_block
from dpace.drafter.vocabulary import PackedRows
from dpace.measure.heldout import heldout_acceptance
from dpace.measure.own_text import find_divergence, generate_transformers
from dpace.prompts.prompts import Prompt
from dpace.respond.conversation import Conversation
from dpace.respond.responses import Response
from dpace.system.progress import count, track
from dpace.target import Target

SIGNIFICANCE = 0.01
"""Probability that a correct implementation fails one or more of the chi-square tests."""
MAX_RELATIVE_ERROR = 1e-3
"""Largest relative difference, in fp32, between hidden states that are computed in two ways."""
RULES: dict[VerifyRule, Width] = {"equality": "auto", "speculative": "full"}
"""Verification lengths with which the distribution of each verify rule is tested."""


class Finding(NamedTuple):
    """The result of one check."""

    name: str
    cases: str
    """What was examined, in words."""
    is_passed: bool
    detail: str


class Question(NamedTuple):
    """A prompt that is decoded in several ways."""

    id: str
    token_ids: list[int]
    seed: int


def check(
    target: Target, drafter: Drafter, prompts: Sequence[Prompt], *, max_new_tokens: int, seed: int = 0
) -> list[Finding]:
    """Run all checks that the dtype allows; see `dpace check --help`.

    First the baseline is compared with `generate` of transformers. In fp32 the others are the text over ways of
    decoding, the distribution of sampled text, leaks, and parity of training and serving. In lower precision only the
    text is checked; each difference is listed with the margin that the target had for its own token.

    Args:
        target: the model.
        drafter: trained for it, or not: a bad drafter has to pass too.
        prompts: of which the first turns are answered.
        max_new_tokens: longest answer.
        seed: for sampling.

    Returns:
        One finding a check.

    Raises:
        ValueError: a drafter for another target, or an over-long prompt.
    """
    limits = RespondConfig(max_new_tokens=max_new_tokens)
    questions = []
    for number, prompt in enumerate(prompts, start=seed):
        questions.append(Question(prompt.id, Conversation(target, prompt, limits).ask(), number))
    findings, whole = check_texts(target, drafter, questions, max_new_tokens)
    if target.dtype_name not in ("float32", "int8"):
        return findings
    responses = []
    for prompt, question, generation in zip(prompts, questions, whole, strict=True):
        text = question.token_ids + generation.token_ids
        responses.append(Response(prompt.id, prompt.set, [], text, [[len(question.token_ids), len(text)]]))
    findings += check_distribution(target, drafter, questions, max_new_tokens)
    findings += check_views(target, drafter, responses)
    findings.append(check_lengths(target, drafter, responses, whole))
    return findings


def check_texts(
    target: Target, drafter: Drafter, questions: Sequence[Question], max_new_tokens: int
) -> tuple[list[Finding], list[Generation]]:
    """Compare the text of every way of decoding with the baseline, and that with `generate` of transformers.

    Returns:
        The findings, and the greedy generations that verified whole blocks.
    """
    ways: dict[str, Callable[..., Generation]] = {"plain": partial(generate_plain, target)}
    for size in sorted({2, (drafter.block_size + 2) // 2, drafter.block_size}):
        ways[f"width {size}"] = partial(generate, target, drafter, width=size)
    ways["width auto"] = partial(generate, target, drafter, paces=Paces())
    # Greedy only: above temperature 0 this rule draws another text.
    ways["rule speculative"] = partial(generate, target, drafter, width="full", verify_rule="speculative")
    encoded = [question.token_ids for question in questions]
    lengths = [(len(token_ids), len(token_ids) + max_new_tokens) for token_ids in encoded]
    findings = []
    whole = []
    for temperature, name in ((0.0, "text at temperature 0"), (1.0, "text at temperature 1, same seed")):
        options: Any = {"max_new_tokens": max_new_tokens, "temperature": temperature}
        outs: dict[str, list[Generation]] = {}
        for way, decode in track(list(ways.items()), f"texts, T={temperature:g}"):
            outs[way] = [decode(question.token_ids, seed=question.seed, **options) for question in questions]
        # A target that cannot decode a batch has none that could be wrong.
        if not batch_fault(target, lengths):
            outs["batch"] = generate_batch(target, drafter, encoded, seed=questions[0].seed, **options)
        plain = outs.pop("plain")
        if temperature == 0:
            whole = outs[f"width {drafter.block_size}"]
            del ways["rule speculative"]
            own = [generate_transformers(target, token_ids, max_new_tokens) for token_ids in encoded]
            name_of_baseline = "plain decoding is generate of transformers"
            findings.append(compare_texts(target, name_of_baseline, questions, {"plain decoding": plain}, own))
        texts = [generation.token_ids for generation in plain]
        findings.append(compare_texts(target, name, questions, outs, texts, temperature))
    return findings, whole


def compare_texts(
    target: Target,
    name: str,
    questions: Sequence[Question],
    ways: Mapping[str, Sequence[Generation]],
    texts: Sequence[list[int]],
    temperature: float = 0.0,
) -> Finding:
    """Compare what each way of decoding gave for each prompt with the text that is expected.

    The check passes where every difference is a tie within rounding.
    """
    lines = []
    is_passed = True
    for way, generations in ways.items():
        for question, generation, expected in zip(questions, generations, texts, strict=True):
            if generation.token_ids == expected:
                continue
            divergence = find_divergence(
                target,
                f"{question.id}, {way}",
                question.token_ids,
                generation.token_ids,
                expected,
                temperature=temperature,
                seed=question.seed,
            )
            lines.append(divergence.line)
            is_passed &= divergence.is_tie
    total = len(ways) * len(questions)
    cases = f"{count(len(questions), 'prompt')} x {', '.join(ways)}"
    return Finding(name, cases, is_passed, "\n".join([f"{total - len(lines)} of {total} texts equal", *lines]))


def check_distribution(
    target: Target, drafter: Drafter, questions: Sequence[Question], max_new_tokens: int
) -> list[Finding]:
    """Test sampled tokens and pairs of tokens by chi-square, for each verify rule.

    Each token is put through the distribution function that it should be a sample of (tokens in order of probability,
    the jump at the token filled evenly). The results are independent and uniform if and only if the text has the
    target's distribution, whatever the prompts are.
    """
    generator = torch.Generator().manual_seed(questions[0].seed)
    findings = []
    for rule, width in RULES.items():
        options: Any = {"width": width, "verify_rule": rule, "paces": Paces(), "temperature": 1.0}
        values = []
        for _, token_ids, seed in track(questions, f"distribution, rule {rule}"):
            out = generate(target, drafter, token_ids, max_new_tokens=max_new_tokens, seed=seed, **options)
            # The first token comes from the prefill, which no rule verifies.
            values.append(distribution_values(target, token_ids, out.token_ids, generator)[1:])
        singles = torch.cat(values)[:, None]
        pairs = singles[: len(singles) // 2 * 2].view(-1, 2)
        p_values = uniformity(singles, 10), uniformity(pairs, 4)
        detail = f"chi-square: p = {p_values[0]:.3f} for single tokens, {p_values[1]:.3f} for pairs"
        cases = f"{len(singles)} sampled tokens, {len(pairs)} pairs"
        # Bonferroni: all tests together, two for each rule, fail by chance with this probability at most.
        is_passed = min(p_values) > SIGNIFICANCE / (2 * len(RULES))
        findings.append(Finding(f"distribution, rule {rule}", cases, is_passed, detail))
    return findings


@torch.inference_mode()
def distribution_values(
    target: Target, prompt: Sequence[int], response: Sequence[int], generator: torch.Generator
) -> Float[Tensor, " seq"]:
    """Put each token of a response through its distribution function at temperature 1.

    This is Rosenblatt's transform.

    Memory: logits of the response, "seq vocab" in fp32.

    Returns:
        Numbers in [0, 1], independent and uniform if the response is a draw from the target.

    Source: Rosenblatt, Remarks on a multivariate transformation (1952).
    """
    text = torch.tensor([[*prompt, *response]], device=target.device)
    # The row of the token before predicts a token, from the prompt's last one on.
    hidden = target.hidden(text[:, :-1])[0, len(prompt) - 1 :]
    probs = torch.softmax(target.logits(hidden).double(), dim=-1)  # (seq, vocab)
    chosen = text[0, len(prompt) :, None]
    jump = probs.gather(1, chosen)
    # Tokens that are equally likely come in the order of their ids.
    is_before = torch.arange(probs.shape[1], device=target.device) < chosen
    below = (probs * ((probs > jump) | ((probs == jump) & is_before))).sum(-1)
    share_of_jump = torch.rand(len(response), generator=generator)
    return (below.cpu() + share_of_jump * jump[:, 0].cpu()).float().clamp(0, 1)


def uniformity(values: Float[Tensor, "draw dim"], num_bins: int) -> float:
    """Compute the p-value of the chi-square test that points are uniform in the unit cube.

    The cube has `num_bins` bins along each side. No point at all is not suspicious: 1.
    """
    if not len(values):
        return 1.0
    dim = values.shape[1]
    counts = torch.histogramdd(values, [num_bins] * dim, range=[0.0, 1.0] * dim).hist.double()
    expected = len(values) / counts.numel()
    statistic = ((counts - expected) ** 2 / expected).sum()
    # The counts add up to the number of points, so one of them is not free.
    degrees = torch.tensor(counts.numel() - 1).double()
    return float(torch.special.gammaincc(degrees / 2, statistic / 2))


def check_views(target: Target, drafter: Drafter, responses: Sequence[Response]) -> list[Finding]:
    """Check that training's blocks do not see their future and are the blocks of decoding.

    Args:
        target: in fp32.
        drafter: of that target.
        responses: one block in the middle of each is examined.

    Returns:
        Two findings.
    """
    rows = ResponseDataset(responses, max_length=10**9, num_anchors=None, seed=0)
    generator = torch.Generator().manual_seed(0)
    # Without a block to examine, both checks fail.
    changes = [change_block(target, drafter, row, generator) for row in rows] or [(math.inf, 0.0, math.inf)]
    by_future, by_past, by_serving = zip(*changes, strict=True)
    cases = f"a block in {count(len(rows), 'response')}"
    # A drafter that ignores its text would not leak either: the past has to change the block much more.
    has_no_leak = max(by_future) < min(MAX_RELATIVE_ERROR, min(by_past) / 10)
    seen = (
        f"other tokens and features after the anchor change the block by {max(by_future):.1g}, before it by "
        f"{min(by_past):.1g} or more (relative)"
    )
    is_served = max(by_serving) < MAX_RELATIVE_ERROR
    served = f"hidden states differ by {max(by_serving):.1g} (relative)"
    return [
        Finding("no leak from the future", cases, has_no_leak, seen),
        Finding("a block in training is the block when serving", cases, is_served, served),
    ]


@torch.no_grad()
def change_block(target: Target, drafter: Drafter, row: Inputs, generator: torch.Generator) -> list[float]:
    """Compute the hidden states of a response's middle block with another text, and as decoding does.

    The future of a block is all text after its anchor, and the features at the anchor: the target has not read it when
    the block is drafted.

    Returns:
        How far they are from the states in training, as the norm of the difference over the norm: with another future,
        with another past, and when serving.
    """
    text = row["token_ids"]
    features = target.features(text[None], drafter.target_layer_ids)[0].cpu()
    other_text = torch.randint(target.config.vocab_size, text.shape, generator=generator)
    # Three times as wide as the text's own features, so that what sees them changes.
    other_features = torch.randn(features.shape, generator=generator) * features.std() * 3
    number = len(row["anchors"]) // 2
    anchor = int(row["anchors"][number])

    def change(tokens: slice, states: slice) -> Inputs:
        """Take other tokens, and other features, at some positions."""
        changed = row | {"token_ids": text.clone(), "features": features.clone()}
        changed["token_ids"][tokens] = other_text[tokens]
        changed["features"][states] = other_features[states]
        return changed

    past = slice(anchor)
    nothing = slice(0)
    variants = [change(nothing, nothing), change(slice(anchor + 1, None), slice(anchor, None)), change(past, past)]
    batch = {name: value.to(target.device) for name, value in collate(variants, drafter.block_size).items()}
    # Where blocks begin at the anchor, slot 0 of the training view predicts nothing, and decoding does not compute it.
    trained, *others = blocks_hidden(drafter, target, batch).hidden[:, number, 1 - drafter.first_slot :]
    block = text.new_full((1, drafter.num_slots), drafter.mask_token_id)
    block[0, 0] = text[anchor]
    before = features[None, :anchor].to(target.device)
    others.append(draft_block(drafter, target, block.to(target.device), before).hidden[0])
    return [float((other - trained).norm() / trained.norm()) for other in others]


def check_lengths(
    target: Target, drafter: Drafter, responses: Sequence[Response], whole: Sequence[Generation]
) -> Finding:
    """Compare accepted lengths as training measures them with the lengths in decoding."""
    num_compared = 0
    num_equal = 0
    for response, generation in zip(responses, whole, strict=True):
        if len(generation.token_ids) < 2:  # nothing was verified
            continue
        num_compared += 1
        dataset = ResponseDataset([response], max_length=10**9, num_anchors=None, seed=0)
        prompt = response.token_ids[: response.response_spans[0][0]]
        # Decoding also drafts the tokens of its prompt, where a draft vocabulary leaves them out.
        drafted = PackedRows(target, drafter.vocabulary, prompt).token_ids
        trained = heldout_acceptance(drafter, target, dataset, token_ids=drafted)
        num_equal += bool((trained.rows == generation.acceptance.rows).all())
    return Finding(
        "accepted lengths in training are those of decoding",
        f"every verification of {count(num_compared, 'response')}",
        0 < num_equal == num_compared,
        f"{num_equal} of {num_compared} histograms equal",
    )
