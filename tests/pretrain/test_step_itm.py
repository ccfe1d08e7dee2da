"""What itm draws, reads and keeps in a step, on any ranks and micro-batches."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from datasets.batch import Batch
from objectives.base import Pairs
from pretrain.coupled import Pool
from pretrain.distributed import Ranks
from pretrain.parallel import wrap
from pretrain.precision import Compute
from pretrain.step import Setup, agree, backward, train_step
from pretrain.testing import make_samples, split, tiny_pretrainer

ALONE = Ranks(rank=0, world=1, device=torch.device("cpu"), group=None)
Drawn = list[tuple[int, tuple[int, ...], bool]]


def pieces(ranks: Ranks, micro_batches: int) -> list[Batch]:
    """Of two sources that share captions; some micro-batches are one masked sample, or one without texts."""
    return [
        replace(piece, source=source)
        for source, samples in (("one", make_samples(41)), ("two", make_samples(33, seed=1)))
        for piece in split(samples, ranks, micro_batches)
    ]


def drawn(
    ranks: Ranks, kinds: tuple[str, ...], micro_batches: int, pool: Pool
) -> tuple[Drawn, dict[str, float]]:
    """Image, words and answer of all pairs that this rank reads, by names; and what the step reports."""
    pretrainer = tiny_pretrainer(kinds, ranks.group)
    read: Drawn = []

    def watched(encodings, batch: Batch, pairs: Pairs):
        images = batch.sample_id[pairs.image].tolist()
        for image, ids, length, matched in zip(
            images, pairs.tokens, pairs.text_length, pairs.matched, strict=True
        ):
            read.append((image, tuple(ids[:length].tolist()), bool(matched)))
        assert not pairs.tokens[:, int(pairs.text_length.max()) if len(images) else 2 :].numel()
        return forward(encodings, batch, pairs)

    itm: Any = pretrainer.objectives["itm"]
    forward, itm.forward = itm.forward, watched
    setup = Setup(
        wrapped=wrap(pretrainer, ranks), compute=Compute(device=ranks.device, bf16=False), pool=pool
    )
    batches = pieces(ranks, micro_batches)
    report = train_step(
        setup,
        batches,
        torch.optim.SGD(pretrainer.parameters(), lr=0.1),
        counts=agree(setup, batches).counts,
        weights=dict.fromkeys(kinds, 1.0),
        largest_norm=1.0,
        key=(5, 9),
    )
    return read, {at: float(value) for at, value in report.values.items()}


@pytest.mark.parametrize("pool_of", ["source", "all"])
@pytest.mark.parametrize("kinds", [("itm",), ("itc", "itm")], ids="+".join)
def test_the_same_negatives_are_drawn_on_any_ranks_and_micro_batches(pool, kinds, pool_of):
    expected, report = drawn(ALONE, kinds, 1, pool_of)
    pairs = sum(int(batch.pair_valid.sum()) for batch in pieces(ALONE, 1))
    assert len(expected) == 3 * pairs
    assert sum(matched for *_, matched in expected) == pairs
    for world in (1, 2, 4):
        for micro_batches in (1, 3, 8):
            results = pool.run(drawn, world, kinds=kinds, micro_batches=micro_batches, pool=pool_of)
            found = Counter(each for read, _ in results for each in read)
            assert found == Counter(expected)
            for _, said in results:
                assert said == pytest.approx(report, rel=1e-9)
    assert report["itm/trivial"] == pytest.approx(2 / 3)
    assert report["itm/missing"] == pytest.approx(0, abs=1e-12)
    assert 0 <= report["itm/accuracy"] <= 1


def test_sources_lend_each_other_negatives_only_where_they_are_contrasted():
    names = {int(name): batch.source for batch in pieces(ALONE, 1) for name in batch.sample_id}
    words = {
        tuple(ids[:length].tolist()): batch.source
        for batch in pieces(ALONE, 1)
        for ids, length in zip(batch.tokens, batch.text_length, strict=True)
    }
    crosses: dict[Pool, bool] = {"source": False, "all": True}
    for pool, crossing in crosses.items():
        read, _ = drawn(ALONE, ("itc", "itm"), 2, pool)
        assert any(names[image] != words[text] for image, text, _ in read) == crossing


@pytest.mark.parametrize("kinds", [("itc", "itm"), ("itm", "itc")], ids="+".join)
def test_drawing_first_takes_no_gradient_from_contrast(kinds):
    """In one micro-batch the embeddings that itm draws by are those that itc is minimised through."""
    pretrainer = tiny_pretrainer(kinds)
    setup = Setup(wrapped=wrap(pretrainer, ALONE), compute=Compute(device=ALONE.device, bf16=False))
    batches = split(make_samples(20), ALONE, 1)
    one = torch.tensor(1.0, dtype=torch.float64)
    backward(setup, batches, {"itc": one, "itm": 0 * one}, key=(0, 0))
    assert pretrainer.model.text is not None
    gradient = pretrainer.model.text.project.weight.grad  # type: ignore[union-attr]
    assert isinstance(gradient, Tensor)
    assert float(gradient.norm()) > 1e-2


def kept(kinds: tuple[str, ...], micro_batches: int) -> int:
    """The most bytes that autograd kept at once in a step for its backwards, parameters left out."""
    pretrainer = tiny_pretrainer(kinds)
    own = {parameter.untyped_storage().data_ptr() for parameter in pretrainer.parameters()}
    setup = Setup(wrapped=wrap(pretrainer, ALONE), compute=Compute(device=ALONE.device, bf16=False))
    batches = split(make_samples(168), ALONE, micro_batches)
    factors = {kind: 1.0 / count for kind, count in agree(setup, batches).counts.items()}
    held, most, now = {}, 0, 0

    class Kept:
        """A saved tensor, counted once for each storage, until the graph lets go of it."""

        def __init__(self, tensor: Tensor) -> None:
            nonlocal most, now
            self.tensor, storage = tensor, tensor.untyped_storage()
            self.at, self.size = storage.data_ptr(), storage.nbytes()
            if self.at in own:
                return
            held[self.at] = held.get(self.at, 0) + 1
            now += self.size if held[self.at] == 1 else 0
            most = max(most, now)

        def __del__(self) -> None:
            nonlocal now
            if self.at in own:
                return
            held[self.at] -= 1
            now -= 0 if held[self.at] else self.size

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda packed: packed.tensor):
        backward(setup, batches, factors, key=(0, 0))
    return most


@pytest.mark.parametrize("kinds", [("itm",), ("itc", "itm", "lm")], ids="+".join)
def test_what_is_kept_for_backward_falls_with_the_micro_batch(kinds):
    """About as one over their number: an image that many texts take for theirs makes its own one larger."""
    whole = kept(kinds, 1)
    for micro_batches in (2, 4, 8):
        assert whole / micro_batches <= kept(kinds, micro_batches) * 1.02
        assert kept(kinds, micro_batches) <= 1.5 * whole / micro_batches
