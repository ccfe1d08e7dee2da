"""What tests of several parts share."""

import os

import pytest


@pytest.fixture
def logged_out(tmp_path, monkeypatch):
    """No key, no settings and no login of W&B are to be found."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / "netrc"))
    (tmp_path / "home").mkdir()
