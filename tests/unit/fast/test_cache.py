import torch
from transformers.cache_utils import DynamicLayer

from dpace.fast.cache import PreallocatedLayer


def test_a_layer_with_a_window_reads_the_last_tokens():
    """A window of 9 behind blocks of 4: 8 tokens and 4 slots, in reads of any length."""
    ours, theirs = PreallocatedLayer(600, 12), DynamicLayer()
    for count in (3, 1, 4, 2, 70, 1, 4, *[3] * 60, 200, 2):
        new = torch.randn(2, 3, 2, count + 4, 8)
        for found, expected in zip(ours.update(*new), theirs.update(*new), strict=True):
            assert torch.equal(found, expected[:, :, -12:])
        for layer in (ours, theirs):
            layer.crop(-4)
