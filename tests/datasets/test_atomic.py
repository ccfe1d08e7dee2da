import os

import pytest

from datasets.atomic import replace


def test_the_new_content_or_the_old_never_less(tmp_path, monkeypatch):
    path = tmp_path / "file"
    replace(path, b"old")
    assert path.read_bytes() == b"old"

    def dies(descriptor):
        raise OSError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", dies)
        with pytest.raises(OSError, match="power cut"):
            replace(path, b"new")
    assert path.read_bytes() == b"old"
    replace(path, b"newer")
    assert path.read_bytes() == b"newer"
    assert list(tmp_path.iterdir()) == [path]
