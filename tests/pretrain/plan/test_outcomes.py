"""What is found once is what torch finds every time: shapes, types, and whose storage it is."""

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from pretrain.plan.outcomes import Outcomes

aten = torch.ops.aten
FAKES = FakeTensorMode(allow_non_fake_inputs=True)


def size(*shape: int, dtype: torch.dtype = torch.float32) -> FakeTensor:
    return FakeTensor(FAKES, torch.empty(shape, dtype=dtype, device="meta"), torch.device("cpu"))


def place(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def test_the_second_time_is_like_the_first():
    outcomes = Outcomes(FAKES)
    for call in (
        (aten.mm.default, (size(2, 3), size(3, 4))),
        (aten.t.default, (size(2, 3),)),
        (aten.select.int, (size(2, 3), 0, 1)),
        (aten.unbind.int, (size(3, 2, 2),)),
        (aten.native_layer_norm.default, (size(5, 4), [4], None, None, 1e-5)),
        (aten._to_copy.default, (size(2, 3),), {"dtype": torch.bfloat16}),
    ):
        func, args, kwargs = call[0], call[1], dict(*call[2:])
        first, second = outcomes.of(func, args, kwargs), outcomes.of(func, args, kwargs)
        assert type(first) is type(second)
        both = [(first, second)] if isinstance(first, torch.Tensor) else zip(first, second, strict=True)
        for one, other in both:
            assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)
            assert one.storage_offset() == other.storage_offset()
            assert (place(one) == place(args[0])) == (place(other) == place(args[0]))


def test_an_operator_in_place_gives_the_tensor_of_its_own_call():
    outcomes = Outcomes(FAKES)
    for _ in range(2):
        x, y = size(7, 3), size(7, 3)
        assert outcomes.of(aten.add_.Tensor, (x, y), {}) is x
        assert outcomes.of(aten.mul_.Tensor, (x, x), {}) is x
        assert place(outcomes.of(aten.view.default, (y, [21]), {})) == place(y)


def test_numbers_of_other_types_make_other_tensors():
    outcomes, x = Outcomes(FAKES), size(2, dtype=torch.int64)
    kinds = [outcomes.of(aten.add.Tensor, (x, number), {}).dtype for number in (1, 1.0, True, 1)]
    assert kinds == [torch.int64, torch.float32, torch.int64, torch.int64]
