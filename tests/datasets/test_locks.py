import errno
import os

from datasets.locks import lock, still_names


def test_one_holds_it_until_it_is_closed(tmp_path):
    with (tmp_path / "x").open("w") as one, (tmp_path / "x").open("w") as other:
        assert lock(one.fileno()) is True
        assert lock(other.fileno()) is False
        one.close()
        assert lock(other.fileno(), wait=True) is True


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    def missing(descriptor, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("datasets.locks.flock", missing)
    with (tmp_path / "x").open("w") as file:
        assert lock(file.fileno()) is None
        assert lock(file.fileno(), wait=True) is None


def test_a_path_names_a_file_until_it_is_replaced(tmp_path):
    path = tmp_path / "x"
    with path.open("w") as file:
        assert still_names(path, file.fileno())
        path.unlink()
        assert not still_names(path, file.fileno())
        path.touch()
        assert not still_names(path, file.fileno())
