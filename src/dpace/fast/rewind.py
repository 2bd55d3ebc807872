"""Go back in caches whose layers keep a recurrent state, which no crop can undo."""

from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from dpace.fast.cache import PreallocatedLayer, go_back, make_cache

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
