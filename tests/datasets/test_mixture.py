from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from datasets.mixture import Account, allot
from datasets.weights import weight_at

UNIT = 1 << 32
"""Credit of a quantum."""

POSITIVE = st.sampled_from([1e-300, 1e-12, 1e-3, 1.0, 3.0, 1e9]) | st.floats(1e-6, 1e6)
POINTS = st.dictionaries(st.integers(0, 40), st.just(0.0) | POSITIVE, min_size=1, max_size=5)
SCHEDULES = st.just(0.0) | POSITIVE | POINTS.map(lambda points: tuple(sorted(points.items())))


@st.composite
def mixtures(draw):
    """Schedules of some sources, of which one at least is never at zero; the batch; the quantum."""
    schedules = {"always": draw(POSITIVE)}
    for place in range(draw(st.integers(0, 6))):
        schedules[f"source {place}"] = draw(SCHEDULES)
    names = draw(st.permutations(list(schedules)))
    quantum = draw(st.integers(1, 16))
    return {name: schedules[name] for name in names}, quantum * draw(st.integers(1, 40)), quantum


def weights_at(schedules, step):
    return {name: weight_at(schedule, step) for name, schedule in schedules.items()}


def run(mixture, first, last, accounts=None):
    """The accounts before each step of [first, last) and after the last one."""
    schedules, batch, quantum = mixture
    standing = [accounts or dict.fromkeys(schedules, Account())]
    for step in range(first, last):
        standing.append(allot(standing[-1], weights_at(schedules, step), batch=batch, quantum=quantum))
    return standing


def exact_share(mixture, name, step):
    """What a source is due in a step, in samples."""
    schedules, batch, _ = mixture
    weights = weights_at(schedules, step)
    return Fraction(weights[name]) / sum(map(Fraction, weights.values())) * batch


@settings(deadline=None)
@given(mixture=mixtures())
def test_a_step_gives_whole_quanta_and_the_whole_batch(mixture):
    schedules, batch, quantum = mixture
    for step, (before, after) in enumerate(pairwise(run(mixture, 0, 50))):
        got = {name: after[name].position - before[name].position for name in schedules}
        assert sum(got.values()) == batch
        if len(schedules) > 1:
            assert all(count >= 0 and count % quantum == 0 for count in got.values())
        for name, weight in weights_at(schedules, step).items():
            assert weight > 0 or not got[name]


@settings(deadline=None)
@given(mixture=mixtures())
def test_credits_add_up_to_nothing_and_stay_small(mixture):
    """No credit of n sources leaves (n - 1) / 2 quanta, whatever the weights.

    Proof: the k largest credits add up to F(k) = k (n - k) / 2 at most; k = 1 and k = n - 1 give the bounds.
    It holds at the start. After a step, let S be the sources with the k largest, m of them in use and K the
    others, and R the r sources outside S that were given a quantum. If r = 0, S was given all, so its sum has
    not risen. Else every credit in use is 1 at the most above each in R, since R's were the largest when they
    were given; S and R together were given all, so their sum is at most F(k + r); that of K is unchanged, at
    most F(k - m). Hence the sum of S is at most (r F(k - m) + m F(k + r) + m r) / (m + r), which is
    F(k) - m r / 2 + m r / (m + r), and no more than F(k) as m + r >= 2 (if m = 0 nothing in S changed).
    """
    most = (len(mixture[0]) - 1) * UNIT // 2
    for accounts in run(mixture, 0, 50):
        owed = sorted(account.credit for account in accounts.values())
        assert sum(owed) == 0
        assert -most <= owed[0] <= owed[-1] <= most


@settings(deadline=None)
@given(mixture=mixtures(), data=st.data())
def test_shares_are_exact_over_any_window_of_steps(mixture, data):
    schedules, _, quantum = mixture
    standing = run(mixture, 0, 60)
    first = data.draw(st.integers(0, 59))
    last = data.draw(st.integers(first + 1, 60))
    for name in schedules:
        got = standing[last][name].position - standing[first][name].position
        due = sum(exact_share(mixture, name, step) for step in range(first, last))
        rounding = Fraction(last - first, UNIT)
        assert abs(got - due) <= (len(schedules) - 1 + rounding) * quantum


@settings(deadline=None)
@given(mixture=mixtures(), step=st.integers(0, 40))
def test_going_on_from_any_accounts_is_the_straight_run(mixture, step):
    standing = run(mixture, 0, 40)
    assert run(mixture, step, 40, standing[step]) == standing[step:]


@settings(deadline=None)
@given(mixture=mixtures())
def test_quanta_go_one_by_one_to_the_largest_credit(mixture):
    """The definition, without its shortcut for the many quanta that need no comparison."""
    schedules, _, quantum = mixture
    for step, (before, after) in enumerate(pairwise(run(mixture, 0, 12))):
        weights = weights_at(schedules, step)
        got = {name: (after[name].position - before[name].position) // quantum for name in schedules}
        owed = {name: after[name].credit + got[name] * UNIT for name in schedules}
        for _ in range(sum(got.values()) if len(schedules) > 1 else 0):
            first = max((name for name in schedules if weights[name]), key=owed.__getitem__)
            owed[first] -= UNIT
            got[first] -= 1
        assert len(schedules) == 1 or set(got.values()) == {0}


def test_the_worst_credit_is_reached():
    """The bound is no guess: pairs of sources that take turns come as near to it as one likes."""
    names = ["a", "b", "c"]
    accounts = dict.fromkeys(names, Account())
    for turn in range(200):
        on = names[:2] if turn % 2 else names[1:]
        for _ in range(2):
            # As much as leaves the greater of the two just behind: it is owed half a quantum more.
            gap = (accounts[on[0]].credit - accounts[on[1]].credit) / UNIT
            share = min(1.0, max(0.0, (1 - gap) / 2 - 1e-9))
            weights = dict.fromkeys(names, 0.0) | {on[0]: share, on[1]: 1 - share}
            accounts = allot(accounts, weights, batch=8, quantum=8)
    assert 0.99 * UNIT < max(account.credit for account in accounts.values()) <= UNIT


def test_a_small_share_appears_every_few_steps():
    mixture = {"large": 15.0, "small": 1.0}, 32, 8  # a quarter of a quantum a step
    standing = run(mixture, 0, 40)
    got = [after["small"].position - before["small"].position for before, after in pairwise(standing)]
    assert set(got) == {0, 8}
    assert all(sum(got[step : step + 4]) == 8 for step in range(37))


def test_a_share_of_nothing_is_never_read():
    mixture = {"all": 1.0, "none": 0.0}, 64, 8
    assert run(mixture, 0, 9)[-1] == {"all": Account(9 * 64), "none": Account()}


def test_the_only_source_gets_a_batch_that_no_quantum_divides():
    assert run(({"all": 0.3}, 10, 8), 0, 3)[-1] == {"all": Account(30)}


def test_weights_change_over_steps():
    """One source fades into another: over all steps each has half, and the second only towards the end."""
    mixture = {"first": ((0, 1.0), (100, 0.0)), "second": ((0, 0.0), (100, 1.0))}, 64, 8
    standing = run(mixture, 0, 101)
    total = 101 * 64
    assert abs(standing[-1]["first"].position - total / 2) <= 8
    assert standing[50]["first"].position > 0.7 * 50 * 64
    assert standing[1]["second"].position == 0


def test_many_steps_do_not_drift():
    """Rounding leaves a step off by 2**-32 quanta at the most."""
    weights = {"a": 1 / 3, "b": 1e-7, "c": 2 / 3}
    accounts = dict.fromkeys(weights, Account(10**9))
    steps = 20_000
    for _ in range(steps):
        accounts = allot(accounts, weights, batch=1024, quantum=8)
    total = sum(weights.values())
    for name, weight in weights.items():
        assert accounts[name].position - 10**9 == pytest.approx(steps * 1024 * weight / total, abs=8 * 1.01)


@given(batch=st.integers(1, 100), quantum=st.integers(2, 100))
@example(batch=12, quantum=8)
def test_a_batch_of_part_quanta_is_refused(batch, quantum):
    if batch % quantum:
        with pytest.raises(AssertionError):
            allot({"a": Account(), "b": Account()}, {"a": 1.0, "b": 1.0}, batch=batch, quantum=quantum)
