import torch
from transformers.cache_utils import DynamicLayer

from dpace.fast.cache import WindowLayer


def test_a_window_layer_holds_the_last_tokens_in_constant_memory():
    """A window of 9 behind blocks of 4: 8 tokens and 4 slots, in reads of any length."""
    ours, theirs = WindowLayer(10**6, 12), DynamicLayer()
    for count in (3, 1, 4, 2, 70, 1, 4, *[3] * 60, 200, 2):
        new = torch.randn(2, 3, 2, count + 4, 8)
        for found, expected in zip(ours.update(*new), theirs.update(*new), strict=True):
            assert torch.equal(found, expected[:, :, -12:])
        for layer in (ours, theirs):
            layer.crop(-4)
    assert ours.buffers[0].shape[2] == ours.capacity == 76 < theirs.keys.shape[2] == 467
