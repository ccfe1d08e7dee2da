import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datasets.errors import UserError
from datasets.tokens import HubTokens, OpenClipTokens, TrainedBPE, normalise

CAPTIONS = [f"A {size} {colour} dog  runs\tover the {place}." for size in ("big", "small")
            for colour in ("red", "brown") for place in ("grass", "sand", "snow")]  # fmt: skip
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def trained():
    return TrainedBPE.train(CAPTIONS, vocabulary=300, context_length=24)


@pytest.fixture(scope="module")
def bundled():
    return OpenClipTokens(context_length=77)


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


@pytest.mark.parametrize(
    ("model", "context"), [("ViT-B-32", 77), ("coca_ViT-B-32", 76), ("ViT-S-16-alt", 77)]
)
@pytest.mark.parametrize("text", [*CAPTIONS[:2], "It's a Café &amp; 2024! 日本", "", "dog " * 200])
def test_open_clip_ids_are_those_of_its_own_call(model, context, text):
    import open_clip

    tokenizer = OpenClipTokens(context_length=context)
    assert_same(tokenizer, open_clip.get_tokenizer(model), text)


@pytest.mark.parametrize("clean", ["lower", "whitespace", "canonicalize"])
def test_open_clip_cleans_a_text_as_it_is_told(clean):
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer = OpenClipTokens(context_length=20, clean=clean)
    assert_same(tokenizer, SimpleTokenizer(context_length=20, clean=clean), "It's  a RED, red_dog &amp; co.")


def assert_same(tokenizer, theirs, text):
    """The ids and the padding of open_clip's tokenizer."""
    (row,) = theirs([text]).tolist()
    ids = tokenizer.encode(text)
    assert row == ids + [tokenizer.pad] * (tokenizer.context_length - len(ids))


def test_open_clip_round_trip(bundled):
    assert bundled.decode([*bundled.encode("A  red Café dog"), 0, 0]) == "a red café dog"


def test_open_clip_caption_that_spells_the_end(bundled):
    ids = bundled.encode("a <end_of_text> dog")
    assert ids.count(bundled.end) == 1
    assert bundled.decode(ids) == "a dog"


WORDS = ["a", "red", "brown", "big", "dog", "grass", "It", "it", "s", "'", ".", "Dog", "reddog"]
FAMILIES = {
    # family: special tokens in the order of their ids, template, and which token is what
    "siglip": (["<unk0>", "</s>", "<unk>"], "$A </s>", {"eos_token": "</s>", "pad_token": "</s>"}),
    "siglip2": (
        ["<pad>", "<eos>", "<bos>", "<unk>"],
        "$A <eos>",
        {"eos_token": "<eos>", "pad_token": "<pad>"},
    ),
    "bert": (
        ["[PAD]", "<unk>", "[CLS]", "[SEP]"],
        "[CLS] $A [SEP]",
        {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"},
    ),
    "roberta": (
        ["<s>", "<pad>", "</s>", "<unk>"],
        "<s> $A </s>",
        {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"},
    ),
    "open": (["<pad>", "<unk>"], "$A", {"pad_token": "<pad>"}),
    "unpadded": (["</s>", "<unk>"], "$A </s>", {"eos_token": "</s>"}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A directory of every family, as transformers writes it."""
    return {family: save_tokenizer(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


def save_tokenizer(family, folder):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special, template, roles = FAMILIES[family]
    library = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate([*special, *WORDS])}, unk_token="<unk>")
    )
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    closing = [(word, special.index(word)) for word in special if word in template.split()]
    library.post_processor = processors.TemplateProcessing(single=template, special_tokens=closing)
    PreTrainedTokenizerFast(tokenizer_object=library, unk_token="<unk>", **roles).save_pretrained(folder)
    return str(folder)


TEXTS = [*CAPTIONS[:2], "It's  a RED, red_dog &amp; co.", "", "dog " * 30, "a red Dog."]


@pytest.mark.parametrize("clean", ["whitespace", "canonicalize", "lower"])
@pytest.mark.parametrize("family", ["siglip", "siglip2", "bert", "roberta"])
def test_ids_of_transformers_are_those_of_open_clips_wrapper(folders, family, clean):
    from open_clip.tokenizer import HFTokenizer

    tokenizer = HubTokens(folders[family], context_length=9, clean=clean)
    theirs = HFTokenizer(folders[family], context_length=9, clean=clean)
    for text in TEXTS:
        assert_same(tokenizer, theirs, text)


def test_the_end_may_be_written_as_padding(folders):
    from open_clip.tokenizer import HFTokenizer

    tokenizer = HubTokens(folders["bert"], context_length=9, strip_end=True)
    theirs = HFTokenizer(folders["bert"], context_length=9, strip_sep_token=True)
    for text in TEXTS:
        assert_same(tokenizer, theirs, text)
    assert (tokenizer.start, tokenizer.end) == (2, 0)
    assert tokenizer.decode([*tokenizer.encode("a red dog"), 5, 6]) == "a red dog"


@pytest.mark.parametrize(
    ("family", "start", "end", "pad"),
    [("siglip", None, 1, 1), ("siglip2", None, 1, 0), ("bert", 2, 3, 0), ("roberta", 0, 2, 1)],
)
def test_what_opens_closes_and_pads_a_text(folders, family, start, end, pad):
    tokenizer = HubTokens(folders[family], context_length=9)
    assert (tokenizer.start, tokenizer.end, tokenizer.pad) == (start, end, pad)
    assert tokenizer.vocabulary == len(FAMILIES[family][0]) + len(WORDS)
    ids = tokenizer.encode("a red dog")
    assert len(ids) == 3 + (start is not None) + 1
    assert tokenizer.decode([*ids, *tokenizer.encode("big dog")]) == "a red dog"


@pytest.mark.parametrize("family", ["siglip", "roberta"])
def test_a_caption_that_spells_the_end_of_transformers(folders, family):
    tokenizer = HubTokens(folders[family], context_length=9)
    ids = tokenizer.encode("a </s> red dog <pad>")
    assert ids.count(tokenizer.end) == 1
    assert tokenizer.decode(ids) == "a red dog"


def test_fingerprints_of_transformers_tell_tokenizers_apart(folders):
    made = [
        HubTokens(folders["siglip"], context_length=9),
        HubTokens(folders["siglip"], context_length=8),
        HubTokens(folders["siglip"], context_length=9, clean="canonicalize"),
        HubTokens(folders["siglip2"], context_length=9),
        HubTokens(folders["bert"], context_length=9),
        HubTokens(folders["bert"], context_length=9, strip_end=True),
    ]
    assert len({tokenizer.fingerprint for tokenizer in made}) == len(made)
    assert made[0].fingerprint == HubTokens(folders["siglip"], context_length=9).fingerprint


def test_tokenizers_that_are_none(folders, tmp_path, monkeypatch):
    def says(source, **options):
        with pytest.raises(UserError) as raised:
            HubTokens(str(source), context_length=9, **options)
        assert "\n" not in str(raised.value)
        return str(raised.value)

    assert says(tmp_path) == f"{tmp_path} holds no tokenizer.json; transformers' save_pretrained writes one"
    (tmp_path / "tokenizer.json").write_text("{}")
    assert says(tmp_path).startswith(f"{tmp_path} cannot be read as a tokenizer: ")
    assert "closes no text with an end token" in says(folders["open"])
    assert "names no padding token" in says(folders["unpadded"])
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = says("timm/no-such-tokenizer")
    assert message.endswith("name a local directory with a tokenizer.json: --model.tokenizer DIR")


def test_a_tokenizer_may_be_that_of_a_repository(folders, monkeypatch):
    from datasets import hub

    asked = []
    monkeypatch.setattr(
        hub, "fetch_folder", lambda *names, **_: asked.append(names) or Path(folders["siglip"])
    )
    assert HubTokens("timm/ViT-B-16-SigLIP", context_length=9).end == 1
    assert asked == [("timm/ViT-B-16-SigLIP", "tokenizer.json")]
