from pathlib import Path

import pytest

from datasets.classes import load_classes
from datasets.errors import UserError
from datasets.homes import at_home


def test_homes_are_written_out(monkeypatch):
    monkeypatch.setenv("HOME", "/me")
    assert at_home("~/x") == Path("/me/x")
    assert at_home("a/~b") == Path("a/~b")


@pytest.mark.parametrize("opened", [at_home, load_classes])
def test_a_home_that_is_not_known_is_said(opened):
    with pytest.raises(UserError, match=r"^~nobody-here/x begins with a home folder that is not known"):
        opened("~nobody-here/x")
