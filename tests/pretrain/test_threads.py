import pytest
import torch

from datasets.errors import UserError
from pretrain import threads
from pretrain.threads import settle_threads


@pytest.fixture(autouse=True)
def _two_threads(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def slower_with(monkeypatch):
    """Steps that take longer with that many threads, by a time that nothing else makes pass."""

    class Time:
        now = 100.0

    monkeypatch.setattr(threads.time, "perf_counter", lambda: Time.now)

    def steps(number: int):
        def step() -> None:
            Time.now += 0.02 if torch.get_num_threads() == number else 0.005

        return step

    return steps


def test_the_faster_number_is_taken_and_kept(tmp_path, slower_with):
    kept = tmp_path / "threads"
    assert settle_threads(0, kept=kept, step=slower_with(2)) == 1
    assert kept.read_text() == "1\n"
    torch.set_num_threads(2)
    assert settle_threads(0, kept=kept, step=slower_with(1)) == 1, "the run keeps what it measured first"
    torch.set_num_threads(2)
    assert settle_threads(0, kept=tmp_path / "other", step=slower_with(1)) == 2


def test_a_number_from_the_user_or_the_environment_is_not_measured(tmp_path, monkeypatch):
    def never() -> None:
        raise AssertionError

    assert settle_threads(0, kept=tmp_path / "none", step=None) == 2
    assert not (tmp_path / "none").exists()
    assert settle_threads(2, kept=tmp_path / "threads", step=never) == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert settle_threads(0, kept=tmp_path / "other", step=never) == 2
    torch.set_num_threads(1)
    assert settle_threads(0, kept=tmp_path / "other", step=never) == 2, "what the run began with holds"


def test_a_file_that_holds_no_number_is_named(tmp_path):
    (tmp_path / "threads").write_text("many")
    with pytest.raises(UserError, match="holds 'many'"):
        settle_threads(0, kept=tmp_path / "threads", step=lambda: None)
