"""Draws are those of a softmax, and a function of names alone."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from objectives.negatives import draw, text_names
from pretrain.testing import make_samples, merge


def names(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 2**62, (count,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("many", ["keys", "rows", "neighbours"])
def test_draws_have_the_probabilities_of_the_softmax(many):
    """Pearson's chi-square lies below its 99.9 % point, over keys, over names, and over names in a row."""
    logits = torch.tensor([2.0, 0.0, -1.0, 0.5, -torch.inf, 1.0, 0.0, 0.0], dtype=torch.float64)
    draws, columns = 20_000, names(8, seed=1)
    rows = torch.arange(draws) if many == "neighbours" else names(draws)
    if many == "keys":
        each = [draw(logits[None], rows[:1], columns, key=(0, step)) for step in range(draws)]
        drawn = torch.cat(each)
    else:
        drawn = draw(logits.expand(draws, -1), rows, columns, key=(0, 0))
    found = torch.bincount(drawn, minlength=8)
    expected = draws * logits.softmax(0)
    assert found[4] == 0
    real = expected > 0
    chi_square = ((found - expected)[real] ** 2 / expected[real]).sum()
    assert chi_square < 22.46  # 6 degrees of freedom


def test_two_directions_and_two_rows_draw_independently():
    """Of 10 equal candidates two draws agree once in ten times: 3 standard deviations either way."""
    logits, columns = torch.zeros(10_000, 10), names(10, seed=1)
    rows = names(10_000)
    there = draw(logits, rows, columns, key=(0, 0, "image"))
    back = draw(logits, rows, columns, key=(0, 0, "text"))
    for one, other in ((there, back), (there[1:], there[:-1])):
        assert abs(float((one == other).double().mean()) - 0.1) < 3 * (0.09 / 10_000) ** 0.5


@given(st.permutations(range(12)), st.permutations(range(9)), st.integers(0, 2**31))
def test_a_draw_depends_on_names_and_on_no_place(row_order, column_order, step):
    generator = torch.Generator().manual_seed(step)
    logits = torch.randn(12, 9, generator=generator, dtype=torch.float64)
    rows, columns = names(12, seed=step), names(9, seed=step + 1)
    drawn = columns[draw(logits, rows, columns, key=(step,))]
    p, q = torch.tensor(row_order), torch.tensor(column_order)
    moved = columns[q][draw(logits[p][:, q], rows[p], columns[q], key=(step,))]
    assert torch.equal(moved, drawn[p])


def test_many_columns_are_drawn_from_in_parts():
    """More numbers than noise is made for at once."""
    rows, columns = names(40), names(20_000, seed=1)
    logits = torch.randn(40, 20_000, generator=torch.Generator().manual_seed(0))
    whole = draw(logits, rows, columns, key=(1,))
    assert torch.equal(
        whole, torch.cat([draw(logits[r : r + 1], rows[r : r + 1], columns, key=(1,)) for r in range(40)])
    )


@pytest.mark.parametrize("columns", [0, 3])
def test_a_row_without_candidates_draws_none(columns):
    logits = torch.full((2, columns), -torch.inf)
    assert draw(logits, names(2), names(columns), key=()).tolist() == [-1, -1]
    assert draw(logits[:0], names(0), names(columns), key=()).tolist() == []


def test_noise_is_finite_and_none_of_it_is_the_same_twice():
    from objectives.negatives import _gumbel

    noise = _gumbel(torch.arange(-500_000, 500_000))
    assert noise.isfinite().all()
    assert len(noise.unique()) == len(noise)
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.005)
    assert float(noise.var()) == pytest.approx(torch.pi**2 / 6, rel=0.01)


def test_a_text_has_the_same_name_wherever_its_sample_stands():
    samples = [sample for sample in make_samples(12) if len(sample.tokens)]
    apart = torch.cat([text_names(sample) for sample in samples])
    assert torch.equal(text_names(merge(samples)), apart)
    assert len(apart.unique()) == len(apart) == 14 - 1
