import pytest
import torch

from pretrain.distributed import Ranks
from pretrain.evaluate import scenes
from pretrain.evaluate.results import table
from pretrain.testing import untrained_judge

ALONE = Ranks(rank=0, world=1, device=torch.device("cpu"), group=None)
EMBEDDED = {
    "zero_shot_seen_combinations",
    "zero_shot_unseen_combinations",
    "image_to_text_recall",
    "text_to_image_recall",
}
WRITTEN = {"exact_captions_1_object", "exact_captions_2_objects", "exact_captions_1_unseen_object"}


@pytest.mark.parametrize(
    ("parts", "names"),
    [({}, EMBEDDED | WRITTEN), ({"text": False}, WRITTEN), ({"captioner": False}, EMBEDDED)],
)
def test_scenes_are_judged_in_every_way_the_model_can(monkeypatch, parts, names):
    monkeypatch.setattr(scenes, "_RETRIEVAL", 20)
    monkeypatch.setattr(scenes, "_PER_COMBINATION", 1)
    monkeypatch.setattr(scenes, "_CAPTIONED", 5)
    results = scenes.examine_scenes(untrained_judge(**parts), resolution=32, ranks=ALONE)
    assert {name.split("@")[0] for name in results} == names
    assert all(0 <= result.value <= 1 for result in results.values())
    lines = table(results)
    assert len({line.index(".") for line in lines}) == 1, "the numbers stand in one column"
