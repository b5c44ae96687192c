"""Uncertainty: bootstrap estimates of means and paired differences, over items or over seeds and items; Holm; SI.

Every resample is a vector of counts, so any number of quantities is resampled together by one matrix product: what is
measured on the same items stays paired. Tables rest on a dozen claims and on a few seeds as well as on hundreds of
items, and one path serves them all: what is resampled is moved apart first (`widened`), and p-values are those of t
tests (`p_value`), so that a call cannot forget how little there is to go by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from scipy.optimize import brentq
from scipy.special import ndtri, stdtr, stdtrit

from ws.errors import WsError

N_BOOTSTRAP = 2000
LEAST_ANSWERS = 50
LOW_MASS = 0.9  # a smaller mean probability of all the answers that are counted supports no conclusion
_CHUNK = 2**21


@dataclass(frozen=True)
class Estimate:
    """A number with its uncertainty.

    Attributes:
        mean: the sample mean (or another statistic of the whole sample, such as SI).
        std: the standard deviation over items, not the standard error; for a statistic that is no mean of items, its
            standard error.
        ci_lo, ci_hi: the percentile-bootstrap interval of values that were moved apart, 95 % unless told otherwise; of
            a single item it is the item, which says nothing of its uncertainty.
        n: the number of items.
        p: two-sided p-value of the mean being zero; see `p_value`. Of a single item it is 1.
    """

    mean: float
    std: float
    ci_lo: float
    ci_hi: float
    n: int
    p: float

    @property
    def excludes_zero(self) -> bool:
        """True when the interval lies on one side of zero; never with a single item."""
        return self.n > 1 and (self.ci_lo > 0 or self.ci_hi < 0)

    def columns(self, name: str, *parts: str) -> dict[str, float]:
        """`{name, name_<part>, ...}` for a table, such as `shift`, `shift_ci_lo`, `shift_ci_hi`."""
        return {name: self.mean} | {f"{name}_{part}": getattr(self, part) for part in parts}

    def __format__(self, spec: str) -> str:
        """`-1.10 [-1.24, -0.97]`, every number as `spec` says, by default `+.2f`."""
        return _with_interval(self.mean, (self.ci_lo, self.ci_hi), spec or "+.2f")


def columns_of(estimate: Estimate | None, name: str, *parts: str) -> dict[str, float | None]:
    """`Estimate.columns`, with empty cells where there is no estimate."""
    if estimate is None:
        return dict.fromkeys((name, *(f"{name}_{part}" for part in parts)))
    return {**estimate.columns(name, *parts)}


def estimate_text(
    row: Mapping[str, Any], name: str, spec: str = "+.2f", scale: float | int = 1, ends: str | None = None
) -> str:
    """A number of a table with its interval, as an `Estimate` is printed, times `scale`.

    Where the interval is empty the number stands alone, and where it is empty, too, there is nothing to say.

    Args:
        ends: what the names of the interval's columns, `<ends>ci_lo` and `<ends>ci_hi`, begin with: `<name>_` unless
            given, and nothing for the number that a table is about.
    """
    if row[name] in (None, ""):
        return ""
    prefix = f"{name}_" if ends is None else ends
    cells = [row[f"{prefix}{end}"] for end in ("ci_lo", "ci_hi")]
    known = [scale * float(cell) for cell in cells if cell not in (None, "")]
    return _with_interval(scale * float(row[name]), known, spec)


def _with_interval(value: float, ends: Sequence[float], spec: str) -> str:
    text = ", ".join(f"{end:{spec}}" for end in ends)
    return f"{value:{spec}} [{text}]" if text else f"{value:{spec}}"


def resampled_means(
    values: Float[np.ndarray, "quantities seeds items"], n_boot: int, seed: int, items: int | None = None
) -> Float[np.ndarray, "quantities n_boot"]:
    """Means of every quantity over `n_boot` resamples of seeds and items, as they are; memory stays bounded.

    Seeds are drawn first and then items. Items are crossed with seeds, not nested in them (every seed is asked the same
    items), so one draw of items serves all drawn seeds. With one seed this is the ordinary bootstrap.

    Args:
        items: the number of a set of items; calls with one `seed` and other sets draw the same seeds and, independently
            of each other, items. Without it items are drawn on with the generator of `seed`.
    """
    rng = np.random.default_rng(seed)
    quantities, n_seeds, n = values.shape
    weights = np.ones((n_boot, 1))
    if n_seeds > 1:
        weights = _counts(rng, n_boot, n_seeds)
    if items is not None:
        rng = np.random.default_rng([seed, items])
    flat, step = values.reshape(-1, n).T, max(1, _CHUNK // n)
    parts = []
    for start in range(0, n_boot, step):
        chunk = weights[start : start + step]
        sums = (_counts(rng, len(chunk), n) @ flat).reshape(len(chunk), quantities, n_seeds)
        parts.append(np.einsum("bqs,bs->qb", sums, chunk) / (n * n_seeds))
    return np.concatenate(parts, axis=1)


def widened(
    values: Float[np.ndarray, "*quantities seeds items"], level: float = 0.95
) -> Float[np.ndarray, "*quantities seeds items"]:
    """The values with their seeds and their items moved apart, so that a bootstrap covers as often as it says.

    Drawing from k things gives a variance with k in place of k - 1 and no t distribution: of intervals over 3 seeds
    that differ much 73 % hold the truth, over 12 items 89 %. So the mean of each seed, and that of each item, is moved
    to `sqrt(k / (k - 1)) t / z` times its distance from the mean of all, with the `(1 + level) / 2` quantiles of
    Student's t (k - 1 degrees of freedom) and of the normal distribution: the expansion of Hesterberg 2015 (arXiv
    1411.5279), as a move of the values. The half width of an interval then is about `sqrt(t_seeds^2 V_seeds + t_items^2
    V_items)`, whose coverage is at least the level however the two variances compare (Banerjee 1960, Sankhya 22, 357).
    Where two seeds differ far more than items do it is narrower: a bootstrap of two values ends at the larger one, and
    93 % of 95 % intervals hold the truth (`2 atan(9.17) / pi`), while `p_value` stays that of the t test. Means over
    everything stay; a single seed or item stays where it is.
    """
    overall, moved = values.mean(axis=(-2, -1), keepdims=True), values
    for axis in (-2, -1):
        k = values.shape[axis]
        if k > 1:
            factor = np.sqrt(k / (k - 1)) * stdtrit(k - 1, (1 + level) / 2) / ndtri((1 + level) / 2)
            means = values.mean(axis=-3 - axis, keepdims=True)  # over the other of the two axes
            moved = moved + (factor - 1) * (means - overall)
    return moved


def p_value(mean: float, variances: Sequence[tuple[float, int]]) -> float:
    """Two-sided p-value of a mean being zero, from independent parts `(V_i, df_i)` of its variance.

    It is the `p` at which the interval of `widened` would touch zero: `mean^2 = sum_i t_i^2 V_i` with `t_i` the
    `1 - p / 2` quantile of Student's t with `df_i` degrees of freedom. With one part that is Student's t test. Where
    nothing varies beyond rounding there is no t, and the mean is zero (p = 1) or is not (p = 0).
    """
    tiny, total = 1e-12 * max(1.0, abs(mean)), sum(v for v, _ in variances)
    if np.sqrt(total) <= tiny:
        return float(abs(mean) <= tiny)
    parts = [(v, df) for v, df in variances if v > 0]
    t, freedom = abs(mean) / np.sqrt(total), [df for _, df in parts]
    least, most = (2 * float(stdtr(df, -t)) for df in (max(freedom), min(freedom)))
    if len(parts) == 1 or least == 0 or most - least <= 1e-9 * most:
        return most

    def excess(log_p: float) -> float:
        return sum(v * float(stdtrit(df, np.exp(log_p) / 2)) ** 2 for v, df in parts) - mean**2

    low, high = np.log(least), np.log(most)
    if excess(low) <= 0 or excess(high) >= 0:  # the ends are the answer but for rounding
        return most
    return float(np.exp(brentq(excess, low, high)))


def _counts(rng: np.random.Generator, rows: int, n: int) -> Float[np.ndarray, "rows n"]:
    """How often each of `n` things is drawn in each of `rows` resamples of size `n`."""
    drawn = rng.integers(0, n, size=(rows, n)) + n * np.arange(rows)[:, None]
    return np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)


def estimate_mean(values: np.ndarray, n_boot: int = N_BOOTSTRAP, seed: int = 0, level: float = 0.95) -> Estimate:
    """The mean of independent items, few or many, with a bootstrap interval and the p-value of Student's t test.

    For a paired comparison pass the per-item differences: items are resampled together.
    """
    return estimate_over_seeds(_checked(values, 1)[None], n_boot, seed, level)


def estimate_over_seeds(
    values: Float[np.ndarray, "seeds items"], n_boot: int = N_BOOTSTRAP, seed: int = 0, level: float = 0.95
) -> Estimate:
    """The mean over seeds and items, from a hierarchical bootstrap; see `widened`, `resampled_means` and `p_value`.

    With one seed the interval knows nothing about seeds and is `estimate_mean`'s.
    """
    values = _checked(values, 2)
    mean, items, n = float(values.mean()), values.mean(axis=0), values.shape[1]
    low, high = _interval(resampled_means(widened(values, level)[None], n_boot, seed)[0], mean, level)
    p = 1.0 if n < 2 else p_value(mean, _variances(values))
    return Estimate(mean, _std(items), low, high, n, p)


def group_difference(
    a: Float[np.ndarray, "n"], b: Float[np.ndarray, "m"], n_boot: int = N_BOOTSTRAP, seed: int = 0
) -> Estimate:
    """`mean(a) - mean(b)` of two groups with no item in common, such as the shifts of two kinds of items.

    Each group is moved apart and resampled on its own; `std` is the standard error, `n` the items of both. Needs at
    least 2 items of either.
    """
    a, b = (_checked(x, 1)[None] for x in (a, b))
    if min(a.size, b.size) < 2:
        raise WsError(f"A difference of groups needs at least 2 items of either, not {a.size} and {b.size}.")
    draws = [resampled_means(widened(x)[None], n_boot, 2 * seed + i)[0] for i, x in enumerate((a, b))]
    mean, variances = float(a.mean() - b.mean()), [*_variances(a), *_variances(b)]
    low, high = _interval(draws[0] - draws[1], mean)
    error = float(np.sqrt(sum(v for v, _ in variances)))
    return Estimate(mean, error, low, high, a.size + b.size, p_value(mean, variances))


def _variances(values: Float[np.ndarray, "seeds items"]) -> list[tuple[float, int]]:
    """The variance of the mean that comes from the drawing of seeds, and of items, with their degrees of freedom."""
    by_seed, by_item = values.mean(axis=1), values.mean(axis=0)
    return [(float(x.var(ddof=1) / len(x)), len(x) - 1) for x in (by_seed, by_item) if len(x) > 1]


def _interval(draws: Float[np.ndarray, "n_boot"], mean: float, level: float = 0.95) -> tuple[float, float]:
    """The interval of the draws around a mean; of values that are all the same, rounding must not put it beside it."""
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return min(float(low), mean), max(float(high), mean)


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


# ---- ranks ----------------------------------------------------------------------------------------------------------


def area_under_roc(positive: Float[np.ndarray, "m"], negative: Float[np.ndarray, "n"], level: float = 0.95) -> Estimate:
    """How well a rating tells two groups apart: `P(x > y) + P(x = y) / 2` for `x` of the one, `y` of the other.

    The variance at an area `A` is that of Hanley & McNeil 1982 (Radiology 143:29),

        V(A) = (A (1 - A) + (m - 1) (A / (2 - A) - A^2) + (n - 1) (2 A^2 / (1 + A) - A^2)) / (m n)

    and the interval holds the areas `A` with `|A - estimate| <= z sqrt(V(A))`, as Newcombe 2006 (Statistics in Medicine
    25:559) inverts it, so that groups that do not overlap at all still have one of some width. `std` is the standard
    error, `p` that of the area 1/2 by Mann and Whitney's test.

    Raises:
        WsError: fewer than two of either group.
    """
    from scipy.stats import mannwhitneyu  # a third of a second, which all commands would pay for

    positive, negative = _checked(positive, 1), _checked(negative, 1)
    m, n = len(positive), len(negative)
    if min(m, n) < 2:
        raise WsError(f"An area under the curve needs at least 2 items of either group, not {m} and {n}.")
    tested = mannwhitneyu(positive, negative)
    area, z = float(tested.statistic) / (m * n), float(ndtri((1 + level) / 2))

    def variance(a: float) -> float:
        first, second = a / (2 - a) - a * a, 2 * a * a / (1 + a) - a * a
        return float((a * (1 - a) + (m - 1) * first + (n - 1) * second) / (m * n))

    def excess(a: float) -> float:
        return abs(a - area) - z * float(np.sqrt(max(variance(a), 0.0)))

    tiny = 1e-9  # at 0 and 1 themselves nothing varies
    inner = float(np.clip(area, tiny, 1 - tiny))
    low = 0.0 if excess(tiny) <= 0 else float(brentq(excess, tiny, inner))
    high = 1.0 if excess(1 - tiny) <= 0 else float(brentq(excess, inner, 1 - tiny))
    return Estimate(area, float(np.sqrt(max(variance(area), 0.0))), low, high, m + n, float(tested.pvalue))


def rank_correlation(a: Float[np.ndarray, "n"], b: Float[np.ndarray, "n"], level: float = 0.95) -> Estimate | None:
    """Spearman's rank correlation of two ratings of the same items; None where one of them does not vary.

    The interval is `tanh(atanh(r) +- z sqrt((1 + r^2 / 2) / (n - 3)))` (Bonett & Wright 2000, Psychometrika 65:23),
    `std` the standard error of `atanh(r)`; of fewer than 4 items it is None, too.
    """
    from scipy.stats import spearmanr

    a, b = _checked(a, 1), _checked(b, 1)
    n = len(a)
    if n < 4 or min(np.ptp(a), np.ptp(b)) <= 1e-12:
        return None
    tested = spearmanr(a, b)
    r = float(np.clip(tested.statistic, -1.0, 1.0))
    error, inner = float(np.sqrt((1 + r * r / 2) / (n - 3))), float(np.clip(r, -1 + 1e-12, 1 - 1e-12))
    ends = np.tanh(np.arctanh(inner) + float(ndtri((1 + level) / 2)) * error * np.array([-1.0, 1.0]))
    return Estimate(r, error, float(min(ends[0], r)), float(max(ends[1], r)), n, float(tested.pvalue))


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
        si: the estimate; None when the base gets fewer than `LEAST_ANSWERS` right, or wrong: a share of so few answers
            has no interval that holds the truth as often as it says.
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
    """SI from signed scores and answer masses at alpha 0, +alpha and -alpha, with a bootstrap over seeds and items.

    What is resampled is the linearisation of SI (delta method), whose mean is SI, so that seeds and items are moved
    apart as in every other estimate. Four answers that nobody gave are added for the interval alone, of the wrong ones
    one that each sign mends and of the right ones one that each sign spoils (Agresti & Caffo 2000, The American
    Statistician 54): without them a share of 0 or 1 would seem to be certain.
    """
    scores, pmass = _checked(scores, 3), _checked(pmass, 3)
    base, plus, minus = is_right(scores)
    changes = [~base, base, ~base & plus, base & ~plus, ~base & minus, base & ~minus]
    values = np.concatenate([np.stack(changes).astype(np.float64), pmass])
    n, names = scores.shape[-1], ("wrong", "right", "fixed_plus", "broken_plus", "fixed_minus", "broken_minus")
    plain = {name: round(float(n * x.mean()), 6) for name, x in zip(names, values, strict=False)}
    if min(plain["wrong"], plain["right"]) < LEAST_ANSWERS:
        return SurgicalInformedness(None, None, None, **plain)
    point, forward, reverse, _ = _si(values, k)
    *_, linear = _si(np.concatenate([values, _imagined(pmass)], axis=-1), k)
    interval = estimate_over_seeds(linear, n_boot, seed)
    error = float(np.sqrt(sum(v for v, _ in _variances(linear))))
    return SurgicalInformedness(replace(interval, mean=point, std=error, n=n), forward, reverse, **plain)


def _imagined(pmass: Float[np.ndarray, "3 seeds items"]) -> Float[np.ndarray, "9 seeds 4"]:
    """Four answers in the rows of `_si`: wrong and mended by +, wrong and mended by -, right and spoilt by +, by -."""
    shares = np.array([[1, 1, 0, 0], [0, 0, 1, 1], [1, 0, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
    masses = np.broadcast_to(pmass.mean(axis=-1, keepdims=True), (*pmass.shape[:2], 4))
    return np.concatenate([np.broadcast_to(shares[:, None], (6, pmass.shape[1], 4)), masses])


def _si(
    values: Float[np.ndarray, "9 seeds items"], k: float
) -> tuple[float, float, float, Float[np.ndarray, "seeds items"]]:
    """`(SI, forward, reverse)`, and SI linearised answer by answer.

    With `r = a / b` a ratio of means, `r + (a_i - r b_i) / b` has the mean `r` and, to first order, its variance.
    """

    def ratio(a: int, b: int) -> Float[np.ndarray, "seeds items"]:
        r = values[a].mean() / values[b].mean()
        return r + (values[a] - r * values[b]) / values[b].mean()

    forward, reverse = ratio(2, 0) - k * ratio(3, 1), ratio(5, 1) - k * ratio(4, 0)
    mass = min(values[6:], key=np.mean)
    both, least = (forward + reverse) / 2, mass.mean()
    linear = 100 * (both * least**2 + both.mean() * 2 * least * (mass - least))
    return float(100 * both.mean() * least**2), float(forward.mean()), float(reverse.mean()), linear


def is_right(scores: Float[np.ndarray, "*shape"]) -> Bool[np.ndarray, "*shape"]:
    """Whether a signed score chooses the side that its label stands for; a tie does not."""
    return scores > 0
