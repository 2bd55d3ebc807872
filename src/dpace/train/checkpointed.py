"""A Trainer with checkpoints all or nothing and without pickle, and with numbers that stay finite."""

import copy
import dataclasses
import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import Trainer, TrainerState

from dpace import ranks
from dpace.drafter import Drafter
from dpace.ledger import write_text
from dpace.loading import refuse_infinite
from dpace.train.checkpoints import (
    STATE,
    checkpoint_folder,
    finish,
    prune,
    read_optimizer,
    read_random,
    unfinished_folder,
    write_optimizer,
    write_random,
)
from dpace.train.sharding import gather_weights, scatter_weights, shard, sharded_by_dpace, wants_shards
from dpace.validity import load_validity

LOWER = "lower --train.learning-rate or --train.max-grad-norm, and name another folder with --output"


class CheckpointedTrainer(Trainer):
    """Replaces how `transformers.Trainer` writes and reads checkpoints.

    Its own are written in place, so a killed process leaves half of one, which is then taken; and they are pickled.
    Training ends at the first loss, gradient or weight that is NaN or infinite, before it reaches a checkpoint.

    Where accelerate's configuration asks for FSDP2, a copy of the drafter is sharded and trained. The drafter itself
    stays whole on each rank, and gets the weights for measuring, for checkpoints and at the end. So the files are the
    same as those of one process.

    Memory, of a rank among n: a whole drafter, and a share 1/n of weights, gradients and moments.
    """

    model: Any
    """What is trained: the drafter, or its sharded copy."""

    def __init__(self, drafter: Drafter, **kwargs):
        self.drafter, self.is_sharded = drafter, wants_shards()
        with sharded_by_dpace():
            super().__init__(model=copy.deepcopy(drafter) if self.is_sharded else drafter, **kwargs)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError("accelerate was set up with FSDP or DeepSpeed in this process before; let dpace set it up")
        if self.is_sharded:
            self.model.attach_validity(None)  # the drafter's own is trained
            shard(self.model)
            self.is_distributed_loading_by_transformers = True  # the Trainer then leaves placement and gradients to it

    def gather(self) -> None:
        """Bring the weights as they are into `drafter`; all ranks must be here."""
        if self.is_sharded:
            gather_weights(self.model, self.drafter)

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Run forward and backward of a micro-batch.

        Raises:
            ValueError: the loss is not finite.
        """
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not bool(loss.isfinite()):
            self._refuse_step(f"the loss of step {self.state.global_step + 1} is {float(loss)}")
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        """Give the norm of the gradient; one that is not finite is refused before the step is taken."""
        norm: Any = ranks.whole(super()._get_grad_norm(model, grad_norm=grad_norm))
        if not math.isfinite(float(norm)):
            self._refuse_step(f"the gradient of step {self.state.global_step + 1} has the norm {float(norm)}")
        return norm

    def _refuse_step(self, fault: str):
        kept = "the last checkpoint is kept in " + str(self.args.output_dir)
        raise ValueError(f"{fault}, with the learning rate {self.args.learning_rate:g}; {LOWER} ({kept})")

    def refuse_infinite_weights(self) -> None:
        """Refuse weights that a step has spoilt.

        Raises:
            ValueError: names the step and the tensors.
        """
        refuse_infinite(f"the drafter after step {self.state.global_step}", self.drafter, LOWER)

    def _determine_best_metric(self, metrics, trial) -> bool:
        """Note the best step, and keep its weights where no checkpoint of it is due."""
        is_best = super()._determine_best_metric(metrics, trial)
        if is_best and not self.control.should_save:
            self._write_checkpoint(has_optimizer=False)
        return is_best

    def _save_checkpoint(self, model, trial=None) -> None:
        """Write a checkpoint aside and let it take its place; keep it and the best one."""
        self.store_flos()
        self._write_checkpoint(has_optimizer=True)

    def _write_checkpoint(self, *, has_optimizer: bool) -> None:
        """Write a checkpoint, which training can go on from only with the optimizer's state."""
        self.gather()
        self.refuse_infinite_weights()
        checkpoints, step = Path(str(self.args.output_dir)), self.state.global_step
        best = self.state.best_global_step
        best_folder = checkpoint_folder(checkpoints, best) if best else None
        self.state.best_model_checkpoint = str(best_folder) if best_folder else None
        unfinished = unfinished_folder(checkpoints, step)
        with room_for(f"the checkpoint of step {step}", checkpoints, unfinished):
            if self.is_world_process_zero():
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            if has_optimizer:
                write_random(unfinished, self.args.process_index)
            if has_optimizer and (self.is_sharded or self.is_world_process_zero()):
                keep = unfinished if self.is_world_process_zero() else None
                write_optimizer(keep, self.optimizer, self.lr_scheduler)
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                self.drafter.save_pretrained(unfinished)
                self.write_state(unfinished / STATE)
                folder = finish(checkpoints, step)
                prune(checkpoints, folder, best_folder)
        self.accelerator.wait_for_everyone()

    def write_state(self, path: Path) -> None:
        """Write the log and the place in the training, all or nothing, as `TrainerState` reads them.

        The entry of the whole run is left out: it tells of this process's own steps only.
        """
        state = dataclasses.asdict(self.state)
        state["log_history"] = [entry for entry in state["log_history"] if "train_runtime" not in entry]
        write_text(path, json.dumps(state, indent=2, sort_keys=True) + "\n")

    def read_finished(self, state: TrainerState) -> None:
        """Take over the state and the best weights of a run whose last step has a checkpoint."""
        self.state = state
        step = state.best_global_step or state.global_step
        self._load_from_checkpoint(str(checkpoint_folder(Path(str(self.args.output_dir)), step)))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        """Read the weights, into the tensors that the optimizer knows."""
        folder, head = Path(resume_from_checkpoint), self.drafter.validity
        self.drafter.load_state_dict(load_file(folder / "model.safetensors"))
        if self.is_sharded:
            scatter_weights(self.drafter, self.model)
        kept = load_validity(folder, self.drafter.config.hidden_size)
        if head is not None and kept is not None:
            head.load_state_dict(kept.state_dict())

    def load_best(self) -> None:
        """Read the weights of the best step, if one was measured; else take those of the last one."""
        self.gather()
        if self.state.best_global_step:
            best = checkpoint_folder(Path(str(self.args.output_dir)), self.state.best_global_step)
            self._load_from_checkpoint(str(best))

    def _init_training_state(self, *args, **kwargs):
        """Find the best checkpoint by its step, since its path changes when the folder is moved."""
        trained = super()._init_training_state(*args, **kwargs)
        if self.state.best_global_step:
            best = checkpoint_folder(Path(str(self.args.output_dir)), self.state.best_global_step)
            self.state.best_model_checkpoint = str(best)
        return trained

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Read the state of optimizer and schedule."""
        if checkpoint is not None:
            read_optimizer(Path(checkpoint), self.optimizer, self.lr_scheduler)

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Do nothing: bf16 needs no scaler."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Set the random generators."""
        if checkpoint is not None:
            read_random(Path(checkpoint), self.args.process_index)


@contextmanager
def room_for(what: str, folder: Path, unfinished: Path | None = None) -> Iterator[None]:
    """Turn a full disk into one line, and free what was written so far.

    Raises:
        OSError: it cannot be written.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if unfinished:
            shutil.rmtree(unfinished, ignore_errors=True)
        reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        raise OSError(
            f"cannot write {what} into {folder}: {reason}; make room there and run the same command: it goes "
            "on from the last checkpoint"
        ) from error
