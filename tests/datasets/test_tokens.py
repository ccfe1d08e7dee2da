import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datasets.errors import UserError
from datasets.tokens import OpenClipTokens, TrainedBPE, normalise

CAPTIONS = [f"A {size} {colour} dog  runs\tover the {place}." for size in ("big", "small")
            for colour in ("red", "brown") for place in ("grass", "sand", "snow")]  # fmt: skip
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def trained():
    return TrainedBPE.train(CAPTIONS, vocabulary=300, context_length=24)


@pytest.fixture(scope="module")
def bundled():
    return OpenClipTokens("ViT-B-32")


def test_special_ids_and_sizes(trained):
    ids = trained.encode("a dog")
    assert (ids[0], ids[-1]) == (trained.start, trained.end) == (1, 2)
    assert 259 < trained.vocabulary <= 300
    assert max(max(trained.encode(caption)) for caption in CAPTIONS) < trained.vocabulary


def test_merges_were_learned(trained):
    assert len(trained.encode("over the grass.")) < len("over the grass.") / 2


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_every_text_comes_back_normalised(text):
    tokenizer = LONG
    assert tokenizer.decode(tokenizer.encode(text)) == normalise(text)


LONG = TrainedBPE.train(CAPTIONS, vocabulary=300, context_length=10_000)


@pytest.mark.parametrize("text", ["<end> of <start> <pad>", "Ünïcode 日本 👩‍👩‍👧 عربى", "", "  \t "])
def test_odd_texts_come_back(text):
    ids = LONG.encode(text)
    assert LONG.end not in ids[1:-1]
    assert LONG.decode(ids) == normalise(text)


@pytest.mark.parametrize("length", [3, 5, 24])
def test_long_text_keeps_its_end(length):
    tokenizer = TrainedBPE.train(CAPTIONS, vocabulary=300, context_length=length)
    whole, cut = LONG.encode("dog " * 200), tokenizer.encode("dog " * 200)
    assert len(cut) == length
    assert cut == [*whole[: length - 1], tokenizer.end]


def test_decoding_stops_at_the_first_end(trained):
    ids = trained.encode("a red dog")
    assert trained.decode([*ids, *trained.encode("more"), 0, 0]) == "a red dog"


def test_training_does_not_depend_on_hashing(tmp_path):
    program = (
        "import sys; from pathlib import Path; from datasets.tokens import TrainedBPE;"
        "tokenizer = TrainedBPE.train(sys.stdin.read().split('|'), vocabulary=320, context_length=24);"
        "tokenizer.save(Path(sys.argv[1]))"
    )
    for seed in ("1", "2"):
        path = str(tmp_path / seed)
        subprocess.run([sys.executable, "-c", program, path], input="|".join(CAPTIONS), text=True, check=True,
                       cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": seed})  # fmt: skip
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_saved_file_is_the_tokenizer(trained, tmp_path):
    trained.save(tmp_path / "tokenizer.json")
    loaded = TrainedBPE.load(tmp_path / "tokenizer.json")
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]
    assert loaded.fingerprint == trained.fingerprint
    assert (loaded.context_length, loaded.vocabulary) == (trained.context_length, trained.vocabulary)
    assert loaded.encode(CAPTIONS[0]) == trained.encode(CAPTIONS[0])


def test_fingerprint_tells_tokenizers_apart(trained):
    others = [
        TrainedBPE.train(CAPTIONS, vocabulary=300, context_length=25),
        TrainedBPE.train(CAPTIONS, vocabulary=270, context_length=24),
    ]
    assert len({trained.fingerprint, *(other.fingerprint for other in others)}) == 3


def test_vocabulary_must_hold_the_bytes():
    with pytest.raises(UserError, match="258 is too small"):
        TrainedBPE.train(CAPTIONS, vocabulary=258, context_length=24)


@pytest.mark.parametrize("model", ["ViT-B-32", "coca_ViT-B-32", "ViT-S-16-alt"])
@pytest.mark.parametrize("text", [*CAPTIONS[:2], "It's a Café &amp; 2024! 日本", "", "dog " * 200])
def test_open_clip_ids_are_those_of_its_own_call(model, text):
    import open_clip

    tokenizer = OpenClipTokens(model)
    row = open_clip.get_tokenizer(model)([text])[0]
    ids = tokenizer.encode(text)
    assert row[: len(ids)].tolist() == ids
    assert not row[len(ids) :].any()
    assert len(row) == tokenizer.context_length


def test_open_clip_round_trip(bundled):
    assert bundled.decode([*bundled.encode("A  red Café dog"), 0, 0]) == "a red café dog"


def test_open_clip_caption_that_spells_the_end(bundled):
    ids = bundled.encode("a <end_of_text> dog")
    assert ids.count(bundled.end) == 1
    assert bundled.decode(ids) == "a dog"


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("ViT-B-16-SigLIP", "does not bundle"),
        ("roberta-ViT-B-32", "roberta-base"),
        ("ViT-B-33", "no model 'ViT-B-33'"),
    ],
)
def test_tokenizers_that_need_a_network_are_refused(model, says):
    with pytest.raises(UserError, match=says):
        OpenClipTokens(model)
