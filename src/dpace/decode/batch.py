"""Decode several prompts at once, each with the text that it gets alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Unpack

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dpace.decode.costs import DRAFT
from dpace.decode.generation import Generation, read_clock
from dpace.decode.loop import generate, generate_plain
from dpace.decode.request import Continuation, SamplingOptions, make_continuation
from dpace.decode.sampling import Sampler, verify_draft
from dpace.drafter import Drafter
from dpace.fast.attention import NAME as GROUPED_ATTENTION
from dpace.fast.cache import RaggedCache
from dpace.target import Target
from dpace.views import draft_block, mask_blocks

COMPILED_COLUMNS = 256
"""Compiled steps round the number of columns up to a multiple of this, so that other prompts have the same shapes."""


@dataclass
class _Row:
    """One prompt, its response so far, and the verifications that emitted it."""

    text: Continuation
    accepted_lengths: list[int] = field(default_factory=list)
    emitted_lengths: list[int] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)

    @property
    def start(self) -> int:
        """Position of the last token, which is the next block's anchor."""
        return len(self.text.text) - 1

    @property
    def limit(self) -> int:
        """Position of the last token that may be emitted."""
        return self.text.num_prompt + self.text.max_new_tokens - 1

    def emit(self, draft: list[int], drawn: list[int]) -> None:
        """Append the accepted beginning of a draft and the next of the target's own draws."""
        draft = draft[: self.text.remaining]
        emitted, accepted = self.text.take(verify_draft(draft, drawn), drawn)
        self.accepted_lengths.append(accepted)
        self.emitted_lengths.append(len(emitted))
        self.widths.append(len(draft) + 1)

    def generation(self, block_size: int, seconds: tuple[float, float]) -> Generation:
        """Give the finished row as a `Generation`; without lengths where nothing was drafted."""
        lengths = (self.accepted_lengths, self.emitted_lengths, self.widths) if block_size > 1 else ([], [], [])
        return Generation(self.text.text[self.text.num_prompt :], *lengths, block_size, *seconds)


def compiled_columns(num_tokens: int) -> int:
    """Round the longest length of a text up to that of the caches of compiled steps."""
    return -(-num_tokens // COMPILED_COLUMNS) * COMPILED_COLUMNS


class _Batch:
    """The rows that are not done, and the caches of target and drafter.

    A token's column in the target's cache is its position, so the caches have no holes. A query sees the columns up to
    its own position. A rejected token lies above these until the next block, which begins there and is no shorter,
    overwrites it.

    The drafter's cache begins with `block_size` columns for the slots, which are never kept; the other columns are as
    in the target's cache. The features of all tokens that the target read go into it; those of rejected tokens are
    hidden and overwritten in the same way.

    With `compile`, shapes are fixed: whole blocks, all columns, done rows stay. Without a drafter a block is a token.
    """

    def __init__(
        self, target: Target, drafter: Drafter | None, rows: list[_Row], captured: list[Tensor], *, compile: bool
    ):
        self.target, self.drafter, self.rows, self.captured = target, drafter, rows, captured
        self.is_fixed = compile
        longest = 1 + max(row.limit for row in rows)
        self.capacity = compiled_columns(longest) if compile else longest
        self.cache = RaggedCache(target.config, self.capacity)
        self.caches = [self.cache]
        if drafter is not None:
            self.drafter_cache = RaggedCache(drafter.config, drafter.block_size + self.capacity)
            self.caches.append(self.drafter_cache)
        options: Any = {"mode": "reduce-overhead", "dynamic": False, "disable": not compile}
        self.read: Any = torch.compile(_read, **options)
        self.draft_block: Any = torch.compile(draft_block, **options)

    def _tensor(self, values: list) -> Tensor:
        return torch.tensor(values, device=self.target.device)

    def prefill(self) -> None:
        """Read the prompts and emit the first tokens; padding is on the right, where no token sees it."""
        prompts = [row.text.text for row in self.rows]
        longest = max(map(len, prompts))
        padded = self._tensor([prompt + prompt[-1:] * (longest - len(prompt)) for prompt in prompts])
        self.positions = torch.arange(longest, device=padded.device).expand(len(padded), -1)
        self.cache.place(self.positions, longest)
        hidden, self.features = _read(self.target, self.captured, padded, self.cache, self.positions, None)
        last = self._tensor([row.start for row in self.rows])
        logits = self.target.logits(hidden[torch.arange(len(last), device=last.device), last])
        drawn = [row.text.draw(rows) for row, rows in zip(self.rows, logits.split(1), strict=True)]
        for row, token in zip(self.rows, torch.cat(drawn).tolist(), strict=True):
            row.text.take(0, [token])

    def draft(self) -> Int[Tensor, "batch slot"]:
        """Draft one block a row: its last token and the most likely tokens after it."""
        last_ids = [row.text.text[-1] for row in self.rows]
        if self.drafter is None:
            return self._tensor([[token] for token in last_ids])
        blocks, size = mask_blocks(self.drafter, last_ids), self.drafter.block_size
        starts = self._tensor([[row.start] for row in self.rows])
        slots = torch.arange(size, device=starts.device).expand(len(starts), -1)
        end = size + (self.capacity if self.is_fixed else max(row.start for row in self.rows))
        self.drafter_cache.place(torch.cat([size + self.positions, slots], dim=1), end)
        # The first features are those of whole prompts and have another shape, for which nothing is compiled.
        draft = self.draft_block if self.features.shape[1] == size else draft_block
        hidden = draft(
            self.drafter,
            self.target,
            blocks,
            self.features,
            position_ids=torch.cat([self.positions, starts + slots], dim=1),
            attention_mask=torch.arange(end, device=starts.device) < size + starts,
            cache=self.drafter_cache,
        )
        width = size if self.is_fixed else min(size, 1 + max(row.text.remaining for row in self.rows))
        logits = self.target.logits(hidden[:, 1:width].flatten(0, 1))
        blocks[:, 1:width] = logits.argmax(-1).unflatten(0, (len(blocks), -1))
        return blocks[:, :width]

    def verify(self, blocks: Int[Tensor, "batch slot"]) -> None:
        """Let the target read the blocks, and emit tokens.

        Slots past the last token that a row may emit share that token's position, and their results are not used.
        """
        width = blocks.shape[1]
        starts, limits = [row.start for row in self.rows], [row.limit for row in self.rows]
        slots = torch.arange(width, device=blocks.device)
        self.positions = torch.minimum(self._tensor(starts)[:, None] + slots, self._tensor(limits)[:, None])
        end = self.capacity if self.is_fixed else 1 + max(map(min, [start + width - 1 for start in starts], limits))
        mask = _additive(torch.arange(end, device=blocks.device) <= self.positions[..., None], self.target.model.dtype)
        self.cache.place(self.positions, end)
        hidden, features = self.read(self.target, self.captured, blocks, self.cache, self.positions, mask)
        self.features = features.clone()  # a CUDA graph writes its results to the same place each time
        logits = self.target.logits(hidden.flatten(0, 1)).unflatten(0, blocks.shape)
        parts = zip(self.rows, blocks, logits, strict=True)
        drawn = [block if row.text.is_done else row.text.draw(row_logits) for row, block, row_logits in parts]
        both = torch.stack([blocks, torch.stack(drawn)], dim=1).tolist()  # the only wait for the device
        for row, (block, own) in zip(self.rows, both, strict=True):
            if not row.text.is_done:
                row.emit(block[1:], own)

    def drop_done(self) -> None:
        """Drop the rows that are done, here and in the caches."""
        kept = [index for index, row in enumerate(self.rows) if not row.text.is_done]
        if len(kept) == len(self.rows) or (kept and self.is_fixed):
            return
        self.rows = [self.rows[index] for index in kept]
        if self.rows:
            indices = self._tensor(kept)
            self.positions, self.features = self.positions[indices], self.features[indices]
            for cache in self.caches:
                cache.batch_select_indices(indices)


def batch_steps(
    target: Target, drafter: Drafter, num_rows: int, *, temperature: float = 0.0, context: int
) -> Callable[[int], None]:
    """Make a function that runs one step of `generate_batch` with `num_rows` rows.

    It takes the same argument as the function that `dpace.decode.costs.single_steps` makes. A verification of one token
    runs as it does without a drafter.

    Memory: keys and values of the context in all rows, and its features.
    """
    size, filler = drafter.block_size, [drafter.mask_token_id] * context
    samplers = [Sampler(temperature, seed=0, device=target.device) for _ in range(num_rows)]
    rows = [_Row(Continuation(filler[:], context, 2 * size, set(), sampler)) for sampler in samplers]
    with torch.inference_mode(), target.capture(drafter.target_layer_ids) as captured:
        batch = _Batch(target, drafter, rows, captured, compile=False)
        batch.prefill()
        prompt_inputs = batch.positions, batch.features
    blocks = torch.full((num_rows, size), drafter.mask_token_id, device=target.device)

    @torch.inference_mode()
    def step(width: int) -> None:
        for row in rows:
            del row.text.text[context + 1 :]
        if width == 1:
            batch.captured = []
            batch.verify(blocks[:, :1])
        elif width > 1:
            with target.capture(drafter.target_layer_ids) as batch.captured:
                batch.verify(blocks[:, :width])
        else:
            batch.positions, batch.features = (x[:, :size] if width == DRAFT else x for x in prompt_inputs)
            batch.draft().tolist()  # waits for the device, as drawing does

    return step


def _read(target: Target, captured: list[Tensor], token_ids, cache, positions, mask) -> tuple[Tensor, Tensor]:
    """Run the target's layers and give the head's input and the features."""
    hidden = target.hidden(token_ids, cache=cache, position_ids=positions, attention_mask=mask)
    return hidden, torch.cat(captured, dim=-1) if captured else hidden[..., :0]


def _additive(
    is_visible: Bool[Tensor, "batch query column"], dtype: torch.dtype
) -> Float[Tensor, "batch 1 query column"]:
    """Make the mask that is added to the scores, which both `sdpa` and `eager` attention accept."""
    mask = torch.zeros(is_visible.shape, dtype=dtype, device=is_visible.device)
    return mask.masked_fill(~is_visible, torch.finfo(dtype).min)[:, None]


@torch.inference_mode()
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
    and accepted lengths are those of `generate`, above temperature 0 with the row's own seed. In low precision,
    rounding depends on the size of the batch.

    Memory: keys and values of the longest prompt, its response and a block, for each row, in target and drafter; logits
    of one block a row.

    Args:
        target: the model whose text is kept; for more than one prompt, all its layers must have full attention.
        drafter: trained for this target; None gives plain decoding, one token a step.
        prompts: decoded all at once; memory limits their number.
        compile: `torch.compile` the steps after the first, with fixed shapes and, on a GPU, CUDA graphs. The first call
            takes a minute or more; later calls with the same number of prompts reuse it.
        options: see `SamplingOptions`; with a `seed`, prompt `i` draws with `seed + i`.

    Returns:
        One `Generation` a prompt, in order. The seconds of each are those of the whole batch: do not add them up.

    Raises:
        ValueError: as `generate`; for more than one prompt also a layer without full attention, or an attention
            implementation that accepts no 4-D mask.
    """
    if len(prompts) == 1 and not compile:
        if drafter is None:
            return [generate_plain(target, prompts[0], **options)]
        return [generate(target, drafter, prompts[0], width="full", **options)]
    if drafter is not None:
        drafter.check_target(target)
    rows, seed = [], options.pop("seed", None)
    for number, token_ids in enumerate(prompts):
        row_options: SamplingOptions = {**options, "seed": None if seed is None else seed + number}
        rows.append(_Row(make_continuation(target, token_ids, **row_options)))
    if not rows:
        return []
    _check_batch(target, rows, compile=compile)
    started = read_clock(target.device)
    with target.capture(drafter.target_layer_ids if drafter is not None else ()) as captured:
        batch = _Batch(target, drafter, rows, captured, compile=compile)
        batch.prefill()
        first = read_clock(target.device)
        batch.drop_done()
        while batch.rows:
            batch.verify(batch.draft())
            batch.drop_done()
    seconds = (first - started, read_clock(target.device) - first)
    return [row.generation(drafter.block_size if drafter is not None else 1, seconds) for row in rows]


def _check_batch(target: Target, rows: Sequence[_Row], *, compile: bool) -> None:
    """Refuse targets whose attention or rotary embedding does not allow rows of different lengths."""
    implementation = target.config._attn_implementation
    if implementation not in ("sdpa", "eager", GROUPED_ATTENTION):
        raise ValueError(
            f"the target's attention is {implementation}, which takes no 4-D mask; load it with "
            "attn_implementation='sdpa', or decode one prompt at a time with `generate`"
        )
    if compile and target.is_spread:
        raise ValueError("the target's layers are on several devices, which cannot be compiled; leave --compile out")
    boundary, longest = target.rotation_boundary, 1 + max(row.limit for row in rows)
    if boundary and len(rows) > 1 and longest > boundary:
        raise ValueError(
            f"a text may have {longest} tokens; past {boundary} this target rotates all positions of a batch anew: "
            "decode one prompt at a time with `generate`"
        )
