"""Write a trained drafter, rounded, measured and calibrated, with what it was made from."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dpace.batches.dataset import ResponseDataset
from dpace.drafter import Drafter
from dpace.drafter.drafter import ANSWERS_FILE
from dpace.drafter.vocabulary import MAX_TAU_LOSS, DraftVocabulary
from dpace.measure.heldout import measure_vocabularies
from dpace.measure.results import defined
from dpace.metrics import Acceptance
from dpace.system import ranks
from dpace.system.ledger import JsonObject, write_json
from dpace.system.provenance import find_hardware, find_versions
from dpace.target import Target
from dpace.target.chat import tokenizer_hashes
from dpace.target.draft_rows import DraftRows
from dpace.training.checkpoints import STATE, write_state
from dpace.training.loop import TrainingLoop

TEMPERATURES = [2 ** (i / 4) for i in range(-6, 11)]
MAX_CALIBRATION_ROWS = 500
"""About how many slots the temperature is fitted to."""
MAX_ANSWER_TOKENS = 200_000
"""Most tokens of answers that are written beside a drafter, about 1.3 MB."""
SERVED = torch.bfloat16
"""Dtype of a finished drafter's weights, as of most published ones; engines in bf16 read it as it is."""


@torch.no_grad()
def write_finished(folder: Path, loop: TrainingLoop, run: JsonObject, init: Drafter | None = None) -> None:
    """Round a trained drafter to 16 bits, measure it, and write it with what it was made from.

    What is measured is what is written. All ranks call this, since the target may need them; the first one writes.

    Args:
        folder: of the run; `provenance.json`, which says that the drafter is finished, comes last.
        loop: has the trained drafter, whose weights are rounded in place, and stay in fp32; and what it was made from.
        run: what `run.json` holds.
        init: the drafter that the training started from.
    """
    drafter = loop.drafter
    target = loop.target
    for parameter in drafter.parameters():
        parameter.copy_(parameter.to(SERVED))
    objective: JsonObject = {"objective": run["loss.objective"]}
    if "loss.objective_sha256" in run:  # of a custom one
        objective["objective_sha256"] = run["loss.objective_sha256"]
    record = {
        "target": target.short_name,
        "dtype": target.dtype_name,
        "thinking": loop.recipe.thinking,
        **tokenizer_hashes(target),
        **objective,
        "confidence_temperature": 1.0,
    }
    drafter.config.dpace = record  # `dpace doctor` compares with it; engines ignore it
    vocabulary = None
    if len(loop.validation):
        seen_ids = [*loop.dataset.seen_tokens.tolist(), *target.stop_token_ids]
        if init is not None and init.vocabulary is not None:  # what that one had seen
            before = init.vocabulary.token_ids
            seen_ids += before[before < len(target.head.weight)].tolist()
        seen = DraftVocabulary(seen_ids)
        of_all, of_seen = measure_and_calibrate(drafter, target, loop.validation, [None, seen.token_ids])
        acceptance, record["confidence_temperature"] = of_all
        record |= {
            "tau": acceptance.tau,
            "tau_interval": list(map(defined, acceptance.interval())),
            "tau_responses": loop.validation.ids,
            "reach_rate": acceptance.reach_rate.tolist(),
        }
        seen_acceptance, seen.confidence_temperature = of_seen
        # A drafter without a vocabulary that this one started from has learned tokens that nobody listed.
        is_known = init is None or init.vocabulary is not None
        if is_known and seen_acceptance.tau >= (1 - MAX_TAU_LOSS) * acceptance.tau:
            vocabulary = seen
    if not ranks.is_first():
        return
    provenance = _provenance(loop, run, objective)
    drafter.save_pretrained(folder, dtype=SERVED)
    if vocabulary is not None:
        vocabulary.save(folder)
    write_json(folder / ANSWERS_FILE, {"token_ids": _find_answers(loop.dataset)})
    write_state(folder / STATE, loop.state)
    write_json(folder / "provenance.json", provenance)  # last: it says that all others are there


def _provenance(loop: TrainingLoop, run: JsonObject, objective: JsonObject) -> JsonObject:
    """Return from what, on what and how long the drafter was trained."""
    return {
        "target": loop.target.name,
        "target_revision": getattr(loop.target.model.config, "_commit_hash", None),
        "conversations": len(loop.dataset),
        "steps": loop.state.global_step,
        "best_eval_tau": loop.state.best_metric,
        "hardware": vars(find_hardware(loop.target.device)),
        "versions": vars(find_versions()),
        **objective,
        "init": loop.recipe.drafter.init,
        "init_sha256": run["init_sha256"],
    }


def _find_answers(dataset: ResponseDataset) -> list[int]:
    """Return the tokens of the answers that were trained on; of every n-th conversation where all are too many."""
    num_tokens = sum(int(dataset.is_response(number).sum()) for number in range(len(dataset)))
    tokens: list[int] = []
    for number in range(0, len(dataset), 1 + num_tokens // MAX_ANSWER_TOKENS):
        tokens += dataset.token_ids(number)[dataset.is_response(number)].tolist()
    return tokens[:MAX_ANSWER_TOKENS]


@torch.no_grad()
def measure_and_calibrate(
    drafter: Drafter, target: Target, dataset: ResponseDataset, vocabularies: Sequence[Tensor | None]
) -> list[tuple[Acceptance, float]]:
    """Measure tau on responses, and find the temperature at which confidence best says whether a slot is accepted.

    Only slots that decoding reaches count: all slots before them are right. About `MAX_CALIBRATION_ROWS` are used.
    What is minimized, over a grid of quarter octaves, is the cross-entropy between the probability of the drafter's
    most likely token and whether it is the text's token.

    Args:
        drafter: a trained drafter.
        target: its target.
        dataset: responses that were not trained on, every token an anchor; each rank measures a share.
        vocabularies: the only tokens that are drafted, each in turn; None for all.

    Returns:
        For each vocabulary the accepted lengths; and the temperature, above 1 for a drafter that is too sure.
    """
    rows = [DraftRows(target, token_ids) for token_ids in vocabularies]
    errors = torch.zeros(len(rows), len(TEMPERATURES), dtype=torch.float64)

    def add_errors(number: int, states: Tensor, is_right: Tensor) -> None:
        # Every n-th slot, as if all conversations had as many slots as this one.
        stride = max(1, round(len(states) * len(dataset) / MAX_CALIBRATION_ROWS))
        scores = drafter.selector.scores(states[::stride], rows[number])
        confidences = torch.stack([drafter.confidences(scores, t) for t in TEMPERATURES])  # (temperature, slot)
        # Below 1, or a wrong draft would cost infinitely much.
        log_confidences = confidences.log().clamp_max(-1e-6)
        log_wrong = torch.log(-torch.expm1(log_confidences))  # log(1 - confidence)
        log_probs = torch.where(is_right[::stride], log_confidences, log_wrong)
        errors[number] -= log_probs.sum(-1).cpu()

    acceptances = measure_vocabularies(drafter, target, dataset, vocabularies, visit=add_errors)
    best = torch.stack(ranks.gather(errors)).sum(0).argmin(-1).tolist()
    temperatures = [TEMPERATURES[index] for index in best]
    return list(zip(acceptances, temperatures, strict=True))
