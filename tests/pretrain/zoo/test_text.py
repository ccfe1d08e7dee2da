"""Every text tower of open_clip, against open_clip's own padded forward, in float64."""

import json
from collections.abc import Iterator
from typing import Any

import open_clip
import pytest
import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.model import CLIPTextCfg, _build_text_tower, convert_to_custom_text_state_dict
from open_clip.transformer import TextTransformer

from pretrain.zoo.text import HubText, OpenClipText, build_small_text

VOCABULARY, WIDTH, EMBED = 64, 16, 12
VISION = {"layers": 1, "width": 16, "head_width": 8, "patch_size": 8, "image_size": 8}
DECODER = {"layers": 1, "width": 16, "heads": 2, "context_length": 8}


def shrunken(config):
    """The same text tower with every flag, of small sizes; its end token stays where it was, or largest."""
    text = {**config["text_cfg"], "width": WIDTH, "heads": 2, "layers": 2, "vocab_size": VOCABULARY}
    small = {
        key: value for key, value in config.items() if key in ("custom_text", "quick_gelu", "init_logit_bias")
    }
    no_projection = text.get("proj_type") == "none"
    small |= {"embed_dim": WIDTH if no_projection else EMBED, "text_cfg": text, "vision_cfg": VISION}
    if "multimodal_cfg" in config:
        small["vision_cfg"] = {
            **VISION,
            "attentional_pool": True,
            "attn_pooler_heads": 2,
            "output_tokens": True,
        }
        small["multimodal_cfg"] = DECODER
    for key in ("hf_tokenizer_name", "tokenizer_kwargs"):
        text.pop(key, None)
    return small


def own_text_configs() -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, config) of every open_clip model whose text tower is open_clip's own."""
    for name in open_clip.list_models():
        config: Any = open_clip.get_model_config(name)
        if "hf_model_name" not in config["text_cfg"]:
            yield name, config


# Many models, few kinds of text tower.
KINDS: dict[str, list[str]] = {}
for _name, _config in own_text_configs():
    KINDS.setdefault(json.dumps(shrunken(_config), sort_keys=True), []).append(_name)


def text_of(embed, text) -> Any:
    return _build_text_tower(embed, text)


def theirs(config) -> Any:
    """open_clip's model, of the class that its factory would take."""
    config = dict(config)
    if not config.pop("custom_text", False):
        return open_clip.CLIP(**config)
    return (open_clip.CoCa if "multimodal_cfg" in config else open_clip.CustomTextCLIP)(**config)


def ours(model, config) -> Any:
    """Our tower with the weights of open_clip's model."""
    if hasattr(model, "text"):
        return OpenClipText(model.text)
    config = {key: value for key, value in config.items() if key != "custom_text"}
    custom: Any = open_clip.CustomTextCLIP(**config).double()
    custom.load_state_dict(convert_to_custom_text_state_dict(model.state_dict()))
    return OpenClipText(custom.text)


def captions(config, lengths):
    """Texts of these lengths that end with the end token; some hold id 0, padding but also CLIP's "!"."""
    text = CLIPTextCfg(**config["text_cfg"])
    end = text.eos_id if text.pool_type == "eos" else VOCABULARY - 1
    tokens = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, length in zip(tokens, lengths, strict=True):
        row[:length] = torch.randint(3, VOCABULARY - 2, (length,))
        if length > 3:
            row[2] = 0
        row[length - 1] = end
    return tokens, torch.tensor(lengths)


def padded(tokens, columns):
    return torch.nn.functional.pad(tokens, (0, columns - tokens.shape[1]))


def gradient(embedding, pooled):
    """Of a fixed weighted sum, with respect to the token embedding."""
    weights = torch.linspace(-1, 1, pooled.numel(), dtype=pooled.dtype).view_as(pooled)
    return torch.autograd.grad((pooled * weights).sum(), embedding.weight)[0]


def embedding_of(model):
    return getattr(model, "text", model).token_embedding


@pytest.mark.parametrize("kind", KINDS, ids=[names[0] for names in KINDS.values()])
def test_equals_the_padded_forward(kind):
    torch.manual_seed(0)
    config = json.loads(kind)
    model = theirs(config).double()
    tower = ours(model, config)
    context = config["text_cfg"].get("context_length", 77)
    assert tower.context_length == context
    for lengths in ([3, 9, 14, 5], [2, context - 1, 6], [context, 4]):
        tokens, length = captions(config, lengths)
        reference = model.encode_text(padded(tokens, context), normalize=False)
        pooled, states = tower(tokens, length)
        torch.testing.assert_close(pooled, reference, rtol=1e-9, atol=1e-12)
        assert pooled.shape == (len(lengths), tower.embed)
        assert states.shape == (*tokens.shape, tower.width)
        torch.testing.assert_close(
            gradient(tower.tower.token_embedding, pooled),
            gradient(embedding_of(model), reference),
            rtol=1e-9,
            atol=1e-12,
        )


def tiny(**flags) -> Any:
    return TextTransformer(context_length=20, vocab_size=VOCABULARY, width=WIDTH, heads=2, layers=2, **flags)


@pytest.mark.parametrize("kind", KINDS, ids=[names[0] for names in KINDS.values()])
def test_trims_exactly_the_towers_where_padding_cannot_be_seen(kind):
    torch.manual_seed(0)
    config = json.loads(kind)
    model = theirs(config).double()
    tower = ours(model, config)
    tokens, length = captions(config, [3, 9, 14])
    columns = []
    tower.tower.transformer.register_forward_pre_hook(lambda _, inputs: columns.append(inputs[0].shape[1]))
    tower(tokens, length)
    if tower.trims:
        assert columns[0] <= tokens.shape[1] + 2
    else:
        assert columns == [tower.context_length]
        tower.trims = True
        wrong = tower(tokens, length).pooled
        reference = model.encode_text(padded(tokens, tower.context_length), normalize=False)
        assert (wrong - reference).abs().max() > 1e-4, "this tower could have been trimmed"


def test_known_towers_are_decided_as_they_should_be():
    towers = {
        name: OpenClipText(text_of(WIDTH, shrunken(config)["text_cfg"]))
        for name, config in own_text_configs()
    }
    assert {name for name, tower in towers.items() if tower.trims} >= {
        "ViT-B-32", "ViT-L-14-quickgelu", "coca_ViT-B-32", "EVA02-B-16", "PE-Core-B-16", "ViT-H-14-worldwide",
    }  # fmt: skip
    assert {name for name, tower in towers.items() if not tower.trims} >= {
        "ViT-B-16-SigLIP", "ViT-SO400M-14-SigLIP", "ViT-B-16-SigLIP2", "ViT-H-14-CLIPA", "MobileCLIP-S1",
    }  # fmt: skip


def test_every_full_size_tower_is_of_the_kind_we_wrap():
    sizes = {json.dumps([config["embed_dim"], config["text_cfg"]]) for _, config in own_text_configs()}
    for embed, text in map(json.loads, sizes):
        with torch.device("meta"):
            module = text_of(embed, text)
        assert isinstance(module, TextTransformer), text
        tower = OpenClipText(module)
        assert (tower.width, tower.embed) == (text["width"], embed), text


@pytest.mark.parametrize("flags", [{"embed_cls": True, "correct_cls_mask": True}, {"use_pad_mask": True}])
@pytest.mark.parametrize("causal", [True, False])
def test_masks_of_padding_that_no_configuration_uses_yet(flags, causal):
    torch.manual_seed(0)
    text = tiny(no_causal_mask=not causal, **flags).double()
    tower = OpenClipText(text)
    assert tower.trims
    tokens, length = captions({"text_cfg": {}}, [3, 9, 14])
    pooled = tower(tokens, length).pooled
    torch.testing.assert_close(pooled, text(padded(tokens, 20)), rtol=1e-9, atol=1e-12)


def test_a_causal_tower_that_pools_the_last_column_is_not_trimmed():
    torch.manual_seed(0)
    text = tiny(pool_type="last").double()
    tokens, length = captions({"text_cfg": {}}, [3, 9, 14])
    torch.testing.assert_close(OpenClipText(text)(tokens, length).pooled, text(padded(tokens, 20)))


def test_a_text_longer_than_the_context_is_no_surprise():
    for pool in ("eos", "last"):
        tower = OpenClipText(tiny(pool_type=pool))
        with pytest.raises(AssertionError, match="longer than the context"):
            tower(torch.ones(1, 21, dtype=torch.long), torch.tensor([21]))


def test_what_stands_behind_a_text_is_not_read():
    torch.manual_seed(0)
    for pool in ("eos", "last"):
        text = TextTransformer(
            context_length=20, vocab_size=64, width=16, heads=2, layers=2, pool_type=pool, eos_id=2
        )
        tower = OpenClipText(text)
        tokens, length = captions({"text_cfg": {"pool_type": "eos"}}, [3, 9, 14])
        spoiled = torch.where(torch.arange(14) < length[:, None], tokens, 63)
        assert torch.equal(tower(tokens, length).pooled, tower(spoiled, length).pooled)


def test_padding_is_the_tokenizers_where_it_is_seen():
    text = tiny(pool_type="last", no_causal_mask=True)
    tokens, length = captions({"text_cfg": {}}, [3, 9])
    pooled = OpenClipText(text, pad_id=1)(tokens, length).pooled
    columns = padded(tokens, 20)
    expected = columns.masked_fill(torch.arange(20) >= length[:, None], 1)
    torch.testing.assert_close(pooled, text(expected))
    assert not torch.allclose(pooled, text(columns), atol=1e-3)


def test_tokens_are_the_states_that_open_clip_gives():
    torch.manual_seed(0)
    for flags in ({}, {"embed_cls": True}):
        text = tiny(output_tokens=True, **flags)
        tokens, length = captions({"text_cfg": {}}, [3, 9, 14])
        _, expected = text(padded(tokens, 20))
        _, states = OpenClipText(text)(tokens, length)
        real = torch.arange(14) < length[:, None]
        torch.testing.assert_close(states[real], expected[:, :14][real], rtol=1e-4, atol=1e-5)


def small() -> Any:
    return build_small_text(
        vocabulary=64, width=16, layers=2, heads=2, context_length=20, embed=12, end_id=5
    )  # fmt: skip


def test_the_small_tower_pools_at_the_end_token_and_not_at_the_largest_id():
    torch.manual_seed(0)
    tower = small().double()
    tokens = torch.tensor([[4, 60, 33, 5, 0, 0], [4, 7, 63, 9, 11, 5]])
    length = torch.tensor([4, 6])
    pooled, states = tower(tokens, length)
    expected = torch.stack([states[0, 3], states[1, 5]]) @ tower.tower.text_projection
    torch.testing.assert_close(pooled, expected)
    assert (tower.width, tower.embed, tower.context_length, tower.trims) == (16, 12, 20, True)


@pytest.mark.parametrize("columns", [0, 1, 6])
def test_no_texts_at_all(columns):
    tower = small()
    pooled, states = tower(torch.zeros(0, columns, dtype=torch.long), torch.zeros(0, dtype=torch.long))
    assert pooled.shape == (0, 12)
    assert states.shape == (0, columns, 16)
    pooled.sum().backward()  # every rank takes part in the reduction of every gradient
    assert all(parameter.grad is not None for parameter in tower.parameters())


HUB = {
    "bert": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32},
    "roberta": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32},
    "mt5": {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2},
    "m2m_100": {
        "d_model": 16, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "pooler"),
    [("bert", "cls_pooler"), ("roberta", "mean_pooler"), ("mt5", "mean_pooler"), ("m2m_100", "cls_pooler")],
)
def test_towers_of_transformers_equal_their_padded_forward(family, pooler, tmp_path):
    from transformers import AutoConfig

    torch.manual_seed(0)
    AutoConfig.for_model(family, vocab_size=VOCABULARY, **HUB[family]).save_pretrained(tmp_path)
    encoder = HFTextEncoder(
        str(tmp_path), output_dim=EMBED, pooler_type=pooler, proj_type="mlp", pretrained=False
    )
    encoder = encoder.double().eval()
    tower = HubText(encoder, context_length=40)
    assert (tower.width, tower.embed) == (16, EMBED)
    tokens, length = captions({"text_cfg": {}}, [3, 9, 14])
    tokens = tokens.masked_fill(tokens == tower.pad_id, 7)  # inside a text, padding would be a masked word
    columns = padded(tokens, 40).masked_fill(torch.arange(40) >= length[:, None], tower.pad_id)
    reference = encoder(columns)
    pooled, states = tower(tokens, length)
    assert states.shape == (3, 14, 16)
    torch.testing.assert_close(pooled, reference, rtol=1e-9, atol=1e-12)
    embedding = encoder.transformer.get_input_embeddings()
    torch.testing.assert_close(
        gradient(embedding, pooled), gradient(embedding, reference), rtol=1e-9, atol=1e-12
    )
