import json
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets.errors import KINDS, Kind, UserError
from datasets.sample import Fault
from pretrain.quarantine import Budget, Quarantine, put_away


@dataclass(frozen=True)
class Met:
    source: str
    key: str
    position: int
    epoch: int
    fault: Fault


def bad(number, *, kind: Kind = "truncated", shard="00000.tar", source="web", epoch=0):
    fault = Fault(kind, f"{kind} {number}", shard, 512 * number)
    return Met(source, f"{shard}/{number:06d}", 7 * number, epoch, fault)


def opened(folder, *, size=100, **budget):
    return Quarantine(folder / "quarantine.jsonl", Budget(**budget), samples_of=lambda source, shard: size)


def listed(folder):
    return [json.loads(line) for line in (folder / "quarantine.jsonl").read_bytes().splitlines()]


def test_every_sample_is_listed_once_with_all_that_is_known(tmp_path):
    quarantine = opened(tmp_path)
    quarantine.add([bad(1), bad(2, kind="json")], step=4)
    quarantine.add([bad(1, epoch=1)], step=9)
    assert listed(tmp_path) == [
        {
            "source": "web", "key": f"00000.tar/{n:06d}", "shard": "00000.tar", "offset": 512 * n,
            "kind": kind, "reason": f"{kind} {n}", "epoch": 0, "position": 7 * n, "step": 4,
        }
        for n, kind in ((1, "truncated"), (2, "json"))
    ]  # fmt: skip
    assert quarantine.counts() == {"truncated": 1, "json": 1}


def test_equal_keys_of_two_sources_are_two_samples(tmp_path):
    quarantine = opened(tmp_path)
    quarantine.add([bad(1), bad(1, source="books")], step=0)
    assert quarantine.counts() == {"truncated": 2}


def test_restart_counts_what_stood_there_and_nothing_twice(tmp_path):
    quarantine = opened(tmp_path)
    quarantine.add([bad(n) for n in range(5)], step=1)
    quarantine.close()
    again = opened(tmp_path)
    assert again.counts() == {"truncated": 5}
    assert again.add([bad(n) for n in range(5)], step=1) == []
    again.add([bad(7)], step=2)
    assert again.counts() == {"truncated": 6}
    assert len(listed(tmp_path)) == 6


@settings(max_examples=30, deadline=None)
@given(cut=st.integers(0, 400))
def test_a_torn_line_is_cut_and_its_sample_listed_again(tmp_path_factory, cut):
    folder = tmp_path_factory.mktemp("torn")
    quarantine = opened(folder)
    quarantine.add([bad(n) for n in range(3)], step=1)
    whole = (folder / "quarantine.jsonl").read_bytes()
    (folder / "quarantine.jsonl").write_bytes(whole[: max(0, len(whole) - cut)])
    again = opened(folder)
    again.add([bad(n) for n in range(3)], step=1)
    assert (folder / "quarantine.jsonl").read_bytes() == whole


def test_spoiled_lines_are_passed_over(tmp_path):
    opened(tmp_path).add([bad(1)], step=1)
    with (tmp_path / "quarantine.jsonl").open("ab") as file:
        file.write(b"\0\0\0\n[]\n{}\n\xff\n")
    assert opened(tmp_path).counts() == {"truncated": 1}


def test_nothing_waits_in_the_process(tmp_path):
    opened(tmp_path).add([bad(1)], step=1)  # neither flushed nor closed
    assert len(listed(tmp_path)) == 1


def test_the_console_hears_a_handful_and_then_totals(tmp_path):
    quarantine = opened(tmp_path)
    said = [quarantine.add([bad(n, kind="json" if n % 2 else "truncated")], step=n) for n in range(5000)]
    spoken = [sentence for each in said for sentence in each]
    assert spoken[:2] == [
        "masked sample 00000.tar/000000: truncated 0",
        "masked sample 00000.tar/000001: json 1",
    ]
    assert len(spoken) == 6 + 9  # three of each kind, then 16, 32, ... 4096
    assert "4,096 samples are masked by now (2048 truncated, 2048 json): " in spoken[-1]


def test_hostile_names_stay_within_their_line(tmp_path):
    quarantine = opened(tmp_path)
    quarantine.add([bad(1, shard="a\nb\udce9\u2028.tar")], step=0)
    assert [line["shard"] for line in listed(tmp_path)] == ["a\nb\udce9\u2028.tar"]
    quarantine.close()
    assert opened(tmp_path).counts() == {"truncated": 1}


def test_share_of_everything_read(tmp_path):
    quarantine = opened(tmp_path, overall=0.05)
    quarantine.add([bad(n, shard=f"{n}.tar") for n in range(60)], step=1)
    assert quarantine.verdict(samples=999, masked=999) is None  # too early to say
    assert quarantine.verdict(samples=1200, masked=60) is None
    reason = quarantine.verdict(samples=1199, masked=60)
    assert reason is not None
    assert "60 of 1,199 samples read so far cannot be used (mostly truncated)" in reason
    assert "--bad.overall 0.05" in reason
    assert str(tmp_path / "quarantine.txt") in reason


def test_share_of_one_shard(tmp_path):
    quarantine = opened(tmp_path, shard=0.2, size=50)
    quarantine.add([bad(n) for n in range(10, 0, -1)], step=1)
    assert quarantine.verdict(samples=100, masked=10) is None
    quarantine.add([bad(11)], step=2)
    reason = quarantine.verdict(samples=100, masked=11)
    assert reason is not None
    assert "11 of the 50 samples of 00000.tar in web cannot be used" in reason
    assert "(the first at byte 512: truncated 1)" in reason
    assert "--bad.shard 0.2" in reason
    assert opened(tmp_path, shard=0.3, size=50).verdict(samples=100, masked=11) is None


def test_a_restart_does_not_get_round_the_budget_of_a_shard(tmp_path):
    opened(tmp_path, size=20).add([bad(n) for n in range(12)], step=1)
    again = opened(tmp_path, size=20)
    assert again.verdict(samples=100, masked=0) is None  # the shard may have been left out since
    again.add([bad(3)], step=1)
    assert again.verdict(samples=100, masked=1) is not None


def test_a_budget_of_nothing_waits_for_nothing(tmp_path):
    overall = opened(tmp_path, overall=0, shard=1)
    shard = Quarantine(tmp_path / "other.jsonl", Budget(overall=1, shard=0), samples_of=lambda *_: 100)
    assert overall.verdict(samples=8, masked=0) is None
    for each in (overall, shard):
        each.add([bad(3)], step=0)
    assert "1 of 8 samples read so far" in (overall.verdict(samples=8, masked=1) or "")
    assert "1 of the 100 samples of 00000.tar" in (shard.verdict(samples=8, masked=1) or "")


def test_a_list_is_put_away_with_its_report_and_the_next_begins_with_nothing(tmp_path):
    for number in range(2):
        quarantine = opened(tmp_path, size=20)
        quarantine.add([bad(n) for n in range(number, 12)], step=1)
        quarantine.close()
        put_away(tmp_path / "quarantine.jsonl")
    opened(tmp_path).close()
    put_away(tmp_path / "quarantine.jsonl")  # it is empty: there is nothing to keep
    names = {"quarantine.1.jsonl", "quarantine.1.txt", "quarantine.2.jsonl", "quarantine.2.txt"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert [len((tmp_path / f"quarantine.{n}.jsonl").read_text().splitlines()) for n in (1, 2)] == [12, 11]
    again = opened(tmp_path, size=20)
    again.add([bad(3)], step=2)
    assert again.verdict(samples=100, masked=1) is None


def test_the_report_of_a_list_that_was_deleted_goes(tmp_path):
    quarantine = opened(tmp_path)
    quarantine.add([bad(1)], step=1)
    quarantine.close()
    (tmp_path / "quarantine.jsonl").unlink()
    opened(tmp_path).close()
    assert not (tmp_path / "quarantine.txt").exists()


@pytest.mark.parametrize("size", [None, 9])
def test_few_bad_samples_or_no_shard_are_no_reason_to_stop(tmp_path, size):
    quarantine = opened(tmp_path, size=size)
    quarantine.add([bad(n) for n in range(9 if size else 40)], step=1)
    assert quarantine.verdict(samples=100, masked=40) is None


def test_report_says_what_where_and_what_to_do(tmp_path):
    quarantine = opened(tmp_path)
    quarantine.flush()
    assert not (tmp_path / "quarantine.txt").exists()  # there is nothing to report
    quarantine.add([bad(n, shard="worse.tar") for n in range(3, 40)], step=1)
    quarantine.add([bad(n, kind="json", shard="") for n in range(2)], step=1)
    quarantine.add([bad(2, shard="better.tar")], step=1)
    quarantine.flush()
    text = (tmp_path / "quarantine.txt").read_text()
    assert "40 samples cannot be used" in text
    assert f"38  truncated: {KINDS['truncated']}" in text
    assert "37 of 100 (37.0%)  worse.tar in web, the first at byte 1536" in text
    assert text.index("worse.tar in web") < text.index("better.tar in web")
    assert "worse.tar/000003 at byte 1536: truncated 3" in text
    ways_out = (
        "python -m datasets.check", "--bad.shard (now 0.2)", "--bad.overall (now\n  0.02)",
        "go on with --allow-changed", "delete quarantine.jsonl",
    )  # fmt: skip
    for way_out in ways_out:
        assert way_out in text


@pytest.mark.parametrize("budget", [{"overall": -0.1}, {"shard": 1.5}, {"shard": float("nan")}])
def test_a_budget_is_a_share(budget):
    Budget(overall=0, shard=1).check()
    with pytest.raises(UserError, match="is no share"):
        Budget(**budget).check()
