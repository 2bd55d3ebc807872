"""Check that a drafter does not change the text: `dpace check`.

Greedy and sampled texts of every way of decoding have to be the target's own. In fp32, sampled text is also tested for
the target's distribution, by Rosenblatt's transform and chi-square; nothing may leak from the future; and training has
to measure what decoding does.
"""

import contextlib
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dpace.batches.dataset import ResponseDataset
from dpace.config import CheckConfig, RespondConfig, VerifyRule, Width
from dpace.decode import Paces, generate, generate_plain
from dpace.decode.decoder import generate_batch
from dpace.decode.generation import Generation
from dpace.decode.sampling import Sampler
from dpace.drafter import Drafter
from dpace.drafter.vocabulary import PackedRows
from dpace.measure.heldout import heldout_acceptance
from dpace.measure.own_text import find_divergence, generate_transformers, text_finding
from dpace.measure.parity import Finding, check_views
from dpace.metrics import Acceptance
from dpace.prompts.prompts import Prompt, first_of_each_set
from dpace.respond.conversation import Conversation
from dpace.respond.responses import Response
from dpace.system.progress import count, track
from dpace.target import Target

SIGNIFICANCE = 0.01
"""Probability that a correct implementation fails one or more of the chi-square tests."""
RULES: dict[VerifyRule, Width] = {"equality": "auto", "speculative": "full"}
"""Verification lengths with which the distribution of each verify rule is tested."""


def check(target: Target, drafter: Drafter, prompts: Sequence[Prompt], config: CheckConfig) -> list[Finding]:
    """Run all checks that the dtype allows; see `dpace check --help`.

    First the baseline is compared with `generate` of transformers. In fp32 the others are the text over ways of
    decoding, the distribution of sampled text, leaks, and parity of training and serving. In lower precision only the
    text is checked; each difference is listed with the margin that the target had for its own token.

    Args:
        target: the model.
        drafter: trained for it, or not: a bad drafter has to pass too.
        prompts: the first `num_prompts` of each set are used.
        config: how much is checked.

    Returns:
        One finding a check.

    Raises:
        ValueError: a drafter for another target, or an over-long prompt.
    """
    drafter.check_target(target)
    prompts = first_of_each_set(prompts, config.num_prompts)
    limits = RespondConfig(max_new_tokens=config.max_new_tokens)
    encoded = [Conversation(target, prompt, limits).ask() for prompt in prompts]
    findings, whole = check_texts(target, drafter, prompts, encoded, config)
    if target.model.dtype == torch.float32:
        findings += check_distribution(target, drafter, encoded, config)
        responses = [
            Response(p.id, p.set, [], ids + out.token_ids, [[len(ids), len(ids) + len(out.token_ids)]])
            for p, ids, out in zip(prompts, encoded, whole, strict=True)
        ]
        findings += check_views(target, drafter, responses)
        findings.append(check_lengths(target, drafter, responses, whole))
    return findings


def check_texts(
    target: Target,
    drafter: Drafter,
    prompts: Sequence[Prompt],
    encoded: Sequence[list[int]],
    config: CheckConfig,
) -> tuple[list[Finding], list[Generation]]:
    """Compare the text of every way of decoding with the baseline, and that with `generate` of transformers.

    Args:
        target: the model.
        drafter: drafts.
        prompts: of which the first turns are decoded.
        encoded: their token ids.
        config: lengths and seed.

    Returns:
        The findings, and the greedy generations that verified whole blocks.
    """
    seeds = [config.seed + number for number in range(len(prompts))]
    findings = []

    def decode(function: Any, *models: Any, **options: Any) -> list[Generation]:
        return [function(*models, ids, seed=seed, **options) for ids, seed in zip(encoded, seeds, strict=True)]

    def compare(name: str, temperature: float, texts: Mapping[str, Sequence[Any]], expected: Sequence[Any]) -> None:
        """Add the finding about the token ids of each way of decoding, one text a prompt."""
        divergences = []
        for how, number in product(texts, range(len(prompts))):
            found = texts[how][number]
            if found != expected[number]:
                sampler = Sampler(temperature, seed=seeds[number], device=target.device)
                where = f"{prompts[number].id}, {how}"
                divergences.append(find_divergence(target, sampler, where, encoded[number], found, expected[number]))
        cases = f"{count(len(prompts), 'prompt')} x {', '.join(texts)}"
        findings.append(text_finding(name, cases, len(texts) * len(prompts), divergences))

    sizes = sorted({2, (drafter.block_size + 2) // 2, drafter.block_size})
    ways: dict[str, dict[str, Any]] = {f"width {size}": {"width": size} for size in sizes}
    ways["width auto"] = {"width": "auto", "paces": Paces()}
    ways["rule speculative"] = {"width": "full", "verify_rule": "speculative"}
    whole = []
    for temperature, name in ((0.0, "text at temperature 0"), (1.0, "text at temperature 1, same seed")):
        options: dict[str, Any] = {"max_new_tokens": config.max_new_tokens, "temperature": temperature}
        outs = {}
        for how, arguments in track(list(ways.items()), f"texts, T={temperature:g}"):
            outs[how] = decode(generate, target, drafter, **options, **arguments)
        with contextlib.suppress(ValueError):  # layers or attention without batches, which then cannot be wrong
            outs["batch"] = generate_batch(target, drafter, encoded, seed=config.seed, **options)
        texts = {how: [out.token_ids for out in of_way] for how, of_way in outs.items()}
        plain = [out.token_ids for out in decode(generate_plain, target, **options)]
        if temperature == 0:
            whole = outs[f"width {drafter.block_size}"]
            del ways["rule speculative"]  # above temperature 0 it draws another text
            own = [generate_transformers(target, token_ids, config.max_new_tokens) for token_ids in encoded]
            compare("plain decoding is generate of transformers", temperature, {"plain decoding": plain}, own)
        compare(name, temperature, texts, plain)
    return findings, whole


def check_distribution(
    target: Target, drafter: Drafter, encoded: Sequence[list[int]], config: CheckConfig
) -> list[Finding]:
    """Test sampled tokens and pairs of tokens by chi-square, for each verify rule.

    Each token is put through the distribution function that it should be a sample of (tokens in order of probability,
    the jump at the token filled evenly). The results are independent and uniform if and only if the text has the
    target's distribution, whatever the prompts are.
    """
    generator = torch.Generator().manual_seed(config.seed)
    findings = []
    for rule, width in RULES.items():
        options: dict[str, Any] = {"width": width, "verify_rule": rule, "paces": Paces()}
        of_texts = []
        for number, token_ids in enumerate(track(encoded, f"distribution, rule {rule}")):
            limits = {"max_new_tokens": config.max_new_tokens, "temperature": 1.0, "seed": config.seed + number}
            out = generate(target, drafter, token_ids, **limits, **options)
            values = distribution_values(target, token_ids, out.token_ids, generator)
            of_texts.append(values[1:])  # 0 is from the prefill
        singles = torch.cat(of_texts)[:, None]
        pairs = torch.cat([of_text[: len(of_text) // 2 * 2].unflatten(0, (-1, 2)) for of_text in of_texts])
        p_values = uniformity(singles, 10), uniformity(pairs, 4)
        detail = f"chi-square: p = {p_values[0]:.3f} for single tokens, {p_values[1]:.3f} for pairs"
        cases = f"{len(singles)} sampled tokens, {len(pairs)} pairs"
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
    hidden = target.hidden(text[:, :-1])[0, len(prompt) - 1 :]
    probs = torch.softmax(target.head.logits(hidden).double(), dim=-1)
    chosen = torch.tensor(response, device=target.device)[:, None]
    own = probs.gather(1, chosen)
    ranks = torch.arange(probs.shape[1], device=target.device)
    above = (probs * ((probs > own) | ((probs == own) & (ranks < chosen)))).sum(-1)
    return (above.cpu() + torch.rand(len(response), generator=generator) * own[:, 0].cpu()).float().clamp(0, 1)


def uniformity(values: Float[Tensor, "draw dim"], num_bins: int) -> float:
    """Compute the p-value of the chi-square test that points are uniform in the unit cube.

    The cube has `num_bins` bins along each side.
    """
    dim = values.shape[1]
    counts = torch.histogramdd(values, [num_bins] * dim, range=[0.0, 1.0] * dim).hist.double()
    expected = len(values) / counts.numel()
    statistic = ((counts - expected) ** 2 / expected).sum()
    degrees = torch.tensor(counts.numel() - 1).double()
    return float(torch.special.gammaincc(degrees / 2, statistic / 2))


def check_lengths(
    target: Target, drafter: Drafter, responses: Sequence[Response], whole: Sequence[Generation]
) -> Finding:
    """Compare accepted lengths as training measures them with those of decoding."""
    pairs = [(response, out) for response, out in zip(responses, whole, strict=True) if len(out.token_ids) > 1]
    trained = []
    for response, _ in pairs:
        dataset = ResponseDataset([response], max_length=10**9, num_anchors=None, seed=0)
        prompt = response.token_ids[: response.response_spans[0][0]]
        drafted = PackedRows(target, drafter.vocabulary, prompt).token_ids
        trained.append(heldout_acceptance(drafter, target, dataset, token_ids=drafted))
    decoded = [out.acceptance for _, out in pairs]
    num_equal = sum(bool((a.rows == b.rows).all()) for a, b in zip(trained, decoded, strict=True))
    detail = f"{num_equal} of {len(pairs)} histograms equal"
    if pairs:
        taus = [Acceptance.of_prompts(found).tau for found in (trained, decoded)]
        detail += f", tau {taus[0]:.3f} and {taus[1]:.3f}"
    return Finding(
        "accepted lengths in training are those of decoding",
        f"every verification of {count(len(pairs), 'response')}",
        0 < num_equal == len(pairs),
        detail,
    )
