"""What is copied, once for each content, and that it stays what it was."""

import subprocess

import pytest

from datasets.errors import UserError
from slurm.snapshot import take


@pytest.fixture
def repository(tmp_path):
    root = tmp_path / "repository"
    for name, text in {
        "pretrain/launch.py": "print(1)\n",
        "slurm/env.sh": "true\n",
        ".gitignore": "runs/\n",
        "runs/old/metrics.jsonl": "{}\n",
        "pretrain/gone.py": "",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "slurm" / "env.sh").chmod(0o755)

    def git(*arguments):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(root), *who, *arguments], check=True, capture_output=True)

    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    (root / "pretrain" / "gone.py").unlink()
    (root / "pretrain" / "new.py").write_text("untracked\n")
    return root


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_it_holds_what_git_tracks_or_would_and_is_read_only(repository, tmp_path):
    copy = take(repository, tmp_path / "code")
    assert names(copy.folder) == [".gitignore", "pretrain/launch.py", "pretrain/new.py", "slurm/env.sh"]
    assert copy.files == 4
    assert copy.commit.endswith("+")
    assert copy.size == len("print(1)\n") + len("true\n") + len("runs/\n") + len("untracked\n")
    modes = {path.name: path.stat().st_mode & 0o777 for path in copy.folder.rglob("*") if path.is_file()}
    assert modes == {".gitignore": 0o444, "launch.py": 0o444, "new.py": 0o444, "env.sh": 0o555}


def test_what_was_copied_stays_and_an_edit_makes_another(repository, tmp_path):
    first = take(repository, tmp_path / "code").folder
    inode = (first / "pretrain" / "launch.py").stat().st_ino
    again = take(repository, tmp_path / "code").folder
    assert (again, (again / "pretrain" / "launch.py").stat().st_ino) == (first, inode)

    (repository / "pretrain" / "launch.py").write_text("print(2)\n")
    other = take(repository, tmp_path / "code").folder
    assert other != first
    assert (first / "pretrain" / "launch.py").read_text() == "print(1)\n"
    assert (other / "pretrain" / "launch.py").read_text() == "print(2)\n"
    assert sorted(path.name for path in (tmp_path / "code").iterdir()) == sorted([first.name, other.name])

    (repository / "slurm" / "env.sh").chmod(0o644)
    assert take(repository, tmp_path / "code").folder not in (first, other)


def test_without_git_it_holds_the_packages(repository, tmp_path, monkeypatch):
    (repository / "pretrain" / "__pycache__").mkdir()
    (repository / "pretrain" / "__pycache__" / "launch.pyc").write_text("")
    monkeypatch.setenv("PATH", "")
    copy = take(repository, tmp_path / "code")
    assert names(copy.folder) == ["pretrain/launch.py", "pretrain/new.py", "slurm/env.sh"]
    assert copy.commit == ""


def test_a_file_from_elsewhere_is_part_of_it(repository, tmp_path):
    (tmp_path / "mine.py").write_text("one")
    first = take(repository, tmp_path / "code", {"given/mine.py": tmp_path / "mine.py"}).folder
    (tmp_path / "mine.py").write_text("two")
    second = take(repository, tmp_path / "code", {"given/mine.py": tmp_path / "mine.py"}).folder
    assert [(folder / "given" / "mine.py").read_text() for folder in (first, second)] == ["one", "two"]


def test_data_in_the_repository_are_refused_by_name(repository, tmp_path):
    with (repository / "data.tar").open("wb") as file:
        file.truncate(300 << 20)
    with pytest.raises(UserError, match=r"holds 315 MB, 315 of them in data.tar: name .* in .gitignore"):
        take(repository, tmp_path / "code")
    assert not (tmp_path / "code").exists()


def test_where_it_cannot_be_written(repository, tmp_path):
    (tmp_path / "code").write_text("a file")
    with pytest.raises(UserError, match=r"cannot be copied to .*code \(Not a directory\)"):
        take(repository, tmp_path / "code")
