import json

from pretrain.verdict import Verdict, give, read


def test_the_first_to_speak_is_heard_and_who_comes_later_learns_of_it(tmp_path):
    asked = {"MEDLEY_VERDICT": str(tmp_path / "verdict.json")}
    first, later = Verdict(code=2, reason="a mistake", rank=1), Verdict(code=1, reason="connection closed")
    assert give(first, asked) == first
    assert give(later, asked) == first
    assert read(tmp_path / "verdict.json") == first


def test_where_nobody_asked_or_it_cannot_be_written_nothing_happens(tmp_path):
    mine = Verdict(code=1, reason="x")
    assert give(mine, {}) == mine
    assert give(mine, {"MEDLEY_VERDICT": str(tmp_path / "nowhere" / "verdict.json")}) == mine
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_verdict_says_nothing(tmp_path):
    for content in ("", "[]", json.dumps({"code": 2, "other": 1})):
        (tmp_path / "verdict.json").write_text(content)
        assert read(tmp_path / "verdict.json") is None
