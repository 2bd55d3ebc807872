"""Keys and values in buffers that are allocated once: writing a token copies that token, and going back copies nothing."""

from typing import Any

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class PreallocatedLayer(DynamicLayer):
    """A `DynamicLayer` whose keys and values are views of one buffer; `crop` only shortens the views."""

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity = capacity
        self._buffers: Any = None

    def update(self, key_states, value_states, *args, **kwargs):
        """Write new keys and values behind the old ones; returns views of all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if self._buffers is None or end > self._buffers[0].shape[-2] or len(key_states) != len(self._buffers[0]):
            self.capacity = max(self.capacity, 2 * end if self._buffers else end)
            shapes = [(*x.shape[:-2], self.capacity, x.shape[-1]) for x in (key_states, value_states)]
            old = (self.keys, self.values)
            self._buffers = [key_states.new_empty(shape) for shape in shapes]
            for buffer, kept in zip(self._buffers, old, strict=True):
                if start:
                    buffer[..., :start, :] = kept
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[..., start:end, :] = new
        self.keys, self.values = (buffer[..., :end, :] for buffer in self._buffers)
        return self.keys, self.values


def make_cache(config, capacity: int) -> DynamicCache:
    """A cache for `capacity` tokens; layers with a sliding window keep transformers' own, which can also go back.

    Memory: keys and values of `capacity` tokens in every full-attention layer, allocated at once.
    """
    cache: Any = DynamicCache(config=config)
    if not cache.layers:  # a config that does not tell its layers' kinds
        cache.layers = [DynamicLayer() for _ in range(config.num_hidden_layers)]
    cache.layers = [PreallocatedLayer(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    cache.activate_past_recording()
    return cache
