"""What transformers reads of an export equals the run's model; what it has no place for is refused."""

import json
from typing import Any

import pytest
import torch
from PIL import Image

from datasets.errors import UserError
from datasets.views import fixed_view
from pretrain.evaluate.subject import load_subject
from pretrain.export.__main__ import export

CAPTIONS = ["a dog", "A red  square left of a blue circle", "it's 42!", "a dog " * 30]


def theirs(out) -> Any:
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    return tuple(each.from_pretrained(out) for each in (AutoModel, AutoImageProcessor, AutoTokenizer))


@torch.no_grad()
def assert_equal(run, out, *, side, stop=None):
    """In float64 the embeddings are equal to 1e-9; so are the ids, but for an end token that had to move."""
    subject: Any = load_subject(run)
    model, see, tokenizer = theirs(out)
    ours, model = subject.model.double(), model.double().eval()
    images = torch.randint(0, 256, (3, 3, side, side), dtype=torch.uint8)
    pixels = see(list(images), return_tensors="pt").pixel_values
    same = (images - ours.image.mean) / ours.image.std
    torch.testing.assert_close(pixels, same.float(), rtol=0, atol=2e-6)
    seen = torch.nn.functional.normalize(model.get_image_features(pixel_values=same).pooler_output, dim=-1)
    torch.testing.assert_close(seen, ours.encode_image(images)["image"], rtol=0, atol=1e-9)

    ids = [subject.tokenizer.encode(caption) for caption in CAPTIONS]
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(each) for each in ids], batch_first=True)
    inputs = tokenizer(CAPTIONS, padding="max_length", truncation=True, return_tensors="pt")
    assert inputs.keys() == {"input_ids"}
    for row, each in zip(inputs.input_ids, ids, strict=True):
        expected = each if stop is None else [*each[:-1], stop]
        assert row[: len(each)].tolist() == expected
    texts = ours.encode_text(tokens, torch.tensor([len(each) for each in ids]))["text"]
    read = torch.nn.functional.normalize(model.get_text_features(**inputs).pooler_output, dim=-1)
    torch.testing.assert_close(read, texts, rtol=0, atol=1e-9)
    torch.testing.assert_close(model.logit_scale.reshape(1), ours.logit_scale)
    if ours.logit_bias is not None and hasattr(model, "logit_bias"):
        torch.testing.assert_close(model.logit_bias, ours.logit_bias)
    return model


@pytest.mark.parametrize(
    ("model", "side", "kind"),
    [
        ("clip", 32, "CLIPModel"), ("quickgelu", 32, "CLIPModel"), ("custom", 48, "CLIPModel"),
        ("siglip", 224, "SiglipModel"), ("siglip", 112, "SiglipModel"),
    ],
)  # fmt: skip
def test_embeddings_are_equal(model, side, kind, make_run, tmp_path):
    run, out = make_run(model, resolutions=(side,)), tmp_path / "out"
    export(run, out, to="transformers")
    assert type(assert_equal(run, out, side=side)).__name__ == kind


@pytest.mark.parametrize("model", ["beside clip", "beside quickgelu"])
def test_a_vocabulary_of_its_own_and_an_activation_of_each_tower(model, make_run, tmp_path):
    run, out = make_run(model, "itc,lm"), tmp_path / "out"
    export(run, out, to="transformers", without=["captioner"])
    subject = load_subject(run)
    stop = subject.tokenizer.vocabulary
    model = assert_equal(run, out, side=32, stop=stop)
    assert (model.config.text_config.eos_token_id, model.config.text_config.vocab_size) == (stop, stop + 1)
    assert f"ends with id {stop} here" in (out / "README.md").read_text()


def test_a_sigmoid_models_bias_is_left_out_knowingly_where_there_is_no_place(make_run, tmp_path):
    run = make_run("clip", "siglip")
    with pytest.raises(UserError, match=r"CLIPModel has no logit_bias.*--without logit_bias"):
        export(run, tmp_path / "out", to="transformers")
    export(run, tmp_path / "out", to="transformers", without=["logit_bias"])
    assert_equal(run, tmp_path / "out", side=32)


@pytest.mark.parametrize(
    ("model", "side", "objectives", "sentence"),
    [
        ("beside small", 32, "itc", "the image tower 'small' begins with a convolutional stem"),
        ("beside timm:test_vit", 32, "itc", "the image tower 'timm:test_vit' is neither"),
        ("beside timm:test_vit3", 32, "itc", "the image tower 'timm:test_vit3' ends in a projection"),
        ("beside siglip", 224, "itc", "siglip.json' ends in a projection"),
        ("trunk", 160, "itc", "trunk.json' is neither a vision transformer of open_clip's own"),
        ("average", 32, "itc", "average.json' pools all its tokens"),
        ("scaled", 32, "itc", r"scaled.json' has `transformer.resblocks.0.ls_1.gamma`"),
        ("bert", 32, "itc", "the text tower is one of transformers' language models"),
        ("coca", 32, "itc,lm", "transformers has no captioner.*--without captioner"),
        ("clip", 32, "itc,itm", "transformers has no place for that.*--without fusion"),
        ("coca", 32, "itc", r"coca.json' has `attn_pool.query`"),
        ("clip", 32, "itc,lm", "transformers has no captioner.*--without captioner"),
    ],
)
def test_what_transformers_has_no_place_for_is_refused_by_name(
    model, side, objectives, sentence, make_run, tmp_path
):
    run = make_run(model, objectives, resolutions=(side,))
    there = set(tmp_path.iterdir())
    with pytest.raises(UserError, match=sentence) as raised:
        export(run, tmp_path / "out", to="transformers")
    assert "\n" not in str(raised.value)
    assert set(tmp_path.iterdir()) == there


def test_images_are_seen_as_in_training_and_not_squeezed(make_run, tmp_path):
    for model, side in (("clip", 32), ("siglip", 224)):
        run, out = make_run(model, resolutions=(side,), name=model), tmp_path / f"{model}-out"
        export(run, out, to="transformers")
        image = torch.zeros(3, 448, 672, dtype=torch.uint8)
        image[:, :, 112:560] = torch.linspace(50, 250, 448).to(torch.uint8)
        _, see, _ = theirs(out)
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        pixels = see(picture, return_tensors="pt").pixel_values[0]
        ours: Any = load_subject(run).model.image
        expected = (fixed_view(448, 672).pixels(image, resolution=side) - ours.mean) / ours.std
        difference = (pixels - expected).abs()[:, :, 2:-2]
        assert difference.max() < 1.1 / ours.std.min(), "more than one of 255 levels"


def test_the_processor_of_the_model_is_found(make_run, tmp_path):
    from transformers import AutoProcessor, CLIPTokenizer

    run, out = make_run("clip"), tmp_path / "out"
    export(run, out, to="transformers")
    processor = AutoProcessor.from_pretrained(out)
    assert type(processor).__name__ == "CLIPProcessor"
    tokenizer, ours = CLIPTokenizer.from_pretrained(out), load_subject(run).tokenizer
    for caption in CAPTIONS[:3]:
        assert tokenizer(caption).input_ids == ours.encode(caption)
    config = json.loads((out / "preprocessor_config.json").read_text())
    assert (config["size"], config["crop_size"]) == ({"shortest_edge": 32}, {"height": 32, "width": 32})
