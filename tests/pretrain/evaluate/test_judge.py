"""Evaluation of a real, if untrained, model: its shapes, its modes, and what it leaves behind."""

import math

import torch
import torch.nn.functional as F

from datasets.loader import evaluation_batches
from datasets.scenes import Scenes
from pretrain.testing import untrained_judge


def first(judge, count=5):
    (examined,) = evaluation_batches(
        Scenes(split="test", size=count), judge.tokenizer, batch=8, resolution=32
    )
    return examined.batch


def test_embeddings_are_of_unit_norm_and_training_goes_on_as_before(judge):
    judge.model.train()
    look = judge.look(first(judge))
    for found in (look.features, look.texts, judge.sentences(["a red circle", "a ring"])):
        torch.testing.assert_close(found.norm(dim=1), torch.ones(len(found)))
        assert not found.requires_grad
    assert judge.model.training
    assert len(look.said) == 5
    assert judge.look(first(judge), write=False).said is None


def test_a_sentence_and_the_same_caption_in_a_batch_have_the_same_embedding(judge):
    sentences = [Scenes(split="test", size=6).captions(index)[0] for index in range(6)]
    texts = judge.look(first(judge, 6)).texts
    torch.testing.assert_close(texts, judge.sentences(sentences), rtol=1e-5, atol=1e-6)
    many = judge.sentences(sentences * 100)  # more than are encoded at a time
    torch.testing.assert_close(many, texts.repeat(100, 1), rtol=1e-5, atol=1e-6)


def test_the_likelihood_is_the_cross_entropy_of_the_whole_logits(judge):
    batch, model = first(judge), judge.model
    look = judge.look(batch)
    with torch.no_grad():
        tokens = model.eval().encode_image(batch.images)["image_tokens"]
        states = model.captioner(tokens, batch.tokens[:, :-1])
        logits = (states @ model.captioner.head.weight.T).double()
    targets = batch.tokens[:, 1:].masked_fill(~batch.token_mask[:, 1:], -100)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
    assert look.tokens == int((batch.text_length - 1).sum())
    assert math.isclose(look.loss, expected, rel_tol=1e-5)


def test_without_a_text_tower_the_features_are_those_that_the_captioner_reads():
    judge = untrained_judge(text=False)
    batch = first(judge)
    look = judge.look(batch)
    assert look.texts is None
    with torch.no_grad():
        tokens = judge.model.eval().encode_image(batch.images)["image_tokens"]
    torch.testing.assert_close(look.features, tokens.mean(1))
    without = untrained_judge(captioner=False).look(batch)
    assert (without.said, without.tokens) == (None, 0)
