"""Where a run stands survives being written, and is taken up only by what fits it."""

import json
from dataclasses import replace

import pytest

from datasets.errors import UserError
from datasets.mixture import Account
from pretrain.config import Stage
from pretrain.curriculum import Curriculum
from pretrain.state import Known, Standing

PAIRS, BOOKS = Known(fingerprint="f00d", size=77), Known(fingerprint="b00c", size=None)
CURRICULUM = Curriculum({"one": Stage(steps=10, batch=8), "two": Stage(steps=10, batch=16)})
BEFORE = Standing(
    data={"pairs": PAIRS, "books": BOOKS},
    tokenizer="a" * 32,
    step=12,
    samples=10 * 8 + 2 * 16,
    behind={"one": 10},
    accounts={"pairs": Account(100, -5), "books": Account(12, 5)},
    masked={"truncated": 3},
)
HERE = Standing(data=BEFORE.data, tokenizer=BEFORE.tokenizer)


def test_what_is_written_is_read_again():
    plain = json.loads(json.dumps(BEFORE.plain()))
    assert Standing.of(plain) == BEFORE
    assert plain["accounts"]["books"] == {"position": 12, "credit": 5}


def test_a_checkpoint_is_taken_up_as_it_stands():
    assert HERE.resumed(BEFORE, CURRICULUM) == BEFORE


@pytest.mark.parametrize(
    "saved",
    [
        {"data": "f00d", "tokenizer": "aa", "step": 3, "position": 24, "masked": 0},  # of the first release
        {**BEFORE.plain(), "position": 24},
        {key: value for key, value in BEFORE.plain().items() if key != "accounts"},
        {**BEFORE.plain(), "accounts": {"pairs": 100}},
        {**BEFORE.plain(), "data": {"pairs": {"digest": "f00d"}}},
    ],
)
def test_what_another_release_wrote_is_refused_in_one_sentence(saved):
    with pytest.raises(UserError, match=r"written by another release.* or choose another --out") as raised:
        Standing.of(json.loads(json.dumps(saved)))
    assert "\n" not in str(raised.value)


def test_another_tokenizer_is_refused_whatever_is_allowed():
    with pytest.raises(UserError, match=r"the tokenizer has changed .* \(a{12} then, b{12} now\)"):
        replace(HERE, tokenizer="b" * 32).resumed(BEFORE, CURRICULUM, allowed=True)


def test_other_stages_are_refused_and_may_be_allowed_once():
    """What was used and what these stages would have used by then differ from then on by the same."""
    others = Curriculum({"one": Stage(steps=10, batch=4), "two": Stage(steps=10, batch=32)})
    with pytest.raises(UserError, match="step 12 has used 112 samples, which does not fit these stages"):
        HERE.resumed(BEFORE, others)
    allowed = HERE.resumed(BEFORE, others, allowed=True)
    assert (allowed.step, allowed.samples, allowed.shift) == (12, 112, 112 - (40 + 64))
    # What is owed is counted in parts of the lanes, which may be others too.
    assert {name: account.position for name, account in allowed.accounts.items()} == {
        name: account.position for name, account in BEFORE.accounts.items()
    }
    assert not any(account.credit for account in allowed.accounts.values())
    later = replace(allowed, step=15, samples=allowed.samples + 3 * 32)
    assert HERE.resumed(later, others) == later
    with pytest.raises(UserError, match="does not fit"):
        HERE.resumed(later, CURRICULUM)


def test_a_stage_that_is_behind_keeps_its_steps_and_the_last_one_may_get_more():
    even = {"one": Stage(steps=10, batch=8), "two": Stage(steps=10, batch=8)}
    before = replace(BEFORE, step=12, samples=96)
    moved = {"one": Stage(steps=11, batch=8), "two": Stage(steps=9, batch=8)}
    assert HERE.resumed(before, Curriculum(even)) == before
    with pytest.raises(UserError, match=r"through one \(10 steps\), and these stages say one \(11 steps\)"):
        HERE.resumed(before, Curriculum(moved))
    with pytest.raises(UserError, match=r"these stages say first \(10 steps\)"):
        HERE.resumed(before, Curriculum({"first": even["one"], "two": even["two"]}))
    done = replace(BEFORE, step=10, samples=80, behind={})
    assert HERE.resumed(done, Curriculum({"one": Stage(steps=20, batch=8)})).step == 10


def test_a_step_beyond_the_last_is_refused_whatever_is_allowed():
    short = Curriculum({"one": Stage(steps=11, batch=8)})
    with pytest.raises(UserError, match="does not fit these stages"):
        HERE.resumed(BEFORE, short, allowed=True)


def test_changed_data_keep_their_place_and_new_ones_begin():
    """Where sources come or go, nothing is owed any more: what is owed adds up to nothing among all."""
    here = replace(HERE, data={"pairs": replace(PAIRS, fingerprint="5ea1"), "books": BOOKS}, order=99)
    found = here.resumed(BEFORE, CURRICULUM)
    assert found == replace(BEFORE, data=here.data, order=99)
    here = replace(HERE, data={"pairs": PAIRS, "photos": BOOKS})
    found = here.resumed(BEFORE, CURRICULUM, allowed=True)
    assert found.accounts == {"pairs": Account(100), "photos": Account()}
    assert (found.step, found.samples, found.masked) == (12, 112, {"truncated": 3})
