"""Choice scores and statistics against slow or closed-form references."""

from __future__ import annotations

from functools import wraps

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import bootstrap, kstest, ttest_1samp

import ws
from conftest import build_model
from ws.eval.choice import choice_tokens, score_choices, share_prefixes
from ws.eval.stats import (
    estimate_mean,
    estimate_over_seeds,
    holm,
    resampled_means,
    surgical_informedness,
    widened_over_seeds,
)
from ws.eval.sycophancy import claim_shift, evaluate_sycophancy, per_claim_rows, summary_row
from ws.models import encode, render_prompt

PROMPTS = ["Q", "What is the color of the sky?", "A much longer question about nothing at all, twice over.", "Why?"]


def reference(model, tok, prompt, choices):
    """One prompt at a time, all positions, plain sums over the vocabulary."""
    with torch.no_grad():
        p = model(torch.tensor([encode(tok, prompt)])).logits[0, -1].double().softmax(-1)
    texts = [tok.decode([i]) for i in range(len(tok))]
    special = set(tok.all_special_ids)
    return [
        sum(float(p[i]) for i, t in enumerate(texts) if i not in special and t.lstrip(" \n\t").lower() == c.lower())
        for c in choices
    ]


def test_choice_tokens_take_case_and_leading_space_but_no_punctuation(tiny):
    _, tok = tiny
    texts = {tok.decode([i]) for i in choice_tokens(tok, "Yes")}
    assert {"Yes", " Yes"} <= texts
    assert all(t.strip().lower() == "yes" and t == t.rstrip() for t in texts)
    with pytest.raises(ws.WsError, match="No single token"):
        choice_tokens(tok, "Yes, of course")


def test_scores_equal_the_plain_computation(tiny):
    model, tok = tiny
    prompts = [render_prompt(tok, p, opener="My answer:") for p in PROMPTS]
    scores = score_choices(model, tok, prompts, ("Yes", "No"))
    for i, prompt in enumerate(prompts):
        yes, no = reference(model, tok, prompt, ("Yes", "No"))
        assert scores.logratio[i] == pytest.approx(np.log(yes / no), abs=1e-4)
        assert scores.mass[i] == pytest.approx(yes + no, rel=1e-4)


def test_batch_size_and_row_order_do_not_matter(tiny):
    model, tok = tiny
    prompts = [render_prompt(tok, p) for p in PROMPTS]
    all_at_once = score_choices(model, tok, prompts, ("Yes", "No"))
    for other in (
        score_choices(model, tok, prompts, ("Yes", "No"), batch_size=1),
        score_choices(model, tok, prompts, ("Yes", "No"), batch_size=3),
    ):
        assert np.allclose(other.logp, all_at_once.logp, atol=1e-4)
    back = score_choices(model, tok, prompts[::-1], ("Yes", "No"))
    assert np.allclose(back.logp[::-1], all_at_once.logp, atol=1e-4)


SHARED = [
    *(
        f"A long story about {x} that is told twice. Is it {q}"
        for x in ("a dog", "the doctor")
        for q in ("wrong?", "ok?")
    ),
    "Alone.",
    "A long story about a dog that is told twice.",
    "A long story about a dog that is told twice.",
]


@pytest.mark.parametrize("batch_size", [1, 2, 3, None])
def test_a_shared_start_is_run_once_and_changes_nothing(tiny, batch_size, monkeypatch):
    model, tok = tiny
    prompts = [render_prompt(tok, p) for p in SHARED]
    families = share_prefixes([encode(tok, p) for p in prompts])
    assert sorted(i for f in families for i in f.rows) == list(range(len(prompts)))
    assert {f.rows for f in families if 4 in f.rows} == {(4,)}, "a prompt on its own shares nothing"
    assert max(len(f.rows) for f in families) >= 4
    for family in families:
        for suffix, row in zip(family.suffixes, family.rows, strict=True):
            assert suffix
            assert [*family.prefix, *suffix] == encode(tok, prompts[row])
    seen = []
    monkeypatch.setattr(model, "forward", _counting(model.forward, seen))
    scores = score_choices(model, tok, prompts, ("Yes", "No"), batch_size)
    if batch_size is None:
        assert sum(seen) < sum(len(encode(tok, p)) for p in prompts)
    for i, prompt in enumerate(prompts):
        yes, no = reference(model, tok, prompt, ("Yes", "No"))
        assert scores.logratio[i] == pytest.approx(np.log(yes / no), abs=1e-4)


def _counting(forward, seen):
    @wraps(forward)
    def counted(*args, **kwargs):
        seen.append(kwargs["input_ids"].numel() if "input_ids" in kwargs else 0)
        return forward(*args, **kwargs)

    return counted


@pytest.mark.parametrize("architecture", ["qwen3", "qwen2"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_equal_single_ones_in_other_models(architecture, attention):
    """Half of a shared start, unequal rests, in both attention implementations, with biases and without."""
    from ws.eval.choice import _families, _score_batch

    model = build_model(architecture)
    model.set_attn_implementation(attention)
    prompts = [[5, 6, 7, 8, 9, 1], [5, 6, 7, 8, 2, 3, 4], [5, 6, 7, 8], [40, 41, 42], [40, 41, 43], [90]]
    variants = [torch.tensor([1, 2, 3]), torch.tensor([50])]
    families = _families(model, prompts)
    assert max(len(f.rows) for f in families) == 3
    for family in families:
        packed = _score_batch(model, 0, [family], variants)
        for row, found in zip(family.rows, packed, strict=True):
            with torch.no_grad():
                logp = model(torch.tensor([prompts[row]])).logits[0, -1].log_softmax(-1)
            assert torch.allclose(found, torch.stack([logp[v].logsumexp(-1) for v in variants]), atol=1e-5)
    model.config.sliding_window = 4
    assert {len(f.rows) for f in _families(model, prompts)} == {1}, "a window needs a mask of its own"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=7), min_size=1, max_size=9))
def test_families_hold_every_prompt_whole(prompts):
    families = share_prefixes(prompts)
    found = {row: [*f.prefix, *s] for f in families for s, row in zip(f.suffixes, f.rows, strict=True)}
    assert [found[i] for i in range(len(prompts))] == prompts
    assert all(s for f in families for s in f.suffixes)
    pieces = [p for f in families for p in f.pieces(2)]
    assert sorted(i for p in pieces for i in p.rows) == list(range(len(prompts)))


def test_broken_models_and_empty_input_stop(tiny):
    model, tok = tiny
    with pytest.raises(ws.WsError, match="no prompts"):
        score_choices(model, tok, [], ("Yes", "No"))
    handle = model.lm_head.register_forward_hook(lambda m, a, out: out * float("nan"))
    try:
        with pytest.raises(ws.WsError, match="NaN"):
            score_choices(model, tok, PROMPTS, ("Yes", "No"))
    finally:
        handle.remove()


def test_sycophancy_rows_have_the_documented_columns(tiny):
    model, tok = tiny
    behavior = ws.load_behavior("honesty", "pocket")
    base = evaluate_sycophancy(model, tok, behavior, "dev")
    key = {"behavior": "honesty", "adapter": "lora", "seed": 0}
    rows, summary = per_claim_rows(key, 1.0, base), summary_row(key, 1.0, base, base)
    assert list(rows[0])[:8] == ["behavior", "adapter", "seed", "alpha", "claim_id", "claim", "logratio", "pmass"]
    assert list(summary)[:13] == [
        "behavior", "adapter", "seed", "alpha", "mean_logratio", "std_logratio", "ci_lo", "ci_hi",
        "shift", "shift_ci_lo", "shift_ci_hi", "mean_pmass", "n",
    ]  # fmt: skip
    assert summary["n"] == len(rows) == len(behavior.test.select("dev", False))
    assert claim_shift(base, base).mean == 0
    assert summary["shift_p"] == 1


def test_bootstrap_agrees_with_scipy():
    values = np.random.default_rng(3).exponential(size=80)
    ours = estimate_mean(values, n_boot=20_000)
    theirs = bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=1).confidence_interval
    assert ours.mean == pytest.approx(values.mean())
    assert ours.std == pytest.approx(values.std(ddof=1))
    assert ours.ci_lo == pytest.approx(theirs.low, abs=0.01)
    assert ours.ci_hi == pytest.approx(theirs.high, abs=0.01)


def test_bootstrap_agrees_with_the_normal_interval_for_many_items():
    values = np.random.default_rng(4).normal(2.0, 3.0, size=4000)
    ours = estimate_mean(values, n_boot=4000)
    half = 1.96 * values.std(ddof=1) / np.sqrt(len(values))
    assert (ours.ci_hi - ours.ci_lo) / 2 == pytest.approx(half, rel=0.06)
    assert ours.excludes_zero


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(5)
    draws = [estimate_mean(rng.normal(size=60), n_boot=300, seed=i) for i in range(300)]
    covered = sum(e.ci_lo <= 0 <= e.ci_hi for e in draws)
    assert 0.90 <= covered / 300 <= 0.985


def test_seeds_widen_the_interval_when_they_disagree():
    rng = np.random.default_rng(6)
    items = rng.normal(size=(1, 200)) * 0.1
    spread = items + np.array([[-1.0], [0.0], [1.0]])
    alike = items + np.zeros((3, 1))
    wide, narrow = estimate_over_seeds(spread), estimate_over_seeds(alike)
    assert wide.ci_hi - wide.ci_lo > 5 * (narrow.ci_hi - narrow.ci_lo)
    one, flat = estimate_over_seeds(items, n_boot=4000), estimate_mean(items[0], n_boot=4000)
    assert (one.ci_lo, one.ci_hi) == pytest.approx((flat.ci_lo, flat.ci_hi), abs=0.003)


@pytest.mark.parametrize(("n_seeds", "spread"), [(3, 0.0), (3, 0.5), (3, 2.0), (5, 0.5)])
def test_intervals_over_a_few_seeds_cover_whatever_seeds_do(n_seeds, spread):
    """Also where seeds differ by many standard errors over items, where a plain bootstrap over 3 holds 76 %."""
    rng, held = np.random.default_rng(11), 0
    for case in range(300):
        seeds, items = rng.normal(0, spread, (n_seeds, 1)), rng.normal(size=60)
        found = estimate_over_seeds(seeds + items + rng.normal(0, 0.3, (n_seeds, 60)), n_boot=300, seed=case)
        held += found.ci_lo <= 0 <= found.ci_hi
    assert held / 300 >= 0.91


def test_widening_moves_seeds_apart_and_nothing_else():
    values = np.random.default_rng(12).normal(size=(2, 3, 40))
    wide = widened_over_seeds(values)
    assert np.allclose(wide.mean(axis=1), values.mean(axis=1)), "every item keeps its mean over seeds"
    before, after = (v.mean(axis=2) - v.mean(axis=(1, 2))[:, None] for v in (values, wide))
    factor = np.sqrt(3 / 2) * 4.302653 / 1.959964
    assert np.allclose(after, factor * before)
    inside = [v - v.mean(axis=2, keepdims=True) for v in (values, wide)]
    assert np.allclose(*inside), "within a seed, items keep their distances"
    assert np.array_equal(widened_over_seeds(values[:, :1]), values[:, :1])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30), st.integers(0, 100))
def test_estimates_are_ordered_and_reproducible(values, seed):
    e = estimate_mean(np.array(values), n_boot=200, seed=seed)
    slack = 1e-6 * (1 + abs(e.mean))
    assert min(values) - slack <= e.ci_lo <= e.ci_hi <= max(values) + slack
    assert e == estimate_mean(np.array(values), n_boot=200, seed=seed)


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [[1.0]]])
def test_nan_and_nothing_are_never_averaged(values):
    with pytest.raises(ws.WsError):
        estimate_mean(np.array(values))


def test_a_batch_of_quantities_is_resampled_together():
    """One draw of items serves every quantity: a difference of means is the mean of the differences, draw by draw."""
    a, b = np.random.default_rng(7).normal(size=(2, 50))
    draws = resampled_means(np.stack([a, b, a - b])[:, None], 500, seed=3)
    assert np.allclose(draws[0] - draws[1], draws[2])
    assert np.array_equal(draws, resampled_means(np.stack([a, b, a - b])[:, None], 500, seed=3))


def test_the_hierarchical_bootstrap_equals_a_plain_loop():
    """Seeds first, then items shared by the drawn seeds: the same law as the loop that says so."""
    values = np.random.default_rng(8).normal(size=(4, 30)) + np.arange(4)[:, None]
    ours = resampled_means(values[None], 20_000, seed=0)[0]
    rng = np.random.default_rng(1)
    loop = [values[np.ix_(rng.integers(0, 4, 4), rng.integers(0, 30, 30))].mean() for _ in range(20_000)]
    assert ours.mean() == pytest.approx(np.mean(loop), abs=0.02)
    assert ours.std() == pytest.approx(np.std(loop), rel=0.03)
    assert np.quantile(ours, [0.025, 0.5, 0.975]) == pytest.approx(np.quantile(loop, [0.025, 0.5, 0.975]), abs=0.05)


def test_p_values_agree_with_the_t_test_and_are_uniform_under_the_null():
    rng = np.random.default_rng(9)
    values = rng.normal(0.12, 1.0, size=400)
    assert estimate_mean(values, n_boot=20_000).p == pytest.approx(ttest_1samp(values, 0).pvalue, abs=0.01)
    null = [estimate_mean(rng.normal(size=50), n_boot=400, seed=i).p for i in range(300)]
    assert kstest(null, "uniform").pvalue > 0.001
    assert estimate_mean(np.zeros(5)).p == 1
    assert estimate_mean(np.full(9, 2.0), n_boot=999).p == pytest.approx(2 / 1000)


def test_holm_by_hand():
    assert holm(np.array([0.01, 0.04, 0.03, 0.005])) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm(np.array([0.5])) == pytest.approx([0.5])
    assert holm(np.array([0.9, 0.8])).max() == 1


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_is_between_the_plain_and_the_bonferroni_p(values):
    p = np.array(values)
    adjusted = holm(p)
    assert (adjusted >= p - 1e-12).all()
    assert (adjusted <= np.minimum(1, p * len(p)) + 1e-12).all()
    order = np.argsort(p, kind="stable")
    assert (np.diff(adjusted[order]) >= -1e-12).all(), "the order of the p-values is kept"


def test_surgical_informedness_by_hand():
    """10 dilemmas, 4 wrong. +alpha mends 3 and spoils 1; -alpha spoils 4 and mends 1. Masses 1, 0.9, 1; k = 2."""
    base = np.array([-1.0] * 4 + [1.0] * 6)
    plus = np.array([1, 1, 1, -1, -1, 1, 1, 1, 1, 1.0])
    minus = np.array([1, -1, -1, -1, -1, -1, -1, -1, 1, 1.0])
    scores = np.stack([base, plus, minus])[:, None]
    mass = np.ones_like(scores) * np.array([1, 0.9, 1])[:, None, None]
    found = surgical_informedness(scores, mass, n_boot=500)
    forward, reverse = 3 / 4 - 2 * 1 / 6, 4 / 6 - 2 * 1 / 4
    assert (found.forward, found.reverse) == pytest.approx((forward, reverse))
    assert found.si is not None
    assert found.si.mean == pytest.approx(100 * (forward + reverse) / 2 * 0.81)
    assert found.si.ci_lo < found.si.mean < found.si.ci_hi
    counts = (found.wrong, found.right, found.fixed_plus, found.broken_plus, found.fixed_minus, found.broken_minus)
    assert counts == (4, 6, 3, 1, 1, 4)
    seeds = surgical_informedness(np.repeat(scores, 3, axis=1), np.repeat(mass, 3, axis=1), n_boot=500)
    assert seeds.si is not None
    assert seeds.si.mean == pytest.approx(found.si.mean), "three equal seeds are one"


def test_there_is_no_si_where_the_base_is_never_wrong():
    scores = np.ones((3, 1, 20))
    assert surgical_informedness(scores, np.ones_like(scores)).si is None
    scores[0, 0, 0] = -1  # one wrong answer: a third of the resamples would have none
    rare = surgical_informedness(scores, np.ones_like(scores))
    assert rare.si is None
    assert rare.forward == 1
