"""Key-value caches in buffers that are allocated once: of one text, and of several texts of different lengths.

`TextCache` appends tokens: writing one copies that token only, and dropping the last ones copies nothing. `RaggedCache`
writes each row's tokens where they belong. `place` and `place_block` say where the next tokens go and return the mask
that they need, so that a decoding step is the same with both. `probe_cache` finds out whether a target's caches can
take back a rejected draft.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from dpace.blocks import FULL, Reach

NUM_CONTEXT = 12
"""Tokens that `probe_cache` reads first."""
NUM_ACCEPTED = 2
"""Tokens that `probe_cache` then accepts of a draft."""
NUM_REJECTED = 2
"""Tokens that `probe_cache` rejects after them."""
UNSEEN = -(2**40)
"""Position of what a column holds that no slot may see: farther away than any reach."""


class TextCache(DynamicCache):
    """The cache of one text.

    Layers of a target with a sliding window or a recurrent state keep transformers' own cache layers. Only after
    `record` can these be cropped; they then keep all tokens until the next crop.

    Memory: keys and values of `capacity` tokens in every full-attention layer and in all layers of a drafter, allocated
    at once; after `record`, so many recurrent states of each such layer.

    Args:
        config: of the model.
        capacity: longest text, in tokens, with the slots of a block.
        num_slots: slots of a drafter's block; 0 for a target.
    """

    def __init__(self, config: Any, capacity: int, num_slots: int = 0):
        super().__init__(config=config)
        for number, layer in enumerate(self.layers):
            if type(layer) is DynamicLayer:
                self.layers[number] = PreallocatedLayer(capacity)
            elif num_slots and type(layer) is DynamicSlidingWindowLayer:
                # A window counts the slot itself, so `window - 1` tokens before the anchor are seen.
                self.layers[number] = PreallocatedLayer(capacity, layer.sliding_window - 1 + num_slots)

    def place(self, positions: Int[Tensor, "1 new"]) -> None:
        """Return no mask: the next tokens follow those in the cache, and see these and one another as usual."""

    def place_block(self, positions: Int[Tensor, "1 new"], starts: Int[Tensor, "1 1"]) -> None:
        """Return no mask: the layers know what the slots of a block see of the cache and of the block."""

    def record(self, num_tokens: int) -> None:
        """Let the next passes be cropped by up to so many tokens; each is followed by a crop, which may be of none."""
        self.activate_past_recording(recurrent_states_to_keep=num_tokens)


class PreallocatedLayer(DynamicLayer):
    """A `DynamicLayer` whose keys and values are parts of two preallocated buffers.

    New tokens are copied in; going back only sets a length. `keys` and `values` stay empty.

    Args:
        capacity: longest text, in tokens, with the slots of a block.
        num_read: the most tokens that a pass reads, the last ones: in a drafter's layer with a window, those before the
            anchor that a slot sees, and the slots; by default all.
    """

    def __init__(self, capacity: int, num_read: int | None = None):
        self.capacity = capacity
        self.num_read = num_read or capacity
        self.length = 0
        self.buffers: list[Tensor] = []
        super().__init__()

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Write new keys and values after the old ones and return views of the last `num_read`."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            for states in (key_states, value_states):
                # (batch, head, token, dim)
                self.buffers.append(states.new_empty(*states.shape[:2], self.capacity, states.shape[3]))
        start = self.length
        num_new = key_states.shape[2]
        keys, values = self.buffers
        keys.narrow(2, start, num_new).copy_(key_states)
        values.narrow(2, start, num_new).copy_(value_states)
        self.length = end = start + num_new
        num_read = min(end, self.num_read)
        return keys.narrow(2, end - num_read, num_read), values.narrow(2, end - num_read, num_read)

    def get_seq_length(self) -> int:
        """Return the number of tokens in the cache."""
        return self.length

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens."""
        self.length = max(0, self.length + tokens_to_remove)


class RaggedCache(DynamicCache):
    """The cache of several texts of different lengths.

    In a target's cache a token's column is its position, so there are no holes. A query sees the columns up to its own
    position. A rejected token lies above these until the next block, which begins there and is no shorter, overwrites
    it. A drafter's cache begins with `num_slots` columns for the slots of a block, which are never kept. A token's
    column is then `num_slots` plus its position.

    Memory: keys and values of `num_slots + capacity` tokens a row, allocated at the first pass.

    Attributes:
        end: number of columns that the next passes read, at most all.

    Args:
        config: of the model.
        capacity: longest text, in tokens.
        dtype: of the model.
        num_slots: slots of a block; 0 for a target.
        reaches: of a drafter, see `dpace.drafter.Drafter.reaches`. All layers of a target have full attention, see
            `dpace.decode.batch.batch_fault`.
    """

    def __init__(
        self,
        config: Any,
        capacity: int,
        dtype: torch.dtype,
        num_slots: int = 0,
        reaches: Mapping[str, Reach] | None = None,
    ):
        super().__init__(config=config)
        self.end = num_slots + capacity
        self.dtype = dtype
        self.num_slots = num_slots
        self.reaches = reaches or {}
        self.layers: Any = [RaggedLayer(self.end) for _ in self.layers]

    def place(
        self, positions: Int[Tensor, "batch new"], rows: Sequence[int] | None = None
    ) -> Float[Tensor, "batch 1 new column"]:
        """Write the next pass's tokens to their positions; return the mask that is added to the scores.

        Both `sdpa` and `eager` attention accept such a mask.

        Args:
            positions: of the tokens.
            rows: numbers of the rows that the pass reads; all by default.
        """
        self.write_to(positions, rows)
        # (batch, new, column)
        is_hidden = torch.arange(self.end, device=positions.device) > positions[..., None]
        # Not minus infinity, which times the 0 of a visible column would be nan.
        return is_hidden[:, None].to(self.dtype) * torch.finfo(self.dtype).min

    def place_block(
        self, positions: Int[Tensor, "batch new"], starts: Int[Tensor, "batch 1"]
    ) -> dict[str, Bool[Tensor, "batch 1 _ column"]]:
        """Write the next pass's features to their columns, its slots to the first ones; return masks by kind of layer.

        A slot sees the features of its row's tokens up to the one before the anchor, and the slots, as far as the
        layer's reach goes. Masks of layers with full attention are the same for all slots, and have one row.
        """
        slots = torch.arange(self.num_slots, device=starts.device)
        self.write_to(torch.cat([self.num_slots + positions, slots.expand(len(starts), -1)], dim=1))
        columns = torch.arange(self.end - self.num_slots, device=starts.device)
        # Columns from the anchor's on hold tokens of rejected drafts, or padding.
        token_positions = torch.where(columns < starts, columns, UNSEEN)
        # (batch, column): the position of what a column holds, first the slots and then the tokens
        key_positions = torch.cat([starts + slots, token_positions], dim=1)
        masks = {}
        for kind, reach in self.reaches.items():
            query_positions = starts + (slots[:1] if reach == FULL else slots)
            # (batch, 1, slot, column)
            masks[kind] = reach.sees(query_positions[..., None] - key_positions[:, None])[:, None]
        return masks

    def crop(self, tokens_to_remove: int) -> None:
        """Do nothing: the next block overwrites the slots of a drafted one."""

    def write_to(self, columns: Int[Tensor, "batch new"], rows: Sequence[int] | None = None) -> None:
        """Make the next pass write its tokens to these columns, of all rows or of the given ones."""
        if rows is None:
            # Counted on the device, which does not have to wait for the host; and read without a copy.
            row_numbers = torch.arange(len(columns), device=columns.device)
            read_rows = slice(None)
        else:
            row_numbers = read_rows = torch.tensor(rows, device=columns.device)
        for layer in self.layers:
            layer.rows = row_numbers[:, None]
            layer.read_rows = read_rows
            layer.columns = columns
            layer.end = self.end

    def copy_columns(self, row: int, others: Sequence[int], start: int, end: int) -> None:
        """Copy what a row has in the columns from `start` to `end` to other rows."""
        for layer in self.layers:
            for buffer in layer.buffers:
                buffer[others, :, start:end] = buffer[row, :, start:end]

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Keep the given rows, in their order; only those whose place changes are copied.

        A layer that nothing was written to has no rows yet: the drafter's is such a layer right after the prompts were
        read.
        """
        moved = [place for place, row in enumerate(rows) if row != place]
        sources = [rows[place] for place in moved]
        for layer in self.layers:
            for buffer in layer.buffers:
                buffer[moved] = buffer[sources]
            layer.buffers = [buffer[: len(rows)] for buffer in layer.buffers]


class RaggedLayer(PreallocatedLayer):
    """A `PreallocatedLayer` whose rows hold different numbers of tokens.

    Each new token is written to a given column and replaces the token that was there. Columns not written yet are
    zero, so that a mask is enough to hide them. `keys` and `values` stay empty, and so the layer's length is 0: what is
    in the buffers is hidden by masks, or overwritten by the next prompts.

    Attributes:
        num_rows: rows that the first pass makes; as many as it reads where 0.
        read_rows: rows that the next pass reads.
    """

    num_rows = 0
    rows: Tensor
    read_rows: slice | Tensor
    columns: Tensor
    end: int

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Write new keys and values to their columns and return views of the columns before `end`."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            num_rows = self.num_rows or len(key_states)
            for states in (key_states, value_states):
                buffer = states.new_zeros(num_rows, states.shape[1], self.capacity, states.shape[-1])
                self.buffers.append(buffer)
                torch._dynamo.mark_static_address(buffer)  # otherwise CUDA graphs would copy it at each replay
        keys, values = self.buffers
        # Indices around a slice put their axes first: (batch, new, head, dim).
        keys[self.rows, :, self.columns] = key_states.transpose(1, 2)
        values[self.rows, :, self.columns] = value_states.transpose(1, 2)
        return keys[self.read_rows, :, : self.end], values[self.read_rows, :, : self.end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of columns that are read, and the first of them."""
        return self.end, 0


def fill_places(is_kept: Sequence[bool]) -> list[int]:
    """Return the numbers of the rows that are kept, where the last of them take the places of dropped rows."""
    kept_rows = [row for row, is_row_kept in enumerate(is_kept) if is_row_kept]
    last_rows = reversed(kept_rows)
    places = []
    for place in range(len(kept_rows)):
        # Kept rows past the last place are as many as dropped rows before it.
        places.append(place if is_kept[place] else next(last_rows))
    return places


def is_full_attention(cache: Any) -> bool:
    """Return whether every layer of a cache keeps keys and values of the whole text."""
    return all(type(layer) in (DynamicLayer, PreallocatedLayer, RaggedLayer) for layer in cache.layers)


@torch.inference_mode()
def probe_cache(target: Any) -> bool:
    """Find out whether a target's caches can read several tokens, take back some, and read on as in one pass.

    Caches with full attention in all layers can be cropped, and are not tried.

    Args:
        target: a `dpace.target.Target`.
    """
    if is_full_attention(TextCache(target.config, 1)):
        return True
    # The last tokens are read where the rejected ones stood.
    sizes = (NUM_CONTEXT, NUM_ACCEPTED, NUM_REJECTED, NUM_REJECTED)
    num_tokens = sum(sizes)
    tokens = torch.randint(len(target.head.weight), (1, num_tokens), generator=torch.Generator().manual_seed(0))
    context, accepted, rejected, last = tokens.to(target.device).split(sizes, dim=1)
    end = torch.cat([accepted, last], dim=1)
    expected = target.hidden(torch.cat([context, end], dim=1))[0, -NUM_REJECTED:]
    read_on, taken_back = (TextCache(target.config, num_tokens) for _ in range(2))
    taken_back.record(NUM_ACCEPTED + NUM_REJECTED)
    try:
        target.hidden(context, read_on)
        found = [target.hidden(end, read_on)[0, -NUM_REJECTED:]]
        target.hidden(context, taken_back)
        taken_back.crop(0)  # once after each pass, as when decoding
        target.hidden(torch.cat([accepted, rejected], dim=1), taken_back)
        taken_back.crop(-NUM_REJECTED)
        found.append(target.hidden(last, taken_back)[0])
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError):
        return False
    errors = (torch.stack(found) - expected).norm(dim=-1) / expected.norm(dim=-1)
    tolerance = 1e-3 if target.model.dtype == torch.float32 else 5e-2  # of hidden states, relative
    # At the best position: rounding may change a router's choice at some.
    return float(errors.amin(-1).max()) <= tolerance
