import torch
from transformers.cache_utils import DynamicLayer

from dpace.fast.cache import PreallocatedLayer


def test_a_preallocated_layer_holds_what_a_dynamic_one_holds():
    """Through writing and going back."""
    ours, theirs = PreallocatedLayer(9), DynamicLayer()
    for count, num_removed in ((4, 2), (3, 0), (4, 3)):
        new = torch.randn(2, 3, 2, count, 8)
        for found, expected in zip(ours.update(*new), theirs.update(*new), strict=True):
            assert torch.equal(found, expected)
        for layer in (ours, theirs):
            layer.crop(-num_removed)
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)
