"""Uncertainty: bootstrap estimates of means and paired differences, over items or over seeds and items; Holm; SI.

Every resample is a vector of counts, so any number of quantities is resampled together by one matrix product: what is
measured on the same items stays paired.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from scipy import stats as distributions

from ws.errors import WsError

N_BOOTSTRAP = 2000
MAX_UNDEFINED = 0.05
_CHUNK = 2**21


@dataclass(frozen=True)
class Estimate:
    """A number with its uncertainty.

    Attributes:
        mean: the sample mean (or another statistic of the whole sample, such as SI).
        std: the standard deviation over items, not the standard error; for a statistic that is no mean of items, its
            bootstrap standard error.
        ci_lo, ci_hi: the percentile-bootstrap interval, 95 % unless told otherwise.
        n: the number of items.
        p: two-sided p-value of the mean being zero, from the same resamples; see `least_p`.
    """

    mean: float
    std: float
    ci_lo: float
    ci_hi: float
    n: int
    p: float

    @property
    def excludes_zero(self) -> bool:
        """True when the interval lies on one side of zero."""
        return self.ci_lo > 0 or self.ci_hi < 0

    def columns(self, name: str, *parts: str) -> dict[str, float]:
        """`{name, name_<part>, ...}` for a table, such as `shift`, `shift_ci_lo`, `shift_ci_hi`."""
        return {name: self.mean} | {f"{name}_{part}": getattr(self, part) for part in parts}


def resampled_means(
    values: Float[np.ndarray, "quantities seeds items"], n_boot: int, seed: int
) -> Float[np.ndarray, "quantities n_boot"]:
    """Means of every quantity over `n_boot` resamples of seeds and items; memory stays bounded.

    Seeds are drawn first and then items. Items are crossed with seeds, not nested in them (every seed is asked the same
    items), so one draw of items serves all drawn seeds. With one seed this is the ordinary bootstrap.
    """
    rng = np.random.default_rng(seed)
    quantities, n_seeds, n = values.shape
    weights = np.ones((n_boot, 1))
    if n_seeds > 1:
        weights = _counts(rng, n_boot, n_seeds)
    flat, step = values.reshape(-1, n).T, max(1, _CHUNK // n)
    parts = []
    for start in range(0, n_boot, step):
        chunk = weights[start : start + step]
        sums = (_counts(rng, len(chunk), n) @ flat).reshape(len(chunk), quantities, n_seeds)
        parts.append(np.einsum("bqs,bs->qb", sums, chunk) / (n * n_seeds))
    return np.concatenate(parts, axis=1)


def widened_over_seeds(
    values: Float[np.ndarray, "*quantities seeds items"],
) -> Float[np.ndarray, "*quantities seeds items"]:
    """The values with their seeds moved apart, so that a bootstrap over a few seeds covers about as often as it says.

    Drawing from S seeds gives a variance with S in place of S - 1 and no t distribution: of intervals over 3 seeds that
    differ much, 76 % hold the truth. So every seed's mean is moved to `sqrt(S / (S - 1)) t / z` times its distance from
    the mean of all, with the 97.5 % quantiles of Student's t (S - 1 degrees of freedom) and of the normal distribution;
    it is the expansion of `ws.eval.groups` (Hesterberg 2015, arXiv 1411.5279) for seeds. Means over seeds stay.
    """
    n_seeds = values.shape[-2]
    if n_seeds == 1:
        return values
    factor = np.sqrt(n_seeds / (n_seeds - 1)) * distributions.t.ppf(0.975, n_seeds - 1) / distributions.norm.ppf(0.975)
    means = values.mean(axis=-1, keepdims=True)
    return values + (factor - 1) * (means - means.mean(axis=-2, keepdims=True))


def _counts(rng: np.random.Generator, rows: int, n: int) -> Float[np.ndarray, "rows n"]:
    """How often each of `n` things is drawn in each of `rows` resamples of size `n`."""
    drawn = rng.integers(0, n, size=(rows, n)) + n * np.arange(rows)[:, None]
    return np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)


def estimate_mean(values: np.ndarray, n_boot: int = N_BOOTSTRAP, seed: int = 0, level: float = 0.95) -> Estimate:
    """The mean of independent items with a percentile-bootstrap interval (Efron 1979).

    For a paired comparison pass the per-item differences: items are resampled together.
    """
    return estimate_over_seeds(_checked(values, 1)[None], n_boot, seed, level)


def estimate_over_seeds(
    values: Float[np.ndarray, "seeds items"], n_boot: int = N_BOOTSTRAP, seed: int = 0, level: float = 0.95
) -> Estimate:
    """The mean over seeds and items, from a hierarchical bootstrap; see `resampled_means` and `widened_over_seeds`.

    With one seed the interval knows nothing about seeds and is `estimate_mean`'s.
    """
    values = _checked(values, 2)
    draws = resampled_means(widened_over_seeds(values)[None], n_boot, seed)[0]
    items = values.mean(axis=0)
    return _summary(float(items.mean()), _std(items), draws, level, len(items))


def _summary(value: float, std: float, draws: np.ndarray, level: float, n: int) -> Estimate:
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    tail = min(int((draws <= 0).sum()), int((draws >= 0).sum()))
    return Estimate(value, std, float(low), float(high), n, min(1.0, (tail + 1) * least_p(len(draws))))


def least_p(n_boot: int) -> float:
    """The smallest p-value that so many resamples can give: `2 / (n_boot + 1)`."""
    return 2 / (n_boot + 1)


def _std(items: np.ndarray) -> float:
    return float(items.std(ddof=1)) if len(items) > 1 else 0.0


def _checked(values: np.ndarray, ndim: int) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != ndim or values.size == 0:
        raise WsError(f"An estimate needs a non-empty array of {ndim} dimensions, not one of shape {values.shape}.")
    if not np.isfinite(values).all():
        raise WsError("An estimate was asked of values that hold NaN or infinity.")
    return values


def holm(p_values: np.ndarray) -> np.ndarray:
    """Holm's step-down adjusted p-values (Holm 1979), in the order given: they bound the family-wise error.

    `p'_(i) = max over j <= i of min(1, (m - j + 1) p_(j))` for the `m` p-values in ascending order.
    """
    p = _checked(p_values, 1)
    order = np.argsort(p)
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)).clip(max=1.0)
    return adjusted


# ---- surgical informedness ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SurgicalInformedness:
    """How selectively steering mends wrong answers (forward) and, with the opposite sign, spoils right ones (reverse).

        forward = fixed / wrong - k broken / right           at +alpha
        reverse = broken / right - k fixed / wrong           at -alpha
        SI = 100 (forward + reverse) / 2 * min(pmass)^2

    `wrong` and `right` count the base's answers, `fixed` and `broken` those that steering changes; counts are means
    over seeds. A choice is right when its score is above zero.

    Attributes:
        si: the estimate; None when the base gets all or nothing right, or nearly so: then a share of its wrong (or
            right) answers is undefined, or too often undefined among the resamples to give an interval.
        forward, reverse: the two parts before the mass penalty, None like `si`.
        wrong, right: of the base.
        fixed_plus, broken_plus, fixed_minus, broken_minus: changed answers at +alpha and at -alpha.
    """

    si: Estimate | None
    forward: float | None
    reverse: float | None
    wrong: float
    right: float
    fixed_plus: float
    broken_plus: float
    fixed_minus: float
    broken_minus: float


def surgical_informedness(
    scores: Float[np.ndarray, "3 seeds items"],
    pmass: Float[np.ndarray, "3 seeds items"],
    k: float = 2.0,
    n_boot: int = N_BOOTSTRAP,
    seed: int = 0,
) -> SurgicalInformedness:
    """SI from signed scores and answer masses at alpha 0, +alpha and -alpha, with a bootstrap over seeds and items."""
    scores, pmass = _checked(scores, 3), _checked(pmass, 3)
    base, plus, minus = is_right(scores)
    changes = [~base, base, ~base & plus, base & ~plus, ~base & minus, base & ~minus]
    values = np.concatenate([np.stack(changes).astype(np.float64), pmass])
    n = scores.shape[-1]
    counts = values.mean(axis=(1, 2))
    with np.errstate(divide="ignore", invalid="ignore"):
        point, forward, reverse = (float(x[0]) for x in _si(counts[:, None], k))
        draws = _si(resampled_means(values, n_boot, seed), k)[0]
    defined = draws[np.isfinite(draws)]
    names = ("wrong", "right", "fixed_plus", "broken_plus", "fixed_minus", "broken_minus")
    plain = {name: round(float(n * share), 6) for name, share in zip(names, counts[:6], strict=True)}
    if not np.isfinite(point):
        return SurgicalInformedness(None, None, None, **plain)
    if len(defined) < (1 - MAX_UNDEFINED) * n_boot:
        return SurgicalInformedness(None, forward, reverse, **plain)
    estimate = _summary(point, float(defined.std(ddof=1)), defined, 0.95, n)
    return SurgicalInformedness(estimate, forward, reverse, **plain)


def _si(means: np.ndarray, k: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`(SI, forward, reverse)` from the six shares of answers and the three mean masses."""
    wrong, right, fixed_plus, broken_plus, fixed_minus, broken_minus, *masses = means
    forward = fixed_plus / wrong - k * broken_plus / right
    reverse = broken_minus / right - k * fixed_minus / wrong
    return 100 * (forward + reverse) / 2 * np.minimum.reduce(masses) ** 2, forward, reverse


def is_right(scores: Float[np.ndarray, "*shape"]) -> Bool[np.ndarray, "*shape"]:
    """Whether a signed score chooses the side that its label stands for; a tie does not."""
    return scores > 0
