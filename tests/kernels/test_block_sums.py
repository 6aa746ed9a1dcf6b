"""Sums over blocks of keys: equal to those through a matrix of ones, wherever a range begins and ends."""

import pytest
import torch

from interp.kernels.block_sums import sum_blocks


@pytest.mark.parametrize("size", [1, 3, 7, 64])
@pytest.mark.parametrize("first", [(0,), (-5,), (4,), (-1, 2), (0, 30)])
def test_a_sum_is_the_product_with_the_blocks_of_the_keys(size, first):
    weight = torch.rand(len(first), 2, 3, 17, dtype=torch.float64)
    number = ((torch.arange(17) - torch.tensor(first)[:, None]).clamp(min=0)) // size
    m = int(number.max()) + 2
    member = torch.nn.functional.one_hot(number, m).double()
    assert torch.allclose(sum_blocks(weight, first, size, m), torch.einsum("bhrk,bkm->bhrm", weight, member))


def test_no_keys_make_no_sum():
    assert sum_blocks(torch.ones(1, 2, 3, 0), [0], 4, 0).shape == (1, 2, 3, 0)
