"""The numbers of a configuration are those that the tower computes with, and as they were once written."""

import pytest
import torch

from pretrain.export.preprocessing import normalisation_of
from pretrain.testing import TinyImage
from pretrain.zoo.vision import TimmTower


@pytest.mark.parametrize("numbers", [(0.48145466, 0.4578275, 0.40821073), (0.5, 0.5, 0.5), (0.1, 0.25, 0.7)])
def test_the_numbers_that_were_written_down_come_back(numbers):
    tower = TimmTower(torch.nn.Identity(), mean=numbers, std=numbers[::-1])
    seen = normalisation_of(tower)
    torch.testing.assert_close(255 * torch.tensor(seen.std), tower.std.flatten(), rtol=0, atol=0)
    assert seen.mean == list(numbers)
    assert normalisation_of(tower.double()) == seen


def test_a_tower_that_does_not_normalise_is_none_of_ours():
    with pytest.raises(AssertionError, match="TinyImage"):
        normalisation_of(TinyImage())
