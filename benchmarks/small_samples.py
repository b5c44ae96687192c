"""How often intervals, p-values and verdicts are wrong when nothing is there and items are few, by simulation.

`uv run python -m benchmarks.small_samples`: noise in place of scores, normal or as skewed as an exponential one. How
often a 95 % interval holds the truth, by items, by seeds and by how much seeds differ; in how many tables of 12 rows
that do nothing some p-value survives Holm's correction; how often the interval of SI holds the truth, by the base's
wrong answers; how often the interval of an adapter does that is picked out of six; and what the agreement verdict calls
1,000 vectors that move nothing, or all claims by 1 nat. Beside ours stands the plain percentile bootstrap.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np

from benchmarks import harness
from ws.eval.confounds import agreement_verdict
from ws.stats import Estimate, estimate_mean, estimate_over_seeds, holm, resampled_means, surgical_informedness

CASES, TABLES, ROWS, VECTORS, N_BOOT = 1000, 400, 12, 1000, 300
ADAPTERS, EFFECT = 6, -0.5
RATIOS = (0.0, 1.0, 3.0, 10.0)
NOISE: dict[str, Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]] = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "skewed": lambda rng, shape: rng.exponential(size=shape) - 1,
}


def plain(values: np.ndarray, n_boot: int, case: int) -> Estimate:
    """The percentile bootstrap of seeds and items as they are, and its two-sided p-value."""
    draws = resampled_means(values[None], n_boot, case)[0]
    low, high = np.quantile(draws, [0.025, 0.975])
    tail = min(int((draws <= 0).sum()), int((draws >= 0).sum()))
    p = min(1.0, 2 * (tail + 1) / (n_boot + 1))
    return Estimate(float(values.mean()), 0.0, float(low), float(high), values.shape[1], p)


def coverage(rng: np.random.Generator, n_seeds: int, n: int, ratio: float, noise: str) -> dict[str, float]:
    """Shares of 1,000 intervals that hold the true mean, 0, and of ours the share with p under 0.05.

    Items vary by 1, a seed and an item together by 0.3, and seeds by `ratio` standard errors of the mean over items.
    """
    counts = Counter[str]()
    for case in range(CASES):
        seeds, items = rng.normal(0, ratio / np.sqrt(n), (n_seeds, 1)), NOISE[noise](rng, (n,))
        values = seeds + items + rng.normal(0, 0.3, (n_seeds, n))
        ours = estimate_over_seeds(values, N_BOOT, case)
        counts["ours"] += not ours.excludes_zero
        counts["plain"] += not plain(values, N_BOOT, case).excludes_zero
        counts["p_under_0.05"] += ours.p < 0.05
    return {kind: count / CASES for kind, count in counts.items()}


def null_tables(rng: np.random.Generator, n: int, noise: str) -> dict[str, float]:
    """Shares of 400 tables of 12 rows that do nothing in which some p survives Holm's correction."""
    counts = Counter[str]()
    for case in range(TABLES):
        rows = NOISE[noise](rng, (ROWS, 1, n))
        counts["ours"] += holm(np.array([estimate_over_seeds(row, 50, case).p for row in rows])).min() < 0.05
        counts["plain"] += holm(np.array([plain(row, 1000, case).p for row in rows])).min() < 0.05
    return {kind: counts[kind] / TABLES for kind in ("ours", "plain")}


def informedness(rng: np.random.Generator, wrong: int) -> dict[str, float]:
    """Shares of 1,000 intervals of SI that hold the truth; the base is wrong on `wrong` of 240 answers."""
    fixed, broken, unfixed, spoilt = 0.9, 0.02, 0.05, 0.6
    truth, held = 50 * (fixed - 2 * broken + spoilt - 2 * unfixed), Counter[str]()
    base = np.where(np.arange(240) < wrong, -1.0, 1.0)
    for case in range(CASES):
        u = rng.random((2, 240))
        plus, minus = (
            np.where(base < 0, u[0] < fixed, u[0] >= broken),
            np.where(base < 0, u[1] < unfixed, u[1] >= spoilt),
        )
        found = surgical_informedness(
            np.stack([base, 2.0 * plus - 1, 2.0 * minus - 1])[:, None], np.ones((3, 1, 240)), n_boot=N_BOOT, seed=case
        ).si
        if found is not None:
            held["ours"] += found.ci_lo <= truth <= found.ci_hi
        bad, changes = base < 0, np.stack([base < 0, base > 0, plus, ~plus, minus, ~minus]).astype(float)
        changes[2:] *= np.stack([bad, ~bad, bad, ~bad])
        w, r, fp, bp, fm, bm = resampled_means(changes[:, None], N_BOOT, case)
        with np.errstate(divide="ignore", invalid="ignore"):
            draws = 50 * (fp / w - 2 * bp / r + bm / r - 2 * fm / w)
        low, high = np.quantile(draws[np.isfinite(draws)], [0.025, 0.975])
        held["plain"] += bool(low <= truth <= high)
    return {kind: count / CASES for kind, count in held.items()}


def picked(rng: np.random.Generator, n: int) -> dict[str, float]:
    """Shares of 400 intervals that hold the truth, of the adapter whose interval is farthest from zero out of six."""
    held = Counter[str]()
    for case in range(TABLES):
        values = EFFECT + rng.normal(size=(ADAPTERS, n))
        for kind, level in (("plain", 0.95), ("ours", 1 - 0.05 / ADAPTERS)):
            best = min((estimate_mean(v, 1000, case, level) for v in values), key=lambda e: e.ci_hi)
            held[kind] += best.ci_lo <= EFFECT <= best.ci_hi
    return {kind: count / TABLES for kind, count in held.items()}


def verdicts(rng: np.random.Generator, sizes: tuple[int, int], shift: float) -> dict[str, int]:
    """How often each kind is the verdict on a vector that moves false and true claims alike by `shift` nats."""
    kinds: Counter[str] = Counter()
    for _ in range(VECTORS):
        before = [rng.normal(0, 2, n) for n in sizes]
        after = [x + rng.normal(shift, 0.5, len(x)) for x in before]
        kinds[agreement_verdict(before[0], after[0], before[1], after[1], 1, N_BOOT).kind] += 1
    return dict(kinds)


def main() -> None:
    found: dict[str, object] = {}
    for n in (12, 40, 113):
        for noise in NOISE:
            found[f"coverage, 1 seed, {n} items, {noise}"] = coverage(np.random.default_rng(n), 1, n, 0.0, noise)
            found[f"12 null rows, {n} items, {noise}"] = null_tables(np.random.default_rng(n), n, noise)
    for n in (12, 113):
        for n_seeds in (2, 3, 5):
            rng = np.random.default_rng([n, n_seeds])
            shares = {f"{ratio:g}": coverage(rng, n_seeds, n, ratio, "normal") for ratio in RATIOS}
            found[f"coverage, {n_seeds} seeds, {n} items, by standard deviation of seeds in standard errors"] = shares
    for wrong in (4, 20, 50, 100):
        found[f"coverage of SI, {wrong} wrong answers"] = informedness(np.random.default_rng(wrong), wrong)
    for n in (12, 113):
        found[f"coverage of the adapter picked out of six, {n} items"] = picked(np.random.default_rng(n), n)
    for sizes in ((12, 12), (113, 68)):
        for shift in (0.0, 1.0):
            name = f"{sizes[0]} false and {sizes[1]} true claims moved by {shift:g}"
            found[name] = verdicts(np.random.default_rng(10), sizes, shift)
    harness.record("small_samples", found)


if __name__ == "__main__":
    main()
