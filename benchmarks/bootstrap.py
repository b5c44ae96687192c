"""The bootstrap on as many items as AIRiskDilemmas labels for Truthfulness, against `scipy.stats.bootstrap`.

`uv run python -m benchmarks.bootstrap` takes 1,869 random items and 10,000 resamples: the mean in alternation with
scipy's percentile bootstrap of the same size (in batches that fit in memory), and the seconds of SI at three strengths.
"""

from __future__ import annotations

import time

import numpy as np
from scipy.stats import bootstrap

from benchmarks import harness
from ws.stats import estimate_mean, surgical_informedness

ITEMS, RESAMPLES = 1869, 10_000


def main() -> None:
    rng = np.random.default_rng(0)
    values, three = rng.normal(size=ITEMS), rng.normal(size=(3, 1, ITEMS))

    def scipys() -> object:
        return bootstrap((values,), np.mean, n_resamples=RESAMPLES, method="percentile", batch=1000, rng=rng)

    ratio = harness.compare(lambda: estimate_mean(values, RESAMPLES), scipys)
    start = time.perf_counter()
    surgical_informedness(three, np.ones_like(three), n_boot=RESAMPLES)
    harness.record("bootstrap", {"mean_against_scipy": ratio, "seconds_si": round(time.perf_counter() - start, 3)})


if __name__ == "__main__":
    main()
