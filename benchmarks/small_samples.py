"""How often intervals, p-values and verdicts are wrong when nothing is there and items are few, by simulation.

`uv run python -m benchmarks.small_samples`: normal noise in place of scores. For groups of 12 to 32 items the share of
400 cases in which a plain bootstrap, an expanded one and a t test see a shift, alone and in any of seven groups after
Holm's correction; what the agreement verdict calls 1,000 vectors that move nothing, or all claims by 1 nat; and how
often a 95 % interval over a few seeds holds the truth, by how much seeds differ.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
from scipy import stats

from benchmarks import harness
from ws.eval.confounds import agreement_verdict
from ws.eval.groups import expanded_level
from ws.eval.stats import estimate_mean, estimate_over_seeds, holm, resampled_means

CASES, GROUPS, VECTORS, N_BOOT = 400, 7, 1000, 300


def false_positives(rng: np.random.Generator, n: int) -> dict[str, float]:
    """Shares of cases; `any_of_seven` after Holm's correction, the others of a single 95 % interval."""
    counts: Counter[str] = Counter()
    for _ in range(CASES):
        values = rng.normal(size=(GROUPS, n))
        plain = [estimate_mean(v, 2000) for v in values]
        counts["any_of_seven_bootstrap"] += bool(holm(np.array([e.p for e in plain])).min() < 0.05)
        counts["any_of_seven_t_test"] += bool(holm(stats.ttest_1samp(values, 0, axis=1).pvalue).min() < 0.05)
        counts["one_bootstrap"] += plain[0].excludes_zero
        counts["one_expanded"] += estimate_mean(values[0], 2000, level=expanded_level(n)).excludes_zero
    return {name: count / CASES for name, count in counts.items()}


def coverage_over_seeds(rng: np.random.Generator, n_seeds: int, ratio: float) -> dict[str, float]:
    """Shares of 1,000 intervals over seeds and 113 items that hold the true mean, 0: as they are, and not widened.

    Items vary by 1, a seed and an item together by 0.3, and seeds by `ratio` standard errors of the mean over items.
    """
    n, held = 113, Counter[str]()
    for case in range(VECTORS):
        seeds, items = rng.normal(0, ratio / np.sqrt(n), (n_seeds, 1)), rng.normal(size=n)
        values = seeds + items + rng.normal(0, 0.3, (n_seeds, n))
        low, high = np.quantile(resampled_means(values[None], 500, case)[0], [0.025, 0.975])
        held["widened"] += not estimate_over_seeds(values, 500, case).excludes_zero
        held["plain"] += bool(low <= 0 <= high)
    return {kind: count / VECTORS for kind, count in held.items()}


def verdicts(rng: np.random.Generator, sizes: tuple[int, int], shift: float) -> dict[str, int]:
    """How often each kind is the verdict on a vector that moves false and true claims alike by `shift` nats."""
    kinds: Counter[str] = Counter()
    for _ in range(VECTORS):
        before = [rng.normal(0, 2, n) for n in sizes]
        after = [x + rng.normal(shift, 0.5, len(x)) for x in before]
        kinds[agreement_verdict(before[0], after[0], before[1], after[1], 1, N_BOOT).kind] += 1
    return dict(kinds)


def main() -> None:
    rng, found = np.random.default_rng(1), {}
    for n in (12, 16, 22, 32):
        found[f"{n} items"] = false_positives(rng, n)
    for sizes in ((12, 12), (113, 68)):
        for shift in (0.0, 1.0):
            name = f"{sizes[0]} false and {sizes[1]} true claims moved by {shift:g}"
            found[name] = verdicts(np.random.default_rng(10), sizes, shift)
    for n_seeds in (3, 5, 10):
        rng = np.random.default_rng(n_seeds)
        shares = {f"{ratio:g}": coverage_over_seeds(rng, n_seeds, ratio) for ratio in (0.0, 1.0, 3.0, 5.0, 10.0)}
        found[f"coverage over {n_seeds} seeds, by their standard deviation in standard errors over items"] = shares
    harness.record("small_samples", found)


if __name__ == "__main__":
    main()
