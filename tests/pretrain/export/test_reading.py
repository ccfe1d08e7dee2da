"""An export read back for evaluation says what its run says, of both libraries."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from datasets.errors import UserError
from pretrain.evaluate.subject import load_subject
from pretrain.export.__main__ import export
from pretrain.zoo.coca import CoCaDecoder

CAPTIONS = ["a dog", "a red square left of a blue circle", "its 42", "a dog " * 30]


def said(subject, images):
    with torch.no_grad():
        ids = [torch.tensor(subject.tokenizer.encode(caption)) for caption in CAPTIONS]
        tokens, length = (
            torch.nn.utils.rnn.pad_sequence(ids, batch_first=True),
            torch.tensor(list(map(len, ids))),
        )
        seen, read = subject.model.encode_image(images), subject.model.encode_text(tokens, length)
    real = torch.arange(tokens.shape[1]) < length[:, None]
    return seen["image"], seen["image_tokens"], read["text"], read["text_tokens"][real]


@pytest.mark.parametrize(
    ("model", "side", "to"),
    [
        ("clip", 48, "open_clip"), ("siglip", 224, "open_clip"), ("beside clip", 32, "open_clip"),
        ("clip", 48, "transformers"), ("siglip", 224, "transformers"), ("beside clip", 32, "transformers"),
    ],
)  # fmt: skip
def test_what_was_exported_is_read_back(model, side, to, make_run, tmp_path):
    run, out = make_run(model, resolutions=(side,)), tmp_path / "out"
    export(run, out, to=to)
    before, after = load_subject(run), load_subject(out)
    assert (after.resolution, after.run, after.model.captioner) == (side, None, None)
    assert not after.model.training
    assert after.model.image.width == before.model.image.width
    assert after.model.text is not None
    assert after.model.text.embed == after.model.image.embed == before.model.image.embed
    assert after.tokenizer.context_length == before.tokenizer.context_length
    images = torch.randint(0, 256, (3, 3, side, side), dtype=torch.uint8)
    for ours, theirs in zip(said(before, images), said(after, images), strict=True):
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    torch.testing.assert_close(after.model.logit_scale, before.model.logit_scale)
    assert (after.model.logit_bias is None) == (before.model.logit_bias is None)
    held = [id(parameter) for parameter in after.model.parameters()]
    assert len(held) == len(set(held))


@pytest.mark.parametrize("model", ["clip", "beside clip"])
def test_captions_are_read_as_in_training(model, make_run, tmp_path):
    run, out = make_run(model), tmp_path / "out"
    export(run, out, to="transformers")
    before, after = load_subject(run).tokenizer, load_subject(out).tokenizer
    for caption in ("one o\u2019clock", "\u201chere\u201d &amp; there", "\ufb01ne", "<end> </s>"):
        assert after.encode(caption)[:-1] == before.encode(caption)[:-1]
        text = after.decode(after.encode(caption))
        assert text.strip() == before.decode(before.encode(caption)).strip()


def test_a_coca_can_write_again(make_run, tmp_path):
    run, out = make_run("coca", "itc,lm"), tmp_path / "out"
    export(run, out, to="open_clip")
    assert isinstance(load_subject(out).model.captioner, CoCaDecoder)


def test_a_directory_of_another_kind(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserError, match="holds a model of type 'bert', and only clip and siglip can be read"):
        load_subject(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(UserError, match="cannot be read by transformers: ") as raised:
        load_subject(tmp_path)
    assert "\n" not in str(raised.value)


def refused(folder, **files):
    """The sentence about a directory some of whose files were changed; they are put back."""
    kept = {name: (folder / name.replace("__", ".")).read_bytes() for name in files}
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_bytes(content)
    with pytest.raises(UserError) as raised:
        load_subject(folder)
    for name, content in kept.items():
        (folder / name.replace("__", ".")).write_bytes(content)
    assert str(folder) in str(raised.value)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_damaged_export_is_said_in_a_sentence(make_run, tmp_path):
    out = tmp_path / "out"
    export(make_run("clip"), out, to="transformers")
    for text in (b"{", b"", b"\xff\xfe\x00"):
        message = refused(out, config__json=text)
        assert f"{out / 'config.json'} is not JSON (" in message
        assert "export the run again" in message
    assert "model of type None" in refused(out, config__json=b"[]")
    assert "model of type []" in refused(out, config__json=b'{"model_type": []}')
    config = {**json.loads((out / "config.json").read_bytes()), "vision_config": 3}
    assert "'vision_config'" in refused(out, config__json=json.dumps(config).encode())
    weights = (out / "model.safetensors").read_bytes()
    for content in (weights[:500], weights[:-9], b"", b"version https://git-lfs.github.com/spec/v1"):
        message = refused(out, model__safetensors=content)
        assert f"{out / 'model.safetensors'} is not a readable safetensors file (" in message
        assert "export the run again" in message
    see = {**json.loads((out / "preprocessor_config.json").read_bytes()), "image_mean": 0.5}
    assert "the mean of the pixels is 0.5" in refused(out, preprocessor_config__json=json.dumps(see).encode())


def test_weights_that_are_missing_are_not_made_up(make_run, tmp_path):
    out = tmp_path / "out"
    export(make_run("clip"), out, to="transformers")
    whole, path = load_file(out / "model.safetensors"), out / "model.safetensors"
    key = "visual_projection.weight"
    save_file({name: value for name, value in whole.items() if name != key}, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"holds no weights for {key} \(1 such in all\): export the run"):
        load_subject(out)
    save_file({**whole, key: whole[key][:1].clone()}, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match="cannot be read by transformers: "):
        load_subject(out)
