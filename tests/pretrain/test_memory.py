"""Bytes of tensors are counted as long as they live, each storage once."""

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pretrain.memory import Alive


def test_what_a_forward_keeps_for_its_backward_and_what_a_backward_leaves():
    net, x = nn.Sequential(nn.Linear(10, 100), nn.GELU(), nn.Linear(100, 10)), torch.randn(5, 10)
    parameters = sum(each.nbytes for each in net.parameters())
    alive = Alive()
    with alive:
        out = net(x)
        assert alive.bytes == 4 * (5 * 100 + 5 * 100 + 5 * 10), "two hidden layers and what comes out"
        out.sum().backward()
        assert alive.bytes == parameters + out.nbytes, "gradients"
    del out
    assert alive.bytes == parameters


def test_views_and_what_was_there_before_do_not_count():
    alive, x = Alive(), torch.ones(8)
    with alive:
        y = x.view(2, 4).mT[1:]
        x.add_(1)
        assert alive.bytes == 0
        z = y + 1
        assert alive.bytes == z.nbytes
        z.mul_(2)
        assert alive.bytes == z.nbytes


def test_what_torch_only_supposes_takes_no_memory():
    alive = Alive()
    with alive, FakeTensorMode():
        kept = torch.ones(8) + 1
    assert kept.shape == (8,)
    assert alive.peak == 0
