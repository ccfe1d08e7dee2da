"""What towers are stacked of, and that computing it twice or compiling it changes nothing but the cost."""

import pytest
import torch
from torch import nn

from pretrain.blocks import blocks_of, compile_each, glances_of, recompute
from pretrain.precision import Compute
from pretrain.zoo.captioner import Captioner
from pretrain.zoo.dual import Dual
from pretrain.zoo.fusion import Fusion
from pretrain.zoo.text import build_small_text
from pretrain.zoo.vision import Small, build_image_tower, build_small


def model(*, depth: int = 3, image: str = "small") -> Dual:
    torch.manual_seed(0)
    if image == "small":
        tower = build_small(Small(patch=4, width=32, depth=depth, heads=2), resolution=16)
        tower.measure(resolution=16, embed=8)
    else:
        tower = build_image_tower(image, embed=8, resolution=64)
    text = build_small_text(vocabulary=20, width=8, layers=2, heads=2, context_length=16, embed=8, end_id=19)
    config = Captioner.Config(width=8, layers=2, heads=2)
    return Dual(
        image=tower,
        text=text,
        captioner=Captioner(config, image_width=tower.width, vocabulary=20, context_length=16),
        fusion=Fusion(Fusion.Config(), text=text, image_width=tower.width),
        logit_scale=torch.tensor(1.5),
        logit_bias=None,
    )


@pytest.mark.parametrize(
    ("image", "kind", "count"),
    [("small", "Block", 3), ("timm:convnext_atto", "ConvNeXtBlock", 12)],
)
def test_blocks_are_found_in_towers_of_every_kind(image, kind, count):
    dual = model(image=image)
    blocks = blocks_of(dual)
    kinds = [type(block).__name__ for block in blocks]
    assert len(blocks) == count + 2 + 2
    assert all(kind in name for name in kinds[:count])
    assert kinds[count:] == ["GroundedBlock"] * 2 + ["_Block"] * 2
    assert [type(each).__name__ for each in glances_of(dual)] == ["_Look"] * 2
    within = {id(part) for block in blocks for part in block.modules() if part is not block}
    assert not any(id(block) in within for block in blocks)
    dual.fusion = dual.text = None
    assert glances_of(dual) == []
    assert len(blocks_of(dual)) == count + 2


def kept_and_gradient(dual: Dual) -> tuple[int, torch.Tensor]:
    """Bytes that the image tower's forward keeps for its backward, beside parameters, and the gradient."""
    own = {parameter.untyped_storage().data_ptr() for parameter in dual.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        at = tensor.untyped_storage().data_ptr()
        if at not in own:
            kept[at] = tensor.untyped_storage().nbytes()
        return tensor

    images = torch.randint(
        0, 256, (16, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    compute, hooks = Compute(device=torch.device("cpu"), bf16=False), torch.autograd.graph.saved_tensors_hooks
    with compute.forward(), hooks(pack, lambda tensor: tensor):
        pooled, tokens = dual.image(images)
    (pooled.sum() + tokens.square().sum()).backward()
    return sum(kept.values()), nn.utils.parameters_to_vector(
        parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        for parameter in dual.parameters()
    )


def test_what_is_computed_twice_is_not_kept():
    """Two more blocks cost two more inputs instead of two more blocks' activations; the bits are the same."""
    plain = [kept_and_gradient(model(depth=depth)) for depth in (1, 3)]
    again = []
    for depth in (1, 3):
        dual = model(depth=depth)
        names = list(dual.state_dict())
        recompute(blocks_of(dual))
        assert list(dual.state_dict()) == names
        again.append(kept_and_gradient(dual))
    for (_, expected), (_, found) in zip(plain, again, strict=True):
        assert torch.equal(found, expected)
    one_input = 16 * 16 * 32 * 4  # images, tokens, width, bytes
    assert again[1][0] - again[0][0] <= 2 * one_input
    assert plain[1][0] - plain[0][0] >= 2 * 8 * one_input


@pytest.mark.slow
@pytest.mark.parametrize("twice", [False, True])
def test_blocks_of_one_kind_are_compiled_once(twice):
    """However many there are. Needs a C++ compiler."""
    expected = kept_and_gradient(model(depth=10))[1]
    dual = model(depth=10)
    names = list(dual.state_dict())
    if twice:
        recompute(blocks_of(dual))
    compile_each(blocks_of(dual))
    assert list(dual.state_dict()) == names
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    found = kept_and_gradient(dual)[1]
    assert float((found - expected).norm()) <= 1e-5 * expected.norm()
    counted = torch._dynamo.utils.counters
    assert counted["stats"]["unique_graphs"] <= 2
    assert not counted["graph_break"]
