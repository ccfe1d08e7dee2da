import json

import numpy as np
import pytest
from PIL import Image

from datasets.collate import collate
from datasets.sources import open_source
from pretrain.evaluate.sheet import make_sheet, save_sheet
from pretrain.testing import untrained_judge

HARD = ["$x_1$ costs \\$5", "\u72ac \U0001f600", "word " * 200, "line\nbreak"]


@pytest.fixture
def source(tmp_path, write_shard):
    def beside(place, colour):
        return {"captions": [HARD[place % 4] if place > 3 else f"a {colour} square", f"number {place}"]}

    shard = write_shard(tmp_path / "a.tar", 40, beside=beside, damaged=(0,))
    return open_source(shard, seed=0, split="test")


@pytest.mark.filterwarnings("ignore:Glyph")
def test_the_sheet_shows_images_spread_over_the_set_and_the_data_says_the_same(source, judge, tmp_path):
    sheet = make_sheet(judge, source, resolution=32)
    assert sheet.said_by == "captioner"
    places = [int(row.key.rpartition("/")[2]) for row in sheet.rows]
    assert places == [place * 40 // 16 for place in range(1, 16)]  # the first cannot be read
    picture = save_sheet(sheet, tmp_path / "samples", step=7, samples=448)
    assert picture.name == "step-00000007.png"
    assert np.asarray(Image.open(picture)).std() > 10
    record = json.loads((tmp_path / "samples" / "step-00000007.json").read_text())
    assert (record["step"], record["samples"], record["sheet"]) == (7, 448, picture.name)
    for row, shown in zip(sheet.rows, record["rows"], strict=True):
        assert (shown["key"], shown["said"], tuple(shown["references"])) == (
            row.key,
            row.said,
            row.references,
        )
        pixels = np.asarray(Image.open(tmp_path / "samples" / shown["image"]))
        assert (pixels == row.image.permute(1, 2, 0).numpy()).all()
    assert make_sheet(judge, source, resolution=32).rows[3].said == sheet.rows[3].said


def test_a_model_that_writes_nothing_chooses_the_nearest_caption(source):
    judge = untrained_judge(captioner=False)
    sheet = make_sheet(judge, source, resolution=32)
    assert sheet.said_by == "nearest caption"
    pool = list(dict.fromkeys(c for index in range(40) for c in source.captions(index)))
    texts = judge.sentences(pool)
    sample = source.read(20, seed=(), resolution=32)
    (row,) = [row for row in sheet.rows if row.key == sample.key]
    features = judge.look(collate([sample], judge.tokenizer, resolution=32)).features
    assert row.said == pool[int((features @ texts.T).argmax())]
