"""Check that a drafter does not change the text.

In fp32, also check that nothing leaks from the future and that training measures what decoding does.

Test that sampled text has the target's distribution, by Rosenblatt's transform and chi-square.

Find where a text differs from the target's own, and tell ties within rounding from bugs.

Check what comparisons rest on: the baseline and kept responses are the target's greedy text.
"""

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import GenerationConfig

from dpace.batches.dataset import ResponseDataset
from dpace.config import CheckConfig
from dpace.decode import Paces, generate, generate_plain
from dpace.decode.batch import generate_batch
from dpace.decode.generation import Generation
from dpace.decode.sampling import Sampler
from dpace.drafter import Drafter
from dpace.fast.cache import make_cache
from dpace.measure.heldout import heldout_acceptance
from dpace.measure.parity import Finding, check_views
from dpace.metrics import Acceptance
from dpace.prompts.prompts import Prompt, first_of_each_set
from dpace.respond.responses import Response, read_meta, read_responses
from dpace.system.progress import progress_bar
from dpace.target import Target
from dpace.target.chat import encode_chat, tokenizer_hashes

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


@dataclass(frozen=True)
class Divergence:
    """The first place where a text differs from the target's own."""

    prompt_id: str
    how: str
    """Way of decoding, in words."""
    position: int
    """Number of the token in the response, from 0."""
    token_ids: tuple[int | None, int | None]
    """Token found and token expected; None where the text had ended."""
    margin: float
    """How much the target prefers the expected token, as a difference of logits.

    Above temperature 0, the logits include the noise of sampling."""
    noise: float
    """Size of rounding here: the largest difference between logits of this text read at once and token by token."""

    @property
    def is_tie(self) -> bool:
        """Whether rounding alone can have caused it: both logits may be off by the noise."""
        return self.margin <= 2 * self.noise


@torch.inference_mode()
def find_divergence(target: Target, sampler: Sampler, where: tuple[str, str], prompt, found, expected) -> Divergence:
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
    scores = at_once
    if sampler.temperature:
        scores = sampler.probs(at_once).log() - torch.stack(sampler.noise(0, at_once)).log()
    return Divergence(*where, position, tokens, float(scores[-1, tokens[1]] - scores[-1, tokens[0]]), noise)


def describe(target: Target, divergence: Divergence) -> str:
    """Write a divergence in one line."""
    words = [
        "the end" if token is None else repr(target.tokenizer.decode([token])) if target.tokenizer else str(token)
        for token in divergence.token_ids
    ]
    kind = "tie" if divergence.is_tie else "NOT A TIE"
    return (
        f"{divergence.prompt_id}, {divergence.how}, token {divergence.position}: {words[0]}, expected {words[1]}, "
        f"margin {divergence.margin:.2g}, rounding {divergence.noise:.2g}: {kind}"
    )


NUM_REREAD = 8
"""Responses of a file that are read again."""
MAX_LISTED = 5
"""Differences that a finding lists."""


@torch.inference_mode()
def check_plain(
    target: Target, prompts: Sequence[Prompt], encoded: Sequence[list[int]], max_new_tokens: int
) -> Finding:
    """Compare the baseline with `generate` of transformers, greedy, without the generation config."""
    different = []
    sampler, stops = Sampler(device=target.device), target.stop_token_ids
    for prompt, token_ids in zip(prompts, encoded, strict=True):
        found = generate_plain(target, token_ids, max_new_tokens=max_new_tokens).token_ids
        expected = _generate(target, token_ids, stops, max_new_tokens)
        if found != expected:
            where = prompt.id, "plain decoding"
            different.append(find_divergence(target, sampler, where, token_ids, found, expected))
    detail = f"{len(prompts) - len(different)} of {len(prompts)} texts equal"
    detail += "".join(f"\n{describe(target, divergence)}" for divergence in different[:MAX_LISTED])
    is_passed = all(divergence.is_tie for divergence in different)
    return Finding("plain decoding is generate of transformers", f"{len(prompts)} prompts", is_passed, detail)


def _generate(target: Target, token_ids: list[int], stops: Sequence[int], max_new_tokens: int) -> list[int]:
    """Continue a prompt with transformers' own loop."""
    input_ids = torch.tensor([token_ids], device=target.device)
    own, target.model.generation_config = target.model.generation_config, GenerationConfig()
    try:
        out = target.model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=next(iter(stops), 0),
            eos_token_id=list(stops) or None,
            disable_compile=True,
        )
    finally:
        target.model.generation_config = own
    return out[0, len(token_ids) :].tolist()


def read_greedy(path: str | Path) -> tuple[list[Response], dict[str, Any]]:
    """Read a file of responses that can be read again, and what made it.

    Raises:
        ValueError: it cannot be read, is empty, or its answers were sampled.
    """
    responses, meta = read_responses(path), read_meta(path)
    if not responses:
        raise ValueError(f"{path} has no response; name a file that `dpace respond` wrote with --responses")
    of_weights = () if meta.get("source") == "servers" else ("dtype", "target_sha256")  # servers do not tell these
    if missing := [key for key in ("temperature", "max_new_tokens", *of_weights) if key not in meta]:
        raise ValueError(
            f"the meta file beside {path} does not tell {', '.join(missing)} of its answers; write them again with "
            "`dpace respond`"
        )
    if meta["temperature"]:
        raise ValueError(
            f"{path} was sampled at temperature {meta['temperature']:g}, and only greedy answers can be read again; "
            "leave --responses out"
        )
    return responses, meta


def check_responses(target: Target, responses: Sequence[Response], meta: dict[str, Any]) -> list[Finding]:
    """Read a sample of greedy answers again.

    Every token must be the most likely one after the text before it, and an answer must end at a stop token or where it
    was cut.

    Args:
        target: loaded in the precision that the answers were written in.
        responses: of which a fixed random sample is read.
        meta: what made them, see `dpace.respond.responses.read_meta`.

    Returns:
        Whether the target is the one that answered, and whether the text is its own.
    """
    now = {"target_sha256": target.sha256, **tokenizer_hashes(target)}
    if meta.get("source") == "servers":
        now.pop("target_sha256")
    other = [key.removesuffix("_sha256") for key in now if meta.get(key) != now[key]]
    detail = ", ".join(now).replace("_sha256", "")
    if other:
        detail = f"another {', '.join(other)} than {meta.get('target')} had"
    same = Finding("responses are of this target", "hashes", not other, detail)
    chosen = random.Random(0).sample(list(responses), min(NUM_REREAD, len(responses)))
    wrong, num_tokens = [], 0
    for response in chosen:
        for number, (start, end) in enumerate(response.response_spans, start=1):
            num_tokens += end - start
            wrong += _reread(target, response, (start, end), f"answer {number}", meta["max_new_tokens"])
    detail = f"{num_tokens - len(wrong)} of {num_tokens} tokens are the most likely ones"
    detail += "".join(f"\n{describe(target, divergence)}" for divergence in wrong[:MAX_LISTED])
    is_passed = all(divergence.is_tie for divergence in wrong)
    return [same, Finding("responses are the target's greedy text", f"{len(chosen)} responses", is_passed, detail)]


@torch.inference_mode()
def _reread(target: Target, response: Response, span: tuple[int, int], how: str, limit: int) -> list[Divergence]:
    """List the tokens of an answer that the target would not have written."""
    (start, end), where = span, (response.id, how)
    vocabulary, stops = target.head.weight.shape[0], set(target.stop_token_ids)
    # An answer needs a text before it, and tokens of this target.
    if start == 0 or max(response.token_ids[:end], default=0) >= vocabulary:
        token = max(response.token_ids[:end], default=0)
        return [Divergence(*where, 0, (token, None), math.inf, 0.0)]
    found = response.token_ids[start:end]
    text = torch.tensor([response.token_ids[: max(end - 1, start)]], device=target.device)
    logits = target.head.logits(target.hidden(text)[0, start - 1 :]).float()
    best = logits.argmax(-1).tolist()[: len(found)]
    places = [i for i, (token, own) in enumerate(zip(found, best, strict=True)) if token != own]
    noise = 0.0
    if places:  # that of the whole answer, up to the last difference
        sampler, last = Sampler(device=target.device), places[-1]
        prompt, expected = response.token_ids[:start], [*found[:last], best[last]]
        noise = find_divergence(target, sampler, where, prompt, found, expected).noise
    wrong = [
        Divergence(*where, i, (found[i], best[i]), float(logits[i, best[i]] - logits[i, found[i]]), noise)
        for i in places
    ]
    early = next((i + 1 for i, token in enumerate(found) if token in stops), None)
    if early is not None and early < len(found):
        wrong.append(Divergence(*where, early, (found[early], None), math.inf, noise))
    if early is None and len(found) != limit:
        wrong.append(Divergence(*where, len(found), (None, best[-1] if best else 0), math.inf, noise))
    return wrong


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
    is_exact = target.model.dtype == torch.float32
    encoded = [encode_chat(target, prompt.turns[0]) for prompt in prompts]
    with progress_bar() as bar:
        task = bar.add_task("checking", total=len(prompts) * (3 if is_exact else 2) + 1, info="")

        def advance(info: str) -> None:
            bar.update(task, advance=1, info=info)

        texts, whole = _check_texts(target, drafter, prompts, encoded, config, advance)
        findings = [check_plain(target, prompts, encoded, config.max_new_tokens), *texts]
        if is_exact:
            findings += check_distribution(target, drafter, encoded, config, advance)
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
    """Compare the text of every way of decoding with the baseline.

    Returns:
        The findings, and the greedy generations that verified whole blocks.
    """
    sizes = sorted({2, (drafter.block_size + 2) // 2, drafter.block_size})
    ways: dict[str, dict[str, Any]] = {f"blocks of {size}": {"width": "full", "block_size": size} for size in sizes}
    ways |= {
        "width auto": {"width": "auto", "paces": Paces()},
        "rule speculative": {"width": "full", "verify_rule": "speculative"},
    }
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
                        find_divergence(target, sampler, where, token_ids, out.token_ids, plain[-1])
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
                    find_divergence(target, sampler, where, token_ids, out.token_ids, plain[number])
                )
    names = {0.0: "text at temperature 0", 1.0: "text at temperature 1, same seed"}
    cases = f"{len(prompts)} prompts x {', '.join(ways)}, batch"
    findings = []
    for temperature, name in names.items():
        different = divergences[temperature]
        detail = f"{count[temperature] - len(different)} of {count[temperature]} texts equal"
        detail += "".join(f"\n{describe(target, divergence)}" for divergence in different)
        findings.append(Finding(name, cases, all(divergence.is_tie for divergence in different), detail))
    return findings, whole


def _check_lengths(
    target: Target, drafter: Drafter, responses: Sequence[Response], whole: Sequence[Generation]
) -> Finding:
    """Compare accepted lengths as training measures them with those of decoding."""
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
