"""Decode prompts call after call, one or several at a time, and keep what later calls can use."""

from collections.abc import Sequence
from typing import Unpack

from dpace.config import Width
from dpace.decode.batch import Batch, make_caches
from dpace.decode.generation import Generation, SamplingOptions, collect, make_continuation
from dpace.decode.loop import generate, generate_plain
from dpace.decode.pace import Paces
from dpace.drafter import Drafter
from dpace.fast.cache import RaggedCache
from dpace.target import Target

COMPILED_COLUMNS = 256
"""Compiled steps round the number of columns up to a multiple of this, so that other prompts have the same shapes."""


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
        self.paces = Paces(recall_mib)
        self.columns = 0
        self._caches: dict[int, list[RaggedCache]] = {}
        self.make_room(max_length or 1)

    def generate(self, token_ids: Sequence[int], **options: Unpack[SamplingOptions]) -> Generation:
        """Decode one prompt; arguments and errors as in `generate`."""
        if self.compile:
            return self.generate_batch([token_ids], **options)[0]
        if self.drafter is None:
            return generate_plain(self.target, token_ids, **options)
        return generate(self.target, self.drafter, token_ids, width=self.width, paces=self.paces, **options)

    def generate_batch(self, prompts: Sequence[Sequence[int]], **options: Unpack[SamplingOptions]) -> list[Generation]:
        """Decode several prompts at once; arguments and errors as in `generate_batch`."""
        seed = options.get("seed")
        rows = []
        for number, token_ids in enumerate(prompts):
            own: SamplingOptions = {**options, "seed": None if seed is None else seed + number}
            rows.append(make_continuation(self.target, token_ids, **own))
        if not rows:
            return []
        caches = None
        if self.compile:
            self.make_room(1 + max(row.limit for row in rows))
            made = make_caches(self.target, self.drafter, self.columns)  # without memory until something is read
            caches = self._caches.setdefault(len(rows), made)
        batch = Batch(self.target, self.drafter, rows, caches)
        return collect(rows, batch.steps(), batch.block_size, self.target.device)

    def make_room(self, num_tokens: int) -> None:
        """Let the caches of compiled steps have room for texts of this length, and keep none that have not."""
        if num_tokens > self.columns:
            self.columns = -(-num_tokens // COMPILED_COLUMNS) * COMPILED_COLUMNS
            self._caches.clear()


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
        target: the model whose text is kept; all its layers must have full attention.
        drafter: trained for this target; None gives plain decoding, one token a step.
        prompts: decoded all at once; memory limits their number.
        compile: `torch.compile` the steps after the first, with fixed shapes and, on a GPU, CUDA graphs. The first call
            takes a minute or more. For further calls take a `Decoder`, which keeps the caches that graphs refer to.
        options: see `SamplingOptions`; with a `seed`, prompt `i` draws with `seed + i`.

    Returns:
        One `Generation` a prompt, in order. The seconds of each are those of the whole batch: do not add them up.

    Raises:
        ValueError: as `generate`; also a layer without full attention, an attention implementation that accepts no 4-D
            mask, or layers on several devices.
    """
    return Decoder(target, drafter, compile=compile).generate_batch(prompts, **options)
