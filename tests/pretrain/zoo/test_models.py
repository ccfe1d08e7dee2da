"""Models with the tokenizers they bring along: as open_clip reads the same directory, or refused."""

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from datasets.errors import UserError
from datasets.tokens import HubTokens, OpenClipTokens
from pretrain.cli import parse
from pretrain.zoo import models
from pretrain.zoo.coca import CoCaDecoder
from pretrain.zoo.models import DualConfig, OpenClipConfig, build_model, own_resolution, own_tokenizer

VISION = {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32}
CLIP = {"context_length": 20, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
SIGLIP = {
    "context_length": 8, "vocab_size": 40, "width": 16, "heads": 2, "layers": 1, "no_causal_mask": True,
    "pool_type": "last", "proj_bias": True, "norm_kwargs": {"eps": 1e-6},
    "hf_tokenizer_name": "timm/no-such-tokenizer", "tokenizer_kwargs": {"clean": "canonicalize"},
}  # fmt: skip
WORDS = ["a", "red", "big", "dog", "on", "grass", "sand"]
CAPTIONS = ["A red dog, on grass.", "a BIG dog", "", "a big red dog on sand and grass or on snow"]


def write(folder, text, **settings) -> str:
    config = {"embed_dim": 16, "custom_text": True, "vision_cfg": VISION, "text_cfg": text, **settings}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    return str(folder)


def save_tokenizer(folder, *, pad="</s>", closing="$A </s>", start=None) -> str:
    """A tokenizer of SigLIP's kind: its texts end, and nothing opens them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "</s>", "<unk>", "<s>"]
    words = {word: i for i, word in enumerate([*special, *WORDS])}
    library = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.post_processor = processors.TemplateProcessing(
        single=closing, special_tokens=[("</s>", 1), ("<s>", 3)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=library, unk_token="<unk>", eos_token="</s>", pad_token=pad, bos_token=start
    )
    fast.save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def built(config: OpenClipConfig, **options: Any):
    tokenizer = own_tokenizer(config)
    assert tokenizer is not None
    model = build_model(config, tokenizer=tokenizer, resolution=32, temperature=None, **options)
    return model.eval(), tokenizer


def batch(tokenizer, captions):
    ids = [torch.tensor(tokenizer.encode(caption)) for caption in captions]
    return torch.nn.utils.rnn.pad_sequence(ids, batch_first=True), torch.tensor([len(each) for each in ids])


@pytest.mark.parametrize("pad", ["</s>", "<pad>"])
def test_captions_of_a_siglip_directory_are_embedded_as_open_clip_does(pad, tmp_path):
    folder = write(tmp_path, SIGLIP, init_logit_bias=-10)
    save_tokenizer(tmp_path, pad=pad)
    torch.manual_seed(0)
    theirs: Any = open_clip.create_model(f"local-dir:{folder}", load_weights=False).eval()
    save_file(theirs.state_dict(), tmp_path / "open_clip_model.safetensors")
    expected = theirs.encode_text(open_clip.get_tokenizer(f"local-dir:{folder}")(CAPTIONS), normalize=True)

    model, tokenizer = built(OpenClipConfig(name=folder))
    assert isinstance(tokenizer, HubTokens)
    tokens, length = batch(tokenizer, CAPTIONS)
    assert length.tolist() == [6, 4, 1, 8]
    torch.testing.assert_close(model.encode_text(tokens, length)["text"], expected, rtol=1e-5, atol=1e-6)
    assert model.logit_bias is not None
    assert model.logit_bias.item() == -10


def test_weights_are_left_out_for_who_has_others(tmp_path):
    folder = write(tmp_path, CLIP)
    torch.manual_seed(0)
    theirs: Any = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    torch.nn.init.constant_(theirs.logit_scale, 1.25)
    save_file(theirs.state_dict(), tmp_path / "open_clip_model.safetensors")
    assert built(OpenClipConfig(name=folder))[0].logit_scale.item() == 1.25
    assert built(OpenClipConfig(name=folder), load=False)[0].logit_scale.item() != 1.25


def test_a_tokenizer_can_be_named_instead_of_the_hubs(tmp_path):
    folder = write(tmp_path, SIGLIP)
    with pytest.raises(
        UserError, match=r"timm/no-such-tokenizer is not in the cache .+: --model.tokenizer DIR"
    ):
        own_tokenizer(OpenClipConfig(name=folder))
    (tmp_path / "words").mkdir()
    tokenizer = own_tokenizer(OpenClipConfig(name=folder, tokenizer=save_tokenizer(tmp_path / "words")))
    assert tokenizer is not None
    assert (tokenizer.context_length, tokenizer.start, tokenizer.end, tokenizer.pad) == (8, None, 1, 1)
    assert tokenizer.decode(tokenizer.encode("A Red, dog!")) == "a red dog"  # cleaned as the model asks


def test_clips_own_tokenizer_is_told_how_long_and_how_clean(tmp_path):
    text = {**CLIP, "tokenizer_kwargs": {"clean": "whitespace"}}
    tokenizer = own_tokenizer(OpenClipConfig(name=write(tmp_path, text)))
    assert isinstance(tokenizer, OpenClipTokens)
    assert tokenizer.context_length == 20
    assert tokenizer.encode("DOG") != tokenizer.encode("dog")


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({"tokenizer_kwargs": {"reduction_mask": "random"}}, "asks for a tokenizer with reduction_mask"),
        ({"tokenizer_mode": "clips"}, "asks for a tokenizer with tokenizer_mode clips"),
    ],
)
def test_a_tokenizer_that_works_otherwise_is_refused(extra, says, tmp_path):
    with pytest.raises(UserError, match=says):
        own_tokenizer(OpenClipConfig(name=write(tmp_path, {**CLIP, **extra})))


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    words = save_tokenizer(tmp_path, closing="<s> $A </s>", start="<s>")
    too_small = {**SIGLIP, "vocab_size": 8}
    with pytest.raises(UserError, match="knows 8 token ids and its tokenizer makes 11: name the one"):
        built(OpenClipConfig(name=write(tmp_path, too_small), tokenizer=words))
    # The end of a text is its largest id, or that of the configuration.
    for pool, end in (({}, 10), ({"pool_type": "eos", "eos_id": 2}, 2)):
        folder = write(tmp_path, {**CLIP, **pool})
        message = f"knows the end of a text by the id {end} and its tokenizer ends texts with 1: name"
        with pytest.raises(UserError, match=message):
            built(OpenClipConfig(name=folder, tokenizer=words))
    built(OpenClipConfig(name=write(tmp_path, {**CLIP, "pool_type": "eos", "eos_id": 1}), tokenizer=words))


def test_the_resolution_is_the_configurations(tmp_path):
    assert own_resolution(OpenClipConfig(name="ViT-L-14-336")) == 336
    assert own_resolution(OpenClipConfig(name=write(tmp_path, CLIP))) == 32
    vision = {**VISION, "image_size": [48, 48]}
    assert own_resolution(OpenClipConfig(name=write(tmp_path, CLIP, vision_cfg=vision))) == 48


COCA = {
    "vision_cfg": {**VISION, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
    "multimodal_cfg": {"layers": 1, "width": 16, "heads": 2, "context_length": 20},
}


def test_a_coca_brings_its_decoder_and_takes_no_sizes_for_ours(tmp_path):
    folder = write(tmp_path, {**CLIP, "embed_cls": True, "output_tokens": True}, **COCA)
    model, tokenizer = built(OpenClipConfig(name=folder))
    assert isinstance(model.captioner, CoCaDecoder)
    assert model.captioner.head.matrix.shape == (tokenizer.vocabulary, 16)
    with pytest.raises(UserError, match=r"brings its own decoder: leave the --model\.captioner flags out"):
        parse(["--model", f"open_clip:{folder}", "--model.captioner.layers", "2"])
    (tmp_path / "dual").mkdir()
    parse(["--model", f"open_clip:{write(tmp_path / 'dual', CLIP)}", "--model.captioner.layers", "2"])


def test_a_path_is_a_model_on_the_command_line_and_its_resolution_that_of_every_stage(tmp_path):
    folder = write(tmp_path, CLIP)
    for name in (folder, str(Path(folder) / "open_clip_config.json")):
        run = parse(["--model", f"open_clip:{name}", "--model.tokenizer", "words"]).run
        assert run.model == OpenClipConfig(name=name, tokenizer="words")
        assert {stage.resolution for stage in run.stages.values()} == {32}


@pytest.mark.parametrize("kind", ["dual", "open_clip"])
def test_the_fusion_tower_changes_no_other_weight_and_no_later_number(kind, tmp_path, monkeypatch):
    config = DualConfig() if kind == "dual" else OpenClipConfig(name=write(tmp_path, CLIP))
    tokenizer: Any = own_tokenizer(OpenClipConfig(name=write(tmp_path, CLIP)))

    def build() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        torch.manual_seed(0)
        model = build_model(config, tokenizer=tokenizer, resolution=32, temperature=(10.0, None))
        state = {name: value for name, value in model.state_dict().items() if "fusion" not in name}
        return state, torch.rand(3)

    state, later = build()
    monkeypatch.setattr(models, "build_fusion", lambda *_, **__: None)
    alone, after = build()
    assert state.keys() == alone.keys()
    assert all(torch.equal(state[name], alone[name]) for name in state)
    assert torch.equal(later, after)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--model.fusion.heads", "-1"], r"--model\.fusion\.heads is -1; it must be at least 0"),
        (["--model.fusion.every", "0"], r"--model\.fusion\.every is 0; it must be at least 1"),
    ],
)
def test_sizes_of_a_fusion_tower_that_none_can_have_are_refused(flags, says):
    with pytest.raises(UserError, match=says):
        parse(["--objectives", "itc", *flags])
