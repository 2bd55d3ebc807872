"""Decode several prompts together: their rows, caches, and one step for all of them.

`Batch` takes checked requests and runs the steps of `steps` until all are done, as they are or compiled. `Decoder` and
`generate_batch` make one.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from dpace.decode.request import Continuation
from dpace.decode.sampling import verify_draft
from dpace.decode.steps import Ends, State, draft_step, verify_greedily, verify_step
from dpace.drafter import Drafter
from dpace.drafter.vocabulary import DraftHead
from dpace.fast.attention import NAME as GROUPED_ATTENTION
from dpace.fast.cache import RaggedCache
from dpace.target import Target

COMPILED_COLUMNS = 256
"""Compiled steps round the number of columns up to a multiple of this, so that other prompts have the same shapes."""


def compiled_columns(num_tokens: int) -> int:
    """Round the longest length of a text up to that of the caches of compiled steps."""
    return -(-num_tokens // COMPILED_COLUMNS) * COMPILED_COLUMNS


class RowCaches:
    """The caches of target and drafter for several rows.

    Memory: keys and values of `capacity` tokens a row in both, allocated at the first step.

    Args:
        target: the model.
        drafter: None for plain decoding.
        capacity: longest text, in tokens.
    """

    def __init__(self, target: Target, drafter: Drafter | None, capacity: int):
        self.target = RaggedCache(target.config, capacity, target.model.dtype)
        self.all = [self.target]
        if drafter is not None:
            self.drafter = RaggedCache(drafter.config, capacity, drafter.dtype, num_slots=drafter.block_size)
            self.all.append(self.drafter)

    def keep(self, indices: Int[Tensor, " row"]) -> None:
        """Keep some rows."""
        for cache in self.all:
            cache.batch_select_indices(indices)


class Batch:
    """The rows that are not done, and where they are.

    Without a drafter a block is a token. Steps read as few columns of the caches as they can, and rows that are done
    leave. Compiled steps have fixed shapes instead: whole blocks, all columns, and rows that are done stay to the end.
    At temperature 0 drafting and its head are a graph, and verification, its head and the number of accepted tokens are
    another. Nothing of the state goes from the host to the device: only the tokens of a step come back. Above, tokens
    are drawn between the graphs.

    Args:
        target: verifies.
        drafter: None for plain decoding.
        rows: at least one.
        caches: with room for the longest text.
        is_compiled: whether `torch.compile` makes the steps.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter | None,
        rows: list[Continuation],
        caches: RowCaches,
        *,
        is_compiled: bool = False,
    ):
        self.target = target
        self.drafter = drafter
        self.rows = rows
        self.caches = caches
        self.is_compiled = is_compiled
        self.layer_ids = () if drafter is None else drafter.target_layer_ids
        self.is_greedy = all(row.sampler.temperature == 0 and not row.sampler.processors for row in rows)
        vocabulary = None if drafter is None or is_compiled else drafter.vocabulary
        self.head = DraftHead(target, vocabulary, (token for row in rows for token in row.token_ids))
        # The first draft is never compiled: it reads prompts, of any length, and makes the drafter's cache.
        self.draft_step: Any = draft_step
        self.verify_step: Any = self._compile(verify_greedily if self.is_greedy else verify_step)

    def _compile(self, step: Any) -> Any:
        return torch.compile(step, mode="reduce-overhead", dynamic=False) if self.is_compiled else step

    def _tensor(self, values: list) -> Tensor:
        return torch.tensor(values, device=self.target.device)

    def prefill(self) -> None:
        """Read the prompts and emit the first tokens; padding is on the right, where no token sees it."""
        prompts = [row.token_ids for row in self.rows]
        longest = max(map(len, prompts))
        padded = self._tensor([prompt + prompt[-1:] * (longest - len(prompt)) for prompt in prompts])
        positions = torch.arange(longest, device=padded.device).expand(len(padded), -1)
        cache = self.caches.target
        capacity, cache.end = cache.end, longest
        cache.write_to(positions)
        hidden, features = self.target.read(padded, cache, self.layer_ids, position_ids=positions)
        cache.end = capacity
        last = self._tensor([row.start for row in self.rows])
        logits = self.target.logits(hidden[torch.arange(len(last), device=last.device), last])
        drawn = [row.draw(own) for row, own in zip(self.rows, logits.split(1), strict=True)]
        for row, token in zip(self.rows, torch.cat(drawn).tolist(), strict=True):
            row.take(0, [token], width=0)
        limits = self._tensor([[row.limit] for row in self.rows])
        self.state = State(self._find_ends(limits), features, positions)

    def _find_ends(self, limits: Int[Tensor, "batch 1"]) -> Ends:
        """Look up which token is the last of each row, and where it is."""
        last_ids = self._tensor([[row.token_ids[-1]] for row in self.rows])
        return Ends(last_ids, self._tensor([[row.start] for row in self.rows]), limits)

    def step(self) -> None:
        """Emit the tokens of one draft and its verification in every row, and drop the rows that are done."""
        self.verify(self.draft())
        self.drop_done()

    def draft(self) -> Int[Tensor, "batch width"]:
        """Draft one block a row: its last token and the most likely tokens after it."""
        if self.drafter is None:
            return self.state.ends.last_ids
        width = self.drafter.block_size
        if not self.is_compiled:
            self.caches.drafter.end = width + max(row.start for row in self.rows)
            width = min(width, 1 + max(row.remaining for row in self.rows))
        blocks, _ = self.draft_step(self.drafter, self.head, self.caches.drafter, self.state, width)
        if self.draft_step is draft_step:
            self.draft_step = self._compile(draft_step)
        return blocks

    def verify(self, blocks: Int[Tensor, "batch width"]) -> None:
        """Let the target read the blocks, and emit tokens."""
        cache = self.caches.target
        if not self.is_compiled:
            cache.end = 1 + max(min(row.start + blocks.shape[1] - 1, row.limit) for row in self.rows)
        drawn, state = self.verify_step(self.target, cache, self.layer_ids, blocks, self.state.ends)
        # A CUDA graph writes its results to the same place each time.
        self.state = state.map(torch.clone) if self.is_compiled else state
        if not self.is_greedy:
            own = [
                block if row.is_done else row.draw(logits)
                for row, block, logits in zip(self.rows, blocks, drawn, strict=True)
            ]
            drawn = torch.stack(own)
        both = torch.stack([blocks, drawn], dim=1).tolist()  # the only wait for the device
        for row, (block, tokens) in zip(self.rows, both, strict=True):
            if not row.is_done:
                draft = block[1 : row.remaining + 1]
                row.take(verify_draft(draft, tokens), tokens, width=len(draft) + 1)
        if not self.is_greedy:
            self.state = self.state._replace(ends=self._find_ends(self.state.ends.limits))

    def drop_done(self) -> None:
        """Drop the rows that are done, here and in the caches; compiled steps end when all are."""
        kept = [index for index, row in enumerate(self.rows) if not row.is_done]
        if len(kept) == len(self.rows) or (kept and self.is_compiled):
            return
        self.rows = [self.rows[index] for index in kept]
        if self.rows:
            indices = self._tensor(kept)
            self.state = self.state.map(lambda value: value[indices])
            self.caches.keep(indices)


def check_batch(target: Target, rows: Sequence[Continuation], *, compile: bool) -> None:
    """Refuse targets whose attention or rotary embedding does not allow rows of different lengths.

    Raises:
        ValueError: names what was found and how to decode instead.
    """
    implementation = target.config._attn_implementation
    if implementation not in ("sdpa", "eager", GROUPED_ATTENTION):
        raise ValueError(
            f"the target's attention is {implementation}, which takes no 4-D mask; load it with "
            "attn_implementation='sdpa', or decode one prompt at a time with `generate`"
        )
    if compile and target.is_spread:
        raise ValueError("the target's layers are on several devices, which cannot be compiled; leave --compile out")
    boundary = target.rotation_boundary
    longest = 1 + max(row.limit for row in rows)
    if boundary and len(rows) > 1 and longest > boundary:
        raise ValueError(
            f"a text may have {longest} tokens; past {boundary} this target rotates all positions of a batch anew: "
            "decode one prompt at a time with `generate`"
        )
