"""The highest numbers of rows are those that PyTorch finds."""

import pytest
import torch

from dpace.fast.top import GROUP, argmax, topk


@pytest.mark.parametrize("num_places", [1, 5, GROUP, 16 * GROUP, 16 * GROUP + 7])
@pytest.mark.parametrize("count", [1, 4])
def test_the_highest_are_those_of_torch(num_places: int, count: int):
    rows = torch.stack([torch.randperm(num_places, generator=torch.Generator().manual_seed(seed)) for seed in range(9)])
    count = min(count, num_places)
    assert argmax(rows.float()).equal(rows.argmax(-1))
    for found, expected in zip(topk(rows.float(), count), rows.float().topk(count), strict=True):
        assert found.equal(expected)


def test_of_equal_numbers_the_first_is_the_highest_and_several_are_among_the_top():
    rows = torch.zeros(2, 16 * GROUP + 7)
    rows[0, [-1, 3]] = 1.0
    rows[1].fill_(-torch.inf)
    assert argmax(rows).tolist() == [3, 0]
    highest, places = topk(rows, 3)
    assert highest.tolist() == [[1.0, 1.0, 0.0], [-torch.inf] * 3]
    assert sorted(places[0, :2].tolist()) == [3, 16 * GROUP + 6]
    assert len(set(places[1].tolist())) == 3
    rows[0, 5] = torch.nan
    assert argmax(rows)[0] == 5
