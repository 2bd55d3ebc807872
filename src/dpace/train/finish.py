"""Write a trained drafter with its calibration and provenance."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpace.config import Recipe
from dpace.data.chat import tokenizer_hashes
from dpace.data.dataset import ResponseDataset
from dpace.drafter import Drafter
from dpace.ledger import write_json
from dpace.measure.rows import defined
from dpace.provenance import find_hardware, find_versions
from dpace.target import Target
from dpace.train.calibration import fit_confidence_temperature, measure_reliability
from dpace.train.callbacks import PeakMemory
from dpace.train.checkpointed import CheckpointedTrainer, room_for
from dpace.train.checkpoints import STATE
from dpace.train.identity import OBJECTIVE_SHA256


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
    """Calibrate a trained drafter, and write it with what it was made from.

    All ranks calibrate, since the target may need all of them.

    Args:
        folder: of the run; `provenance.json`, which says that the drafter is finished, comes last.
        drafter: the trained one.
        target: its target.
        trainer: has the log.
        dataset: what was trained on.
        validation: what the checkpoint was chosen by, and the confidences are fitted to.
        recipe: every setting.
        run: what `run.json` holds; None on ranks that do not write.
        memory: measured since training began.
    """
    temperature = fit_confidence_temperature(drafter, target, validation)
    reliability = measure_reliability(drafter, target, validation)
    if run is None:
        return
    sha256 = run.get(OBJECTIVE_SHA256)
    objective = {"objective": recipe.loss.objective} | ({"objective_sha256": sha256} if sha256 else {})
    record = {"confidence_temperature": temperature, **_record(target, trainer, validation, recipe)}
    drafter.config.dpace = {**record, **objective}
    start = {"init": recipe.drafter.init, "init_sha256": run["init_sha256"]}
    provenance = {**_provenance(target, trainer, dataset), **objective, **start, "peak_memory_bytes": memory.bytes}
    if drafter.validity is not None:
        provenance["reliability"] = reliability
    _write_folder(folder, drafter, trainer, provenance)


def _write_folder(folder: Path, drafter: Drafter, trainer: CheckpointedTrainer, provenance: dict[str, Any]) -> None:
    """Write the finished drafter; `provenance.json`, which says that it is finished, comes last."""
    with room_for("the drafter", folder):
        drafter.save_pretrained(folder)
        trainer.write_state(folder / STATE)
        write_json(folder / "provenance.json", provenance, indent=2)


def _record(target: Target, trainer: CheckpointedTrainer, validation: ResponseDataset, recipe: Recipe) -> dict:
    """Give what the drafter's config records: what it was trained for, and its tau.

    `dpace doctor` compares with it; engines ignore it.
    """
    record = {
        "target": target.short_name,
        "dtype": str(target.model.dtype).removeprefix("torch."),
        "thinking": recipe.thinking,
        **tokenizer_hashes(target),
    }
    measured = [entry for entry in trainer.state.log_history if "eval_tau" in entry]
    if measured:
        best = max(measured, key=lambda entry: entry["eval_tau"])
        record |= {
            "tau": best["eval_tau"],
            "tau_interval": [defined(best["eval_tau_low"]), defined(best["eval_tau_high"])],
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
