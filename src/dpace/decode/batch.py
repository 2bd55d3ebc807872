"""Decode several prompts at once, each with the text that it gets alone.

Steps of fixed shapes for `torch.compile`: two graphs, and one wait for the device in a step.

Nothing of the loop's state goes from the host to the device: the last tokens and their places stay there, and only the
tokens of a step come back.

The rows of a batch, their caches, and one step for all of them.
"""

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
from dpace.drafter.views import draft_block, mask_blocks
from dpace.drafter.vocabulary import DraftHead
from dpace.fast.attention import NAME as GROUPED_ATTENTION
from dpace.fast.cache import RaggedCache
from dpace.target import Target


@dataclass
class Row:
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


class Buffers:
    """The caches of target and drafter.

    Memory: keys and values of `capacity` tokens a row in both, allocated at the first step.

    Args:
        target: the model.
        drafter: None for plain decoding.
        capacity: longest text, in tokens.
    """

    def __init__(self, target: Target, drafter: Drafter | None, capacity: int):
        self.target, self.capacity = RaggedCache(target.config, capacity), capacity
        self.drafter: Any = None
        if drafter is not None:
            self.drafter = RaggedCache(drafter.config, drafter.block_size + capacity)

    def keep(self, indices: Int[Tensor, " row"]) -> None:
        """Keep some rows."""
        for cache in self._caches():
            cache.batch_select_indices(indices)

    def forget(self) -> None:
        """Begin new texts."""
        for cache in self._caches():
            cache.forget()

    def _caches(self) -> list[RaggedCache]:
        return [cache for cache in (self.target, self.drafter) if cache is not None]


class Batch:
    """The rows that are not done, and the caches of target and drafter.

    A token's column in the target's cache is its position, so the caches have no holes. A query sees the columns up to
    its own position. A rejected token lies above these until the next block, which begins there and is no shorter,
    overwrites it.

    The drafter's cache begins with `block_size` columns for the slots, which are never kept; the other columns are as
    in the target's cache. The features of all tokens that the target read go into it; those of rejected tokens are
    hidden and overwritten in the same way.

    Without a drafter a block is a token.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter | None,
        rows: list[Row],
        captured: list[Tensor],
        buffers: Buffers | None = None,
    ):
        self.target, self.drafter, self.rows, self.captured = target, drafter, rows, captured
        self.buffers = buffers or Buffers(target, drafter, 1 + max(row.limit for row in rows))
        prompts = (token for row in rows for token in row.text.text)
        self.draft_head = DraftHead(target, drafter.vocabulary if drafter is not None else None, prompts)

    def _tensor(self, values: list) -> Tensor:
        return torch.tensor(values, device=self.target.device)

    def prefill(self) -> None:
        """Read the prompts and emit the first tokens; padding is on the right, where no token sees it."""
        prompts = [row.text.text for row in self.rows]
        longest = max(map(len, prompts))
        padded = self._tensor([prompt + prompt[-1:] * (longest - len(prompt)) for prompt in prompts])
        self.positions = torch.arange(longest, device=padded.device).expand(len(padded), -1)
        self.buffers.target.place(self.positions, longest)
        hidden, self.features = read(self.target, self.captured, padded, self.buffers.target, self.positions, None)
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
        end = size + max(row.start for row in self.rows)
        cache = self.buffers.drafter
        cache.place(torch.cat([size + self.positions, slots], dim=1), end)
        hidden = draft_block(
            self.drafter,
            self.target,
            blocks,
            self.features,
            position_ids=torch.cat([self.positions, starts + slots], dim=1),
            attention_mask=torch.arange(end, device=starts.device) < size + starts,
            cache=cache,
        )
        width = min(size, 1 + max(row.text.remaining for row in self.rows))
        logits = self.draft_head.logits(hidden[:, 1:width].flatten(0, 1))
        blocks[:, 1:width] = self.draft_head.tokens(logits).unflatten(0, (len(blocks), -1))
        return blocks[:, :width]

    def verify(self, blocks: Int[Tensor, "batch slot"]) -> None:
        """Let the target read the blocks, and emit tokens.

        Slots past the last token that a row may emit share that token's position, and their results are not used.
        """
        width = blocks.shape[1]
        starts, limits = [row.start for row in self.rows], [row.limit for row in self.rows]
        slots = torch.arange(width, device=blocks.device)
        self.positions = torch.minimum(self._tensor(starts)[:, None] + slots, self._tensor(limits)[:, None])
        end = 1 + max(map(min, [start + width - 1 for start in starts], limits))
        mask = additive(torch.arange(end, device=blocks.device) <= self.positions[..., None], self.target.model.dtype)
        self.buffers.target.place(self.positions, end)
        hidden, self.features = read(self.target, self.captured, blocks, self.buffers.target, self.positions, mask)
        logits = self.target.logits(hidden.flatten(0, 1)).unflatten(0, blocks.shape)
        drawn = [row.text.draw(row_logits) for row, row_logits in zip(self.rows, logits, strict=True)]
        both = torch.stack([blocks, torch.stack(drawn)], dim=1).tolist()  # the only wait for the device
        for row, (block, own) in zip(self.rows, both, strict=True):
            row.emit(block[1:], own)

    def drop_done(self) -> None:
        """Drop the rows that are done, here and in the caches."""
        kept = [index for index, row in enumerate(self.rows) if not row.text.is_done]
        if len(kept) == len(self.rows):
            return
        self.rows = [self.rows[index] for index in kept]
        if self.rows:
            indices = self._tensor(kept)
            self.positions, self.features = self.positions[indices], self.features[indices]
            self.buffers.keep(indices)


def read(target: Target, captured: list[Tensor], token_ids, cache, positions, mask) -> tuple[Tensor, Tensor]:
    """Run the target's layers and give the head's input and the features."""
    hidden = target.hidden(token_ids, cache=cache, position_ids=positions, attention_mask=mask)
    return hidden, torch.cat(captured, dim=-1) if captured else hidden[..., :0]


def additive(
    is_visible: Bool[Tensor, "batch query column"], dtype: torch.dtype
) -> Float[Tensor, "batch 1 query column"]:
    """Make the mask that is added to the scores, which both `sdpa` and `eager` attention accept."""
    mask = torch.zeros(is_visible.shape, dtype=dtype, device=is_visible.device)
    return mask.masked_fill(~is_visible, torch.finfo(dtype).min)[:, None]


Column = Int[Tensor, "batch 1"]


class FixedBatch(Batch):
    """A batch whose steps are compiled: whole blocks, all columns, and rows that are done stay to the end.

    At temperature 0 drafting and its head are a graph, and verification, its head and the number of accepted tokens are
    another. Above, tokens are drawn between graphs, as they are without.
    """

    def __init__(
        self, target: Target, drafter: Drafter | None, rows: list[Row], captured: list[Tensor], buffers: Buffers
    ):
        super().__init__(target, drafter, rows, captured, buffers)
        samplers = [row.text.sampler for row in rows]
        self.is_greedy = all(one.temperature == 0 and not one.processors for one in samplers)
        options: Any = {"mode": "reduce-overhead", "dynamic": False}
        self.draft_step: Any = torch.compile(draft_step, **options)
        self.verify_step: Any = torch.compile(verify_step, **options)

    def prefill(self) -> None:
        """Read the prompts, emit the first tokens, and put the state of the loop on the device."""
        super().prefill()
        self.has_drafted = False
        self.limits = self._tensor([[row.limit] for row in self.rows])
        self._place()

    def _place(self) -> None:
        """Say which token is the last of each row, and where it is."""
        self.anchors = self._tensor([[row.text.text[-1]] for row in self.rows])
        self.starts = self._tensor([[row.start] for row in self.rows])

    def draft(self) -> Int[Tensor, "batch slot"]:
        """Draft one block a row, see `Batch.draft`."""
        if self.drafter is None:
            return self.anchors
        # The first draft reads prompts, of any length, and makes the drafter's cache, which no graph may do.
        step = self.draft_step if self.has_drafted else draft_step
        self.has_drafted = True
        cache, state = self.buffers.drafter, (self.anchors, self.starts, self.positions, self.features)
        return step(self.drafter, self.target, cache, *state)

    def verify(self, blocks: Int[Tensor, "batch slot"]) -> None:
        """Let the target read the blocks, and emit tokens."""
        state = self.starts, self.limits
        found = self.verify_step(self.target, self.captured, self.buffers.target, blocks, *state, self.is_greedy)
        drawn, *kept = found
        # A CUDA graph writes its results to the same place each time.
        self.positions, self.features, self.starts, self.anchors = (value.clone() for value in kept)
        if not self.is_greedy:
            rows = [
                block if row.text.is_done else row.text.draw(logits)
                for row, block, logits in zip(self.rows, blocks, drawn, strict=True)
            ]
            drawn = torch.stack(rows)
        both = torch.stack([blocks, drawn], dim=1).tolist()  # the only wait for the device
        for row, (block, own) in zip(self.rows, both, strict=True):
            if not row.text.is_done:
                row.emit(block[1:], own)
        if not self.is_greedy:
            self._place()

    def drop_done(self) -> None:
        """End when all rows are done."""
        if all(row.text.is_done for row in self.rows):
            self.rows = []


def draft_step(
    drafter: Drafter, target: Target, cache: RaggedCache, anchors: Column, starts: Column, positions: Tensor, features
) -> Int[Tensor, "batch slot"]:
    """Draft a block behind each row's last token.

    Args:
        drafter: drafts.
        target: has embedding and head.
        cache: the drafter's; its first columns are those of the slots.
        anchors: the last tokens.
        starts: their positions.
        positions: "batch new", of the features.
        features: "batch new feature", of the tokens that the target has read last.
    """
    size, end = drafter.block_size, cache.layers[0].capacity
    slots = torch.arange(size, device=starts.device).expand(len(starts), -1)
    cache.place(torch.cat([size + positions, slots], dim=1), end)
    masks = torch.full_like(slots[:, 1:], drafter.mask_token_id)
    hidden = draft_block(
        drafter,
        target,
        torch.cat([anchors, masks], dim=1),
        features,
        position_ids=torch.cat([positions, starts + slots], dim=1),
        attention_mask=torch.arange(end, device=starts.device) < size + starts,
        cache=cache,
    )
    tokens = target.logits(hidden[:, 1:].flatten(0, 1)).argmax(-1)
    return torch.cat([anchors, tokens.unflatten(0, (len(anchors), -1))], dim=1)


def verify_step(
    target: Target,
    captured: list[Tensor],
    cache: RaggedCache,
    blocks: Int[Tensor, "batch slot"],
    starts: Column,
    limits: Column,
    is_greedy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Let the target read blocks, and accept the beginnings that it would have written.

    Slots past the last token that a row may emit share that token's position, and their results are not used.

    Args:
        target: verifies.
        captured: of `Target.capture`.
        cache: the target's.
        blocks: of `draft_step`; without a drafter the last tokens.
        starts: positions of the last tokens.
        limits: positions of the last tokens that may be emitted.
        is_greedy: choose tokens here.

    Returns:
        The target's tokens, "batch slot", or its logits where they are drawn elsewhere; positions and features of what
        was read; and positions and tokens of the new last tokens, which are right only where they are chosen here.
    """
    slots = torch.arange(blocks.shape[1], device=blocks.device)
    positions, end = torch.minimum(starts + slots, limits), cache.layers[0].capacity
    mask = additive(torch.arange(end, device=blocks.device) <= positions[..., None], target.model.dtype)
    cache.place(positions, end)
    hidden, features = read(target, captured, blocks, cache, positions, mask)
    logits = target.logits(hidden.flatten(0, 1)).unflatten(0, blocks.shape)
    if not is_greedy:
        return logits, positions, features, starts, blocks[:, :1]
    drawn = logits.argmax(-1)
    accepted = (blocks[:, 1:] == drawn[:, :-1]).int().cumprod(-1).sum(-1, keepdim=True)
    return drawn, positions, features, torch.minimum(starts + accepted + 1, limits), drawn.gather(1, accepted)


COMPILED_COLUMNS = 256
"""Compiled steps round the number of columns up to a multiple of this, so that other prompts have the same shapes."""


def compiled_columns(num_tokens: int) -> int:
    """Round the longest length of a text up to that of the caches of compiled steps."""
    return -(-num_tokens // COMPILED_COLUMNS) * COMPILED_COLUMNS


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
    rows = [Row(Continuation(filler[:], context, 2 * size, set(), sampler)) for sampler in samplers]
    with torch.inference_mode(), target.capture(drafter.target_layer_ids) as captured:
        batch = Batch(target, drafter, rows, captured)
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
        ValueError: as `generate`; for more than one prompt also a layer without full attention, or an attention
            implementation that accepts no 4-D mask.
    """
    if len(prompts) == 1 and not compile:
        if drafter is None:
            return [generate_plain(target, prompts[0], **options)]
        return [generate(target, drafter, prompts[0], width="full", **options)]
    return decode_rows(target, drafter, prompts, compile=compile, **options)


def decode_rows(
    target: Target,
    drafter: Drafter | None,
    prompts: Sequence[Sequence[int]],
    *,
    compile: bool,
    find_buffers: Callable[[int, int], Buffers] | None = None,
    **options: Unpack[SamplingOptions],
) -> list[Generation]:
    """Decode prompts as rows of a batch.

    Args:
        target: the model.
        drafter: None for plain decoding.
        prompts: any number.
        compile: see `generate_batch`.
        find_buffers: gives the caches of compiled steps for a number of rows and their longest text.
        options: see `SamplingOptions`.
    """
    if drafter is not None:
        drafter.check_target(target)
    rows, seed = [], options.pop("seed", None)
    for number, token_ids in enumerate(prompts):
        row_options: SamplingOptions = {**options, "seed": None if seed is None else seed + number}
        rows.append(Row(make_continuation(target, token_ids, **row_options)))
    if not rows:
        return []
    _check_batch(target, rows, compile=compile)
    started, longest = read_clock(target.device), 1 + max(row.limit for row in rows)
    with torch.inference_mode(), target.capture(drafter.target_layer_ids if drafter is not None else ()) as captured:
        if compile:
            columns = compiled_columns(longest)
            buffers = find_buffers(len(rows), columns) if find_buffers else Buffers(target, drafter, columns)
            batch = FixedBatch(target, drafter, rows, captured, buffers)
        else:
            batch = Batch(target, drafter, rows, captured)
        batch.prefill()
        first = read_clock(target.device)
        batch.drop_done()
        while batch.rows:
            batch.verify(batch.draft())
            batch.drop_done()
    seconds = (first - started, read_clock(target.device) - first)
    return [row.generation(drafter.block_size if drafter is not None else 1, seconds) for row in rows]


def _check_batch(target: Target, rows: Sequence[Row], *, compile: bool) -> None:
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
