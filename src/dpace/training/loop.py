"""The training loop: from conversations and an untrained drafter to its weights after the last step.

A step draws its blocks, scores them through the frozen head, and divides, clips and applies the gradient. Accelerate
spreads it over the ranks. The drafter is measured every few steps, and checkpoints are written on the way.
"""

import contextlib
import copy
import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import convert_to_fp32, patch_environment, send_to_device, set_seed
from safetensors.torch import load_file
from torch.nn.utils import get_total_norm
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_cosine_schedule_with_warmup

from dpace.batches.dataset import ResponseDataset, collate, redraw
from dpace.blocks import Blocks, block_sizes
from dpace.config import Recipe, TrainConfig
from dpace.drafter import Drafter
from dpace.drafter.views import Inputs, blocks_hidden
from dpace.loss import SlotScores, Weigh, block_loss, frozen_head_nll
from dpace.loss.head_scores import chunk_bytes_of
from dpace.loss.scorer import Scorer
from dpace.measure.heldout import heldout_acceptance
from dpace.system import ranks
from dpace.system.device import TILED, default_dtype
from dpace.system.loading import refuse_infinite, translate_library_errors
from dpace.system.progress import progress_bar
from dpace.target import Target
from dpace.target.draft_rows import DraftRows
from dpace.target.head import TINY
from dpace.training.checkpoints import (
    REMOVE,
    WEIGHTS,
    TrainingState,
    checkpoint_folder,
    read_optimizer,
    read_state,
    write_checkpoint,
)
from dpace.training.optimizer import make_optimizer, products_dtype
from dpace.training.progress import Interrupt, StepLog, latest_numbers, open_trackers
from dpace.training.sharding import copy_weights, shard, wants_shards

T = TypeVar("T")
LOWER = "lower --train.learning-rate or --train.max-grad-norm, and name another folder with --output"


def num_steps(train: TrainConfig, conversations: int, num_ranks: int = 1) -> int:
    """Count the optimizer steps of a training."""
    if train.max_steps > 0:
        return train.max_steps
    step_size = train.batch_size * train.gradient_accumulation_steps * num_ranks
    return math.ceil(train.num_epochs * math.ceil(conversations / step_size))


def read_ahead(items: Iterator[T]) -> Iterator[T]:
    """Make each item in a thread, while the one before is used.

    Memory: one more item.
    """
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(next, items, None)
        while (item := following.result()) is not None:
            following = pool.submit(next, items, None)
            yield item


def score_blocks(drafter: Drafter, scorer: Scorer, batch: Inputs, *, forward: Any = None) -> tuple[SlotScores, Blocks]:
    """Draft the blocks of a micro-batch, and compute their losses.

    Args:
        drafter: is trained.
        scorer: computes the losses.
        batch: of `TrainingLoop.read_batch`, on the target's device.
        forward: runs the drafter; by default the drafter itself does.

    Returns:
        What the LM head and the drafter's selector give, and the blocks.
    """
    drafted = blocks_hidden(
        drafter, scorer.rows.target, batch, model=forward, with_target_hidden=scorer.needs_target_hidden
    )
    blocks = drafted.blocks
    config = scorer.loss
    # The target's may be there for a selector's loss alone; with it, token losses take a slower path.
    target_hidden = drafted.target_hidden if config.needs_target_probs else None
    head = drafter.selector.head(scorer.rows)
    scores = frozen_head_nll(
        drafter.selector.states(drafted),
        head,
        scorer.rows.index(blocks.labels),
        blocks.is_scored,
        weigh=scorer.weigh,
        token_loss=config.token_loss,
        target_hidden=target_hidden,
        scored_rows=batch.get("scored_rows"),
        chunk_bytes=chunk_bytes_of(config, head.weight, is_cpu=head.weight.is_cpu),
        num_candidates=drafter.selector.num_candidates,
    )
    return drafter.selector.add_loss(scores, drafted, scorer), blocks


class TrainingLoop:
    """Trains a drafter on blocks of a target's responses.

    `drafter` is whole on each rank; it is measured and written. `trained` has the parameters that steps change. It is
    the same drafter, or, where accelerate's configuration asks for FSDP2, a sharded copy, whose weights `drafter` gets
    for measuring, for checkpoints and at the end. So the files are the same as from one process. `wrapped` is `trained`
    as accelerate runs it.

    Memory, of a rank among n: a whole drafter with its gradient and moments; sharded, a whole drafter and a share 1/n
    of weights, gradient and moments.

    Args:
        drafter: trained in place; in fp32. On an accelerator its forward pass runs in bf16.
        target: its target.
        dataset: what is trained on.
        validation: what tau is measured on; may be empty.
        recipe: every setting.
        weigh: computes the weights of slots.
        checkpoints: folder for them.
    """

    def __init__(
        self,
        drafter: Drafter,
        target: Target,
        dataset: ResponseDataset,
        validation: ResponseDataset,
        recipe: Recipe,
        *,
        weigh: Weigh,
        checkpoints: Path,
    ):
        self.drafter = drafter
        self.target = target
        self.dataset = dataset
        self.validation = validation
        self.recipe = recipe
        self.config = recipe.train
        self.loss = recipe.loss
        self.checkpoints = checkpoints
        self.accelerator = self._make_accelerator()
        is_causal = drafter.spec.is_causal is True  # it may be "sliding" too
        self.block_sizes = block_sizes(drafter.block_size, is_growing=self.config.grow_blocks, is_causal=is_causal)
        self.micro_size = self.config.batch_size * ranks.num_ranks()
        self.step_size = self.micro_size * self.config.gradient_accumulation_steps
        self.steps_per_epoch = math.ceil(len(dataset) / self.step_size)
        self.state = TrainingState(max_steps=num_steps(self.config, len(dataset), ranks.num_ranks()))
        if self.config.gradient_checkpointing:
            drafter.activation_checkpointing_enable()
        self.is_sharded = wants_shards()
        self.trained = shard(copy.deepcopy(drafter)) if self.is_sharded else drafter
        drafted_tokens = dataset.seen_tokens if self.loss.vocabulary == "seen" else None
        self.scorer = Scorer(
            self.loss,
            # The loss, which makes the slots, does not know how far the training is.
            lambda slots: weigh(slots._replace(progress=self.progress)),
            DraftRows(target, drafted_tokens),
            needs_target_hidden=recipe.needs_target_hidden,
            autocast=self.autocast,
        )
        # Prepared are autocast and compilation, and, without shards, the sum of the gradients over the ranks.
        self.wrapped: Any = self.accelerator.prepare_model(
            self.trained, device_placement=not self.is_sharded, evaluation_mode=self.is_sharded
        )
        if self.is_sharded:
            self.accelerator.prepare_model(drafter, device_placement=False, evaluation_mode=True)  # for measuring
        self.optimizer = make_optimizer(self.trained, self.config)
        self.schedule = self._make_schedule()
        self.log = StepLog(drafter.block_size, target.device)
        self.interrupt = Interrupt()

    def _make_accelerator(self) -> Accelerator:
        """Choose the precision: fp32 on a CPU, bf16 with fp32 weights on an accelerator."""
        device = self.target.device
        is_bf16 = default_dtype(device) == torch.bfloat16
        AcceleratorState._reset_state(reset_partial_state=True)  # it keeps the device of a training before this one
        # Accelerate would not shard on a CPU, and would have all in bf16 on a GPU.
        with patch_environment(accelerate_use_fsdp=False):
            accelerator = Accelerator(
                cpu=device.type == "cpu",
                mixed_precision="bf16" if is_bf16 else "no",
                dynamo_backend="inductor" if self.config.torch_compile else None,
            )
        assert accelerator.device.type == device.type
        return accelerator

    def _make_schedule(self) -> LambdaLR:
        """Make the schedule of the learning rate, from where the training stands."""
        num_steps = self.state.max_steps
        # The last step is no warmup: otherwise a training of one step would have the learning rate 0.
        warmup = min(math.ceil(num_steps * self.config.warmup_ratio), num_steps - 1)
        # An epoch of torch's schedules is one of our steps.
        return get_cosine_schedule_with_warmup(self.optimizer, warmup, num_steps, last_epoch=self.state.global_step - 1)

    def autocast(self) -> contextlib.AbstractContextManager:
        """Open the precision of products for a `with` block: accelerate's, and on a CPU `--train.products`."""
        if self.target.device.type != "cpu":
            return self.accelerator.autocast()
        dtype = products_dtype(self.config, self.target.device)
        return torch.autocast("cpu", dtype, enabled=dtype != torch.float32)

    def forward(self, **inputs: Any) -> Any:
        """Run the drafter; whatever its products are rounded to, losses and their gradients start from fp32."""
        with self.autocast():  # on an accelerator, accelerate's wrapper opens it too
            return convert_to_fp32(self.wrapped(**inputs))

    @property
    def progress(self) -> float:
        """Share of the training that is done, 0 to 1; the same for all micro-batches of a step."""
        return self.state.global_step / self.state.max_steps

    def run(self, newest: Path | None = None) -> None:
        """Train to the last step; the drafter then has the best weights, or the last where tau was not measured.

        Args:
            newest: the checkpoint to go on from.

        Raises:
            ValueError: a loss, gradient or weight that is not finite; an objective that fails.
            OSError: no room on the disk; the same call goes on when there is.
            KeyboardInterrupt: after Ctrl-C or SIGTERM, with a checkpoint of the last step.
        """
        if newest is not None:
            with translate_library_errors(str(newest), REMOVE):
                self.state = read_state(newest)
                self.read_weights(newest)
                read_optimizer(newest, self.optimizer)
            self.schedule = self._make_schedule()
        state = self.state
        config = self.config
        with open_trackers(self.recipe) as track, progress_bar() as bar, self.interrupt.watching():
            task = bar.add_task(
                f"training, {self.loss.objective}", total=state.max_steps, completed=state.global_step, info=""
            )
            steps = self.batches_of_steps()
            if self.target.device.type != "cpu":  # there the thread would take cores from the training
                steps = read_ahead(steps)
            for batches in steps:
                if self.interrupt.is_asked:
                    break
                self.take_step(batches)
                if self.is_due(config.logging_steps):
                    track(state.add_to_log(self.log.entry(self.accelerator)))
                # Before a checkpoint, which records whether it is the best one.
                if len(self.validation) and self.is_due(config.eval_steps):
                    track(self.measure())
                is_best = state.best_global_step == state.global_step
                if is_best or self.interrupt.is_asked or self.is_due(config.save_steps or config.eval_steps):
                    self.save()
                bar.update(task, completed=state.global_step, info=latest_numbers(state))
        self.gather()
        if state.best_global_step not in (None, state.global_step):
            self.read_weights(checkpoint_folder(self.checkpoints, state.best_global_step))

    def is_due(self, num_steps: int) -> bool:
        """Return whether the time has come for what is done every so many steps, and after the last one."""
        step = self.state.global_step
        return step == self.state.max_steps or step % num_steps == 0

    def batches_of_steps(self) -> Iterator[list[Inputs]]:
        """Yield this rank's micro-batches of each step, from where the training stands to its end.

        Counts the steps itself, since it may be ahead of the training.
        """
        step = self.state.global_step
        max_steps = self.state.max_steps
        batch_size = self.config.batch_size
        # A micro-batch of all ranks is `micro_size` conversations in a row; the lower ranks take the first ones.
        offset = ranks.rank() * batch_size
        while step < max_steps:
            self.dataset.epoch, num_done = divmod(step, self.steps_per_epoch)
            steps = self.dataset.steps(self.step_size, seed=self.config.seed, is_grouped=self.config.group_by_length)
            for numbers in steps[num_done : num_done + max_steps - step]:
                num_slots = self.block_sizes[int(step / max_steps * len(self.block_sizes))]
                if step == max_steps - 1:  # whole blocks also where there are fewer steps than parts
                    num_slots = self.block_sizes[-1]
                starts = range(offset, len(numbers) + offset, self.micro_size)
                yield [self.read_batch(numbers[start : start + batch_size], num_slots) for start in starts]
                step += 1

    def read_batch(self, numbers: Sequence[int], num_slots: int) -> Inputs:
        """Read a micro-batch and draw its blocks of `num_slots`.

        The last step of an epoch may have no conversation left for this rank, which then reads one whose slots do not
        count, because the ranks keep step.
        """
        rows = [self.dataset[number] for number in numbers or (0,)]
        if num_slots < self.drafter.block_size:
            # Of half the slots there are twice as many blocks.
            num_anchors = self.config.num_anchors * self.drafter.block_size // num_slots
            rows = [redraw(row, num_anchors) for row in rows]
        batch = collate(rows, num_slots)
        is_scored = batch["is_scored"]
        is_scored &= bool(numbers)
        # Found here, on the host: on a device `nonzero` would make the host wait in each step.
        batch["scored_rows"] = is_scored.flatten().nonzero()[:, 0]
        batch["whole_blocks"] = is_scored[..., 1:].flatten(0, 1).all(-1).nonzero()[:, 0]
        return batch | {"counts": bool(numbers)}

    def send(self, batch: Inputs) -> Inputs:
        """Send a micro-batch to the target's device."""
        device = self.target.device
        inputs: Any = {**batch}
        for name, value in batch.items():
            if device.type in TILED and isinstance(value, torch.Tensor):
                inputs[name] = value.pin_memory()  # which is copied while the device computes
        inputs = send_to_device(inputs, device, non_blocking=True)
        return inputs | {"text": batch["token_ids"]}  # on the host, where the target looks for shared beginnings

    def take_step(self, batches: Sequence[Inputs]) -> None:
        """Take one optimizer step, which is the same however its conversations are split.

        The losses of blocks are only added up. What their sum is divided by, the items of the reduction, is counted
        over all micro-batches and ranks, and the accumulated gradient is divided by it. The sum of the weights, the
        divisor of the reduction `weights`, is known only then.

        Args:
            batches: this rank's micro-batches of `read_batch`; each rank has as many.

        Raises:
            ValueError: a loss or gradient that is not finite; the step is not taken then.

        Source: D-PACE (arXiv 2605.18810), equation 9.
        """
        started = time.perf_counter()
        # Of an objective that draws: the same after a resume.
        set_seed((self.config.seed + self.state.global_step) % 2**32)
        self.trained.train()
        totals = torch.zeros(3, device=self.target.device)  # losses, items, and ranks that are asked to end
        for number, batch in enumerate(batches, start=1):
            inputs = self.send(batch)
            with self.reduced_over_ranks(number == len(batches)):
                out, blocks = score_blocks(self.trained, self.scorer, inputs, forward=self.forward)
                losses, items = block_loss(out.losses, blocks.is_scored, out.weights, reduction=self.loss.reduction)
                losses.backward()  # divided by the step's items below, when they are known
            totals[:2] += torch.stack([losses.detach(), items * batch["counts"]])
            self.log.add_batch(out, blocks.is_scored)
        gradients = [parameter.grad for parameter in self.trained.parameters() if parameter.grad is not None]
        norm_of_sum = ranks.whole(get_total_norm(gradients))
        totals[2] = self.interrupt.asked_at is not None

        over_ranks = self.accelerator.reduce(totals, reduction="sum")
        # The only time that the host waits for the device.
        sum_of_losses, num_items, num_asked, norm = torch.stack([*over_ranks, norm_of_sum]).tolist()
        self.interrupt.is_asked = num_asked > 0
        divisor = max(num_items, TINY)
        loss = sum_of_losses / divisor
        factor = self.accelerator.num_processes / divisor  # the gradient is a mean over ranks
        norm *= factor
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise ValueError(
                f"step {self.state.global_step + 1} has the loss {loss} and a gradient of norm {norm}; {LOWER}, or "
                "correct an objective of your own whose weights are negative or not finite"
            )
        if self.config.max_grad_norm:
            factor *= min(1.0, self.config.max_grad_norm / (norm + 1e-6))
        # Division and clipping in one pass over all gradients.
        torch._foreach_mul_(gradients, factor)  # pyright: ignore[reportPrivateImportUsage]

        learning_rate = float(self.schedule.get_last_lr()[0])
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.state.global_step += 1
        self.state.epoch = self.state.global_step / self.steps_per_epoch
        seconds = time.perf_counter() - started
        numbers = {"loss": loss, "grad_norm": norm, "learning_rate": learning_rate, "seconds": seconds}
        self.log.steps.append(numbers)

    @contextlib.contextmanager
    def reduced_over_ranks(self, is_last: bool) -> Iterator[None]:
        """Let the ranks exchange gradients in the backward pass of a step's last micro-batch only."""
        if self.is_sharded:
            self.trained.set_requires_gradient_sync(is_last)  # pyright: ignore[reportCallIssue]
        if is_last or self.is_sharded:
            yield
        else:
            with self.accelerator.no_sync(self.wrapped):
                yield

    def gather(self) -> None:
        """Bring the weights as they are into `drafter`; all ranks must be here.

        Raises:
            ValueError: a step has spoilt them; names it and the tensors.
        """
        if self.is_sharded:
            copy_weights(self.trained, self.drafter)
        refuse_infinite(f"the drafter after step {self.state.global_step}", self.drafter, LOWER)

    def measure(self) -> dict[str, float]:
        """Measure tau of the validation responses, keep it where it is the best so far, and return the log's entry.

        Tau is what selects the best checkpoint: the loss cannot be compared between steps or objectives, and D-PACE's
        grows as the drafter gets better.
        """
        state = self.state
        self.gather()
        acceptance = heldout_acceptance(self.drafter, self.target, self.validation)
        if state.best_metric is None or acceptance.tau > state.best_metric:
            state.best_metric = acceptance.tau
            state.best_global_step = state.global_step
        names = ("eval_tau", "eval_tau_top", "eval_tau_oracle")
        # Only a selector has bounds.
        taus: dict[str, float] = dict(zip(names, (acceptance.tau, *acceptance.bounds), strict=False))
        return state.add_to_log(taus)

    def save(self) -> None:
        """Write a checkpoint."""
        self.gather()
        write_checkpoint(self.checkpoints, self.drafter, self.state, self.optimizer)

    def read_weights(self, folder: Path) -> None:
        """Read the weights, into the tensors that the optimizer knows."""
        self.drafter.load_state_dict(load_file(folder / WEIGHTS))
        if self.is_sharded:
            copy_weights(self.drafter, self.trained)
