from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from datasets.errors import UserError
from objectives.base import DECODED, Widths
from objectives.lm import LM
from pretrain.testing import make_samples, merge
from pretrain.zoo.head import VocabularyHead

WIDTHS = Widths(embed=6, image_tokens=8, text_tokens=8, vocabulary=20, temperature=False, contrast=False)


class Decoded:
    group = None
    logit_scale = torch.zeros(1)
    logit_bias = None

    def __init__(self, states, head) -> None:
        self.states, self.head = states, head

    def __getitem__(self, wanted):
        assert wanted == DECODED
        return self.states

    def vocabulary_loss(self, states, targets, *, smoothing, z_loss):
        return self.head(states, targets, smoothing=smoothing, z_loss=z_loss)


def test_the_sum_over_real_tokens_only():
    torch.manual_seed(0)
    batch = merge(make_samples(15))
    head = VocabularyHead(nn.Parameter(torch.randn(20, 8))).double()
    states = torch.randn(len(batch.tokens), batch.tokens.shape[1] - 1, 8, dtype=torch.float64)
    objective = LM(LM.Config(smoothing=0.1, z_loss=0.01), WIDTHS)
    terms = objective(Decoded(states, head), batch)

    targets = batch.tokens[:, 1:].clone()
    for row in range(len(targets)):
        targets[row, int(batch.text_length[row]) - 1 :] = -100
        if not batch.pair_valid[row]:
            targets[row] = -100
    logits = states @ head.weight.T
    reference = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=-100, label_smoothing=0.1, reduction="sum"
    )
    drift = 0.01 * logits.logsumexp(dim=-1)[targets != -100].square().sum()
    torch.testing.assert_close(terms.total, reference + drift, rtol=1e-12, atol=0)
    assert objective.denominator(batch).item() == int((targets != -100).sum())
    hits = ((logits.argmax(-1) == targets) & (targets != -100)).sum()
    assert terms.metrics["accuracy"].item() == hits.item()


def test_texts_alone_are_all_scored_and_among_images_only_those_beside_one():
    torch.manual_seed(0)
    batch = merge(make_samples(15))
    objective = LM(LM.Config(), WIDTHS)
    lengths = batch.text_length - 1
    index = batch.image_index
    nowhere = torch.full_like(index, -1)
    alone = replace(batch, images=batch.images[:0], image_valid=batch.image_valid[:0], image_index=nowhere)
    assert objective.denominator(alone) == lengths[batch.text_valid].sum()
    mixed = replace(batch, image_index=torch.where(torch.arange(len(index)) % 2 == 0, -1, index))
    assert objective.denominator(mixed) == lengths[1::2][batch.pair_valid[1::2]].sum()

    head = VocabularyHead(nn.Parameter(torch.randn(20, 8))).double()
    states = torch.randn(len(batch.tokens), batch.tokens.shape[1] - 1, 8, dtype=torch.float64)
    rows = [
        F.cross_entropy(
            (states[n, : lengths[n]] @ head.weight.T), batch.tokens[n, 1 : lengths[n] + 1], reduction="sum"
        )
        for n in range(len(states))
    ]
    for told, scored in ((alone, batch.text_valid), (mixed, mixed.pair_valid)):
        expected = torch.stack(rows)[scored].sum()
        torch.testing.assert_close(objective(Decoded(states, head), told).total, expected, rtol=1e-12, atol=0)


def test_a_batch_without_a_readable_pair_costs_nothing():
    batch = merge([make_samples(15)[4]])  # masked
    head = VocabularyHead(nn.Parameter(torch.randn(20, 8)))
    states = torch.randn(1, batch.tokens.shape[1] - 1, 8, requires_grad=True)
    objective = LM(LM.Config(), WIDTHS)
    terms = objective(Decoded(states, head), batch)
    terms.total.backward()
    assert terms.total.item() == 0
    assert objective.denominator(batch).item() == 0
    assert states.grad is not None
    assert not states.grad.any()


def test_a_negative_z_loss_is_refused():
    LM.Config(z_loss=1e-5).check("--objectives.lm")
    with pytest.raises(UserError, match=r"--objectives\.lm\.z-loss is -1"):
        LM.Config(z_loss=-1).check("--objectives.lm")
