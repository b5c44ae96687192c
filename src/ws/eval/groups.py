"""Small groups of items: intervals and p-values that hold for a dozen items, and differences between two groups.

The percentile bootstrap of `ws.eval.stats` is too narrow when items are few: it divides by n where the variance needs
n - 1, and it knows no t distribution. Here its interval is expanded, and p-values are those of t tests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import stats

from ws.errors import WsError
from ws.eval.stats import N_BOOTSTRAP, Estimate, estimate_mean, resampled_means


def expanded_level(n: int, level: float = 0.95) -> float:
    """The level at which a percentile bootstrap over `n` items covers about as much as a t interval of `level`.

    `1 - 2 Phi(-sqrt(n / (n - 1)) t)` with `t` the `(1 + level) / 2` quantile of Student's t with n - 1 degrees of
    freedom: the expanded percentile interval (Hesterberg 2015, arXiv 1411.5279).
    """
    if n < 2:
        raise WsError(f"An interval needs at least 2 items, not {n}.")
    quantile = np.sqrt(n / (n - 1)) * stats.t.ppf((1 + level) / 2, n - 1)
    return float(1 - 2 * stats.norm.sf(quantile))


def group_mean(values: Float[np.ndarray, "n"], n_boot: int = N_BOOTSTRAP, seed: int = 0) -> Estimate:
    """The mean of a group: a 95 % expanded bootstrap interval, and `p` of Student's t test of the mean being zero.

    For a paired comparison pass the per-item differences. Needs at least 2 items.
    """
    found = estimate_mean(values, n_boot, seed, expanded_level(len(values)))
    return replace(found, p=_p(found.mean, float(np.ptp(values)), lambda: stats.ttest_1samp(values, 0.0).pvalue))


def group_difference(
    a: Float[np.ndarray, "n"], b: Float[np.ndarray, "m"], n_boot: int = N_BOOTSTRAP, seed: int = 0
) -> Estimate:
    """`mean(a) - mean(b)` of two groups with no item in common, such as the shifts of two kinds of items.

    Each group is resampled on its own, expanded for the smaller one; `p` is that of Welch's t test, `std` the bootstrap
    standard error, `n` the items of both.
    """
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise WsError("A difference was asked of values that hold NaN or infinity.")
    level = expanded_level(min(len(a), len(b)))
    draws = _draws(a, n_boot, 2 * seed) - _draws(b, n_boot, 2 * seed + 1)
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    mean = float(np.mean(a) - np.mean(b))
    p = _p(mean, float(max(np.ptp(a), np.ptp(b))), lambda: stats.ttest_ind(a, b, equal_var=False).pvalue)
    return Estimate(mean, float(draws.std(ddof=1)), float(low), float(high), len(a) + len(b), p)


def _draws(values: np.ndarray, n_boot: int, seed: int) -> np.ndarray:
    return resampled_means(np.asarray(values, dtype=np.float64)[None, None], n_boot, seed)[0]


def _p(mean: float, spread: float, test: Callable[[], Any]) -> float:
    """The p-value of a t test; where nothing varies beyond rounding there is no t, and the mean is zero or is not."""
    tiny = 1e-12 * max(1.0, abs(mean))
    return float(test()) if spread > tiny else float(abs(mean) <= tiny)
