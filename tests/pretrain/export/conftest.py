"""Run directories of small models, written by hand: a few weights, no training."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer as Library
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from datasets.tokens import TrainedBPE
from objectives import objective_class
from pretrain import checkpoint, runfile
from pretrain.build import build_pretrainer
from pretrain.config import Run, Stage
from pretrain.distributed import Ranks
from pretrain.rundir import RunDir, record
from pretrain.state import Known, Standing, capture
from pretrain.zoo.models import DualConfig, OpenClipConfig, SmallText, own_tokenizer

VISION = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32}
TEXT = {"context_length": 20, "width": 16, "heads": 2, "layers": 2}
SIGLIP_TEXT = {
    "context_length": 10, "vocab_size": 40, "width": 24, "heads": 2, "layers": 2, "mlp_ratio": 3.0,
    "no_causal_mask": True, "pool_type": "last", "proj_bias": True, "norm_kwargs": {"eps": 1e-6},
    "hf_tokenizer_name": "words", "tokenizer_kwargs": {"clean": "canonicalize"},
}  # fmt: skip
COCA = {
    "embed_dim": 16, "custom_text": True,
    "vision_cfg": {
        **VISION, "attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 5,
        "output_tokens": True,
    },
    "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True},
    "multimodal_cfg": {"layers": 1, "width": 16, "heads": 2, "context_length": 20, "vocab_size": 49408},
}  # fmt: skip
CONFIGS = {
    "clip": {"embed_dim": 12, "vision_cfg": VISION, "text_cfg": TEXT},
    "quickgelu": {"embed_dim": 12, "quick_gelu": True, "vision_cfg": VISION, "text_cfg": TEXT},
    "custom": {"embed_dim": 12, "custom_text": True, "vision_cfg": VISION, "text_cfg": TEXT},
    "trunk": {
        "embed_dim": 12, "text_cfg": TEXT,
        "vision_cfg": {
            "timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear", "image_size": 160,
        },
    },
    "average": {
        "embed_dim": 12, "text_cfg": TEXT,
        "vision_cfg": {**VISION, "pool_type": "avg", "final_ln_after_pool": True, "no_ln_pre": True},
    },
    "scaled": {"embed_dim": 12, "text_cfg": TEXT, "vision_cfg": {**VISION, "ls_init_value": 0.1}},
    "siglip": {
        "embed_dim": 24, "custom_text": True, "init_logit_bias": -10, "text_cfg": SIGLIP_TEXT,
        "vision_cfg": {
            "timm_model_name": "vit_base_patch16_siglip_224", "timm_pool": "map", "timm_proj": "none",
            "image_size": 224,
        },
    },
    "coca": COCA,
    "bert": {
        "embed_dim": 12, "vision_cfg": VISION,
        "text_cfg": {
            "hf_model_name": "bert", "hf_tokenizer_name": "words", "context_length": 10,
            "hf_pooler_type": "mean_pooler",
        },
    },
}  # fmt: skip
CAPTIONS = ("a red square left of a blue circle", "two small green stars", "it's a dog", "No. 42!")


@pytest.fixture(autouse=True, scope="session")
def _one_tokenizer_of_clip():
    """Its 49,000 merges are read once and not for every model."""
    from open_clip import factory, tokenizer

    with pytest.MonkeyPatch.context() as patch:
        kept = cache(tokenizer.SimpleTokenizer)
        for module in (factory, tokenizer):
            patch.setattr(module, "SimpleTokenizer", kept)
        yield


@pytest.fixture
def make_run(tmp_path, monkeypatch, words):
    """Call it with a model and objectives for the directory of a run of two steps in each stage."""
    monkeypatch.setitem(timm_entrypoints(), "vit_base_patch16_siglip_224", small_siglip)

    def make(model, objectives="itc", *, resolutions=(32,), name="run"):
        root = tmp_path / name
        root.mkdir()
        run = Run(
            model=config_of(model, tmp_path, words),
            objectives={kind: objective_class(kind).Config() for kind in objectives.split(",")},
            stages={
                f"stage{place}": Stage(steps=2, batch=8, resolution=side)
                for place, side in enumerate(resolutions)
            },
        )
        rundir = RunDir(root)
        record(rundir, runfile.dump(run), identity=runfile.identity(run))
        tokenizer = own_tokenizer(run.model)
        if tokenizer is None:
            tokenizer = TrainedBPE.train(CAPTIONS * 5, vocabulary=400, context_length=12)
            tokenizer.save(rundir.tokenizer)
        ranks = Ranks(rank=0, world=1, device=torch.device("cpu"), group=None)
        pretrainer = build_pretrainer(run, tokenizer, ranks)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in pretrainer.parameters():  # what begins as zeros or ones shall be seen too
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
        step = 2 * len(resolutions)
        data = {"data": Known(fingerprint="f00d", size=None)}
        standing = Standing(data=data, tokenizer=tokenizer.fingerprint, step=step, samples=8 * step)
        nothing = torch.optim.AdamW(pretrainer.parameters())
        checkpoint.save(rundir.checkpoints, step, capture(pretrainer, nothing), standing.plain())
        return root

    return make


def config_of(model, folder, tokenizer):
    """`clip`: that of CONFIGS; `beside clip`, `beside timm:NAME`: such an image tower and our text tower."""
    before, _, name = model.rpartition(" ")
    path = folder / f"{name}.json"
    if name in CONFIGS:
        text = json.dumps(CONFIGS[name])
        path.write_text(text.replace('"bert"', json.dumps(str(bert(tokenizer)))))
    if before:
        text = SmallText(width=16, layers=1, heads=2, context_length=12)
        return DualConfig(image=f"open_clip:{path}" if name in CONFIGS else name, text=text, embed=16)
    own = CONFIGS[name]["text_cfg"].get("hf_tokenizer_name")
    return OpenClipConfig(name=str(path), tokenizer=str(tokenizer) if own else "")


def bert(folder):
    """The configuration of a small text tower of transformers, whose padding is that of `words`."""
    from transformers import BertConfig

    config = BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        pad_token_id=1,
    )  # fmt: skip
    config.save_pretrained(folder)
    return folder


def timm_entrypoints():
    from timm.models import _registry

    return _registry._model_entrypoints


def small_siglip(pretrained=False, **more):
    """What SigLIP's image tower is, with 4 tokens of 24 numbers."""
    from timm.models.vision_transformer import _create_vision_transformer

    sizes = {"patch_size": 112, "embed_dim": 24, "depth": 2, "num_heads": 2, "mlp_ratio": 3.0}
    return _create_vision_transformer(
        "vit_base_patch16_siglip_224", pretrained=pretrained, class_token=False, global_pool="map",
        **{**sizes, **{key: value for key, value in more.items() if key != "global_pool"}},
    )  # fmt: skip


@pytest.fixture
def words(tmp_path_factory) -> Path:
    """A tokenizer that closes texts, opens none, and pads with what is no zero, as SigLIP's does."""
    known = ["<unk>", "<pad>", "</s>", "a", "red", "square", "left", "of", "blue", "circle", "its", "dog"]
    library = Library(WordLevel({word: place for place, word in enumerate(known)}, unk_token="<unk>"))
    library.pre_tokenizer = Whitespace()
    library.add_special_tokens(["<unk>", "<pad>", "</s>"])
    library.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    made = tmp_path_factory.mktemp("words")
    library.save(str(made / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "pad_token": "<pad>",
        "unk_token": "<unk>",
    }  # fmt: skip
    (made / "tokenizer_config.json").write_text(json.dumps(config))
    return made
