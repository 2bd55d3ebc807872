"""Key-value caches in buffers that are allocated once.

Writing a token copies that token only, and dropping the last tokens copies nothing.
"""

from typing import Any

import torch
from jaxtyping import Int
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
