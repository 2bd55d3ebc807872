"""Check that a drafter does not change the text.

In fp32, also check that nothing leaks from the future and that training measures what decoding does.
"""

from collections.abc import Sequence
from typing import Any

import torch

from dpace.config import CheckConfig
from dpace.data.chat import encode_chat
from dpace.data.dataset import ResponseDataset
from dpace.data.prompts import Prompt, first_of_each_set
from dpace.data.responses import Response
from dpace.decode import Paces, generate, generate_plain
from dpace.decode.batch import generate_batch
from dpace.decode.generation import Generation
from dpace.decode.sampling import Sampler
from dpace.drafter import Drafter
from dpace.measure.distribution import check_distribution
from dpace.measure.divergence import describe, find_divergence
from dpace.measure.heldout import heldout_acceptance
from dpace.measure.own_text import check_plain
from dpace.measure.parity import Finding, check_views
from dpace.metrics import Acceptance
from dpace.progress import progress_bar
from dpace.target import Target


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
