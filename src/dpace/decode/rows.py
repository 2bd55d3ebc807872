"""The rows of a batch, their caches, and one step for all of them."""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dpace.decode.generation import Generation
from dpace.decode.request import Continuation
from dpace.decode.sampling import verify_draft
from dpace.draft_vocabulary import DraftHead
from dpace.drafter import Drafter
from dpace.fast.cache import RaggedCache
from dpace.target import Target
from dpace.views import draft_block, mask_blocks


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
