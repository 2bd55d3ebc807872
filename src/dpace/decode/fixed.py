"""Steps of fixed shapes for `torch.compile`: two graphs, and one wait for the device in a step.

Nothing of the loop's state goes from the host to the device: the last tokens and their places stay there, and only the
tokens of a step come back.
"""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from dpace.decode.rows import Batch, Buffers, Row, additive, read
from dpace.drafter import Drafter
from dpace.fast.cache import RaggedCache
from dpace.target import Target
from dpace.views import draft_block

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
        # The first features are those of whole prompts and have another shape, for which nothing is compiled.
        step = self.draft_step if self.features.shape[1] == self.drafter.block_size else draft_step
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
