from statistics import fmean, pstdev

from datasets.draws import draws


def test_draws_never_change():
    """Golden values: a resumed run must see the same views with another release."""
    assert draws("crop", 0, 1, 2)[:3] == (0.5863264363952592, 0.774373007234195, 0.7921761025284076)


def test_keys_do_not_run_into_each_other():
    keys = [(1, 23), (12, 3), (123,), ("1", 23), ("a", 1), ("a1",)]
    assert len({draws(*key) for key in keys}) == len(keys)


def test_draws_are_uniform():
    values = [value for i in range(5000) for value in draws("x", i)]
    assert abs(fmean(values) - 0.5) < 0.005
    assert abs(pstdev(values) - 12**-0.5) < 0.003
    assert min(values) >= 0
    assert max(values) < 1
