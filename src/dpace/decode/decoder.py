"""Decode prompts call after call, one or several at a time, and keep what later calls can use."""

from collections.abc import Sequence
from typing import Unpack

import torch

from dpace.config import Width
from dpace.decode.batch import Batch, RowCaches, check_batch, compiled_columns
from dpace.decode.generation import Generation, read_clock
from dpace.decode.loop import generate, generate_plain
from dpace.decode.pace import Paces
from dpace.decode.request import SamplingOptions, make_continuation
from dpace.drafter import Drafter
from dpace.fast.packing import refresh_copies
from dpace.target import Target


class Decoder:
    """A target with its drafter, for many prompts.

    It keeps what was learned about the drafter and the answers to copy from (`Paces`) and, with `compile`, the caches
    that compiled steps refer to. So the steps are compiled once for each number of prompts and length.

    Memory: at most `recall_mib` MiB of answers; with `compile`, keys and values of the longest text in target and
    drafter, for each number of prompts that are decoded at once.

    Args:
        target: the model whose text is kept.
        drafter: trained for this target; None decodes plainly.
        width: see `generate`; compiled steps verify whole blocks.
        compile: see `generate_batch`.
        max_length: with `compile`, tokens of the longest prompt and response. Longer ones compile the steps again; by
            default that happens whenever a text is longer than all before.
        recall_mib: MiB of memory of answers, which single prompts with width `auto` copy from and are added to; 0 keeps
            none.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter | None,
        *,
        width: Width = "auto",
        compile: bool = False,
        max_length: int | None = None,
        recall_mib: float = 64.0,
    ):
        self.target = target
        self.drafter = drafter
        self.width: Width = width
        self.compile = compile
        self.columns = compiled_columns(max_length or 1)
        self.paces = Paces(recall_mib)
        self._caches: dict[int, RowCaches] = {}

    def generate(self, token_ids: Sequence[int], **options: Unpack[SamplingOptions]) -> Generation:
        """Decode one prompt; arguments and errors as in `generate`."""
        if self.compile:
            return self.generate_batch([token_ids], **options)[0]
        return self._generate_alone(token_ids, self.width, options)

    def _generate_alone(self, token_ids: Sequence[int], width: Width, options: SamplingOptions) -> Generation:
        if self.drafter is None:
            return generate_plain(self.target, token_ids, **options)
        return generate(self.target, self.drafter, token_ids, width=width, paces=self.paces, **options)

    def generate_batch(self, prompts: Sequence[Sequence[int]], **options: Unpack[SamplingOptions]) -> list[Generation]:
        """Decode several prompts at once; arguments and errors as in `generate_batch`."""
        if len(prompts) == 1 and not self.compile:
            return [self._generate_alone(prompts[0], "full", options)]
        if self.drafter is not None:
            self.drafter.check_target(self.target)
            refresh_copies(self.drafter)
        seed = options.get("seed")
        rows = []
        for number, token_ids in enumerate(prompts):
            own: SamplingOptions = {**options, "seed": None if seed is None else seed + number}
            rows.append(make_continuation(self.target, token_ids, **own))
        if not rows:
            return []
        check_batch(self.target, rows)
        started = read_clock(self.target.device)
        with torch.inference_mode():
            caches = self._find_caches(len(rows), 1 + max(row.limit for row in rows))
            batch = Batch(self.target, self.drafter, rows, caches, is_compiled=self.compile)
            batch.prefill()
            first = read_clock(self.target.device)
            batch.run()
        block_size = 1 if self.drafter is None else self.drafter.block_size
        end = read_clock(self.target.device)
        return [
            Generation.from_steps(row.steps, block_size, prefill_seconds=first - started, decode_seconds=end - first)
            for row in rows
        ]

    def make_room(self, num_tokens: int) -> None:
        """Let the caches of compiled steps have room for texts of this length, and keep none that have not."""
        columns = compiled_columns(num_tokens)
        if columns > self.columns:
            self.columns = columns
            self._caches.clear()

    def _find_caches(self, num_rows: int, num_tokens: int) -> RowCaches:
        """Return the caches for a number of rows; compiled steps keep theirs, with room for the longest text so far."""
        if not self.compile:
            return RowCaches(self.target, self.drafter, num_tokens)
        self.make_room(num_tokens)
        if num_rows not in self._caches:
            self._caches[num_rows] = RowCaches(self.target, self.drafter, self.columns)
        return self._caches[num_rows]


def generate_batch(
    target: Target,
    drafter: Drafter | None,
    prompts: Sequence[Sequence[int]],
    *,
    compile: bool = False,
    **options: Unpack[SamplingOptions],
) -> list[Generation]:
    """Decode several prompts at once with a drafter, each with the text that it gets alone.

    Each step drafts a block for every row and verifies the whole blocks (`width="full"`, `verify_rule="equality"` of
    `generate`). Rows accept different numbers of tokens, and leave the batch when they are done. In fp32 a row's text
    and accepted lengths are those of `generate`, above temperature 0 with the row's own seed; with a draft vocabulary,
    tokens of other prompts may be drafted too. In low precision, rounding depends on the size of the batch.

    Memory: keys and values of the longest prompt, its response and a block, for each row, in target and drafter; logits
    of one block a row.

    Args:
        target: the model whose text is kept; for more than one prompt, all its layers must have full attention.
        drafter: trained for this target; None gives plain decoding, one token a step.
        prompts: decoded all at once; memory limits their number.
        compile: `torch.compile` the steps after the first, with fixed shapes and, on a GPU, CUDA graphs. The first call
            takes a minute or more. For further calls take a `Decoder`, which keeps the caches that graphs refer to.
        options: see `SamplingOptions`; with a `seed`, prompt `i` draws with `seed + i`.

    Returns:
        One `Generation` a prompt, in order. The seconds of each are those of the whole batch: do not add them up.

    Raises:
        ValueError: as `generate`; for more than one prompt also a layer without full attention, an attention
            implementation that accepts no 4-D mask, or layers on several devices.
    """
    return Decoder(target, drafter, compile=compile).generate_batch(prompts, **options)
