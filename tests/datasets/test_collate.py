import subprocess
import sys
from pathlib import Path

import torch

from datasets.collate import collate, text_id
from datasets.sample import Fault, Sample
from datasets.tokens import TrainedBPE

TOKENIZER = TrainedBPE.train(["a red dog"] * 3, vocabulary=270, context_length=16)


def picture(value, *, resolution=4):
    return torch.full((3, resolution, resolution), value, dtype=torch.uint8)


def sample(key, image, *captions, fault=None):
    return Sample(key=key, image=image, captions=captions, fault=fault)


def test_ragged_batch():
    batch = collate(
        [
            sample("two", picture(1), "a red dog", "a dog that is not red"),
            sample("image", picture(2)),
            sample("bad", None, fault=Fault("truncated", "truncated JPEG")),
            sample("one", picture(3), "A  red DOG"),
        ],
        TOKENIZER,
        resolution=4,
    )
    assert batch.keys == ("two", "image", "bad", "one")
    assert batch.images.dtype == torch.uint8
    assert batch.images[:, 0, 0, 0].tolist() == [1, 2, 0, 3]
    assert batch.image_valid.tolist() == [True, True, False, True]
    assert batch.image_index.tolist() == [0, 0, 2, 3]
    assert batch.text_valid.tolist() == batch.pair_valid.tolist() == [True, True, False, True]
    texts = ["a red dog", "a dog that is not red", "", "a red dog"]
    expected = [TOKENIZER.encode(text) for text in texts]
    assert batch.text_length.tolist() == [len(ids) for ids in expected]
    assert batch.tokens.shape == (4, max(map(len, expected)))
    for row, ids in zip(batch.tokens.tolist(), expected, strict=True):
        assert row == ids + [0] * (len(row) - len(ids))
    assert batch.text_id[0] == batch.text_id[3]
    assert len(set(batch.text_id.tolist())) == 3
    assert not batch.box_valid.any()
    assert not batch.boxes.any()


def test_masked_sample_shows_nothing_of_what_it_held():
    batch = collate(
        [sample("bad", picture(9), "a red dog", "another", fault=Fault("corrupt", "why"))],
        TOKENIZER,
        resolution=4,
    )
    assert not batch.images.any()
    assert batch.tokens.tolist() == [[TOKENIZER.start, TOKENIZER.end]]
    assert not batch.text_valid.any()
    assert not batch.image_valid.any()


def test_images_without_texts():
    batch = collate([sample("image", picture(1))], TOKENIZER, resolution=4)
    assert batch.tokens.shape == (0, 2)
    assert batch.image_index.shape == batch.text_id.shape == batch.text_valid.shape == (0,)
    assert batch.boxes.shape == (0, 4)


def test_texts_without_images():
    bad = sample("bad", None, fault=Fault("utf8", "its .txt is not UTF-8"))
    texts = [sample("text", None, "a dog", "no image here"), bad, sample("more", None, "a red dog")]
    batch = collate(texts, TOKENIZER, resolution=4, images=False, source="books")
    assert batch.keys == ("text", "bad", "more")
    assert batch.source == "books"
    assert batch.images.shape == (0, 3, 4, 4)
    assert batch.image_valid.shape == (0,)
    assert batch.image_index.tolist() == [-1] * 4
    assert batch.text_valid.tolist() == [True, True, False, True]
    assert not batch.pair_valid.any()
    lengths = [len(TOKENIZER.encode(text)) for text in ("a dog", "no image here", "a red dog")]
    assert batch.token_mask.sum(1).tolist() == [*lengths[:2], 0, lengths[2]]


def test_phrases_stand_beside_their_boxes():
    boxes = ((0.0, 0.25, 0.5, 1.0), (0.5, 0.5, 1.0, 1.0))
    named = Sample(key="named", image=picture(1), captions=("a dog", "red"), boxes=boxes)
    bad = Sample(key="bad", image=None, captions=(), boxes=boxes, fault=Fault("box", "no box"))
    batch = collate([sample("none", picture(2)), bad, named], TOKENIZER, resolution=4)
    assert batch.image_index.tolist() == [1, 2, 2]
    assert batch.boxes.tolist() == [[0, 0, 0, 0], *map(list, boxes)]
    assert batch.box_valid.tolist() == [False, True, True]


def test_text_id_is_the_same_in_every_process_and_fits_int64():
    program = "from datasets.collate import text_id; print(text_id('A red  Dog'))"
    root = Path(__file__).parents[2]
    out = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True
    )
    assert int(out.stdout) == text_id("a red dog")
    assert all(0 <= text_id(str(i)) < 2**63 for i in range(100))
