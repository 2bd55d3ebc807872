"""A thin Hugging Face Trainer: responses -> features and blocks -> drafter -> loss, and what to log."""

import json
import platform
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments

import dpace
from dpace.config import LossConfig, Recipe, TrainConfig, read_recipe, write_recipe
from dpace.data.dataset import ResponseDataset, collate
from dpace.data.responses import Response, tokenizer_hashes
from dpace.drafter import Drafter
from dpace.loss import Head, block_loss, count_items, frozen_head_nll
from dpace.measure.heldout import blocks_hidden, fit_confidence_temperature, heldout_acceptance
from dpace.objective import make_weigh
from dpace.progress import PeakMemory, SaveOnInterrupt, StepTimer, TrainingBar
from dpace.target import Target
from dpace.train.optimizer import MuonAdamW


class _Schedule(TrainerCallback):
    """Tells the dataset which epoch's anchors to draw, and measures and saves at the last step too."""

    def __init__(self, dataset: ResponseDataset):
        self.dataset = dataset

    def on_epoch_begin(self, args, state, control, **_):
        self.dataset.epoch = int(state.epoch)  # on resume, the epoch that was interrupted

    def on_step_end(self, args, state, control, **_):
        if state.global_step == state.max_steps:
            control.should_evaluate, control.should_save = args.eval_strategy != "no", True


class DrafterTrainer(Trainer):
    """Trains a drafter on blocks of a target's responses with a frozen-head loss.

    A thin subclass of `transformers.Trainer`: optimizer, schedule, accumulation, distribution, checkpoints and resuming are
    its own. Logs the loss, seconds a step, the drafter's accuracy and share of the weight by slot; `evaluate` gives `eval_tau`, the emitted
    tokens a verification on responses that are not trained on, which also selects the best checkpoint. The loss itself cannot be compared
    between steps or objectives: D-PACE's grows as the drafter gets better.

    The loss is divided by `count_items` over all ranks and micro-batches of a step, so a step is the same however it is split.
    The sum of the weights is known only after a step's last forward pass; with the reduction `weights` it is the accumulated
    gradient that is divided, before it is clipped.

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
        use_muon: bool = False,
    ):
        super().__init__(
            model=drafter,
            args=args,
            train_dataset=dataset,
            eval_dataset=validation,
            data_collator=partial(collate, block_size=drafter.block_size),
            callbacks=[_Schedule(dataset)],
        )
        self.remove_callback(ProgressCallback)
        self.add_callback(TrainingBar(f"training, {loss.objective}"))
        self.step_timer = StepTimer()
        self.add_callback(self.step_timer)
        self.model_accepts_loss_kwargs = False
        self.use_muon = use_muon
        self.target, self.validation, self.loss_config = target, validation, loss
        self.drafter = drafter
        self.weigh = make_weigh(loss, drafter.block_size)
        self.head, self.head_index = target.head, None
        if loss.vocabulary == "seen":
            self.head, self.head_index = _seen_head(target, dataset)
        self._sums: dict[str, Tensor] = {}
        self._step_weight = torch.zeros((), device=target.device)

    def create_optimizer(self, model=None):
        """AdamW as transformers makes it, or Muon."""
        if self.optimizer is None and self.use_muon:
            args = self.args
            named = self.drafter.named_parameters()
            self.optimizer = MuonAdamW(named, lr=args.learning_rate, weight_decay=args.weight_decay)
        return super().create_optimizer(model)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device):
        """Count the items of a whole optimizer step, over its micro-batches and all ranks."""
        if self.loss_config.reduction == "weights":
            return torch.ones((), device=device)  # training_step divides
        count = sum(count_items(batch["is_scored"], self.loss_config.reduction) for batch in batch_samples)
        return self._over_ranks(torch.as_tensor(count, device=device))

    def _over_ranks(self, value: Tensor) -> Tensor:
        """The sum over all ranks."""
        total: Any = self.accelerator.reduce(value, reduction="sum")
        return total

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Forward and backward of a micro-batch; after a step's last one, divide the gradient by the sum of the weights."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.loss_config.reduction == "weights" and self.accelerator.sync_gradients:
            total = float(self._over_ranks(self._step_weight).clamp_min(torch.finfo(torch.float32).tiny))
            for parameter in self.drafter.parameters():
                if parameter.grad is not None:
                    parameter.grad.div_(total)
            self._step_weight = torch.zeros_like(self._step_weight)
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of a micro-batch, in nats; what `Trainer` calls."""
        drafter, config = self.drafter, self.loss_config
        hidden, blocks, target_hidden = blocks_hidden(
            model,
            self.target,
            inputs,
            mask_token_id=drafter.mask_token_id,
            target_layer_ids=drafter.target_layer_ids,
            with_target_hidden=config.needs_target_probs,
        )
        labels = blocks.labels if self.head_index is None else self.head_index[blocks.labels]
        out = frozen_head_nll(
            hidden,
            self.head,
            labels,
            blocks.is_scored,
            weigh=self.weigh,
            token_loss=config.token_loss,
            target_hidden=target_hidden,
        )
        self._add_to_log(out, blocks.is_scored)
        loss = block_loss(out.losses, blocks.is_scored, reduction=config.reduction, num_items=num_items_in_batch)
        return loss * self.accelerator.num_processes  # DDP averages gradients over ranks

    def _add_to_log(self, out, is_scored):
        """Add up what is logged as means."""
        self._step_weight += out.weights.sum()
        sums = {
            "losses": out.losses.detach().sum()[None],
            "weights": out.weights.sum((0, 1)),
            "matches": out.is_match.float().sum((0, 1)),
            "nll": out.nll.sum((0, 1)),
            "slots": is_scored.float().sum((0, 1)),
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
            logs["step_seconds"] = statistics.median(self.step_timer.seconds)
            logs["tokens_per_second"] = float(sums["slots"].sum()) / sum(self.step_timer.seconds)  # scored ones
            self.step_timer.seconds.clear()
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
        acceptance = heldout_acceptance(self.drafter, self.target, self.validation)
        low, high = acceptance.interval()
        metrics = {"tau": acceptance.tau, "tau_low": low, "tau_high": high}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def _seen_head(target: Target, dataset: ResponseDataset) -> tuple[Head, Tensor]:
    """The head's rows of the tokens that occur in the training text, and where each token's row is."""
    tokens = torch.unique(torch.cat([token_ids for _, token_ids, _ in dataset.rows]))
    index = torch.full((len(target.head.weight),), -1, dtype=torch.long)
    index[tokens] = torch.arange(len(tokens))
    device = target.device
    return target.head._replace(weight=target.head.weight[tokens.to(device)].contiguous()), index.to(device)


def training_arguments(
    config: TrainConfig, folder: Path, *, device: torch.device, has_validation: bool
) -> TrainingArguments:
    """The recipe in the words of transformers' Trainer: fp32 on CPU, bf16 with fp32 master weights on GPU."""
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
        eval_strategy="steps" if has_validation else "no",
        eval_steps=config.eval_steps,
        save_strategy="steps",
        save_steps=config.eval_steps,
        save_total_limit=2,
        load_best_model_at_end=has_validation,
        metric_for_best_model="eval_tau" if has_validation else None,
        greater_is_better=True,
        bf16=device.type == "cuda",
        use_cpu=device.type == "cpu",
        activation_checkpointing=config.gradient_checkpointing,
        remove_unused_columns=False,
        disable_tqdm=False,
        report_to=list(config.report_to),
        dataloader_pin_memory=device.type == "cuda",
    )
    assert arguments.device.type == device.type
    arguments._n_gpu = min(1, arguments.n_gpu)  # several GPUs by torchrun, a process each; never DataParallel
    return arguments


def is_trained(folder: str | Path, recipe: Recipe) -> bool:
    """Say whether a folder holds a finished drafter of this recipe.

    Raises:
        ValueError: it holds a run, finished or not, of another recipe.
    """
    folder = Path(folder)
    if not (folder / "recipe.yaml").exists():
        return False
    old = read_recipe(folder / "recipe.yaml")
    for name in ("target", "prompts", "drafter", "loss", "train"):
        if getattr(old, name) != getattr(recipe, name):
            raise ValueError(
                f"{folder} holds a run with another setting of `{name}`: {getattr(old, name)}, now {getattr(recipe, name)}; "
                "name another --output or delete that folder"
            )
    return (folder / "provenance.json").exists()


def make_datasets(
    target: Target, responses: Sequence[Response], validation: Sequence[Response], recipe: Recipe
) -> tuple[ResponseDataset, ResponseDataset]:
    """Make what `train` takes: conversations to train on, and others with every response token as an anchor.

    Their features are computed here where they fit in `feature_cache_gib`, so that several drafters can share them.

    Raises:
        ValueError: nothing to train on.
    """
    config = recipe.train
    dataset = ResponseDataset(responses, max_length=config.max_length, num_anchors=config.num_anchors, seed=config.seed)
    if not len(dataset):
        raise ValueError(
            f"none of {len(responses)} responses has two tokens in a row that the target wrote; nothing to train on"
        )
    measured = ResponseDataset(validation, max_length=config.max_length, num_anchors=None, seed=config.seed)
    layer_ids = Drafter.layer_ids(target, **vars(recipe.drafter))
    for part, with_last in ((dataset, recipe.loss.needs_target_probs), (measured, False)):
        part.keep_features(target, layer_ids, limit_bytes=config.feature_cache_gib * 2**30, with_last=with_last)
    return dataset, measured


def train(
    target: Target, dataset: ResponseDataset, validation: ResponseDataset, recipe: Recipe, folder: str | Path
) -> Drafter:
    """Train a drafter and write its folder; an interrupted run goes on from its last checkpoint.

    Memory: drafter, its gradient and the optimizer's moments in fp32; the target; features of a batch, or of all
    conversations where they are kept; O(batch x block tokens x (tokens + block tokens)) bytes for the dense mask on CPU; the
    loss as `frozen_head_nll` says. Disk: two checkpoints of three times the drafter's size.

    Args:
        target: the frozen target.
        dataset: what it wrote, from `make_datasets`.
        validation: for measuring tau during training; best greedy responses. May be empty.
        recipe: every setting.
        folder: receives `config.json`, `model.safetensors`, `recipe.yaml`, `provenance.json`, `trainer_state.json`, and
            `checkpoints/`.

    Returns:
        The best drafter by tau of the validation responses; the last one where there are none.

    Raises:
        ValueError: the text contains the mask token, or the folder holds a run of another recipe.
        KeyboardInterrupt: after Ctrl-C, with a checkpoint of the last step.
    """
    folder, config = Path(folder), recipe.train
    is_trained(folder, recipe)
    drafter = Drafter.from_target(target, seed=config.seed, **vars(recipe.drafter))
    if any((token_ids == drafter.mask_token_id).any() for _, token_ids, _ in dataset.rows):
        raise ValueError(
            f"the training text contains the mask token {drafter.mask_token_id}; "
            "name another with --drafter.mask-token-id"
        )
    args = training_arguments(
        config, folder / "checkpoints", device=target.device, has_validation=bool(len(validation))
    )
    trainer = DrafterTrainer(drafter, target, dataset, validation, args, recipe.loss, config.optimizer == "muon")
    is_begun = Path(folder / "checkpoints").is_dir()
    resume = transformers.trainer_utils.get_last_checkpoint(str(folder / "checkpoints")) if is_begun else None
    if trainer.is_world_process_zero():
        folder.mkdir(parents=True, exist_ok=True)
        write_recipe(recipe, folder / "recipe.yaml")
    interrupt = SaveOnInterrupt()
    trainer.add_callback(interrupt)
    memory = PeakMemory(target.device)
    if resume and _is_last(
        Path(resume)
    ):  # all that is missing is the folder's own files; Trainer would take another step
        trainer.state = TrainerState.load_from_json(str(Path(resume) / "trainer_state.json"))
        drafter.load_state_dict(load_file(Path(trainer.state.best_model_checkpoint or resume) / "model.safetensors"))
    else:
        with interrupt.watching():
            trainer.train(resume_from_checkpoint=resume)
    if trainer.is_world_process_zero():
        temperature = fit_confidence_temperature(drafter, target, validation)
        record = _record(target, trainer, validation, recipe)
        drafter.config.dpace = {"confidence_temperature": temperature, **record}
        drafter.save_pretrained(folder)
        trainer.state.save_to_json(str(folder / "trainer_state.json"))
        provenance = {**_provenance(target, trainer, dataset), "peak_memory_bytes": memory.bytes}
        (folder / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")
    return drafter


def _is_last(checkpoint: Path) -> bool:
    """The checkpoint is that of the last step."""
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    return state.global_step >= state.max_steps


def _record(target: Target, trainer: Trainer, validation: ResponseDataset, recipe: Recipe) -> dict:
    """What a drafter was trained for and how well it did, for its config; `dpace doctor` compares, engines ignore it."""
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
            "tau_interval": [best["eval_tau_low"], best["eval_tau_high"]],
            "tau_responses": validation.ids,
        }
    return record


def _provenance(target: Target, trainer: Trainer, dataset: ResponseDataset) -> dict:
    """Where a drafter comes from."""
    return {
        "dpace": dpace.__version__,
        "target": target.name,
        "target_revision": getattr(target.model.config, "_commit_hash", None),
        "conversations": len(dataset),
        "conversations_without_anchor": dataset.num_skipped,
        "steps": trainer.state.global_step,
        "best_eval_tau": trainer.state.best_metric,
        "device": str(target.device),
        "processor": platform.processor() or platform.machine(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "numpy": np.__version__},
    }
