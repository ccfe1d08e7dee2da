"""CoCa's own decoder: logits, gradients and captions of open_clip's module, and one run of its text tower."""

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import open_clip
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from datasets.batch import Batch
from datasets.errors import UserError
from objectives import objective_class
from objectives.base import DECODED, IMAGE, TEXT, Objective
from pretrain.build import drop_unread, widths_of
from pretrain.distributed import Ranks
from pretrain.encodings import ModelEncodings
from pretrain.parallel import wrap
from pretrain.precision import Compute
from pretrain.pretrainer import Pretrainer
from pretrain.step import Setup, agree, backward
from pretrain.testing import make_samples, merge, split
from pretrain.zoo.coca import CoCaDecoder
from pretrain.zoo.dual import Dual
from pretrain.zoo.generate import greedy, top_p
from pretrain.zoo.whole import build_whole, open_clip_state

START, END, V, CONTEXT = 1, 2, 20, 12
VISION = {"layers": 1, "width": 24, "head_width": 12, "patch_size": 4, "image_size": 8, "output_tokens": True}
POOLED = {**VISION, "attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 5}
TEXT_TOWER = {"context_length": CONTEXT, "vocab_size": V, "width": 16, "heads": 2, "layers": 2}
DECODER = {"context_length": CONTEXT, "vocab_size": V, "width": 16, "heads": 2, "layers": 2}
KINDS = {
    "class token": {"vision_cfg": POOLED, "text_cfg": {**TEXT_TOWER, "embed_cls": True}},
    "end token": {"vision_cfg": POOLED, "text_cfg": {**TEXT_TOWER, "pool_type": "eos", "eos_id": END}},
    "patches": {"vision_cfg": {**VISION, "width": 16, "head_width": 8}, "text_cfg": TEXT_TOWER},
}


def define(folder, kind="class token", **changes):
    """Write a small CoCa's configuration, as open_clip exports it; the name of its directory."""
    config = {"embed_dim": 16, "custom_text": True, "multimodal_cfg": DECODER, **KINDS[kind], **changes}
    config["text_cfg"] = {**config["text_cfg"], "output_tokens": True}
    half = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    content = {"model_cfg": config, "preprocess_cfg": half}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    return str(folder)


def theirs(folder) -> Any:
    """open_clip's own model with weights that are all visible in what it says."""
    torch.manual_seed(0)
    model: Any = open_clip.create_model(f"local-dir:{folder}", load_weights=False).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def ours(model, folder) -> Dual:
    """The same weights, in our towers."""
    whole = build_whole(str(folder))
    made = Dual(
        image=whole.image,
        text=whole.text,
        captioner=whole.captioner,
        fusion=None,
        logit_scale=whole.logit_scale,
        logit_bias=None,
    ).double()
    state = open_clip_state(made)
    assert state.keys() == model.state_dict().keys()
    with torch.no_grad():
        for key, value in model.state_dict().items():
            state[key].copy_(value)
    return made.eval()


@pytest.fixture(params=KINDS)
def pair(request, tmp_path):
    folder = define(tmp_path, request.param)
    model = theirs(folder)
    return model, ours(model, folder)


def captions(lengths=(9, 4, 12, 6)) -> Batch:
    """Texts of these lengths over as many images, some with id 0 in them: CLIP's "!", but also padding."""
    random = torch.Generator().manual_seed(1)
    tokens = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    for row, length in zip(tokens, lengths, strict=True):
        row[:length] = torch.randint(3, V, (length,), generator=random)
        row[0], row[length - 1] = START, END
        if length > 4:
            row[2] = 0
    count = len(lengths)
    valid = torch.ones(count, dtype=torch.bool)
    return Batch(
        images=torch.randint(0, 256, (count, 3, 8, 8), generator=random, dtype=torch.uint8),
        image_valid=valid,
        tokens=tokens,
        text_length=torch.tensor(lengths),
        image_index=torch.arange(count),
        text_valid=valid,
        text_id=torch.arange(count),
        boxes=torch.zeros(count, 4),
        box_valid=~valid,
        keys=tuple(map(str, range(count))),
        sample_id=torch.arange(count),
    )


def pixels(batch):
    return (batch.images.double() / 255 - 0.5) / 0.5


def padded(tokens):
    return F.pad(tokens, (0, CONTEXT - tokens.shape[1]))


def test_what_is_said_equals_open_clips_forward(pair):
    model, made = pair
    batch = captions()
    expected = model(pixels(batch), padded(batch.tokens))
    encodings = ModelEncodings(made, batch, group=None, key=())
    assert made.captioner is not None
    logits = made.captioner.head.logits(encodings[DECODED])
    T = batch.tokens.shape[1]
    read = torch.arange(T - 1) < batch.text_length[:, None]
    torch.testing.assert_close(logits[read], expected["logits"][:, : T - 1][read], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(encodings[IMAGE], expected["image_features"], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(encodings[TEXT], expected["text_features"], rtol=1e-9, atol=1e-12)


def test_loss_and_gradients_equal_those_of_open_clips_logits(pair):
    model, made = pair
    batch = captions()
    out = model(pixels(batch), padded(batch.tokens))
    targets = padded(batch.tokens)[:, 1:].masked_fill(
        torch.arange(1, CONTEXT) >= batch.text_length[:, None], -1
    )
    expected = F.cross_entropy(
        out["logits"].flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum"
    )
    expected.backward()
    owner = objective_class("lm")
    lm = owner(owner.Config(), widths=None)
    lm(ModelEncodings(made, batch, group=None, key=()), batch).total.backward()
    found = open_clip_state(made)
    named = dict(model.named_parameters())
    ours_by_place = {value.data_ptr(): parameter for parameter in made.parameters() for value in [parameter]}
    seen = 0
    for key, value in found.items():
        if named[key].grad is None:
            continue
        gradient = ours_by_place[value.data_ptr()].grad
        assert gradient is not None, key
        torch.testing.assert_close(gradient, named[key].grad, rtol=1e-8, atol=1e-10, msg=key)
        seen += 1
    assert seen > 30


def test_texts_alone_are_open_clips_decoder_with_its_looks_left_out(pair):
    """Where each cross-attention block of open_clip adds nothing, and for gradients of the words alike."""
    model, made = pair
    batch = captions()
    texts = replace(
        batch,
        images=batch.images[:0],
        image_valid=batch.image_valid[:0],
        image_index=torch.full_like(batch.image_index, -1),
    )
    owner = objective_class("lm")
    lm = owner(owner.Config(), widths=None)
    assert lm.denominator(texts) == (batch.text_length - 1).sum()
    lm(ModelEncodings(made, texts, group=None, key=()), texts).total.backward()
    with torch.no_grad():
        for block in model.text_decoder.cross_attn:
            for part in (block.attn.out_proj, block.mlp.c_proj):
                part.weight.zero_()
                part.bias.zero_()
    logits = model(pixels(batch), padded(batch.tokens))["logits"]
    targets = padded(batch.tokens)[:, 1:].masked_fill(
        torch.arange(1, CONTEXT) >= batch.text_length[:, None], -1
    )
    F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum").backward()
    named, ours_at = dict(model.named_parameters()), {p.data_ptr(): p for p in made.parameters()}
    seen = 0
    for key, value in open_clip_state(made).items():
        found = ours_at[value.data_ptr()].grad if value.data_ptr() in ours_at else None
        if "cross_attn" in key or key.startswith("visual"):
            assert found is None, key
        elif key in named and named[key].grad is not None:
            torch.testing.assert_close(found, named[key].grad, rtol=1e-8, atol=1e-10, msg=key)
            seen += 1
    assert seen > 15


def test_greedy_captions_are_those_of_open_clips_forward(pair):
    model, made = pair
    images = captions(lengths=(5,) * 12).images
    with torch.no_grad():
        latent, tokens = model._encode_image((images.double() / 255 - 0.5) / 0.5)
        expected = []
        for row in range(len(images)):
            text = [START]
            while len(text) <= CONTEXT:
                out = model(
                    None, padded(torch.tensor([text])), image_latent=latent[row : row + 1],
                    image_embs=tokens[row : row + 1], output_labels=False,
                )  # fmt: skip
                token = int(out["logits"][0, len(text) - 1].argmax())
                if token == END:
                    break
                text.append(token)
            expected.append(text[1:])
        seen = made.encode_image(images)["image_tokens"]
    assert made.captioner is not None
    found = greedy(made.captioner, seen, start=START, end=END)
    assert found == expected
    assert greedy(made.captioner, seen, start=START, end=END, longest=2) == [text[:2] for text in found]
    sampled = top_p(made.captioner, seen, start=START, end=END, p=1e-9, generator=torch.Generator())
    assert sampled == found


def test_a_batch_without_texts_says_nothing(pair):
    _, made = pair
    nothing = merge([sample for sample in make_samples(6) if not len(sample.tokens)])
    assert nothing.tokens.shape == (0, 0)
    assert ModelEncodings(made, nothing, group=None, key=())[DECODED].shape[0] == 0


def objective(kind, made) -> Objective:
    owner, tokens = objective_class(kind), SimpleNamespace(vocabulary=V)
    return owner(owner.Config(), widths_of(made, tokens, temperature=True, contrast=False))  # type: ignore[arg-type]


def step(made, kinds, micro_batches):
    """The gradient of one step, by parameter, and how often each tower ran."""
    made.zero_grad()
    runs = {"image": 0, "text": 0, "captioner": 0}
    hooks = [
        getattr(made, name).register_forward_hook(lambda *_, name=name: runs.update({name: runs[name] + 1}))
        for name in runs
    ]
    pretrainer = Pretrainer(made, {kind: objective(kind, made) for kind in kinds})
    ranks = Ranks(rank=0, world=1, device=torch.device("cpu"), group=None)
    batches = split(make_samples(11, vocabulary=V), ranks, micro_batches)
    setup = Setup(wrapped=wrap(pretrainer, ranks), compute=Compute(device=ranks.device, bf16=False))
    factors = {kind: 1.0 / count for kind, count in agree(setup, batches).counts.items()}
    backward(setup, batches, factors, key=(0, 0))
    for hook in hooks:
        hook.remove()
    return {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}, runs


def test_the_text_tower_runs_once_for_contrast_and_captions(tmp_path):
    folder = define(tmp_path)
    made = ours(theirs(folder), folder)
    whole, runs = step(made, ("itc", "lm"), 1)
    assert runs == {"image": 1, "text": 1, "captioner": 1}
    cut, runs = step(made, ("itc", "lm"), 3)
    assert runs == {"image": 6, "text": 6, "captioner": 3}
    assert cut.keys() == whole.keys() == dict(made.named_parameters()).keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(cut[name], gradient, rtol=1e-8, atol=1e-10, msg=name)


def test_captions_alone_keep_the_text_tower_and_contrast_alone_drops_the_decoder(tmp_path):
    folder = define(tmp_path)
    model = theirs(folder)
    made = ours(model, folder)
    itc = objective("itc", made)
    drop_unread(made, {"lm": objective("lm", made)})
    assert isinstance(made.captioner, CoCaDecoder)
    assert made.text is not None
    _, runs = step(made, ("lm",), 2)
    assert runs == {"image": 2, "text": 2, "captioner": 2}
    drop_unread(made, {"itc": itc})
    assert made.captioner is None
    assert open_clip_state(made).keys() == {
        key for key in model.state_dict() if not key.startswith("text_decoder.")
    }


def test_parameters_are_registered_once_and_moved_together(tmp_path):
    made = ours(theirs(define(tmp_path)), tmp_path)
    names = [name for name, _ in made.named_parameters(remove_duplicate=False)]
    assert len(names) == len({id(p) for p in made.parameters()})
    assert made.captioner is not None
    made.float()
    tokens = made.encode_image(captions().images)["image_tokens"]
    assert len(greedy(made.captioner, tokens, start=START, end=END)) == 4  # its text tower is float as well


def test_random_weights_are_numbers_that_open_clip_left_out(tmp_path):
    folder = define(tmp_path, multimodal_cfg={**DECODER, "layers": 1})
    stds = []
    for seed in range(2):
        torch.manual_seed(seed)
        captioner = build_whole(folder).captioner
        assert captioner is not None
        assert captioner.head.weight.shape == (16, V)
        stds.append(captioner.head.weight.std().item())
    assert stds == pytest.approx([16**-0.5] * 2, rel=0.15)
    torch.manual_seed(1)
    again = build_whole(folder).captioner
    assert again is not None
    assert again.head.weight.std().item() == stds[1]


def test_a_text_tower_that_sees_the_future_is_refused(tmp_path):
    seeing = {**TEXT_TOWER, "no_causal_mask": True, "pool_type": "last"}
    with pytest.raises(UserError, match="its text tower sees the words that its decoder is to predict"):
        build_whole(define(tmp_path, text_cfg=seeing))


def test_sizes_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(UserError, match="its image tower has tokens of width 24, its text tower"):
        build_whole(define(tmp_path, embed_dim=24))
    with pytest.raises(UserError, match="its decoder reads 5 tokens and its text tower 12"):
        build_whole(define(tmp_path, multimodal_cfg={**DECODER, "context_length": 5}))
