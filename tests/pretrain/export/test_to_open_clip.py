"""What open_clip reads of an export equals the run's model; what it has no shape for is refused by name."""

import json
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file
from torchvision.transforms.v2.functional import normalize

from datasets.errors import UserError
from pretrain.evaluate.subject import load_subject
from pretrain.export.__main__ import export
from pretrain.zoo.definition import WEIGHTS

CAPTIONS = ["a dog", "A red  square left of a blue circle", "it's 42!", "x y z " * 30]


def theirs(out) -> Any:
    model: Any
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{out}")
    return model.eval(), preprocess, open_clip.get_tokenizer(f"local-dir:{out}")


def config_of(out):
    return json.loads((out / "open_clip_config.json").read_text())


@torch.no_grad()
def assert_equal(run, out, *, side, step=None):
    """In float64 the embeddings are equal to 1e-9; the tokens are equal up to each text's end."""
    subject: Any = load_subject(run, step=step)
    model, preprocess, tokenizer = theirs(out)
    assert tuple(model.visual.image_size) == (side, side)
    assert preprocess.transforms[0].size == side
    seen = config_of(out)["preprocess_cfg"]
    ours, model = subject.model.double(), model.double()
    images = torch.randint(0, 256, (3, 3, side, side), dtype=torch.uint8)
    pixels = (images - ours.image.mean) / ours.image.std
    torch.testing.assert_close(normalize(images / 255, seen["mean"], seen["std"]), pixels.float())
    torch.testing.assert_close(
        model.encode_image(pixels, normalize=True), ours.encode_image(images)["image"], rtol=0, atol=1e-9
    )
    ids = [subject.tokenizer.encode(caption) for caption in CAPTIONS]
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(each) for each in ids], batch_first=True)
    padded = tokenizer(CAPTIONS)
    for row, each in zip(padded, ids, strict=True):
        assert row[: len(each)].tolist() == each
    texts = ours.encode_text(tokens, torch.tensor([len(each) for each in ids]))["text"]
    torch.testing.assert_close(model.encode_text(padded, normalize=True), texts, rtol=0, atol=1e-9)
    torch.testing.assert_close(model.logit_scale.reshape(1), ours.logit_scale)
    if ours.logit_bias is None:
        assert model.logit_bias is None
    else:
        torch.testing.assert_close(model.logit_bias.reshape(1), ours.logit_bias)


@pytest.mark.parametrize(
    ("model", "side"),
    [
        ("clip", 32), ("quickgelu", 32), ("custom", 48), ("average", 32), ("scaled", 32), ("trunk", 160),
        ("siglip", 224), ("bert", 32), ("beside clip", 48), ("beside coca", 32), ("beside siglip", 224),
        ("beside timm:test_vit", 160), ("beside timm:test_convnext", 64),
    ],
)  # fmt: skip
def test_embeddings_are_equal(model, side, make_run, tmp_path):
    run, out = make_run(model, resolutions=(side,)), tmp_path / "out"
    export(run, out, to="open_clip")
    assert_equal(run, out, side=side)


def test_a_bias_that_was_trained_beside_a_model_without_one_is_there(make_run, tmp_path):
    run, out = make_run("clip", "siglip"), tmp_path / "out"
    export(run, out, to="open_clip")
    assert_equal(run, out, side=32)
    assert theirs(out)[0].logit_bias is not None


def test_a_bias_can_be_left_out(make_run, tmp_path):
    run, out = make_run("siglip", "siglip", resolutions=(224,)), tmp_path / "out"
    export(run, out, to="open_clip", without=["logit_bias"])
    assert theirs(out)[0].logit_bias is None


def test_positions_of_the_first_stage_stand_as_the_last_stage_saw_them(make_run, tmp_path):
    run, out = make_run("beside timm:test_vit", resolutions=(96, 160)), tmp_path / "out"
    export(run, out, to="open_clip")
    assert_equal(run, out, side=160)
    with pytest.raises(UserError, match=r"'timm:test_vit' for images of 160 px only.* trained with 96 px"):
        export(
            make_run("beside timm:test_vit", resolutions=(96,), name="b"), tmp_path / "b-out", to="open_clip"
        )


@torch.no_grad()
def test_a_coca_takes_its_decoder_along_or_leaves_it_behind(make_run, tmp_path):
    run, out = make_run("coca", "itc,lm"), tmp_path / "out"
    export(run, out, to="open_clip")
    assert_equal(run, out, side=32)
    model, _, tokenizer = theirs(out)
    assert isinstance(model, open_clip.CoCa)
    subject: Any = load_subject(run)
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    ids = [torch.tensor(subject.tokenizer.encode(caption)) for caption in CAPTIONS]
    tokens, length = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True), torch.tensor(list(map(len, ids)))
    states = subject.model.encode_text(tokens, length)["text_tokens"][:, :-1]
    captioner = subject.model.captioner
    ours = captioner.head.logits(captioner(subject.model.encode_image(images)["image_tokens"], states))
    theirs_ = model((images - subject.model.image.mean) / subject.model.image.std, tokenizer(CAPTIONS))[
        "logits"
    ]
    for row, other, count in zip(ours, theirs_, length, strict=True):
        torch.testing.assert_close(row[: count - 1], other[: count - 1], rtol=0, atol=1e-5)

    export(run, tmp_path / "dual", to="open_clip", without=["captioner"])
    assert_equal(run, tmp_path / "dual", side=32)
    assert isinstance(theirs(tmp_path / "dual")[0], open_clip.CustomTextCLIP)


def test_preprocessing_is_that_of_training(make_run, tmp_path):
    export(make_run("clip", resolutions=(48,)), tmp_path / "out", to="open_clip")
    assert config_of(tmp_path / "out")["preprocess_cfg"] == {
        "mean": list(open_clip.OPENAI_DATASET_MEAN), "std": list(open_clip.OPENAI_DATASET_STD),
        "interpolation": "bicubic", "resize_mode": "shortest", "size": 48,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("model", "objectives", "sentence"),
    [
        ("beside small", "itc", "the image tower 'small' begins with a convolutional stem"),
        ("beside quickgelu", "itc", "quickgelu.json' has QuickGELU and the text tower beside it has not"),
        ("clip", "itc,lm", "the captioner is Medley's own.*--without captioner"),
        ("clip", "itc,itm", "open_clip has no place for that.*--without fusion"),
        ("beside small", "lm", "has trained no text tower"),
    ],
)
def test_what_open_clip_has_no_shape_for_is_refused_by_name(model, objectives, sentence, make_run, tmp_path):
    run = make_run(model, objectives)
    with pytest.raises(UserError, match=sentence) as raised:
        export(run, tmp_path / "out", to="open_clip")
    assert "\n" not in str(raised.value)
    assert {path.name for path in tmp_path.iterdir()} <= {"run", f"{model.split()[-1]}.json"}


def test_a_captioner_of_ours_and_a_fusion_tower_are_left_out_knowingly(make_run, tmp_path):
    run = make_run("clip", "itc,itm,lm")
    export(run, tmp_path / "out", to="open_clip", without=["captioner", "fusion"])
    assert_equal(run, tmp_path / "out", side=32)
    assert not [key for key in load_file(tmp_path / "out" / WEIGHTS) if "look" in key or "read" in key]
    after = load_subject(tmp_path / "out")
    assert (after.matcher, after.model.fusion) == (None, None)


def test_a_model_that_open_clip_builds_in_another_way_is_refused(make_run, tmp_path, monkeypatch):
    import timm

    run, real = make_run("beside timm:test_convnext", resolutions=(64,)), timm.create_model
    subject = load_subject(run)
    monkeypatch.setattr("pretrain.export.__main__.load_subject", lambda *_, **__: subject)
    monkeypatch.setattr(timm, "create_model", lambda name, **options: real("test_convnext2", **options))
    with pytest.raises(UserError, match="cannot hold this model, of which it builds another: "):
        export(run, tmp_path / "out", to="open_clip")
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
