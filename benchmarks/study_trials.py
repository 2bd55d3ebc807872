"""Changes of the network and of the loss that `benchmarks/study.py` tries, and that dpace itself does not have.

Each is a context in which drafters are trained and measured.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from unittest import mock

import torch
from torch import Tensor, nn

import dpace.modeling_dflash as network
import dpace.train.scoring as scoring
from dpace.loss import frozen_head_nll

GROUP = 16
"""Channels that share what the input adds to the taps."""


class TwoTaps(nn.Module):
    """Two taps before and after a part of a layer: a slot sees the slot before it, within its block.

    `out[i, c] = sum over t of (base[t, c] + added[i, t, c // 16]) x[i - t, c]`, with 0 before a block's first slot.
    `base` starts at 1 for the slot itself, all else at 0, so that training starts from the network without taps.

    Source: DFlash2, as merged in vLLM (pull request 52816).
    """

    def __init__(self, hidden_size: int, block_size: int):
        super().__init__()
        self.block_size, self.group = block_size, GROUP if hidden_size % GROUP == 0 else 1
        self.base_kernel = nn.Parameter(torch.tensor([1.0, 0.0]).view(1, 2, 1).repeat(2, 1, hidden_size))
        self.kernel_projection = nn.Parameter(torch.zeros(4 * hidden_size // self.group, hidden_size))

    def around(self, hidden: Tensor, part: Callable[[Tensor], Tensor]) -> Tensor:
        """Compute the part between its taps; all tensors are "batch query hidden"."""
        added = (hidden @ self.kernel_projection.T).unflatten(-1, (2, 2, -1)).repeat_interleave(self.group, -1)
        return self._taps(part(self._taps(hidden, added, 0)), added, 1)

    def _taps(self, x: Tensor, added: Tensor, side: int) -> Tensor:
        kernel = self.base_kernel[side] + added[:, :, side]
        slots = x.unflatten(1, (-1, min(self.block_size, x.shape[1])))
        before = nn.functional.pad(slots, (0, 0, 1, 0))[..., :-1, :].flatten(1, 2)
        return kernel[:, :, 0] * x + kernel[:, :, 1] * before


class LayerWithTaps(network.DFlashLayer):
    """A layer with taps around attention and feed-forward."""

    def __init__(self, config, layer: int):
        super().__init__(config, layer)
        self.attention_conv = TwoTaps(config.hidden_size, config.block_size)
        self.mlp_conv = TwoTaps(config.hidden_size, config.block_size)

    def forward(self, hidden, context, rope, mask, cache):
        """Add attention and feed-forward to `hidden`."""
        hidden = hidden + self.attention_conv.around(
            self.input_layernorm(hidden), lambda x: self.self_attn(x, context, rope, mask, cache)
        )
        return hidden + self.mlp_conv.around(self.post_attention_layernorm(hidden), self.mlp)


def two_taps() -> AbstractContextManager:
    """Train and measure drafters of layers with taps."""
    return mock.patch.object(network, "DFlashLayer", LayerWithTaps)


@contextlib.contextmanager
def distillation_temperature(temperature: float) -> Iterator[None]:
    """Train on distributions of logits divided by a temperature; losses grow by its square, as in distillation.

    The weights take the drafter's confidence from the softened distribution too. Validation is as ever.
    """

    def softened(hidden, head, *args, target_hidden=None, **kwargs):
        if target_hidden is None or not torch.is_grad_enabled():
            return frozen_head_nll(hidden, head, *args, target_hidden=target_hidden, **kwargs)
        hidden, target_hidden = hidden / temperature, target_hidden / temperature  # the demo's head is linear
        out = frozen_head_nll(hidden, head, *args, target_hidden=target_hidden, **kwargs)
        return out._replace(losses=out.losses * temperature**2)

    with mock.patch.object(scoring, "frozen_head_nll", softened):
        yield
