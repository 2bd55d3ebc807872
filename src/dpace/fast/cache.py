"""Key-value caches in buffers that are allocated once.

Writing a token copies that token only, and dropping the last tokens copies nothing.

Go back in caches whose layers keep a recurrent state, which no crop can undo.
"""

from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin


class PreallocatedLayer(DynamicLayer):
    """A `DynamicLayer` whose keys and values are the beginnings of two preallocated buffers.

    New tokens are copied in; going back only sets a length.
    """

    def __init__(self, capacity: int):
        self.capacity, self.length = capacity, 0
        self._buffers: list[Any] = [None, None]
        super().__init__()

    keys: Any = property(lambda self: self._view(0), lambda self, new: self._replace(0, new))
    values: Any = property(lambda self: self._view(1), lambda self, new: self._replace(1, new))

    def _view(self, index: int) -> Tensor | None:
        buffer = self._buffers[index]
        return None if buffer is None else buffer.narrow(2, 0, self.length)

    def _replace(self, index: int, new: Tensor | None) -> None:
        """Replace a buffer, as `DynamicLayer` does to change its rows; drop it where the new one is empty."""
        if new is None or not new.numel():
            self._buffers[index], self.length = None, 0
        else:
            self._buffers[index] = new

    def update(self, key_states, value_states, *args, **kwargs):
        """Write new keys and values behind the old ones and return views of all."""
        start, count = self.length, key_states.shape[2]
        keys, values = self._buffers
        if keys is None or start + count > keys.shape[2]:
            keys, values = self._allocate(key_states, value_states)
        keys.narrow(2, start, count).copy_(key_states)
        values.narrow(2, start, count).copy_(value_states)
        self.length = end = start + count
        return keys.narrow(2, 0, end), values.narrow(2, 0, end)

    def _allocate(self, key_states: Tensor, value_states: Tensor) -> list[Tensor]:
        """Make buffers with room for new keys and values behind the old ones."""
        old, start, end = (self.keys, self.values), self.length, self.length + key_states.shape[2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.capacity = max(self.capacity, 2 * end if start else end)
        self._buffers = [x.new_empty(*x.shape[:2], self.capacity, x.shape[3]) for x in (key_states, value_states)]
        for buffer, kept in zip(self._buffers, old if start else (), strict=False):
            buffer.narrow(2, 0, start).copy_(kept)
        return self._buffers

    def get_seq_length(self) -> int:
        """Give the number of tokens in the cache."""
        return self.length

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens."""
        if tokens_to_remove > 0:
            super().crop(tokens_to_remove)  # raises with transformers' own explanation
        self.length = max(0, self.length + tokens_to_remove)


def make_cache(config, capacity: int) -> DynamicCache:
    """Make a cache with room for `capacity` tokens.

    Layers with a sliding window keep transformers' own cache layers, which can also go back.

    Memory: keys and values of `capacity` tokens in every full-attention layer, allocated at once.
    """
    cache: Any = DynamicCache(config=config)
    if not cache.layers:  # a config that does not tell its layers' kinds
        cache.layers = [DynamicLayer() for _ in range(config.num_hidden_layers)]
    cache.layers = [PreallocatedLayer(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    cache.activate_past_recording()
    return cache


def go_back(cache: DynamicCache, num_tokens: int) -> None:
    """Drop the last tokens of a cache made by `make_cache`.

    With `num_tokens` 0, only layers with a sliding window have something to do.
    """
    if num_tokens or any(type(layer) is not PreallocatedLayer for layer in cache.layers):
        cache.crop(-num_tokens)


def repeat_rows(layer: Any, count: int) -> None:
    """Let a layer's only row be that of `count` texts that begin alike."""
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        for states in (layer.conv_states, layer.recurrent_states):
            for index, state in states.items():
                states[index] = state if state is None else state.repeat_interleave(count, dim=0)
    if isinstance(layer, DynamicLayer):
        layer.batch_repeat_interleave(count)


def is_full_attention(cache: DynamicCache) -> bool:
    """Say whether every layer of a cache keeps keys and values of the whole text."""
    return all(type(layer) in (DynamicLayer, PreallocatedLayer) for layer in cache.layers)


class RaggedLayer(DynamicLayer):
    """A `DynamicLayer` whose rows hold different numbers of tokens.

    Each new token is written to a given column and replaces the token that was there. Columns not written yet are
    zero, so that a mask is enough to hide them.
    """

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity = capacity
        self.rows, self.columns, self.end = torch.empty(0), torch.empty(0), 0

    def update(self, key_states, value_states, *args, **kwargs):
        """Write new keys and values to their columns and return views of the columns before `end`."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            shapes = [(*x.shape[:-2], self.capacity, x.shape[-1]) for x in (key_states, value_states)]
            self._buffers = [key_states.new_zeros(shape) for shape in shapes]
            for buffer in self._buffers:
                torch._dynamo.mark_static_address(buffer)  # otherwise CUDA graphs would copy it at each replay
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[self.rows, :, self.columns] = new.transpose(1, 2)
        self.keys, self.values = (buffer[..., : self.end, :] for buffer in self._buffers)
        return self.keys, self.values

    def forget(self) -> None:
        """Begin new texts in the same buffers; what they hold is hidden until it is overwritten."""
        if self.is_initialized:
            self.keys, self.values = (buffer[..., :0, :] for buffer in self._buffers)

    def batch_select_indices(self, indices):
        """Keep the given rows.

        A layer that nothing was written to has no rows yet: the drafter's is such a layer right after the prompts were
        read.
        """
        if not self.is_initialized:
            return
        self._buffers = [buffer[indices] for buffer in self._buffers]
        self.keys, self.values = (buffer[..., : self.end, :] for buffer in self._buffers)


class RaggedCache(DynamicCache):
    """A cache for rows of different lengths.

    Call `place` before each forward pass to say where its tokens go.

    Memory: keys and values of `capacity` tokens a row, allocated at once.

    Raises:
        ValueError: the model has layers that are not full attention.
    """

    def __init__(self, config, capacity: int):
        layers = make_cache(config, capacity).layers
        other = {type(layer).__name__ for layer in layers if type(layer) is not PreallocatedLayer}
        if other:
            raise ValueError(
                f"{config.model_type} has layers that are not full attention ({', '.join(sorted(other))}); a batch "
                "needs full attention in all layers: decode one prompt at a time with `generate`"
            )
        super().__init__(config=config)
        self.layers: Any = [RaggedLayer(capacity) for _ in layers]

    def forget(self) -> None:
        """Begin new texts in the same buffers."""
        for layer in self.layers:
            layer.forget()

    def place(self, columns: Int[Tensor, "batch new"], end: int) -> None:
        """Make the next forward pass write its tokens to `columns` and read the columns before `end`."""
        rows = torch.arange(len(columns), device=columns.device)[:, None]
        for layer in self.layers:
            layer.rows, layer.columns, layer.end = rows, columns, end


NUM_CONTEXT, NUM_READ = 12, 4
"""Tokens that `probe_cache` reads before, and in one pass."""
TOLERANCE = {torch.float32: 1e-3}
"""Relative difference of hidden states that is rounding; `LOW_PRECISION` for other dtypes."""
LOW_PRECISION = 5e-2

CacheAbility = Literal["crop", "rewind", "append"]
"""What a target's caches can do after a rejected draft.

`crop`: take back the rejected tokens. `rewind`: return to a state that was kept, and read the accepted tokens again.
`append`: neither, or not even read several tokens at once, so that drafts cannot be verified.
"""


class _State(NamedTuple):
    """What a layer kept at a moment."""

    layer: Any
    conv_states: dict[int, Tensor | None]
    recurrent_states: dict[int, Tensor]


Mark = list[_State]
"""The recurrent states of a cache at a moment; empty for caches without any."""


def mark_states(cache: Any) -> Mark:
    """Keep the recurrent states of a cache.

    Memory: a copy of them, which does not grow with the text.
    """
    return [
        _State(
            layer, dict(layer.conv_states), {i: s.clone() for i, s in layer.recurrent_states.items() if s is not None}
        )
        for layer in cache.layers
        if isinstance(layer, LinearAttentionCacheLayerMixin) and any(layer.is_recurrent_states_initialized.values())
    ]


def rewind(cache: Any, mark: Mark, num_tokens: int) -> None:
    """Take back all `num_tokens` tokens that were read since the mark was made."""
    cache.crop(-num_tokens)
    for layer, conv_states, recurrent_states in mark:
        layer.conv_states = dict(conv_states)
        for index, state in recurrent_states.items():
            layer.recurrent_states[index].copy_(state)


@torch.inference_mode()
def probe_cache(target: Any) -> CacheAbility:
    """Find out by trying what the target's caches can do: read, go back, and read again.

    Caches with full attention in all layers can be cropped, and are not tried.

    Args:
        target: a `dpace.target.Target`.
    """
    if all(type(layer) is PreallocatedLayer for layer in make_cache(target.config, 1).layers):
        return "crop"
    generator = torch.Generator().manual_seed(0)
    vocab_size = len(target.head.weight)
    text = torch.randint(vocab_size, (1, NUM_CONTEXT + NUM_READ), generator=generator).to(target.device)
    other = torch.randint(vocab_size, (1, NUM_READ), generator=generator).to(target.device)
    kept, rejected = NUM_READ // 2, NUM_READ - NUM_READ // 2
    rest = text[:, NUM_CONTEXT:]
    draft = torch.cat([rest[:, :kept], other[:, kept:]], dim=1)

    def read(part: Tensor, cache: Any, rejected: int = 0) -> Float[Tensor, "seq hidden"]:
        hidden = target.hidden(part, cache=cache)[0]
        go_back(cache, rejected)  # exactly once after each pass, as when decoding
        return hidden

    def start() -> Any:
        cache = make_cache(target.config, NUM_CONTEXT + NUM_READ)
        read(text[:, :NUM_CONTEXT], cache)
        return cache

    cache = start()
    expected = torch.cat([read(part, cache) for part in rest.split(1, dim=1)])
    tolerance = TOLERANCE.get(target.model.dtype, LOW_PRECISION)

    def is_close(found: Tensor) -> bool:
        """Compare at the best position: rounding may change a router's choice at some."""
        errors = (found - expected[-len(found) :]).norm(dim=-1) / expected[-len(found) :].norm(dim=-1)
        return float(errors.min()) <= tolerance

    if not is_close(read(rest, start())):
        return "append"
    cache = start()
    try:
        read(draft, cache, rejected)
        if is_close(read(rest[:, kept:], cache)):
            return "crop"
    except (RuntimeError, NotImplementedError):
        pass
    cache = start()
    mark = mark_states(cache)
    target.hidden(draft, cache=cache)
    rewind(cache, mark, NUM_READ)
    read(rest[:, :kept], cache)
    return "rewind" if is_close(read(rest[:, kept:], cache)) else "append"
