"""A data set through a model: the same bits on any number of ranks, without what cannot be read."""

import dataclasses
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from datasets.errors import UserError
from datasets.sources import open_source
from pretrain.distributed import Ranks
from pretrain.evaluate.observe import StoppedError, observe
from pretrain.testing import untrained_judge

ALONE = Ranks(rank=0, world=1, device=torch.device("cpu"), group=None)


def opened(spec):
    return open_source(spec, seed=0, split="test")


def beside(place, colour):
    return {"captions": [f"a {colour} square", f"number {place}"][: 1 + place % 2], "class": colour}


@pytest.fixture(scope="module")
def shard(tmp_path_factory, write_shard):
    return write_shard(tmp_path_factory.mktemp("data") / "a.tar", 13, beside=beside, damaged=(4, 12))


def plain(observed):
    return {
        field.name: value.tolist() if isinstance(value, torch.Tensor) else value
        for field in dataclasses.fields(observed)
        for value in [getattr(observed, field.name)]
    }


def observe_on(ranks, shard):
    """On each rank of the pool."""
    judge = replace(untrained_judge(), batch=4)
    return plain(observe(judge, opened(shard), resolution=32, ranks=ranks))


def test_the_same_on_any_number_of_ranks(judge, shard, pool):
    alone = plain(observe(replace(judge, batch=4), opened(shard), resolution=32, ranks=ALONE))
    for world in (1, 2, 4):
        for found in pool.run(observe_on, world, shard=shard):
            assert found == alone


def stop_on(ranks, shard):
    """On each rank of the pool: the last is asked to stop before its second batch. How often each asked."""
    looked = []

    def asked():
        looked.append(ranks.rank)
        return ranks.rank == ranks.world - 1 and len(looked) == 2

    judge = replace(untrained_judge(), batch=2, asked=asked)
    try:
        observe(judge, opened(shard), resolution=32, ranks=ranks)
    except StoppedError:
        return len(looked)
    return 0


def test_where_one_rank_is_asked_to_stop_all_do(shard, pool):
    """Seven batches: the others end their share first."""
    assert pool.run(stop_on, 1, shard=shard) == [2]
    first, last = pool.run(stop_on, 2, shard=shard)
    assert (first in (3, 4), last) == (True, 2)


def fail_on(ranks, shard):
    """On each rank of the pool: the second shard is cut off after it was opened."""
    source = opened(f"{shard},{shard}.second.tar")
    ranks.wait()
    if ranks.zero:
        os.truncate(f"{shard}.second.tar", 5120)
    ranks.wait()
    judge = replace(untrained_judge(), batch=4)
    try:
        observe(judge, source, resolution=32, ranks=ranks)
    except UserError as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def test_what_one_rank_cannot_read_stops_all_of_them(shard, pool):
    for world in (1, 2):
        Path(f"{shard}.second.tar").write_bytes(Path(shard).read_bytes())
        answers = pool.run(fail_on, world, shard=shard)
        assert [name for name, _ in answers] == ["UserError", "SaidByRankZeroError"][:world]
        assert all("a.tar.second.tar has changed since it was indexed" in said for _, said in answers)


def test_what_cannot_be_read_is_left_out_and_counted(judge, shard):
    seen = observe(replace(judge, batch=4), opened(shard), resolution=32, ranks=ALONE)
    kept = [place for place in range(13) if place not in (4, 12)]
    assert seen.masked == 2
    assert seen.said is not None
    assert [int(key.rpartition("/")[2]) for key in seen.keys] == kept
    assert seen.labels == tuple(["red", "green", "blue"][place % 3] for place in kept)
    assert len(seen.features) == len(seen.references) == len(seen.said) == len(kept)
    captions = [(at, caption) for at, each in enumerate(seen.references) for caption in each]
    assert seen.owner.tolist() == [at for at, _ in captions]
    texts = judge.sentences([caption for _, caption in captions])
    torch.testing.assert_close(seen.texts, texts, rtol=1e-5, atol=1e-6)
    assert len(set(seen.text_id.tolist())) == len({caption for _, caption in captions})


def test_a_limit_looks_at_the_first(judge, shard):
    assert len(observe(judge, opened(shard), resolution=32, ranks=ALONE, limit=3).keys) == 3


def test_nothing_to_see_is_said(judge, tmp_path, write_shard):
    shard = write_shard(tmp_path / "bad.tar", 2, beside=beside, damaged=(0, 1))
    with pytest.raises(UserError, match=r"not one sample of .*bad\.tar can be read"):
        observe(judge, opened(shard), resolution=32, ranks=ALONE)
