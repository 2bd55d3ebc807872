import torch
from transformers.cache_utils import DynamicLayer

from dpace.fast.cache import PreallocatedLayer


def test_a_preallocated_layer_holds_what_a_dynamic_one_holds():
    """Through writing, going back, growing, choosing and repeating rows, and forgetting."""
    ours, theirs = PreallocatedLayer(6), DynamicLayer()
    changes = [
        (4, lambda layer: layer.crop(-2)),
        (3, lambda layer: layer.crop(0)),
        (5, lambda layer: layer.batch_select_indices(torch.tensor([2, 0]))),
        (1, lambda layer: layer.batch_repeat_interleave(2)),
        (2, lambda layer: layer.reset()),
        (3, lambda layer: layer.crop(-1)),
    ]
    num_rows = 3
    for count, change in changes:
        new = torch.randn(2, num_rows, 2, count, 8)
        for found, expected in zip(ours.update(*new), theirs.update(*new), strict=True):
            assert torch.equal(found, expected)
        for layer in (ours, theirs):
            change(layer)
        assert ours.get_seq_length() == theirs.get_seq_length()
        if theirs.get_seq_length():
            assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)
            num_rows = len(theirs.keys)
