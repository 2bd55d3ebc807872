"""A thin Hugging Face Trainer with the frozen-head loss.

Turn a recipe's training settings into arguments of transformers' Trainer.

The forward pass of a training step.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ProgressCallback, TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from dpace.batches.dataset import GroupedSampler, ResponseDataset, collate
from dpace.blocks import Blocks
from dpace.config import LossConfig, TrainConfig
from dpace.drafter import Drafter
from dpace.drafter.views import blocks_hidden
from dpace.loss import HeadOutput, Weigh, block_loss, count_items, frozen_head_nll
from dpace.measure.heldout import heldout_acceptance
from dpace.system.device import TILED, default_dtype
from dpace.target import Target
from dpace.target.head import Head
from dpace.train.anchors import block_size_at, cut_blocks
from dpace.train.callbacks import StepClock, TrackerGuard, TrainingBar
from dpace.train.checkpoints import CheckpointedTrainer
from dpace.train.optimizer import MuonAdamW

PACKAGES = {"azure_ml": "azureml-core", "comet_ml": "comet-ml", "dagshub": "dagshub mlflow"}
"""Packages of trackers, where they have another name."""


def check_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker that transformers does not know or that is not installed, before any work.

    Raises:
        ValueError: names it, and what to do.
    """
    for name in names:
        if name in ("all", "none"):
            continue
        if name not in INTEGRATION_TO_CALLBACK:
            raise ValueError(
                f"--train.report-to has {name!r}, which transformers does not know; choose some of "
                f"{', '.join(sorted(INTEGRATION_TO_CALLBACK))}, or leave it out"
            )
        if name not in get_available_reporting_integrations():
            raise ValueError(
                f"--train.report-to has {name}, and its package is not installed: run `pip install "
                f"{PACKAGES.get(name, name)}`, or leave it out"
            )


def training_arguments(
    config: TrainConfig, folder: Path, *, device: torch.device, has_validation: bool
) -> TrainingArguments:
    """Turn a recipe into arguments of transformers' Trainer.

    Training is in fp32 on a CPU, and in bf16 with fp32 master weights on an accelerator.
    """
    arguments = TrainingArguments(
        output_dir=str(folder),
        learning_rate=config.learning_rate,
        num_train_epochs=config.num_epochs,
        max_steps=config.max_steps,
        warmup_steps=config.warmup_ratio,
        lr_scheduler_type="cosine",
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        max_grad_norm=config.max_grad_norm,
        weight_decay=config.weight_decay,
        seed=config.seed,
        logging_steps=config.logging_steps,
        logging_nan_inf_filter=False,  # it hides them; `CheckpointedTrainer` refuses them
        eval_strategy="steps" if has_validation else "no",
        eval_steps=config.eval_steps,
        save_strategy="steps",
        save_steps=config.save_steps or config.eval_steps,
        metric_for_best_model="eval_tau" if has_validation else None,
        greater_is_better=True,
        bf16=default_dtype(device) == torch.bfloat16,
        use_cpu=device.type == "cpu",
        torch_compile=config.torch_compile,
        activation_checkpointing=config.gradient_checkpointing,
        remove_unused_columns=False,
        disable_tqdm=False,
        report_to=list(config.report_to),
        dataloader_pin_memory=device.type in TILED,
    )
    assert arguments.device.type == device.type
    arguments._n_gpu = min(1, arguments.n_gpu)  # several GPUs by torchrun, a process each; never DataParallel
    return arguments


def score_batch(
    model: Any,
    target: Target,
    inputs: dict[str, Any],
    config: LossConfig,
    *,
    drafter: Drafter,
    head: Head,
    head_index: Tensor | None,
    weigh: Weigh,
    progress: float = 0.0,
    make_mask: Callable[[Blocks, int], Any] | None = None,
    chunk_bytes: int | None = None,
) -> tuple[HeadOutput, Blocks]:
    """Run the forward pass of a micro-batch, up to the weighted loss of each block.

    Args:
        model: the drafter, or its wrapper in training.
        target: its target.
        inputs: a batch of `collate`.
        config: the loss.
        drafter: what `model` wraps.
        head: the target's, or its rows of the tokens that `head_index` knows.
        head_index: the row of each token in `head`; None where it has all.
        weigh: computes the weights.
        progress: share of the training that is done.
        make_mask: see `blocks_hidden`.
        chunk_bytes: see `frozen_head_nll`.

    Returns:
        What the head gives, and the blocks.
    """
    hidden, blocks, target_hidden = blocks_hidden(
        model,
        target,
        inputs,
        mask_token_id=drafter.mask_token_id,
        target_layer_ids=drafter.target_layer_ids,
        with_target_hidden=config.needs_target_probs,
        make_mask=make_mask,
    )
    labels = blocks.labels if head_index is None else head_index[blocks.labels]
    out = frozen_head_nll(
        hidden,
        head,
        labels,
        blocks.is_scored,
        weigh=lambda slots: weigh(slots._replace(progress=progress)),
        token_loss=config.token_loss,
        target_hidden=target_hidden,
        chunk_bytes=chunk_bytes,
    )
    return out, blocks


class _Schedule(TrainerCallback):
    """Tells the dataset which epoch's anchors to draw, and logs, measures and saves at the last step too."""

    def __init__(self, dataset: ResponseDataset):
        self.dataset = dataset

    def on_epoch_begin(self, args, state, control, **_):
        """Set the epoch."""
        self.dataset.epoch = int(state.epoch)  # on resume, the epoch that was interrupted

    def on_step_end(self, args, state, control, **_):
        """Log, measure and save at the last step."""
        if state.global_step == state.max_steps:
            control.should_evaluate, control.should_save = args.eval_strategy != "no", True
            control.should_log = True


class DrafterTrainer(CheckpointedTrainer):
    """Trains a drafter on blocks of a target's responses with a frozen-head loss.

    A thin subclass of `transformers.Trainer`: optimizer, schedule, accumulation and distribution are the base class's
    own; checkpoints and resuming are those of `CheckpointedTrainer`. The log has the loss, seconds per step, and the
    drafter's accuracy and share of the weight by slot.

    `evaluate` gives `eval_tau`, the tokens emitted per verification on responses that are not trained on, which also
    selects the best checkpoint. The loss itself cannot be compared between steps or objectives: D-PACE's grows as the
    drafter gets better.

    The loss is divided by `count_items` over all ranks and micro-batches of a step, so a step is the same however it is
    split. The sum of the weights is known only after a step's last forward pass; with the reduction `weights` it is the
    accumulated gradient that is divided, before it is clipped.

    Source: D-PACE (arXiv 2605.18810), equation 9.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        drafter: Drafter,
        target: Target,
        dataset: ResponseDataset,
        validation: ResponseDataset,
        args: TrainingArguments,
        loss: LossConfig,
        weigh: Weigh,
        config: TrainConfig,
    ):
        super().__init__(
            drafter,
            args=args,
            train_dataset=dataset,
            eval_dataset=validation,
            data_collator=partial(collate, block_size=drafter.block_size),
            callbacks=[_Schedule(dataset)],
        )
        self.remove_callback(ProgressCallback)
        for tracker in [c for c in self.callback_handler.callbacks if "integrations" in type(c).__module__]:
            self.remove_callback(tracker)
            self.add_callback(TrackerGuard(tracker))
        self.add_callback(TrainingBar(f"training, {loss.objective}"))
        self.step_clock = StepClock()
        self.add_callback(self.step_clock)
        self.model_accepts_loss_kwargs = False
        self.use_muon = config.optimizer == "muon"
        self.grow_blocks, self.num_anchors = config.grow_blocks, config.num_anchors
        self.group_by_length, self.dataset = config.group_by_length, dataset
        self.target, self.validation, self.loss_config = target, validation, loss
        self.weigh = weigh
        self.head, self.head_index = target.head, None
        if loss.vocabulary == "seen":
            self.head, self.head_index = target.head.part(dataset.seen_tokens)
        self._sums: dict[str, Tensor] = {}
        self._step_weight = torch.zeros((), device=target.device)

    def _get_train_sampler(self, train_dataset=None):
        """Order the conversations by length where a step has several; else as transformers does."""
        args = self.args
        step_size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        if not self.group_by_length or step_size == 1:
            return super()._get_train_sampler(train_dataset)
        return GroupedSampler(self.dataset, step_size)

    def create_optimizer(self, model=None):
        """Make AdamW as transformers does, or Muon."""
        if self.optimizer is None and self.use_muon:
            args = self.args
            named = self.model.named_parameters()
            self.optimizer = MuonAdamW(named, lr=args.learning_rate, weight_decay=args.weight_decay)
        return super().create_optimizer(model)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Take the micro-batches of a step; draw their anchors anew for short blocks."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        block_size = self.drafter.block_size
        slots = block_size_at(self.progress, block_size) if self.grow_blocks else block_size
        if slots < block_size:
            started = time.perf_counter()
            num_anchors = self.num_anchors * block_size // slots
            batches = [cut_blocks(batch, slots, num_anchors) for batch in batches]
            num_items = self._get_num_items_in_batch(batches, device)
            self.step_clock.seconds_before = time.perf_counter() - started
        return batches, num_items

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device):
        """Count the items of a whole optimizer step, over its micro-batches and all ranks."""
        if self.loss_config.reduction == "weights":
            return torch.ones((), device=device)  # training_step divides
        count = sum(count_items(batch["is_scored"], self.loss_config.reduction) for batch in batch_samples)
        return self._over_ranks(torch.as_tensor(count, device=device))

    def _over_ranks(self, value: Tensor) -> Tensor:
        """Sum over all ranks."""
        total: Any = self.accelerator.reduce(value, reduction="sum")
        return total

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Run forward and backward of a micro-batch.

        After a step's last one, with the reduction `weights`, divide the gradient by the sum of the weights.
        """
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.loss_config.reduction == "weights" and self.accelerator.sync_gradients:
            total = float(self._over_ranks(self._step_weight).clamp_min(torch.finfo(torch.float32).tiny))
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.div_(total)
            self._step_weight = torch.zeros_like(self._step_weight)
        return loss

    @property
    def progress(self) -> float:
        """Share of the training that is done, 0 to 1; the same for all micro-batches of a step."""
        return self.state.global_step / max(1, self.state.max_steps)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Compute the loss of a micro-batch, in nats; `Trainer` calls this."""
        drafter, config = self.drafter, self.loss_config
        out, blocks = score_batch(
            model,
            self.target,
            inputs,
            config,
            drafter=drafter,
            head=self.head,
            head_index=self.head_index,
            weigh=self.weigh,
            progress=self.progress,
            chunk_bytes=config.chunk_mib and config.chunk_mib * 2**20,
        )
        self._add_to_log(out, blocks.is_scored)
        loss = block_loss(out.losses, blocks.is_scored, reduction=config.reduction, num_items=num_items_in_batch)
        return loss * self.accelerator.num_processes  # DDP averages gradients over ranks

    def _add_to_log(self, out, is_scored):
        """Add up what is logged as means."""
        self._step_weight += out.weights.sum()
        by_slot = {"weights": out.weights, "matches": out.is_match, "nll": out.nll, "slots": is_scored}
        missing = self.drafter.block_size - is_scored.shape[-1]  # slots that shorter blocks lack
        sums = {"losses": out.losses.detach().sum()[None]} | {
            name: nn.functional.pad(values.float().sum((0, 1)), (0, missing)) for name, values in by_slot.items()
        }
        for name, value in sums.items():
            self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Add accuracy and share of the weight by slot to the training log."""
        if "loss" in logs and self._sums:
            sums = {name: self._over_ranks(value) for name, value in self._sums.items()}
            self._sums = {}
            if self.loss_config.reduction == "weights":
                logs["loss"] = float(sums["losses"] / sums["weights"].sum())
            logs["step_seconds"] = statistics.median(self.step_clock.seconds)
            logs["tokens_per_second"] = float(sums["slots"].sum()) / sum(self.step_clock.seconds)  # scored ones
            self.step_clock.seconds.clear()
            shares = sums["weights"] / sums["weights"].sum()
            accuracy = sums["matches"] / sums["slots"].clamp_min(1)
            logs["nll"] = float(sums["nll"].sum() / sums["slots"].sum().clamp_min(1))
            for slot, (share, right) in enumerate(
                list(zip(shares.tolist(), accuracy.tolist(), strict=True))[1:], start=1
            ):
                logs[f"weight_share/{slot}"], logs[f"slot_accuracy/{slot}"] = share, right
        super().log(logs, *args, **kwargs)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Measure tau of the validation responses with its 95 % interval and log it."""
        self.gather()
        self.refuse_infinite_weights()
        acceptance = heldout_acceptance(self.drafter, self.target, self.validation, over_ranks=True)
        low, high = acceptance.interval()
        metrics = {"tau": acceptance.tau, "tau_low": low, "tau_high": high}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
