"""A target and a drafter in; whether the text is the target's, nothing leaks from the future, and training measures what decoding does, out."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from dpace.config import CheckConfig
from dpace.data.dataset import ResponseDataset, collate
from dpace.data.prompts import Prompt, first_of_each_set
from dpace.data.responses import Response, encode_chat
from dpace.decode.batch import generate_batch
from dpace.decode.loop import Generation, generate, generate_plain
from dpace.decode.sampling import Sampler
from dpace.drafter import Drafter
from dpace.fast.cache import make_cache
from dpace.measure.heldout import blocks_hidden, heldout_acceptance
from dpace.metrics import Acceptance
from dpace.progress import progress_bar
from dpace.target import Target

SIGNIFICANCE = 0.01
"""Chance that a right implementation fails any of the chi-square tests together."""
MAX_RELATIVE_ERROR = 1e-3
"""Of hidden states that two ways of computing the same thing may differ by in fp32."""


class Finding(NamedTuple):
    """The result of one check."""

    name: str
    cases: str
    """What was looked at, in words."""
    is_passed: bool
    detail: str


@dataclass(frozen=True)
class Divergence:
    """Where a text first leaves the target's own."""

    prompt_id: str
    how: str
    """The way of decoding."""
    position: int
    """Of the token in the response."""
    token_ids: tuple[int | None, int | None]
    """Found and expected; None where the text had ended."""
    margin: float
    """How much the target prefers the expected token, as a difference of logits (above temperature 0, of logits and noise)."""
    noise: float
    """The largest difference between the logits of reading this text at once and token by token: what rounding does here."""

    @property
    def is_tie(self) -> bool:
        """Rounding alone can have caused it: both logits may be off by the noise."""
        return self.margin <= 2 * self.noise


def check(target: Target, drafter: Drafter, prompts: Sequence[Prompt], config: CheckConfig) -> list[Finding]:
    """Run all checks that the dtype allows; see `dpace check --help`.

    In fp32: the text over ways of decoding, the distribution of sampled text, leaks, and parity of training and serving. In lower
    precision only the text, where each difference is told with the margin that the target had for its own token.

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
    is_exact = target.model.dtype == torch.float32
    encoded = [encode_chat(target, prompt.turns[0]) for prompt in prompts]
    with progress_bar() as bar:
        task = bar.add_task("checking", total=len(prompts) * (3 if is_exact else 2) + 1, info="")

        def advance(info: str) -> None:
            bar.update(task, advance=1, info=info)

        texts, whole = _check_texts(target, drafter, prompts, encoded, config, advance)
        findings = [*texts]
        if is_exact:
            findings += _check_distribution(target, drafter, encoded, config, advance)
            responses = [
                Response(p.id, p.set, [], ids + out.token_ids, [[len(ids), len(ids) + len(out.token_ids)]])
                for p, ids, out in zip(prompts, encoded, whole, strict=True)
            ]
            findings += check_views(target, drafter, responses)
            findings.append(_check_lengths(target, drafter, responses, whole))
            advance("leaks and parity")
    return findings


def _check_texts(
    target: Target, drafter: Drafter, prompts: Sequence[Prompt], encoded, config: CheckConfig, advance
) -> tuple[list[Finding], list[Generation]]:
    """Every way of decoding against plain decoding; also the greedy generations that verified whole blocks."""
    sizes = sorted({2, (drafter.block_size + 2) // 2, drafter.block_size})
    ways: dict[str, dict[str, Any]] = {f"blocks of {size}": {"width": "full", "block_size": size} for size in sizes}
    ways |= {"width auto": {"width": "auto"}, "rule speculative": {"width": "full", "verify_rule": "speculative"}}
    whole, count, divergences = [], {0.0: 0, 1.0: 0}, {0.0: [], 1.0: []}
    for temperature in count:
        options = {"max_new_tokens": config.max_new_tokens, "temperature": temperature}
        plain = []
        for number, (prompt, token_ids) in enumerate(zip(prompts, encoded, strict=True)):
            seed = config.seed + number
            plain.append(generate_plain(target, token_ids, seed=seed, **options).token_ids)
            for how, arguments in ways.items():
                if temperature and "verify_rule" in arguments:
                    continue  # its text is another draw from the same distribution
                out = generate(target, drafter, token_ids, seed=seed, **options, **arguments)
                count[temperature] += 1
                if not temperature and how == f"blocks of {drafter.block_size}":
                    whole.append(out)
                if out.token_ids != plain[-1]:
                    sampler = Sampler(temperature, seed=seed, device=target.device)
                    where = prompt.id, how
                    divergences[temperature].append(
                        _divergence(target, sampler, where, token_ids, out.token_ids, plain[-1])
                    )
            advance(f"texts, T={temperature:g}")
        try:
            batch = generate_batch(target, drafter, encoded, seed=config.seed, **options)
        except ValueError:
            continue  # its layers or attention do not allow batches, which then cannot be wrong
        for number, (prompt, token_ids, out) in enumerate(zip(prompts, encoded, batch, strict=True)):
            count[temperature] += 1
            if out.token_ids != plain[number]:
                sampler = Sampler(temperature, seed=config.seed + number, device=target.device)
                where = prompt.id, "batch"
                divergences[temperature].append(
                    _divergence(target, sampler, where, token_ids, out.token_ids, plain[number])
                )
    names = {0.0: "text at temperature 0", 1.0: "text at temperature 1, same seed"}
    cases = f"{len(prompts)} prompts x {', '.join(ways)}, batch"
    findings = []
    for temperature, name in names.items():
        found = divergences[temperature]
        detail = f"{count[temperature] - len(found)} of {count[temperature]} texts equal"
        detail += "".join(f"\n{_describe(target, divergence)}" for divergence in found)
        findings.append(Finding(name, cases, all(divergence.is_tie for divergence in found), detail))
    return findings, whole


@torch.inference_mode()
def _divergence(target: Target, sampler: Sampler, where: tuple[str, str], prompt, found, expected) -> Divergence:
    """Measure how close the target was to choosing the other token."""
    pairs = itertools.zip_longest(found, expected)
    position, tokens = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
    num_prompt = len(prompt)
    text = torch.tensor([[*prompt, *expected]], device=target.device)[:, : num_prompt + position]
    at_once = target.head.logits(target.hidden(text)[0, num_prompt - 1 :]).float()
    cache, one_by_one = make_cache(target.config, text.shape[1]), []
    for start, end in [(0, num_prompt), *((i, i + 1) for i in range(num_prompt, num_prompt + position))]:
        hidden = target.hidden(text[:, start:end], cache=cache)
        one_by_one.append(target.head.logits(hidden[0, -1:]).float())
    noise = float((at_once - torch.cat(one_by_one)).abs().max())
    if None in tokens:
        return Divergence(*where, position, tokens, math.inf, noise)
    chances = at_once
    if sampler.temperature:
        sampler.draw(at_once, 0)
        chances = sampler.probs(at_once).log() - torch.stack(sampler._noise).log()
    return Divergence(*where, position, tokens, float(chances[-1, tokens[1]] - chances[-1, tokens[0]]), noise)


def _describe(target: Target, divergence: Divergence) -> str:
    """One line."""
    words = [
        "the end" if token is None else repr(target.tokenizer.decode([token])) if target.tokenizer else str(token)
        for token in divergence.token_ids
    ]
    kind = "tie" if divergence.is_tie else "NOT A TIE"
    return (
        f"{divergence.prompt_id}, {divergence.how}, token {divergence.position}: {words[0]} for {words[1]}, margin "
        f"{divergence.margin:.2g}, rounding {divergence.noise:.2g}: {kind}"
    )


def _check_distribution(
    target: Target, drafter: Drafter, encoded: Sequence[list[int]], config: CheckConfig, advance
) -> list[Finding]:
    """Chi-square of sampled tokens and pairs of tokens, for each verify rule.

    Every token is put through the distribution function that it should be a draw from (tokens in order of probability, the jump at
    the token filled evenly): the results are independent and uniform if and only if the text has the target's distribution,
    whatever the prompts.
    """
    generator = torch.Generator().manual_seed(config.seed)
    results = {}
    ways = {"equality": "auto", "speculative": "full"}
    for number, token_ids in enumerate(encoded):
        for rule, width in ways.items():
            seed = config.seed + number
            options: Any = {"max_new_tokens": config.max_new_tokens, "width": width, "verify_rule": rule}
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
    """Put each token of a response through its distribution function at temperature 1 (Rosenblatt's transform).

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
    """p-value of the chi-square test that points are uniform in the unit cube, with `num_bins` along each side."""
    dim = values.shape[1]
    bins = (values * num_bins).long().clamp_max(num_bins - 1)
    index = (bins * num_bins ** torch.arange(dim)).sum(-1)
    counts = torch.bincount(index, minlength=num_bins**dim).double()
    expected = len(values) / num_bins**dim
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((num_bins**dim - 1) / 2).double(), statistic / 2))


@torch.no_grad()
def check_views(target: Target, drafter: Drafter, responses: Sequence[Response]) -> list[Finding]:
    """The training layout: blocks that do not see their future, and that are the blocks of decoding.

    Args:
        target: in fp32.
        drafter: of that target.
        responses: one block in the middle of each is looked at.

    Returns:
        Two findings.
    """
    leaks, controls, errors = [], [], []
    for row in ResponseDataset(responses, max_length=10**9, num_anchors=None, seed=0):
        inputs: dict[str, Any] = collate([row], drafter.block_size)
        inputs["features"] = target.features(inputs["token_ids"].to(target.device), drafter.target_layer_ids)
        inputs = {name: value.to(target.device) for name, value in inputs.items()}
        number = len(row["anchors"]) // 2
        anchor = int(row["anchors"][number])
        hidden = _block(drafter, target, inputs, number)
        is_future = torch.arange(inputs["token_ids"].shape[1], device=target.device)[None] > anchor
        leaks.append(_relative(_block(drafter, target, _changed(inputs, is_future, target, anchor), number), hidden))
        is_past = torch.arange(inputs["token_ids"].shape[1], device=target.device)[None] < anchor
        controls.append(_relative(_block(drafter, target, _changed(inputs, is_past, target, None), number), hidden))
        block = torch.full((1, drafter.block_size), drafter.mask_token_id, device=target.device)
        block[0, 0] = inputs["token_ids"][0, anchor]
        served = drafter(
            noise_embeds=target.embed(block),
            context_hidden_states=target.features(inputs["token_ids"][:, :anchor], drafter.target_layer_ids),
            position_ids=torch.arange(anchor + drafter.block_size, device=target.device)[None],
        ).last_hidden_state[0]
        errors.append(_relative(served, hidden))
    largest_leak, largest_error = max(leaks, default=0.0), max(errors, default=0.0)
    return [
        Finding(
            "no leak from the future",
            f"one block in each of {len(leaks)} responses",
            bool(leaks) and largest_leak < min(MAX_RELATIVE_ERROR, min(controls) / 10),
            f"other tokens and features after the anchor change the block by {largest_leak:.1g}, before it by "
            f"{min(controls, default=0.0):.1g} or more (relative)",
        ),
        Finding(
            "a block in training is the block when serving",
            f"one block in each of {len(errors)} responses",
            bool(errors) and largest_error < MAX_RELATIVE_ERROR,
            f"hidden states differ by {largest_error:.1g} (relative)",
        ),
    ]


def _check_lengths(
    target: Target, drafter: Drafter, responses: Sequence[Response], whole: Sequence[Generation]
) -> Finding:
    """Accepted lengths as training measures them against those of decoding."""
    dataset = ResponseDataset(responses, max_length=10**9, num_anchors=None, seed=0)
    in_training = heldout_acceptance(drafter, target, dataset) if len(dataset) else None
    kept = {response.id: out.acceptance for response, out in zip(responses, whole, strict=True)}
    decoded = Acceptance.of_prompts([kept[i] for i in dataset.ids]) if in_training else None
    num_equal = 0
    if in_training and decoded:
        num_equal = int((in_training.rows == decoded.rows).all(-1).sum())
    return Finding(
        "accepted lengths in training are those of decoding",
        f"every verification of {len(dataset)} responses",
        bool(len(dataset)) and num_equal == len(dataset),
        f"{num_equal} of {len(dataset)} histograms equal"
        + (f", tau {in_training.tau:.3f} and {decoded.tau:.3f}" if in_training and decoded else ""),
    )


def _block(drafter: Drafter, target: Target, inputs: dict[str, Any], number: int) -> Tensor:
    """Final hidden states of one block, "slot hidden"."""
    ids = {"mask_token_id": drafter.mask_token_id, "target_layer_ids": drafter.target_layer_ids}
    return blocks_hidden(drafter, target, inputs, **ids)[0][0, number]


def _changed(inputs: dict[str, Any], where: Tensor, target: Target, anchor: int | None) -> dict[str, Any]:
    """The batch with other tokens and features in some places; for those after an anchor also at it, and with other labels."""
    generator = torch.Generator().manual_seed(0)
    token_ids, features = inputs["token_ids"], inputs["features"]
    other_ids = torch.randint(target.config.vocab_size, token_ids.shape, generator=generator).to(token_ids.device)
    noise = torch.randn(features.shape, generator=generator).to(features) * features.std() * 3
    labels, is_unread = inputs["labels"].clone(), where.clone()
    if anchor is not None:
        is_unread[0, anchor] = True  # the target has not read the anchor when its block is drafted
        labels[..., 1:] = torch.randint(target.config.vocab_size, labels[..., 1:].shape, generator=generator)
    new = {
        "token_ids": torch.where(where, other_ids, token_ids),
        "features": torch.where(is_unread[..., None], noise, features),
        "labels": labels,
    }
    return {**inputs, **new}


def _relative(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm."""
    return float((found - expected).norm() / expected.norm())
