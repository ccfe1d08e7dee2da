"""Which members make a sample, and what makes one unusable."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datasets.shards.grouping import IMAGE, LARGEST, NUMBER, RECORD, TEXT, group, printable
from datasets.shards.scan import Members


def members(names, *, odd=None, sizes=None):
    count = len(names)
    return Members(list(names), [512 * n for n in range(count)], sizes or [1] * count, [0] * count, odd or {})


def grouped(names, **more):
    """Each sample's parts by key, and the faults by key."""
    listed = members(names, **more)
    samples = group(listed)
    parts = {
        key: tuple(listed.names[column[row]] if column[row] >= 0 else "" for column in samples.parts)
        for row, key in enumerate(samples.keys)
    }
    return parts, {samples.keys[row]: fault.reason for row, fault in samples.faults.items()}


def test_parts_are_told_by_their_suffix_in_any_case():
    parts, faults = grouped(
        ["a.JPEG", "a.txt", "b.png", "b.json", "b.cls", "c.webp", "d.txt", "e.npy", "README"]
    )
    assert parts == {
        "a": ("a.JPEG", "a.txt", "", ""),
        "b": ("b.png", "", "b.json", "b.cls"),
        "c": ("c.webp", "", "", ""),
        "d": ("", "d.txt", "", ""),
    }
    assert not faults


def test_dots_folders_and_interleaving_keep_samples_apart():
    names = [
        "img.000.jpg",
        "img.001.jpg",
        "d.x/img.jpg",
        "img.001.txt",
        "d.x/img.txt",
        "./img.000.txt",
        "img.000.txt",
    ]
    parts, faults = grouped(names)
    assert list(parts) == ["img.000", "img.001", "d.x/img", "./img.000"]
    assert parts["img.000"] == ("img.000.jpg", "img.000.txt", "", "")
    assert not faults


@pytest.mark.parametrize(
    ("names", "keys"),
    [
        (["a.jpg", "a.txt", "a.seg.png"], ["a"]),
        (["a.seg.png", "a.jpg", "a.txt"], ["a"]),
        (["a.1.jpg", "a.1.txt", "a.1.mask.png", "a.10.jpg"], ["a.1", "a.10"]),
        (["a.seg.png", "a.depth.png"], ["a.seg", "a.depth"]),
        (["d/a.jpg", "a.seg.png"], ["d/a", "a.seg"]),
        (["._a.jpg", "a.jpg", "d/._b.jpg", ".jpg", "d/.jpg"], ["a"]),
        (["a.tar/b.jpg", "a.jpg", "a.tar/b.txt"], ["a.tar/b", "a"]),
        (["a..jpg", "a.jpg"], ["a"]),
    ],
)
def test_further_members_and_hidden_files_are_no_samples(names, keys):
    assert list(grouped(names)[0]) == keys


@pytest.mark.parametrize(
    ("names", "fault"),
    [
        (["a.jpg", "a.txt", "a.jpg", "a.txt"], "a.jpg and a.jpg are both its image"),
        (["a.jpg", "b.jpg", "a.txt", "b.txt", "a.txt"], "a.txt and a.txt are both its text"),
        (["a.jpg", "a.png", "a.txt"], "a.jpg and a.png are both its image"),
    ],
)
def test_a_part_twice_is_a_fault_of_its_sample_alone(names, fault):
    assert grouped(names)[1] == {"a": fault}


def test_links_folders_and_giants():
    names = ["a.jpg", "a.txt", "b.jpg", "c.jpg", "d.jpg"]
    parts, faults = grouped(names, odd={0: "a link", 2: "a folder"}, sizes=[0, 1, 0, LARGEST + 1, LARGEST])
    assert faults == {
        "a": "a.jpg is a link, not a file",
        "c": f"c.jpg has {LARGEST + 1} bytes, more than {LARGEST}",
    }
    assert list(parts) == ["a", "c", "d"]


def test_keys_can_be_printed_and_are_unique():
    names = ["caf\udce9.jpg", "caf\\udce9.jpg", "a\nb\x1b[31m.jpg", "../../etc/evil.jpg", "/abs/evil.jpg"]
    parts, faults = grouped(names)
    assert list(parts) == [
        "caf\\udce9",
        "caf\\udce9 (1)",
        "a\\nb\\x1b[31m",
        "../../etc/evil",
        "/abs/evil",
    ]
    assert faults == {"caf\\udce9 (1)": "another sample's name also reads caf\\udce9"}
    assert printable("日本 ok") == "日本 ok"


@given(
    st.lists(
        st.tuples(
            st.text("ab./" + string.digits[:2], min_size=1, max_size=6),
            st.sampled_from(["jpg", "png", "txt", "json", "cls", "npy", "seg.png", "JPG"]),
        ),
        max_size=12,
    )
)
def test_no_member_is_part_of_two_samples_and_no_key_twice(pairs):
    listed = members([f"{key}.{suffix}" for key, suffix in pairs])
    samples = group(listed)
    assert len(set(samples.keys)) == len(samples.keys)
    used = [number for column in samples.parts for number in column if number >= 0]
    assert len(set(used)) == len(used)
    for part, suffixes in (
        (IMAGE, ("jpg", "png")),
        (TEXT, ("txt",)),
        (RECORD, ("json",)),
        (NUMBER, ("cls",)),
    ):
        assert all(listed.names[n].lower().endswith(suffixes) for n in samples.parts[part] if n >= 0)
    for row in range(len(samples.keys)):
        assert any(column[row] >= 0 for column in samples.parts)
