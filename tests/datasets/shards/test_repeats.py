"""Keys in more than one shard are found, however few samples are looked at at a time."""

import pytest

from datasets.shards import repeats as module
from datasets.shards.checking import Wanted
from datasets.shards.indexing import Job, index_one
from datasets.shards.repeats import repeats

KEYS = (("a", "b", "c"), ("d", "c"), ("e", "a", "d", "c"), ("f",))


@pytest.fixture
def wanted(tmp_path, pack):
    shards = [
        pack(tmp_path / f"{number}.tar", [(f"{key}.txt", key.encode()) for key in keys])
        for number, keys in enumerate(KEYS)
    ]
    for path in shards:
        index_one(Job(str(path), f"{path}.idx"))
    return [Wanted(str(path), f"{path}.idx", "") for path in shards]


@pytest.mark.parametrize("at_once", [1, 3, 1 << 24])
def test_each_shard_is_told_its_first_key_of_another(wanted, tmp_path, monkeypatch, at_once):
    monkeypatch.setattr(module, "_AT_ONCE", at_once)
    found = list(repeats(wanted, 10))
    assert [(url, one.kind, one.key, one.offset) for url, one in found] == [
        (f"{tmp_path}/1.tar", "repeated", "c", 1536),
        (f"{tmp_path}/2.tar", "repeated", "a", 1536),
    ]
    zero = f"{tmp_path}/0.tar has a sample of this key too"
    assert [one.reason for _, one in found] == [
        zero,
        f"{zero}, and 2 more of its keys in that or others before it",
    ]


def test_what_has_no_sound_sidecar_is_passed_over(wanted, tmp_path):
    (tmp_path / "0.tar.idx").write_bytes(b"torn")
    assert list(repeats([wanted[0], wanted[1]._replace(sidecar=""), wanted[2]], 10)) == []
    assert list(repeats([], 0)) == []
