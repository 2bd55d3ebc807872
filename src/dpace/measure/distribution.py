"""Test that sampled text has the target's distribution, by Rosenblatt's transform and chi-square."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dpace.config import CheckConfig
from dpace.decode import Paces, generate
from dpace.drafter import Drafter
from dpace.measure.parity import Finding
from dpace.target import Target

SIGNIFICANCE = 0.01
"""Probability that a correct implementation fails one or more of the chi-square tests."""


def check_distribution(
    target: Target, drafter: Drafter, encoded: Sequence[list[int]], config: CheckConfig, advance
) -> list[Finding]:
    """Test sampled tokens and pairs of tokens by chi-square, for each verify rule.

    Each token is put through the distribution function that it should be a sample of (tokens in order of probability,
    the jump at the token filled evenly). The results are independent and uniform if and only if the text has the
    target's distribution, whatever the prompts are.
    """
    generator = torch.Generator().manual_seed(config.seed)
    results, paces = {}, Paces()
    ways = {"equality": "auto", "speculative": "full"}
    for number, token_ids in enumerate(encoded):
        for rule, width in ways.items():
            seed = config.seed + number
            options: Any = {
                "max_new_tokens": config.max_new_tokens,
                "width": width,
                "verify_rule": rule,
                "paces": paces,
            }
            out = generate(target, drafter, token_ids, temperature=1.0, seed=seed, **options)
            uniform = distribution_values(target, token_ids, out.token_ids, generator)[1:]  # 0 is from the prefill
            singles, pairs = results.setdefault(rule, ([], []))
            singles.append(uniform)
            pairs.append(uniform[: len(uniform) // 2 * 2].unflatten(0, (-1, 2)))
        advance("distribution")
    findings = []
    for rule, (singles, pairs) in results.items():
        p_values = [uniformity(torch.cat(singles)[:, None], 10), uniformity(torch.cat(pairs), 4)]
        is_passed = min(p_values) > SIGNIFICANCE / 4
        detail = f"chi-square: p = {p_values[0]:.3f} for single tokens, {p_values[1]:.3f} for pairs"
        cases = f"{len(torch.cat(singles))} sampled tokens, {len(torch.cat(pairs))} pairs"
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
    bins = (values * num_bins).long().clamp_max(num_bins - 1)
    index = (bins * num_bins ** torch.arange(dim)).sum(-1)
    counts = torch.bincount(index, minlength=num_bins**dim).double()
    expected = len(values) / num_bins**dim
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((num_bins**dim - 1) / 2).double(), statistic / 2))
