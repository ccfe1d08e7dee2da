"""An export read back for evaluation says what its run says, of both libraries."""

import json

import pytest
import torch

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
