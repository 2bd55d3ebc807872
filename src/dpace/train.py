"""A thin Hugging Face Trainer: responses -> features and blocks -> drafter -> loss, and what to log."""

import json
import platform
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainingArguments

import dpace
from dpace import weights as W
from dpace.config import LossConfig, Recipe, TrainConfig, read_recipe, write_recipe
from dpace.dataset import ResponseDataset, collate
from dpace.drafter import Drafter
from dpace.heldout import blocks_hidden, heldout_acceptance
from dpace.loss import Head, Weigh, block_loss, count_items, frozen_head_nll
from dpace.optimizer import MuonAdamW
from dpace.progress import SaveOnInterrupt, TrainingBar
from dpace.responses import Response
from dpace.target import Target


def make_weigh(config: LossConfig, block_size: int) -> Weigh:
    """The weights function of an objective."""
    schedules = {
        "dflash": partial(W.dflash_weights, gamma=config.gamma or W.dflash_gamma(block_size)),
        "uniform": W.uniform_weights,
        "head": partial(W.head_weights, base=config.base),
    }
    if config.objective in schedules:
        schedule = schedules[config.objective]
        return lambda token_probs, is_scored: schedule(is_scored)
    dynamic = {
        "dpace": W.dpace_weights,
        "dpace-confidence-only": W.dpace_confidence_only_weights,
        "dpace-continuation-only": W.dpace_continuation_only_weights,
    }
    return partial(dynamic[config.objective], alpha=config.alpha)


class _SetEpoch(TrainerCallback):
    """Tells the dataset which epoch's anchors to draw; on resume the state holds the epoch that was interrupted."""

    def __init__(self, dataset: ResponseDataset):
        self.dataset = dataset

    def on_epoch_begin(self, args, state, control, **_):
        self.dataset.epoch = int(state.epoch)


class DrafterTrainer(Trainer):
    """Trains a drafter on blocks of a target's responses with a frozen-head loss.

    A thin subclass of `transformers.Trainer`: optimizer, schedule, accumulation, distribution, checkpoints and resuming are
    its own. Logs the loss, the drafter's accuracy and share of the weight by slot; `evaluate` gives `eval_tau`, the emitted
    tokens a verification on held-out responses, which also selects the best checkpoint. The loss itself cannot be compared
    between steps or objectives: D-PACE's grows as the drafter gets better.

    The loss is divided by `count_items` over all ranks and micro-batches of a step, so a step is the same however it is split.

    Source: D-PACE (arXiv 2605.18810), equation 9.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        drafter: Drafter,
        target: Target,
        dataset: ResponseDataset,
        heldout: ResponseDataset,
        args: TrainingArguments,
        loss: LossConfig,
        use_muon: bool = False,
    ):
        super().__init__(
            model=drafter,
            args=args,
            train_dataset=dataset,
            eval_dataset=heldout,
            data_collator=partial(collate, block_size=drafter.block_size),
            callbacks=[_SetEpoch(dataset)],
        )
        self.remove_callback(ProgressCallback)
        self.add_callback(TrainingBar(f"training, {loss.objective}"))
        self.model_accepts_loss_kwargs = False
        self.use_muon = use_muon
        self.target, self.heldout, self.loss_config = target, heldout, loss
        self.drafter = drafter
        self.weigh = make_weigh(loss, drafter.block_size)
        self.head, self.head_index = target.head, None
        if loss.vocabulary == "seen":
            self.head, self.head_index = _seen_head(target, dataset)
        self._sums: dict[str, Tensor] = {}

    def create_optimizer(self, model=None):
        """AdamW as transformers makes it, or Muon."""
        if self.optimizer is None and self.use_muon:
            args = self.args
            named = self.drafter.named_parameters()
            self.optimizer = MuonAdamW(named, lr=args.learning_rate, weight_decay=args.weight_decay)
        return super().create_optimizer(model)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device):
        """Count the items of a whole optimizer step, over its micro-batches and all ranks."""
        count = sum(count_items(batch["is_scored"], self.loss_config.reduction) for batch in batch_samples)
        return self.accelerator.reduce(torch.as_tensor(count, device=device), reduction="sum")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of a micro-batch, in nats; what `Trainer` calls."""
        drafter = self.drafter
        hidden, blocks = blocks_hidden(
            model, self.target, inputs, mask_token_id=drafter.mask_token_id, target_layer_ids=drafter.target_layer_ids
        )
        labels = blocks.labels if self.head_index is None else self.head_index[blocks.labels]
        out = frozen_head_nll(hidden, self.head, labels, blocks.is_scored, weigh=self.weigh)
        self._add_to_log(out, labels, blocks.is_scored)
        loss = block_loss(
            out.losses, blocks.is_scored, reduction=self.loss_config.reduction, num_items=num_items_in_batch
        )
        return loss * self.accelerator.num_processes  # DDP averages gradients over ranks

    def _add_to_log(self, out, labels, is_scored):
        """Add up what is logged as means."""
        sums = {
            "weights": out.weights.sum((0, 1)),
            "matches": ((out.top_tokens == labels) & is_scored).float().sum((0, 1)),
            "nll": out.nll.sum((0, 1)),
            "slots": is_scored.float().sum((0, 1)),
        }
        for name, value in sums.items():
            self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Add accuracy and share of the weight by slot to the training log."""
        if "loss" in logs and self._sums:
            sums = {name: self.accelerator.reduce(value, reduction="sum")[1:] for name, value in self._sums.items()}
            self._sums = {}
            shares = sums["weights"] / sums["weights"].sum()
            accuracy = sums["matches"] / sums["slots"].clamp_min(1)
            logs["nll"] = float(sums["nll"].sum() / sums["slots"].sum().clamp_min(1))
            for slot, (share, right) in enumerate(zip(shares.tolist(), accuracy.tolist(), strict=True), start=1):
                logs[f"weight_share/{slot}"], logs[f"slot_accuracy/{slot}"] = share, right
        super().log(logs, *args, **kwargs)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Measure held-out tau with its 95 % interval and log it."""
        acceptance = heldout_acceptance(self.drafter, self.target, self.heldout)
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


def training_arguments(config: TrainConfig, folder: Path, *, device: torch.device) -> TrainingArguments:
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
        eval_strategy="steps",
        eval_steps=config.eval_steps,
        save_strategy="steps",
        save_steps=config.eval_steps,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_tau",
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
    target: Target, responses: Sequence[Response], heldout: Sequence[Response], recipe: Recipe
) -> tuple[ResponseDataset, ResponseDataset]:
    """Make what `train` takes: conversations to train on, and held-out ones with every response token as an anchor.

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
    measured = ResponseDataset(heldout, max_length=config.max_length, num_anchors=None, seed=config.seed)
    layer_ids = Drafter.layer_ids(target, **vars(recipe.drafter))
    for part in (dataset, measured):
        part.keep_features(target, layer_ids, limit_bytes=config.feature_cache_gib * 2**30)
    return dataset, measured


def train(
    target: Target, dataset: ResponseDataset, heldout: ResponseDataset, recipe: Recipe, folder: str | Path
) -> Drafter:
    """Train a drafter and write its folder; an interrupted run goes on from its last checkpoint.

    Memory: drafter, its gradient and the optimizer's moments in fp32; the target; features of a batch, or of all
    conversations where they are kept; O(batch x block tokens x (tokens + block tokens)) bytes for the dense mask on CPU; the
    loss as `frozen_head_nll` says. Disk: two checkpoints of three times the drafter's size.

    Args:
        target: the frozen target.
        dataset: what it wrote, from `make_datasets`.
        heldout: for measuring tau during training; best greedy responses.
        recipe: every setting.
        folder: receives `config.json`, `model.safetensors`, `recipe.yaml`, `provenance.json`, `trainer_state.json`, and
            `checkpoints/`.

    Returns:
        The best drafter by held-out tau.

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
    args = training_arguments(config, folder / "checkpoints", device=target.device)
    trainer = DrafterTrainer(drafter, target, dataset, heldout, args, recipe.loss, config.optimizer == "muon")
    is_begun = Path(folder / "checkpoints").is_dir()
    resume = transformers.trainer_utils.get_last_checkpoint(str(folder / "checkpoints")) if is_begun else None
    if trainer.is_world_process_zero():
        folder.mkdir(parents=True, exist_ok=True)
        write_recipe(recipe, folder / "recipe.yaml")
    interrupt = SaveOnInterrupt()
    trainer.add_callback(interrupt)
    with interrupt.watching():
        trainer.train(resume_from_checkpoint=resume)
    if trainer.is_world_process_zero():
        drafter.save_pretrained(folder)
        trainer.state.save_to_json(str(folder / "trainer_state.json"))
        (folder / "provenance.json").write_text(json.dumps(_provenance(target, trainer, dataset), indent=2) + "\n")
    return drafter


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
