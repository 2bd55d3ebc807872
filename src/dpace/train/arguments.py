"""Turn a recipe's training settings into arguments of transformers' Trainer."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from dpace.config import TrainConfig
from dpace.device import TILED, default_dtype

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
