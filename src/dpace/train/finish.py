"""Write a trained drafter with its calibration and provenance."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dpace.batches.dataset import ResponseDataset
from dpace.config import Recipe
from dpace.drafter import Drafter
from dpace.drafter.vocabulary import MAX_TAU_LOSS, DraftVocabulary
from dpace.measure.heldout import heldout_acceptance
from dpace.measure.results import defined
from dpace.metrics import Acceptance
from dpace.system.ledger import write_json
from dpace.system.provenance import find_hardware, find_versions
from dpace.target import Target
from dpace.target.chat import tokenizer_hashes
from dpace.train.calibration import fit_confidence_temperature
from dpace.train.callbacks import PeakMemory
from dpace.train.checkpoints import STATE, CheckpointedTrainer, room_for
from dpace.train.identity import OBJECTIVE_SHA256

SERVED = torch.bfloat16
"""Dtype of a finished drafter's weights, as of most published ones; engines in bf16 read it as it is."""


def finish(
    folder: Path,
    drafter: Drafter,
    target: Target,
    trainer: CheckpointedTrainer,
    dataset: ResponseDataset,
    validation: ResponseDataset,
    recipe: Recipe,
    run: Mapping[str, Any] | None,
    memory: PeakMemory,
) -> None:
    """Round a trained drafter to 16 bits, measure it, and write it with what it was made from.

    What is measured is what is written. All ranks call this, since the target may need them; the first one writes.

    Args:
        folder: of the run; `provenance.json`, which says that the drafter is finished, comes last.
        drafter: the trained one; its weights are rounded in place, and stay in fp32.
        target: its target.
        trainer: has the log.
        dataset: what was trained on.
        validation: what the checkpoint was chosen by, and the confidences are fitted to.
        recipe: every setting.
        run: what `run.json` holds; None on ranks that do not write.
        memory: measured since training began.
    """
    round_weights(drafter)
    acceptance = heldout_acceptance(drafter, target, validation, over_ranks=True) if len(validation) else None
    vocabulary = _find_vocabulary(drafter, target, acceptance, dataset, validation, recipe)
    temperature = fit_confidence_temperature(drafter, target, validation)
    if vocabulary is not None:
        token_ids = vocabulary.token_ids
        vocabulary.confidence_temperature = fit_confidence_temperature(drafter, target, validation, token_ids)
    if run is None:
        return
    sha256 = run.get(OBJECTIVE_SHA256)
    objective = {"objective": recipe.loss.objective} | ({"objective_sha256": sha256} if sha256 else {})
    record = {"confidence_temperature": temperature, **_record(target, acceptance, validation, recipe)}
    drafter.config.dpace = {**record, **objective}
    start = {"init": recipe.drafter.init, "init_sha256": run["init_sha256"]}
    provenance = {**_provenance(target, trainer, dataset), **objective, **start, "peak_memory_bytes": memory.bytes}
    _write_folder(folder, drafter, vocabulary, trainer, provenance)


@torch.no_grad()
def round_weights(drafter: Drafter) -> None:
    """Round all weights to numbers that `SERVED` has."""
    for parameter in drafter.parameters():
        parameter.copy_(parameter.to(SERVED))


def _find_vocabulary(
    drafter: Drafter,
    target: Target,
    acceptance: Acceptance | None,
    dataset: ResponseDataset,
    validation: ResponseDataset,
    recipe: Recipe,
) -> DraftVocabulary | None:
    """Give the tokens of the training text as a draft vocabulary, where the drafter needs no others.

    None where tau of the validation responses falls by more than `MAX_TAU_LOSS`, or is not known. None for a drafter
    that started from another one, which has learned tokens of other texts.
    """
    if acceptance is None or recipe.drafter.init is not None:
        return None
    vocabulary = DraftVocabulary([*dataset.seen_tokens.tolist(), *target.stop_token_ids])
    token_ids = vocabulary.token_ids
    tau = heldout_acceptance(drafter, target, validation, token_ids=token_ids, over_ranks=True).tau
    return vocabulary if tau >= (1 - MAX_TAU_LOSS) * acceptance.tau else None


def _write_folder(
    folder: Path,
    drafter: Drafter,
    vocabulary: DraftVocabulary | None,
    trainer: CheckpointedTrainer,
    provenance: dict[str, Any],
) -> None:
    """Write the finished drafter; `provenance.json`, which says that it is finished, comes last."""
    with room_for("the drafter", folder):
        drafter.save_pretrained(folder, dtype=SERVED)
        if vocabulary is not None:
            vocabulary.save(folder)
        trainer.write_state(folder / STATE)
        write_json(folder / "provenance.json", provenance, indent=2)


def _record(target: Target, acceptance: Acceptance | None, validation: ResponseDataset, recipe: Recipe) -> dict:
    """Give what the drafter's config records: what it was trained for, and its tau.

    `dpace doctor` compares with it; engines ignore it.
    """
    record = {
        "target": target.short_name,
        "dtype": str(target.model.dtype).removeprefix("torch."),
        "thinking": recipe.thinking,
        **tokenizer_hashes(target),
    }
    if acceptance is not None:
        record |= {
            "tau": acceptance.tau,
            "tau_interval": list(map(defined, acceptance.interval())),
            "tau_responses": validation.ids,
        }
    return record


def _provenance(target: Target, trainer: CheckpointedTrainer, dataset: ResponseDataset) -> dict:
    """Give what a drafter was made from, for `provenance.json`."""
    return {
        "target": target.name,
        "target_revision": getattr(target.model.config, "_commit_hash", None),
        "conversations": len(dataset),
        "conversations_without_anchor": dataset.num_skipped,
        "steps": trainer.state.global_step,
        "best_eval_tau": trainer.state.best_metric,
        "hardware": vars(find_hardware(target.device)),
        "versions": vars(find_versions()),
    }
