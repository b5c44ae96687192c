"""Uncertainty: bootstrap estimates of means and of paired differences, over items or over seeds and items."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from ws.errors import WsError

N_BOOTSTRAP = 2000
_CHUNK = 2**22


@dataclass(frozen=True)
class Estimate:
    """A mean with its uncertainty.

    Attributes:
        mean: the sample mean.
        std: the standard deviation over items (not the standard error).
        ci_lo, ci_hi: the percentile-bootstrap interval, 95 % unless told otherwise.
        n: the number of items.
    """

    mean: float
    std: float
    ci_lo: float
    ci_hi: float
    n: int

    @property
    def excludes_zero(self) -> bool:
        """True when the interval lies on one side of zero."""
        return self.ci_lo > 0 or self.ci_hi < 0


def bootstrap_means(values: Float[np.ndarray, "n"], n_boot: int, seed: int) -> Float[np.ndarray, "n_boot"]:
    """Means of `n_boot` resamples with replacement; memory stays bounded for any size."""
    rng = np.random.default_rng(seed)
    n, step = len(values), max(1, _CHUNK // len(values))
    parts = [
        values[rng.integers(0, n, size=(min(step, n_boot - start), n))].mean(axis=1) for start in range(0, n_boot, step)
    ]
    return np.concatenate(parts)


def estimate_mean(values: np.ndarray, n_boot: int = N_BOOTSTRAP, seed: int = 0, level: float = 0.95) -> Estimate:
    """The mean of independent items with a percentile-bootstrap interval (Efron 1979).

    For a paired comparison pass the per-item differences: items are resampled together.
    """
    values = _checked(values, 1)
    return _summary(values, bootstrap_means(values, n_boot, seed), level, len(values))


def estimate_over_seeds(
    values: Float[np.ndarray, "seeds items"], n_boot: int = N_BOOTSTRAP, seed: int = 0, level: float = 0.95
) -> Estimate:
    """The mean over seeds and items, from a hierarchical bootstrap: seeds are drawn first, then items, shared by seeds.

    Items are the same for every seed (crossed, not nested), so one draw of items serves all drawn seeds. With one seed
    the interval knows nothing about seeds and equals `estimate_mean`'s.
    """
    values = _checked(values, 2)
    rng = np.random.default_rng(seed)
    n_seeds, n_items = values.shape
    draws = np.empty(n_boot)
    for i in range(n_boot):
        rows, columns = rng.integers(0, n_seeds, n_seeds), rng.integers(0, n_items, n_items)
        draws[i] = values[np.ix_(rows, columns)].mean()
    return _summary(values.mean(axis=0), draws, level, n_items)


def _summary(items: np.ndarray, draws: np.ndarray, level: float, n: int) -> Estimate:
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    std = float(items.std(ddof=1)) if len(items) > 1 else 0.0
    return Estimate(float(items.mean()), std, float(low), float(high), n)


def _checked(values: np.ndarray, ndim: int) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != ndim or values.size == 0:
        raise WsError(f"An estimate needs a non-empty array of {ndim} dimensions, not one of shape {values.shape}.")
    if not np.isfinite(values).all():
        raise WsError("An estimate was asked of values that hold NaN or infinity.")
    return values
