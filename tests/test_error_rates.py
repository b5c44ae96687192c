"""Intervals and p-values, simulated: how often they hold the truth, and how often they call what is not there."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom, kstest, ttest_1samp

from ws.stats import (
    estimate_mean,
    estimate_over_seeds,
    holm,
    surgical_informedness,
)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(5)
    draws = [estimate_mean(rng.normal(size=60), n_boot=300, seed=i) for i in range(300)]
    covered = sum(e.ci_lo <= 0 <= e.ci_hi for e in draws)
    assert 0.90 <= covered / 300 <= 0.985


def noise(rng, kind: str, n: int) -> np.ndarray:
    """`n` items with mean 0 and standard deviation 1: normal, or as skewed as an exponential distribution."""
    return rng.normal(size=n) if kind == "normal" else rng.exponential(size=n) - 1


def simulated(rng, n_seeds: int, n: int, spread: float, kind: str) -> np.ndarray:
    """Scores with true mean 0; seeds differ by `spread` standard errors of the mean over items."""
    seeds = rng.normal(0, spread / np.sqrt(n), (n_seeds, 1))
    return seeds + noise(rng, kind, n) + rng.normal(0, 0.3, (n_seeds, n))


def covers(n_seeds: int, n: int, spread: float, kind: str, cases: int) -> tuple[int, int]:
    """Of how many cases the interval holds the truth, and in how many p is under 0.05."""
    rng, held, called = np.random.default_rng([n_seeds, n, int(10 * spread)]), 0, 0
    for case in range(cases):
        found = estimate_over_seeds(simulated(rng, n_seeds, n, spread, kind), n_boot=200, seed=case)
        held += found.ci_lo <= 0 <= found.ci_hi
        called += found.p < 0.05
    return held, called


@pytest.mark.parametrize(
    ("n_seeds", "n", "spread"), [(1, 12, 0), (1, 113, 0), (2, 12, 0), (2, 12, 3), (3, 12, 3), (3, 40, 0), (5, 12, 10)]
)
def test_few_items_and_few_seeds_cover_as_often_as_they_say(n_seeds, n, spread):
    """A plain bootstrap over 12 items holds 89 %, one over 3 seeds that differ much 73 %."""
    held, called = covers(n_seeds, n, spread, "normal", 400)
    assert held >= binom.ppf(0.002, 400, 0.945)
    assert called <= binom.ppf(0.998, 400, 0.05)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["normal", "skewed"])
@pytest.mark.parametrize("spread", [0, 1, 3, 10])
@pytest.mark.parametrize("n", [12, 40, 113])
@pytest.mark.parametrize("n_seeds", [1, 2, 3, 5])
def test_every_number_of_seeds_and_items_covers(n_seeds, n, spread, kind):
    """Noise as skewed as an exponential one costs a dozen items a few per cent, which docs/evaluations.md says."""
    held, called = covers(n_seeds, n, spread if n_seeds > 1 else 0, kind, 1000)
    least = 0.9 if kind == "skewed" and n == 12 else 0.93
    assert held >= binom.ppf(0.001, 1000, least)
    assert called <= binom.ppf(0.999, 1000, 1 - least)


def test_p_values_agree_with_the_t_test_and_are_uniform_under_the_null():
    rng = np.random.default_rng(9)
    values = rng.normal(0.12, 1.0, size=400)
    assert estimate_mean(values, n_boot=100).p == pytest.approx(ttest_1samp(values, 0).pvalue)
    null = [estimate_mean(rng.normal(size=12), n_boot=100, seed=i).p for i in range(300)]
    assert kstest(null, "uniform").pvalue > 0.001
    assert estimate_mean(np.zeros(5)).p == 1
    assert estimate_mean(np.full(9, 2.0)).p == 0


@pytest.mark.parametrize("n", [12, 40, 113])
def test_a_table_of_twelve_null_rows_keeps_its_level(n):
    """Some row of 12 is called in 5 % of tables; p-values of a plain bootstrap call one of 12 claims' in 26 %."""
    rng, tables = np.random.default_rng(n), 300
    called = 0
    for _ in range(tables):
        rows = noise(rng, "normal", 12 * n).reshape(12, n)
        called += holm(np.array([estimate_mean(row, n_boot=50).p for row in rows])).min() < 0.05
    assert called <= binom.ppf(0.999, tables, 0.05)


@pytest.mark.parametrize(
    ("share", "seeds"), [((0.5, 0.1, 0.1, 0.5), 1), ((0.97, 0.01, 0.01, 0.97), 1), ((0.8, 0.05, 0.1, 0.6), 3)]
)
def test_si_holds_the_truth_from_fifty_wrong_answers_on(share, seeds):
    """Fixed and broken at +alpha, fixed and broken at -alpha; at 4 wrong answers plain intervals hold 33 to 69 %."""
    rng, cases, held = np.random.default_rng(22), 250, 0
    n, wrong = 240, 55
    fixed, broken, unfixed, spoilt = share
    truth = 50 * (fixed - 2 * broken + spoilt - 2 * unfixed)
    base = np.where(np.arange(n) < wrong, -1.0, 1.0)
    for case in range(cases):
        u = rng.random((2, seeds, n))
        plus = np.where(base < 0, u[0] < fixed, u[0] >= broken) * 2.0 - 1
        minus = np.where(base < 0, u[1] < unfixed, u[1] >= spoilt) * 2.0 - 1
        scores = np.stack([np.broadcast_to(base, (seeds, n)), plus, minus])
        found = surgical_informedness(scores, np.ones_like(scores), n_boot=200, seed=case).si
        assert found is not None
        held += found.ci_lo <= truth <= found.ci_hi
    assert held >= binom.ppf(0.001, cases, 0.945)
