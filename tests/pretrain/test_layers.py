"""Layer decay gives the scales that timm gives, in the towers of every library."""

import pytest
import timm
from timm.optim import param_groups_layer_decay  # pyright: ignore[reportPrivateImportUsage]
from torch import nn

from datasets.errors import UserError
from pretrain.layers import layer_scales
from pretrain.testing import tiny_pretrainer
from pretrain.zoo.text import HubText, build_small_text
from pretrain.zoo.vision import Small, build_image_tower, build_small


class Holder(nn.Module):
    """As a Pretrainer holds its towers."""

    def __init__(self, **towers: nn.Module) -> None:
        super().__init__()
        self.model = nn.Module()
        for name, tower in towers.items():
            self.model.add_module(name, tower)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_atto", "swin_tiny_patch4_window7_224"])
def test_towers_of_timm_have_the_scales_that_it_gives_beside_a_classifier(name):
    holder = Holder(image=build_image_tower(f"timm:{name}", embed=16, resolution=224))
    found = layer_scales(holder, image=0.8, text=1.0)
    with_head = timm.create_model(name, num_classes=3)
    names = {id(parameter): at for at, parameter in with_head.named_parameters()}
    expected = {
        f"model.image.trunk.{names[id(parameter)]}": group["lr_scale"]
        for group in param_groups_layer_decay(with_head, layer_decay=0.8)
        for parameter in group["params"]
    }
    ours = [at for at, _ in holder.named_parameters()]
    assert len(ours) > 100
    assert {at: found.get(at, 1.0) for at in ours} == {at: expected.get(at, 1.0) for at in ours}


def test_the_default_tower_has_a_stem_and_a_pooling_head():
    found = layer_scales(Holder(image=build_small(Small(depth=2), resolution=16)), image=0.5, text=1.0)
    at = "model.image.trunk"
    assert {found[name] for name in found if name.startswith((f"{at}.patch_embed", f"{at}.pos"))} == {0.125}
    assert found[f"{at}.blocks.0.mlp.fc1.weight"] == 0.25
    assert found[f"{at}.blocks.1.mlp.fc1.weight"] == found[f"{at}.norm.weight"] == 0.5
    assert not any(name.startswith(f"{at}.attn_pool") for name in found)


def test_open_clips_towers_fall_from_block_to_block():
    image = build_image_tower("open_clip:ViT-S-32-alt", embed=16, resolution=64)
    text = build_small_text(vocabulary=30, width=16, layers=3, heads=2, context_length=8, embed=6, end_id=29)
    holder = Holder(image=image, text=text)
    found = layer_scales(holder, image=0.9, text=0.75)
    scales = {name: found.get(name, 1.0) for name, _ in holder.named_parameters()}
    depth = sum(name.endswith("ln_1.weight") for name, _ in image.named_parameters())
    for name in ("class_embedding", "positional_embedding", "conv1.weight", "ln_pre.weight"):
        assert scales[f"model.image.visual.{name}"] == pytest.approx(0.9 ** (depth + 1))
    for block in range(depth):
        at = f"model.image.visual.transformer.resblocks.{block}.attn.in_proj_weight"
        assert scales[at] == pytest.approx(0.9 ** (depth - block))
    assert scales["model.image.visual.ln_post.weight"] == pytest.approx(0.9)
    assert scales["model.image.visual.proj"] == scales["model.text.tower.text_projection"] == 1.0
    assert scales["model.text.tower.token_embedding.weight"] == pytest.approx(0.75**4)
    assert scales["model.text.tower.transformer.resblocks.0.ln_1.weight"] == pytest.approx(0.75**3)
    assert scales["model.text.tower.transformer.resblocks.2.mlp.c_fc.weight"] == pytest.approx(0.75)
    assert scales["model.text.tower.ln_final.bias"] == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        (
            "roberta",
            {"num_hidden_layers": 3, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16},
        ),
        ("distilbert", {"n_layers": 3, "dim": 16, "n_heads": 2, "hidden_dim": 16}),
        ("mt5", {"num_layers": 3, "d_model": 16, "num_heads": 2, "d_kv": 8, "d_ff": 16}),
    ],
)
def test_text_towers_of_transformers_fall_from_layer_to_layer(kind, sizes):
    import transformers
    from open_clip.hf_model import HFTextEncoder

    class Built(HFTextEncoder):
        """As open_clip builds it, of a config of ours instead of one of a hub."""

        def __init__(self) -> None:
            nn.Module.__init__(self)
            config = transformers.AutoConfig.for_model(kind, vocab_size=40, **sizes)
            whole = transformers.AutoModel.from_config(config)
            self.transformer = whole.encoder if kind == "mt5" else whole
            self.proj, self.config, self.output_dim = nn.Linear(16, 6), config, 6

    holder = Holder(text=HubText(Built(), context_length=8))
    found = layer_scales(holder, image=1.0, text=0.5)
    layers = {name: found.get(name, 1.0) for name, _ in holder.named_parameters() if ".pooler." not in name}
    blocks = {"roberta": "layer", "distilbert": "layer", "mt5": "block"}[kind]
    for name, scale in layers.items():
        _, marked, rest = name.partition(f".{blocks}.")
        expected = (
            0.5 ** (3 - int(rest[0])) if marked else 0.5**4 if "embed" in name or "shared" in name else 1.0
        )
        assert scale == expected, name
    assert sorted(set(layers.values())) == [0.0625, 0.125, 0.25, 0.5, 1.0]


def test_a_tower_without_layers_is_refused_in_one_sentence():
    with pytest.raises(UserError, match="the layers of this image tower are not known"):
        layer_scales(tiny_pretrainer(("itc",)), image=0.9, text=1.0)
    with pytest.raises(UserError, match="this run has no text tower"):
        layer_scales(Holder(), image=1.0, text=0.9)
    assert layer_scales(Holder(), image=1.0, text=1.0) == {}
