"""Blocks of a conversation: anchors, labels, scored slots, positions, and the attention mask.

The rule of which tokens a slot sees is written once, in `visibility`.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

LEAST_SLOTS = 2
"""Slots of the shortest blocks where blocks grow: one token is drafted. benchmarks/tried.md compares them with 4."""
MASK_TILE = 128
"""Number of queries, and of keys, that `flex_attention` skips or computes together."""


def build_target_layer_ids(num_target_layers: int, num_features: int) -> list[int]:
    """Choose the feature layers, spread evenly from layer 1 to the third from the last.

    Returns:
        Ascending 0-based layer ids; `[num_target_layers // 2]` for one.

    Raises:
        ValueError: the target has too few layers for this number of distinct ids.

    Source: DFlash (arXiv 2602.06036), `build_target_layer_ids` of its code.
    """
    if num_features == 1:
        return [num_target_layers // 2]
    # From layer 1 to layer `num_target_layers - 3`.
    span = num_target_layers - 4
    ids = [round(1 + i * span / (num_features - 1)) for i in range(num_features)]
    if sorted(set(ids)) != ids:
        raise ValueError(
            f"a target of {num_target_layers} layers gives layer ids {ids} for {num_features} features; "
            f"lower --drafter.num-features to {max(1, num_target_layers - 3)}, or set the ids with "
            "--drafter.target-layer-ids"
        )
    return ids


def block_sizes(block_size: int, *, is_growing: bool, is_causal: bool = False) -> list[int]:
    """Return the sizes of the blocks of a training, one for each equal part of the steps.

    Blocks that grow have `block_size` slots in the end, and before that its halves, as long as they have `LEAST_SLOTS`.
    Each size has one part; where slots are causal, half as many parts as the one before: for 16 slots, 8 parts with 2,
    4 with 4, 2 with 8 and 1 with 16. benchmarks/tried.md compares both. Blocks of half the size are twice as many, so a
    step has as many slots at any time.

    Raises:
        ValueError: blocks that are too short to grow.
    """
    sizes = [block_size]
    while is_growing and sizes[0] // 2 >= LEAST_SLOTS:
        sizes.insert(0, sizes[0] // 2)
    if is_growing and len(sizes) == 1:
        raise ValueError(
            f"--train.grow-blocks begins with half a block, of {LEAST_SLOTS} slots or more, and --drafter.block-size "
            f"is {block_size}; take --train.no-grow-blocks, or blocks of {2 * LEAST_SLOTS} slots or more"
        )
    parts = []
    for num_larger, size in enumerate(reversed(sizes)):
        parts += [size] * (2**num_larger if is_causal else 1)
    return parts[::-1]


def sample_anchors(
    is_response: Bool[Tensor, " seq"] | Sequence[bool], *, num_anchors: int | None = None, seed: object = 0
) -> Int[Tensor, " anchor"]:
    """Choose anchors among response positions whose next token also belongs to a response.

    Args:
        is_response: tokens that the target wrote.
        num_anchors: largest number of anchors; all by default.
        seed: anything with a fixed `repr`, such as `(seed, epoch, sample)`. The same seed gives the same anchors on
            every machine, so that a resumed run sees the same anchors as an uninterrupted one.

    Returns:
        Ascending positions, without repetition; empty if there is none.
    """
    is_response = torch.as_tensor(is_response)
    # The last position is never an anchor: no token follows it.
    positions = (is_response[:-1] & is_response[1:]).nonzero().flatten().tolist()
    if num_anchors is not None and num_anchors < len(positions):
        positions = sorted(random.Random(repr(seed)).sample(positions, num_anchors))
    return torch.tensor(positions, dtype=torch.long)


@dataclass(frozen=True)
class Blocks:
    """The blocks of a batch; shorter rows are padded with blocks at position 0 in which nothing is scored."""

    anchors: Int[Tensor, "batch block"]
    """Positions of the anchors."""
    labels: Int[Tensor, "batch block slot"]
    """The text's token at each slot's own position; 0 past the end."""
    is_scored: Bool[Tensor, "batch block slot"]
    """Slots 1 and up that lie in a response."""
    is_block: Bool[Tensor, "batch block"]
    """False for padding."""

    @property
    def block_size(self) -> int:
        """Number of slots, the anchor included."""
        return self.labels.shape[-1]

    @property
    def position_ids(self) -> Int[Tensor, "batch block slot"]:
        """Absolute position of each slot."""
        return self.anchors[..., None] + torch.arange(self.block_size, device=self.anchors.device)

    def input_ids(self, mask_token_id: int) -> Int[Tensor, "batch block slot"]:
        """Make the drafter's input: the anchor's token, then mask tokens."""
        ids = torch.full_like(self.labels, mask_token_id)
        ids[..., 0] = self.labels[..., 0]
        return ids


def build_blocks(
    token_ids: Int[Tensor, "batch seq"],
    is_response: Bool[Tensor, "batch seq"],
    anchors: Sequence[Int[Tensor, " _"]],
    block_size: int,
) -> Blocks:
    """Cut the blocks that start at the given anchors.

    A block may run past the end of the text or out of the response: those slots are not scored.

    Args:
        token_ids: tokens, padded on the right.
        is_response: tokens that the target wrote; False on padding.
        anchors: positions, one tensor a row; tensors may be empty and of different lengths.
        block_size: number of slots, the anchor included; at least 2.
    """
    num_tokens = token_ids.shape[1]
    padded = nn.utils.rnn.pad_sequence(list(anchors), batch_first=True, padding_value=-1).to(token_ids.device)
    if not padded.shape[1]:  # no row has an anchor: one padding block each, because later steps need a block
        padded = nn.functional.pad(padded, (0, 1), value=-1)
    is_block = padded >= 0
    starts = padded.clamp_min(0)
    # (batch, block, slot)
    positions = starts[..., None] + torch.arange(block_size, device=token_ids.device)
    is_inside = positions < num_tokens
    # `gather` takes places inside the text only; what it finds for slots past the end is not used.
    places = positions.clamp_max(num_tokens - 1).flatten(1)
    labels = token_ids.gather(1, places).view(positions.shape).where(is_inside, 0)
    is_scored = is_response.gather(1, places).view(positions.shape) & is_inside & is_block[..., None]
    is_scored[..., 0] = False  # the anchor is known, not predicted
    return Blocks(starts, labels, is_scored, is_block)


class Reach(NamedTuple):
    """How far a layer lets a slot see: the rule that `dpace.modeling_dflash.DFlashAttention` follows."""

    window: int = 2**31 - 1
    """A slot sees positions that differ from its own by less than this, which is more than a block has slots.
    By default it is longer than any text."""
    is_causal: bool = False
    """Whether a slot sees no slot after it."""

    @property
    def sees(self) -> Callable[[Tensor], Tensor]:
        """Whether a slot sees what is so many positions before it; negative distances are after it.

        A lambda, because flex_attention cannot look into a function that checks types.
        """
        # Both bounds are excluded: a causal slot sees itself, at distance 0, and nothing after it.
        nearest = -1 if self.is_causal else -self.window
        return lambda distance: (distance < self.window) & (distance > nearest)


FULL = Reach()
"""Full attention in both directions."""


def visibility(
    blocks: Blocks, num_context: int, reach: Reach = FULL
) -> Callable[[Tensor, Tensor | None, Tensor, Tensor], Tensor]:
    """Make the rule of which keys each slot sees, in the form that `flex_attention` takes.

    Queries are the slots of all blocks, flattened. Keys are the `num_context` tokens of the text, then the same slots.
    A slot sees the context strictly before its block's anchor and its own block, as far as its layer's reach goes, and
    nothing else. It does not see the anchor's features, which do not exist yet when the block is drafted. Padding
    blocks see only themselves, so that no row is empty.

    Returns:
        `mask(batch, head, query, key) -> bool`, elementwise over broadcast index tensors.
    """
    anchors = blocks.anchors
    is_block = blocks.is_block
    block_size = blocks.block_size
    sees = reach.sees
    # A lambda, because flex_attention counts the function's arguments, which a type-checking wrapper hides.
    # Query `q` is slot `q % block_size` of block `q // block_size`. Key `num_context + q` is that slot's own.
    return lambda batch, head, query, key: torch.where(
        key < num_context,
        # A token of the text: before the anchor, and within reach of the slot's position in the text.
        (key < anchors[batch, query // block_size])
        & is_block[batch, query // block_size]
        & sees(anchors[batch, query // block_size] + query % block_size - key),
        # A slot: of the same block, in which positions are as far apart as numbers.
        ((key - num_context) // block_size == query // block_size) & sees(query - key + num_context),
    )


def dense_mask(blocks: Blocks, num_context: int, reach: Reach = FULL) -> Bool[Tensor, "batch 1 query key"]:
    """Compute `visibility` for every query and key.

    Memory: O(batch x query x key) bytes.
    """
    batch = len(blocks.anchors)
    num_queries = blocks.labels[0].numel()
    device = blocks.anchors.device
    # Index tensors that broadcast to (batch, 1, query, key); the rule does not read the head.
    return visibility(blocks, num_context, reach)(
        torch.arange(batch, device=device)[:, None, None, None],
        None,
        torch.arange(num_queries, device=device)[:, None],
        torch.arange(num_context + num_queries, device=device),
    )


def flex_mask(blocks: Blocks, num_context: int, reach: Reach = FULL):
    """Turn `visibility` into a block mask for `flex_attention`, straight from the anchors.

    The mask is the same for all heads. Nothing of the size of queries x keys exists.

    Memory: O(batch x query tiles x key tiles) numbers of 8 bytes, where a tile is `MASK_TILE` tokens.
    """
    from torch.nn.attention.flex_attention import BlockMask

    num_queries = blocks.labels[0].numel()
    is_seen, is_whole = visible_tiles(blocks, num_context, reach)
    tile_lists = []
    # First the tiles in which the rule is asked for each key, then those that are computed without asking.
    for is_listed in (is_seen & ~is_whole, is_whole):
        # For each row of tiles, the number of those that are listed, and all numbers, the listed ones first.
        tile_lists.append(is_listed.sum(-1, dtype=torch.int32)[:, None])
        tile_lists.append(is_listed.int().argsort(dim=-1, descending=True, stable=True).int()[:, None])
    return BlockMask.from_kv_blocks(
        *tile_lists,
        BLOCK_SIZE=MASK_TILE,
        mask_mod=visibility(blocks, num_context, reach),
        seq_lengths=(num_queries, num_context + num_queries),
    )


def visible_tiles(
    blocks: Blocks, num_context: int, reach: Reach = FULL
) -> tuple[Bool[Tensor, "batch query_tile key_tile"], Bool[Tensor, "batch query_tile key_tile"]]:
    """Find the tiles of `visibility` that are seen in part or whole, and those known to be seen whole.

    Each query sees the context before its block's anchor, from where its window begins, and the keys of its block.
    """
    device = blocks.anchors.device
    size = blocks.block_size
    num_queries = blocks.labels[0].numel()
    # (query_tile, 1) and (query_tile, query): the last tile may have fewer queries, and repeats its last one.
    starts = torch.arange(0, num_queries, MASK_TILE, device=device)[:, None]
    queries = (starts + torch.arange(MASK_TILE, device=device)).clamp_max(num_queries - 1)
    # (batch, query_tile, query, 1): a query sees the tokens of the text between these two, both excluded.
    anchors = blocks.anchors.where(blocks.is_block, 0)[:, queries // size, None]
    begins = anchors + (queries % size)[..., None] - reach.window
    # (key_tile): first key of each tile, and the first key after it.
    keys = torch.arange(0, num_context + num_queries, MASK_TILE, device=device)
    stops = keys + MASK_TILE
    sees_text = ((keys < anchors) & (stops > begins + 1)).any(2)
    # Every query of a full tile sees it, even the one with the earliest anchor and the one whose window begins last.
    is_whole = (stops <= anchors.amin(2)) & (keys > begins.amax(2)) & (starts + MASK_TILE <= num_queries)
    first_query = queries[:, :1]
    last_query = queries[:, -1:]
    if not reach.is_causal:
        # A slot sees its block to the end, which may lie in the next tile.
        last_query = last_query // size * size + size - 1
    first_slot = num_context + first_query // size * size
    sees_slots = (keys <= num_context + last_query) & (stops > first_slot)
    return sees_text | sees_slots, is_whole
