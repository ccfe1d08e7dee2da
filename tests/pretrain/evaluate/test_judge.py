"""Evaluation of a real, if untrained, model: its shapes, its modes, and what it leaves behind."""

import pytest
import torch

from datasets.loader import evaluation_batches
from datasets.scenes import Scenes
from datasets.tokens import TrainedBPE
from pretrain.evaluate import final
from pretrain.evaluate.judge import Judge
from pretrain.precision import Compute
from pretrain.zoo.models import DualConfig, SmallText, build_model


@pytest.fixture(scope="module")
def judge() -> Judge:
    scenes = Scenes()
    tokenizer = TrainedBPE.train(
        (scenes.captions(index)[0] for index in range(300)), vocabulary=400, context_length=32
    )
    torch.manual_seed(0)
    model = build_model(
        DualConfig(embed=16, text=SmallText(width=16, layers=1, context_length=32)),
        tokenizer=tokenizer,
        resolution=32,
        temperature=(10.0, None),
    )
    return Judge(model=model, tokenizer=tokenizer, compute=Compute(device=torch.device("cpu"), bf16=False))


def test_embeddings_are_of_unit_norm_and_training_goes_on_as_before(judge):
    judge.model.train()
    (batch,) = evaluation_batches(Scenes(split="test", size=5), judge.tokenizer, batch=8, resolution=32)
    for found in (judge.images(batch), judge.texts(batch), judge.sentences(["a red circle", "a ring"])):
        torch.testing.assert_close(found.norm(dim=1), torch.ones(len(found)))
        assert not found.requires_grad
    assert judge.model.training
    assert len(judge.captions(batch)) == 5


def test_a_sentence_and_the_same_caption_in_a_batch_have_the_same_embedding(judge):
    scenes = Scenes(split="test", size=6)
    (batch,) = evaluation_batches(scenes, judge.tokenizer, batch=8, resolution=32)
    sentences = [scenes.captions(index)[0] for index in range(6)]
    torch.testing.assert_close(judge.texts(batch), judge.sentences(sentences), rtol=1e-5, atol=1e-6)


def test_scenes_are_judged_in_every_way_the_model_can(judge, monkeypatch):
    monkeypatch.setattr(final, "_RETRIEVAL", 20)
    monkeypatch.setattr(final, "_PER_COMBINATION", 1)
    monkeypatch.setattr(final, "_CAPTIONED", 5)
    results = final.judge_scenes(judge, resolution=32)
    assert {name.split("@")[0] for name in results} == {
        "zero_shot_seen_combinations",
        "zero_shot_unseen_combinations",
        "image_to_text_recall",
        "text_to_image_recall",
        "exact_captions_1_object",
        "exact_captions_2_objects",
        "exact_captions_1_unseen_object",
    }
    assert all(0 <= result.value <= 1 for result in results.values())
    lines = final.table(results)
    assert len({line.index(".") for line in lines}) == 1, "the numbers stand in one column"
