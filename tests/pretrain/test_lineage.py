"""What a run was trained on has changed: refused with the difference named, or allowed and recorded."""

import shutil
from pathlib import Path

import pytest

from datasets.errors import UserError
from datasets.loader import Feed
from pretrain import checkpoint, launch, loop
from pretrain.distributed import SaidByRankZeroError
from pretrain.evaluate import during
from pretrain.lineage import check_ranks
from pretrain.starts import read_starts

FLAGS = (
    "--objectives itc,lm --stages.one.batch 32 --stages.one.resolution 16 --stages.one.optim.kind adamw "
    "--stages.one.optim.warmup 2 --vocabulary 300 --model.embed 16 --model.text.width 16 "
    "--model.text.layers 1 --model.captioner.width 16 --model.captioner.layers 1 --cadence.report 1 "
    "--cadence.checkpoint 4 --precision.threads 1 --wandb.mode disabled --loader-threads 1"
)
STEPS = 12
AFTER = 4  # steps of the run that everything here goes on with


@pytest.fixture(autouse=True, scope="module")
def _no_pages():
    """Curves and reports are judged elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "show", lambda training: None)
        patch.setattr(during, "_show", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("lineage") / "corpus"


@pytest.fixture(scope="module")
def flags(write_corpus, corpus) -> str:
    return f"{FLAGS} {write_corpus(corpus)}"


@pytest.fixture(scope="module")
def trained(flags, tmp_path_factory) -> Path:
    """A run that was stopped at a checkpoint."""
    out = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        cut_short(out, flags, patch, at=AFTER)
    return out


@pytest.fixture
def run(trained, tmp_path) -> Path:
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture
def altered(corpus):
    """The corpus as it may be changed: it is put back as it was afterwards."""
    aside = shutil.copytree(corpus, corpus.with_name("aside"))
    yield corpus
    shutil.rmtree(corpus)
    aside.rename(corpus)


def go(out: Path, flags: str, *, more: str = "") -> int:
    return launch.main(f"{flags} --stages.one.steps {STEPS} --out {out} {more}".split())


def files(out: Path) -> dict[str, bytes]:
    """All of a run directory but the lock, which says who holds it."""
    paths = (path for path in out.rglob("*") if path.is_file() and path.name != "lock")
    return {str(path.relative_to(out)): path.read_bytes() for path in paths}


def refused(out: Path, flags: str, capsys, *, more: str = "") -> str:
    """The one sentence that says so; nothing in the run directory was touched."""
    before = files(out)
    capsys.readouterr()
    assert go(out, flags, more=more) == launch.USER_ERROR
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert files(out) == before
    return said


@pytest.mark.parametrize(
    ("more", "difference"),
    [
        ("--seed 5", "seed (0 there, 5 here)"),
        ("--stages.one.batch 16", "stages.one.batch (32 there, 16 here)"),
        ("--shuffle.lanes 4", "shuffle.lanes (8 there, 4 here)"),
        ("--shuffle.window 64", "shuffle.window (524288 there, 64 here)"),
        ("--sources.captions.weight 3", "sources.captions.weight (2.0 there, 3.0 here)"),
        ("--sources.phrases.captions all", "sources.phrases.captions (one there, all here)"),
    ],
)
def test_other_settings_are_refused_by_name(trained, flags, capsys, more, difference):
    said = refused(trained, flags, capsys, more=more)
    assert f"which differs in {difference}: choose another --out, or go on in spite of it" in said


def test_what_weights_hang_on_may_not_change_whatever_is_allowed(trained, flags, capsys):
    said = refused(trained, flags, capsys, more="--model.embed 8 --allow-changed")
    assert "which differs in model.embed (16 there, 8 here): choose another --out\n" in said


def test_a_shard_with_other_content_is_refused_by_name(trained, flags, altered, write_shard, capsys):
    write_shard(altered / "captions" / "00002.tar", "captions", seed=1)
    said = refused(trained, flags, capsys)
    assert f"since the checkpoint of step {AFTER} has changed the data of source captions: 00002.tar" in said
    assert "with --allow-changed" in said


def test_a_byte_that_changed_with_size_and_names_is_another_content(trained, flags, altered, capsys, members):
    path = altered / "classes" / "00001.tar"
    offset, size = members(path)["00007.jpg"]
    content = bytearray(path.read_bytes())
    content[offset + size // 2] ^= 1
    path.write_bytes(content)
    assert "the data of source classes: 00001.tar" in refused(trained, flags, capsys)


def test_a_shard_more_and_a_shard_less_are_refused(trained, flags, altered, write_shard, capsys):
    write_shard(altered / "captions" / "00006.tar", "captions")
    (altered / "phrases" / "00000.tar").unlink()
    said = refused(trained, flags, capsys)
    assert "the data of source captions: 1 shard new: 00006.tar; " in said
    assert "the data of source phrases: 1 shard gone: 00000.tar: bring it back" in said


def test_another_version_of_the_order_is_refused(run, flags, capsys):
    restate(run, order=1)
    said = refused(run, flags, capsys)
    assert "has changed the version of the order (1 then, 2 now)" in said


CHANGES = {
    "seed": "--seed 5",
    "batch": "--stages.one.batch 16",
    "order": "--shuffle.lanes 4 --shuffle.window 64",
    "weights": "--sources.captions.weight 0 --sources.classes.weight 1",
    "a source more": "--data more={corpus}/captions/0000{{0..1}}.tar --sources.more.weight 2",
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_allowed_is_recorded_once_and_what_follows_is_one_run(
    run, flags, corpus, tmp_path, capsys, monkeypatch, change
):
    """Cut short after its next checkpoint it goes on without leave, and does what it does in one go."""
    more = CHANGES[change].format(corpus=corpus)
    whole = shutil.copytree(run, tmp_path / "whole")
    assert go(whole, flags, more=f"{more} --allow-changed") == launch.DONE
    capsys.readouterr()
    cut_short(run, flags, monkeypatch, at=9, more=f"{more} --allow-changed")
    said = capsys.readouterr().out
    *_, start = read_starts(run / "starts.jsonl")
    assert start.changed
    assert all(f"changed since the last start: {words}\n" in said for words in start.changed)
    assert "differs" not in said

    assert go(run, flags, more=more) == launch.DONE
    *_, start = read_starts(run / "starts.jsonl")
    assert (start.step, start.lost, start.changed) == (8, 1, ())
    assert "differs" not in capsys.readouterr().out
    assert (run / "ledger").read_bytes() == (whole / "ledger").read_bytes()


def test_changed_data_are_gone_on_with_and_their_steps_are_done_anew(
    run, flags, altered, write_shard, capsys, monkeypatch
):
    """What was done beyond the checkpoint is no longer promised again; what stands before it stays."""
    cut_short(run, flags, monkeypatch, at=7)
    before = lines(run)
    assert len(before) == 7
    write_shard(altered / "captions" / "00006.tar", "captions")
    shutil.rmtree(run / "manifests")  # a run may have been trained before they were kept
    assert "240 samples then, 280 now, fingerprint" in refused(run, flags, capsys)
    assert go(run, flags, more="--allow-changed") == launch.DONE
    said = capsys.readouterr().out
    assert "changed since the last start: the data of source captions: 240 samples then, 280 now" in said
    assert "differs" not in said
    assert lines(run)[:AFTER] == before[:AFTER]
    assert [int(line.split()[0]) for line in lines(run)] == list(range(1, STEPS + 1))
    assert lines(run)[AFTER] != before[AFTER]


def test_data_that_change_before_anything_is_saved_begin_anew(
    run, flags, altered, write_shard, capsys, monkeypatch
):
    """No checkpoint is of the old data: nothing is lost, and nothing that was done is held against them."""
    young = run.parent / "young"
    cut_short(young, flags, monkeypatch, at=2)
    before = lines(young)
    assert len(before) == 2
    write_shard(altered / "captions" / "00006.tar", "captions")
    assert go(young, flags) == launch.DONE
    said = capsys.readouterr().out
    assert "changed since the last start: the data of source captions: " in said
    assert "00006.tar" in said
    assert "differs" not in said
    assert [int(line.split()[0]) for line in lines(young)] == list(range(1, STEPS + 1))
    assert lines(young)[0] != before[0]
    *_, start = read_starts(young / "starts.jsonl")
    assert len(start.changed) == 1


def cut_short(out: Path, flags: str, monkeypatch, *, at: int, more: str = "") -> None:
    """Let it die in the step after `at`, when the checkpoint of that step has been written."""
    with monkeypatch.context() as patch:
        real, save = loop.train_step, loop.save

        def at_once(training, **named):
            save(training, **named)
            training.saver.finish()

        def die(*arguments, **named):
            if named["key"][1] == at:
                raise KeyboardInterrupt
            return real(*arguments, **named)

        patch.setattr(loop, "train_step", die)
        patch.setattr(loop, "save", at_once)
        with pytest.raises(KeyboardInterrupt):
            go(out, flags, more=more)


def restate(out: Path, **changes: int) -> None:
    """Write the newest checkpoint of a run again, as if it had remembered something else."""
    newest = checkpoint.chosen(out / "checkpoints")
    saved = newest.load()
    shutil.rmtree(newest.folder)
    checkpoint.save(out / "checkpoints", newest.step, saved.tensors, {**saved.state, **changes})


def lines(out: Path) -> list[str]:
    return (out / "ledger").read_text().splitlines()


class Opened:
    """What `check_ranks` looks at."""

    def __init__(self, fingerprint):
        self.fingerprint, self.size = fingerprint, 7


def other_data_on_rank_one(ranks):
    feeds = [Feed(name="photos", source=Opened("a" if ranks.rank == 0 else "b"))]  # pyright: ignore
    try:
        check_ranks(feeds, ranks)
    except (UserError, SaidByRankZeroError) as error:
        return type(error).__name__, str(error)
    return None


def test_ranks_that_opened_other_data_are_refused(pool):
    for world in (2, 4):
        said = pool.run(other_data_on_rank_one, world)
        assert said[0][0] == "UserError"
        assert said[0][1].startswith("rank 1 reads other data as source 'photos' than rank 0 (7 samples")
        assert {name for name, _ in said[1:]} == {"SaidByRankZeroError"}


def test_ranks_that_opened_the_same_go_on(pool):
    assert pool.run(same_data, 2) == [None, None]


def same_data(ranks):
    check_ranks([Feed(name="photos", source=Opened("a"))], ranks)  # pyright: ignore
