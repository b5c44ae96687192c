"""Choice scores and statistics against slow or closed-form references."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import bootstrap

import ws
from ws.eval.choice import choice_tokens, score_choices
from ws.eval.stats import estimate_mean, estimate_over_seeds
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
    assert summary["eval_hash"] != evaluate_sycophancy(model, tok, behavior, "dev", is_true=True).item_hash


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
