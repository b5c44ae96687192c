"""Calibration: the divergence against a plain slow computation, the solver on curves that are known, and the files."""

from __future__ import annotations

import importlib
import json
import math
import re
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ws
import ws.lm.divergence as measuring
from conftest import reworded
from ws import console
from ws.behaviors import load_behavior
from ws.data import Pair, question_key
from ws.delta import LinearDelta
from ws.diff import vector_digest
from ws.files.runs import Run, data_folder, read_csv, sha256_file, sha256_json, write_text
from ws.intervene.calibration import (
    LEAST_PROMPTS,
    Calibration,
    SideCalibration,
    calibrate,
    load_calibration,
    parse_alpha,
    parse_alphas,
    prompts_hash,
    solve,
    split_questions,
    store_calibration,
)
from ws.intervene.interventions import intervention
from ws.lm.divergence import BrokenError, Divergence, divergence, prompt_divergence, token_kl
from ws.lm.models import encode, end_ids, fingerprint, render_prompt, tokenizer_hash
from ws.options.measure import CalibrateOptions
from ws.options.shared import CalibrationConfig
from ws.run import open_run
from ws.steer import _STEERED

SMALL = CalibrationConfig(n_prompts=6, n_tokens=24)
module = importlib.import_module("ws.intervene.calibrate")  # the attribute of that name is the public function
QUESTIONS = load_behavior("honesty", "pocket").questions[::98]


@pytest.fixture(scope="module")
def pocket():
    return ws.load_model("pocket", device="cpu")


@pytest.fixture(scope="module")
def vector(pocket):
    """A random low-rank change of two layers, small enough that its calibrated strength is of the order of one."""
    rng = torch.Generator().manual_seed(3)
    model, deltas = pocket[0], {}
    for name, layer in model.named_modules():
        if name.endswith(("1.mlp.up_proj", "2.self_attn.o_proj")):
            u = torch.randn(layer.out_features, 2, generator=rng) * 0.05
            v = torch.randn(2, layer.in_features, generator=rng)
            deltas[name] = LinearDelta(layer.out_features, layer.in_features, u=u, v=v)
    return ws.SteeringVector(deltas, "pocket", fingerprint(model))


@pytest.fixture(scope="module")
def found(pocket, vector):
    model, tok = pocket
    return calibrate(model, tok, partial(ws.steer, model, vector), QUESTIONS[:4], QUESTIONS[4:], SMALL, "v")


# ---- the divergence -------------------------------------------------------------------------------------------------


def plainly(model, tok, prompt, condition, n_tokens, base_prompt=None):
    """No cache, no batch: one whole forward pass per token and side, and a softmax in double precision."""
    ids, base, ends, kl, said = encode(tok, prompt), encode(tok, base_prompt or prompt), end_ids(model, tok), [], []

    def probabilities(tokens):
        with torch.no_grad():
            return model(torch.tensor([tokens])).logits[0, -1].double().softmax(-1)

    while len(said) < n_tokens and not (said and said[-1] in ends):
        with condition():
            p = probabilities(ids + said)
        q = probabilities(base + said)
        kl.append(float((p * (p / q).log()).sum()))
        said.append(int(p.argmax()))
    return kl, tok.decode(said, skip_special_tokens=True).strip()


@pytest.mark.parametrize("alpha", [-1.5, 0.7, 3.0])
def test_divergence_equals_the_plain_procedure(pocket, vector, alpha):
    model, tok = pocket
    prompts = [render_prompt(tok, q) for q in QUESTIONS]
    steered = partial(ws.steer, model, vector, alpha)
    fast = divergence(model, tok, prompts, steered, SMALL.n_tokens)
    slow = [plainly(model, tok, p, steered, SMALL.n_tokens) for p in prompts]
    for kl, (expected, _) in zip(fast.kl, slow, strict=True):
        assert kl == pytest.approx(expected, abs=2e-4, rel=1e-3)
    assert fast.answers == tuple(text for _, text in slow)
    together = np.concatenate([kl for kl, _ in slow])
    assert fast.at(0.95) == pytest.approx(np.quantile(together, 0.95), abs=2e-4, rel=1e-3)
    assert fast.n_positions == len(together)


def test_nothing_after_the_end_of_turn_counts(pocket):
    model, tok = pocket
    prompts = [render_prompt(tok, q) for q in QUESTIONS]
    long = divergence(model, tok, prompts, nullcontext, 60)
    lengths = [len(kl) for kl in long.kl]
    assert max(lengths) < 60
    assert len(set(lengths)) > 1
    # One token for every word piece of the text and one for the end of turn.
    assert lengths == [len(encode(tok, text)) + 1 for text in long.answers]
    short = divergence(model, tok, prompts, nullcontext, min(lengths) - 1)
    assert {len(kl) for kl in short.kl} == {min(lengths) - 1}


def test_no_steering_diverges_by_nothing(pocket):
    model, tok = pocket
    prompts = [render_prompt(tok, q) for q in QUESTIONS]
    assert divergence(model, tok, prompts, nullcontext, SMALL.n_tokens).at(0.95) < 1e-6


def test_what_acts_on_the_last_position_only_is_measured_as_generation_uses_it(pocket):
    """Such as an activation vector: when an answer is read again in one pass, only its last position is steered."""
    model, tok = pocket
    block, push = model.model.layers[1], torch.randn(192, generator=torch.Generator().manual_seed(0)) * 200.0

    @contextmanager
    def pushed(positions):
        def add(layer, args, output):
            hidden = output[0] if isinstance(output, tuple) else output
            hidden[:, positions] += push
            return output

        handle = block.register_forward_hook(add)
        try:
            yield
        finally:
            handle.remove()

    prompt = render_prompt(tok, QUESTIONS[2])
    fast = divergence(model, tok, [prompt], lambda: pushed(slice(-1, None)), SMALL.n_tokens)
    start = len(encode(tok, prompt)) - 1
    slow, _ = plainly(model, tok, prompt, lambda: pushed(slice(start, None)), SMALL.n_tokens)
    assert max(slow[1:]) > 0.05
    assert fast.kl[0] == pytest.approx(slow, abs=2e-4, rel=1e-3)


@pytest.mark.parametrize("batch_size", [1, 4, None])
def test_batches_and_row_order_do_not_matter(pocket, vector, batch_size):
    model, tok = pocket
    prompts = [render_prompt(tok, q) for q in QUESTIONS]
    steered = partial(ws.steer, model, vector, 1.0)
    whole = divergence(model, tok, prompts, steered, SMALL.n_tokens, 6)
    other = divergence(model, tok, prompts[::-1], steered, SMALL.n_tokens, batch_size)
    assert whole.answers == other.answers[::-1]
    for a, b in zip(whole.kl, other.kl[::-1], strict=True):
        assert a == pytest.approx(b, abs=2e-4, rel=1e-3)


def test_a_small_budget_of_memory_gives_the_same(pocket, vector, monkeypatch):
    model, tok = pocket
    prompts = [render_prompt(tok, q) for q in QUESTIONS]
    steered = partial(ws.steer, model, vector, 1.0)
    whole = divergence(model, tok, prompts, steered, SMALL.n_tokens)
    row = 4 * model.config.vocab_size
    monkeypatch.setattr(measuring, "_BUDGET", 2 * row * SMALL.n_tokens)
    seen = []
    handle = model.register_forward_hook(lambda m, args, out: seen.append(out.logits.numel()))
    try:
        little = divergence(model, tok, prompts, steered, SMALL.n_tokens, 6)
    finally:
        handle.remove()
    assert max(seen) <= 2 * model.config.vocab_size * SMALL.n_tokens
    assert little.at(0.95) == pytest.approx(whole.at(0.95), rel=1e-3)
    with pytest.raises(ws.WsError, match="`n_tokens` must be at most 48"):
        divergence(model, tok, prompts, steered, 49)


def test_a_system_prompt_is_measured_against_the_model_without_it(pocket):
    model, tok = pocket
    system = load_behavior("honesty", "pocket").negative[0]
    assert prompt_divergence(model, tok, QUESTIONS, "", SMALL.n_tokens) < 1e-6
    slow = []
    for question in QUESTIONS:
        told, plain = render_prompt(tok, question, system=system), render_prompt(tok, question)
        slow += plainly(model, tok, told, nullcontext, SMALL.n_tokens, plain)[0]
    found = prompt_divergence(model, tok, QUESTIONS, system, SMALL.n_tokens)
    assert found > 0.1
    assert found == pytest.approx(np.quantile(slow, 0.95), abs=2e-4, rel=1e-3)


def test_token_kl_has_the_closed_form_of_two_coins():
    p, q = torch.tensor([0.9, 0.5, 0.2]), torch.tensor([0.6, 0.5, 0.7])
    rows = [torch.stack([x.log(), (1 - x).log()], dim=1) for x in (p, q)]
    expected = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    assert torch.allclose(token_kl(*rows), expected, atol=1e-6)
    ruled_out = [torch.cat([r, torch.full((3, 1), -torch.inf)], dim=1) for r in rows]
    assert torch.allclose(token_kl(*ruled_out), expected, atol=1e-6)
    rows[0][1, 0] = torch.nan
    assert torch.isnan(token_kl(*rows)).tolist() == [False, True, False]


def test_the_quantile_is_over_all_positions_of_all_prompts():
    kl = (np.arange(0.0, 10.0), np.arange(10.0, 101.0))
    assert Divergence(kl, ("", "")).at(0.95) == pytest.approx(95.0)
    assert Divergence(kl, ("", "")).at(0.5) == pytest.approx(50.0)


def test_divergence_refuses_what_it_cannot_measure(pocket):
    model, tok = pocket
    with pytest.raises(ws.WsError, match="0 prompts"):
        divergence(model, tok, [], nullcontext, SMALL.n_tokens)
    with pytest.raises(ws.WsError, match="1 prompts and 2 for the base"):
        divergence(model, tok, ["a"], nullcontext, SMALL.n_tokens, base_prompts=["a", "b"])
    handle = model.lm_head.register_forward_hook(lambda m, a, out: out * float("nan"))
    try:
        with pytest.raises(ws.WsError, match="NaN"):
            divergence(model, tok, ["a"], nullcontext, SMALL.n_tokens)
        with pytest.raises(ws.WsError, match=r"NaN at alpha 0\.0001 and beyond"):
            calibrate(model, tok, lambda alpha: nullcontext(), ["a"], (), SMALL)
    finally:
        handle.remove()


# ---- the solver -----------------------------------------------------------------------------------------------------


@given(
    scale=st.floats(-3, 3),
    power=st.floats(1.0, 3.0),
    sign=st.sampled_from([1, -1]),
    start=st.floats(-2, 2),
    target=st.floats(0.05, 5.0),
)
def test_power_laws_are_solved_within_ten_measurements(scale, power, sign, start, target):
    calls = []

    def measure(alpha):
        calls.append(alpha)
        return (abs(alpha) * 10**scale) ** power

    exact = target ** (1 / power) / 10**scale
    config = CalibrationConfig(target=target, max_evaluations=12)
    found = solve(measure, sign, config, 10**start)
    if not 2e-4 < exact < 5e3:
        return
    assert found.converged
    assert found.reason == ""
    assert abs(found.divergence - target) <= 0.05 * target
    assert measure(found.alpha) == found.divergence
    assert math.copysign(1, found.alpha) == sign
    assert len(found.evaluations) <= 12
    assert found.evaluations == tuple((a, (abs(a) * 10**scale) ** power) for a in calls[:-1])
    assert abs(found.alpha) == pytest.approx(exact, rel=0.06 / power)


def test_a_saturating_curve_from_an_ordinary_start_takes_few_measurements():
    def measure(alpha):
        return 6 * alpha**2 / (30 + alpha**2)

    found = solve(measure, 1, CalibrationConfig())
    assert found.converged
    assert len(found.evaluations) <= 6


def test_a_noisy_curve_is_returned_only_where_it_was_measured_near_enough():
    rng, config = np.random.default_rng(0), CalibrationConfig(tolerance=0.05)
    converged = 0
    for _ in range(200):
        noise = {}

        def measure(alpha, noise=noise):
            return noise.setdefault(alpha, alpha**2 * float(np.exp(rng.normal(0, 0.15))))

        found = solve(measure, 1, config)
        assert found.divergence == noise[found.alpha]
        off = abs(found.divergence - 1)
        assert off <= 0.05 or found.converged == (off <= 0.15 and at_the_edge_of_a_jump(found))
        assert bool(found.reason) != found.converged
        assert len(noise) == len(found.evaluations) <= config.max_evaluations
        converged += found.converged
    assert converged > 150


def at_the_edge_of_a_jump(found):
    """Whether the target of 1 lies between the strength and the next one tried on either side, less than 2 % away."""
    tried = sorted(found.evaluations, key=lambda e: abs(e[0]))
    steps = [(a, b) for a, b in pairwise(tried) if (a[1] - 1) * (b[1] - 1) < 0]
    widths = {e[0]: math.log(abs(b[0] / a[0])) for a, b in steps for e in (a, b)}
    narrowest = min(widths.values(), default=math.inf)
    return widths.get(found.alpha) == narrowest < 0.02


@pytest.mark.parametrize(("below", "above", "taken"), [(0.9, 1.2, 0.9), (0.8, 1.1, 1.1), (0.84, 1.16, None)])
def test_the_nearer_edge_of_a_jump_is_taken_where_it_is_near_enough(below, above, taken):
    def measure(alpha):
        return below if abs(alpha) < 1.234 else above

    for sign in (-1, 1):
        found = solve(measure, sign, CalibrationConfig())
        assert found.converged == (taken is not None)
        assert taken in (None, found.divergence)
        assert taken is None or found.alpha == pytest.approx(sign * 1.234, rel=0.02)
    wide = solve(measure, 1, CalibrationConfig(max_evaluations=3))
    assert not wide.converged, "a strength that may be off by more than 2 % is not known"


def test_a_jump_over_the_target_is_named_and_not_returned():
    def measure(alpha):
        return 0.7 * alpha if abs(alpha) < 1.03 else 1.4 * abs(alpha)

    found = solve(measure, 1, CalibrationConfig(max_evaluations=30))
    assert not found.converged
    assert found.reason.startswith("D jumps from 0.7")
    assert "nothing near enough to 1 nat" in found.reason
    assert found.divergence == pytest.approx(0.72, abs=0.02)
    assert 1.0 <= found.alpha < 1.03
    coarse = solve(measure, 1, CalibrationConfig(max_evaluations=3))
    assert not coarse.converged
    assert coarse.reason.startswith("D goes from 0.7 at alpha 1 to ")


def test_targets_out_of_reach_are_named():
    low = solve(lambda alpha: 0.3 * (1 - math.exp(-abs(alpha))), -1, CalibrationConfig(max_evaluations=40))
    assert not low.converged
    assert low.reason == "no strength up to 10000 reaches 1 nat (D is 0.3 at alpha -10000)"
    high = solve(lambda alpha: 2.0, 1, CalibrationConfig(max_evaluations=40))
    assert high.reason == "every strength from 0.0001 on is above 1 nat (D is 2 at alpha 0.0001)"
    short = solve(lambda alpha: 0.3, 1, CalibrationConfig(max_evaluations=3))
    assert short.reason == "3 measurements did not get as far as 1 nat (D is 0.3 at alpha 4)"
    nothing = solve(lambda alpha: 0.0, 1, CalibrationConfig())
    assert "no strength up to 10000" in nothing.reason


@pytest.mark.parametrize("start", [1.0, 100.0])
@pytest.mark.parametrize("sign", [-1, 1])
def test_a_strength_at_which_the_model_gives_nan_is_too_strong(start, sign):
    """Half precision overflows; a search that steps that far goes on below."""

    def overflowing(alpha):
        if abs(alpha) > 25:
            raise BrokenError("NaN")
        return 0.001 * abs(alpha) ** 3.4

    solution = solve(overflowing, sign, CalibrationConfig(), start)
    assert solution.converged
    assert abs(solution.alpha) == pytest.approx(1000 ** (1 / 3.4), rel=0.05)
    assert all(abs(alpha) <= 25 and math.isfinite(d) for alpha, d in solution.evaluations)


def test_a_target_that_lies_beyond_what_the_model_can_do_is_not_reached():
    config = CalibrationConfig(max_evaluations=40)
    solution = solve(lambda alpha: 0.3 if alpha < 8 else float("nan"), 1, config)
    assert not solution.converged
    assert solution.divergence == 0.3
    assert re.fullmatch(r"D jumps from 0\.3 at alpha [\d.]+ to NaN at alpha [\d.]+, .*1 nat", solution.reason)


def test_trouble_in_a_measurement_is_not_swallowed():
    with pytest.raises(BrokenError, match=r"NaN at alpha 0\.0001 and beyond"):
        solve(lambda alpha: float("nan"), 1, CalibrationConfig())

    def breaks_later(alpha):
        if alpha not in (1.0, 2.0):
            raise RuntimeError("inside")
        return 0.1 if alpha == 1.0 else 30.0

    with pytest.raises(RuntimeError, match="inside"):
        solve(breaks_later, 1, CalibrationConfig())


# ---- a calibration --------------------------------------------------------------------------------------------------


def test_the_found_strengths_give_the_target_again(pocket, vector, found):
    model, tok = pocket
    for units, side in ((1, found.positive), (-1, found.negative)):
        assert side.converged
        assert math.copysign(1, side.alpha) == units
        prompts = [render_prompt(tok, q) for q in QUESTIONS[:4]]
        again = divergence(model, tok, prompts, partial(ws.steer, model, vector, found.alpha(units)), SMALL.n_tokens)
        assert again.at(0.95) == side.divergence
        assert again.at(0.95) == pytest.approx(1.0, rel=0.05)
        assert again.n_positions == side.n_positions
        others = [render_prompt(tok, q) for q in QUESTIONS[4:]]
        audit = divergence(model, tok, others, partial(ws.steer, model, vector, found.alpha(units)), SMALL.n_tokens)
        assert audit.at(0.95) == side.audit
        assert len(side.evaluations) <= SMALL.max_evaluations
        assert (side.alpha, side.divergence) in side.evaluations


def test_a_vector_of_twice_the_size_takes_half_the_strength(pocket, vector, found):
    model, tok = pocket
    twice = calibrate(model, tok, partial(ws.steer, model, 2 * vector), QUESTIONS[:4], (), SMALL, start=0.5)
    assert twice.positive.alpha == pytest.approx(found.positive.alpha / 2, rel=1e-3)
    assert twice.negative.alpha == pytest.approx(found.negative.alpha / 2, rel=1e-3)
    assert twice.positive.divergence == pytest.approx(found.positive.divergence, rel=1e-3)
    assert twice.positive.audit is None


def test_the_model_is_left_as_it_came(pocket, vector, weights_hash):
    model, tok = pocket
    before, ids = weights_hash(model), torch.tensor([encode(tok, QUESTIONS[0])])
    with torch.no_grad():
        logits = model(ids).logits
    lines: list[str] = []
    two = replace(SMALL, max_evaluations=2)
    calibrate(model, tok, partial(ws.steer, model, vector), QUESTIONS[:2], (), two, report=lines.append)
    assert weights_hash(model) == before
    assert not _STEERED
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with torch.no_grad():
        assert torch.equal(model(ids).logits, logits)
    assert len(lines) == 4
    assert all("alpha" in line and "nats" in line for line in lines)


def test_a_dial_that_steers_nothing_does_not_converge(pocket):
    model, tok = pocket
    found = calibrate(model, tok, lambda alpha: nullcontext(), QUESTIONS[:1], QUESTIONS[1:2], SMALL)
    for side in (found.positive, found.negative):
        assert not side.converged
        assert side.audit is None
        assert "no strength up to 10000" in side.reason
    with pytest.raises(ws.WsError, match=r"\+1u is not available.*did not converge: no strength.*`target`"):
        found.alpha(1)


def test_the_audit_must_be_disjoint(pocket):
    model, tok = pocket
    with pytest.raises(ws.WsError, match="must not repeat"):
        calibrate(model, tok, lambda alpha: nullcontext(), QUESTIONS, QUESTIONS[:1], SMALL)


@pytest.mark.parametrize(
    "wrong", [{"n_tokens": 0}, {"target": 0.0}, {"target": -1.0}, {"max_evaluations": 0}, {"quantile": 2.0}]
)
def test_numbers_that_make_no_sense_are_refused(pocket, wrong):
    model, tok = pocket
    with pytest.raises(ws.WsError, match=rf"{next(iter(wrong))}\b.* must"):
        calibrate(model, tok, lambda alpha: nullcontext(), QUESTIONS[:1], (), CalibrationConfig(**wrong))


@pytest.mark.parametrize("n_tokens", [0, -2])
def test_a_divergence_over_no_tokens_is_refused(pocket, n_tokens):
    model, tok = pocket
    with pytest.raises(ws.WsError, match=f"`n_tokens` must be at least 1, not {n_tokens}"):
        divergence(model, tok, QUESTIONS[:1], nullcontext, n_tokens)


@given(total=st.integers(1, 300), n=st.integers(1, 120), data=st.data())
def test_questions_are_split_evenly_and_without_overlap(total, n, data):
    pool = [f"q{i}" for i in range(total)]
    unseen = data.draw(st.none() | st.integers(0, total).map(lambda k: pool[total - k :]))
    split = split_questions(pool, n, unseen)
    chosen, audit = split.calibration, split.audit
    enough = unseen is not None and len(unseen) >= 2 * min(n, LEAST_PROMPTS)
    source = unseen if enough else pool
    assert split.held_out is (None if unseen is None else enough)
    assert len(set(chosen)) == len(chosen) == min(n, max(1, len(source) // 2))
    assert len(set(audit)) == len(audit) == min(n, len(source) - len(chosen))
    assert not set(chosen) & set(audit)
    assert set(chosen) | set(audit) <= set(source)
    steps = np.diff([pool.index(q) for q in chosen])
    assert len(chosen) == 1 or steps.max() - steps.min() <= 1
    assert bool(split.note) == (not split.held_out or len(chosen) < n)


def test_a_split_says_what_it_is_of():
    pool = [f"q{i}" for i in range(100)]
    assert split_questions(pool, 10, pool[:20]).note == ""
    assert "16 of the 100 questions are in no pair" in split_questions(pool, 50, pool[:16]).note
    assert "8 instead of 50" in split_questions(pool, 50, pool[:16]).note
    assert "Only 7 of the 100 questions" in split_questions(pool, 50, pool[:7]).note
    assert "not on record" in split_questions(pool, 50).note


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"n_prompts": 0}, "`n_prompts`"),
        ({"n_tokens": 0}, "`n_tokens`"),
        ({"batch_size": 0}, "`batch_size`"),
        ({"max_evaluations": 1}, "max_evaluations"),
        ({"target": 0.0}, "`target`"),
        ({"target": float("nan")}, "`target`"),
        ({"quantile": 1.0}, "quantile"),
        ({"tolerance": 0.0}, "tolerance"),
    ],
)
def test_settings_that_make_no_sense_stop(change, what):
    with pytest.raises(ws.WsError, match=what):
        replace(CalibrationConfig(), **change).check()


# ---- units and files ------------------------------------------------------------------------------------------------


def side(alpha: float, converged: bool = True) -> SideCalibration:
    reason = "" if converged else "D jumps from 0.7 to 1.4"
    seen = ((1.0, 0.25), (alpha, 1.02))
    return SideCalibration(alpha, 1.02, converged, reason, 0.97 if converged else None, seen, 700)


KNOWN = Calibration(side(2.5), side(-0.8), CalibrationConfig(), "prompts", "model", "vector")
HALF = replace(KNOWN, negative=side(-0.8, converged=False))


@pytest.mark.parametrize(
    ("text", "alpha"),
    [
        (1, 1.0),
        (-0.25, -0.25),
        ("1.5", 1.5),
        ("-1e-3", -1e-3),
        ("+1u", 2.5),
        ("1u", 2.5),
        ("-1u", -0.8),
        ("-0.5u", -0.4),
        (".5u", 1.25),
        (" 2.u ", 5.0),
        ("0u", 0.0),
    ],
)
def test_strengths_are_read(text, alpha):
    assert parse_alpha(text, KNOWN) == pytest.approx(alpha)


@pytest.mark.parametrize("text", ["", "u", "one", "1 u", "1uu", "1e1u"])
def test_strengths_that_are_not_understood_are_refused(text):
    with pytest.raises(ws.WsError, match="not understood"):
        parse_alpha(text, KNOWN)


def test_a_word_for_two_strengths_is_none():
    with pytest.raises(ws.WsError, match=r"-1u and \+1u"):
        parse_alpha("calibrated", KNOWN)


def test_units_need_a_calibration_that_converged():
    with pytest.raises(ws.WsError, match="no calibration; run `ws calibrate` first"):
        parse_alpha("+1u")
    assert parse_alpha("+1u", HALF) == 2.5
    for units in ("-1u", "-0.01u"):
        with pytest.raises(ws.WsError, match="did not converge: D jumps from 0.7 to 1.4"):
            parse_alpha(units, HALF)
    for bad in ("nan", "inf", float("-inf")):
        with pytest.raises(ws.WsError, match="finite"):
            parse_alpha(bad, KNOWN)
        with pytest.raises(ws.WsError, match="finite"):
            KNOWN.alpha(float(bad))


def test_the_word_calibrated_stands_for_both_sides_and_the_base():
    assert parse_alphas(["calibrated"], KNOWN) == (-0.8, 0.0, 2.5)
    assert parse_alphas(["calibrated", "2", 0, "+2u"], KNOWN) == (-0.8, 0.0, 2.5, 2.0, 5.0)
    assert parse_alphas([-1.0, 0, 1]) == (-1.0, 0.0, 1.0)
    with pytest.raises(ws.WsError, match="no calibration"):
        parse_alphas(["calibrated"])


def test_a_calibration_is_read_back_as_it_was(tmp_path, found):
    for calibration in (KNOWN, HALF, found):
        file = store_calibration(tmp_path, calibration)
        assert json.loads(file.read_text())["format"] == 1
        assert load_calibration(tmp_path, calibration.subject, calibration.model) == calibration
    assert load_calibration(tmp_path / "elsewhere", "vector") is None
    with pytest.raises(ws.WsError, match="no folder"):
        store_calibration(tmp_path / "elsewhere", KNOWN)


def test_foreign_and_damaged_calibrations_are_refused(tmp_path):
    file = store_calibration(tmp_path, KNOWN)
    with pytest.raises(ws.WsError, match=r"of another vector \(vector\) than this one \(0000\)"):
        load_calibration(tmp_path, "0000", "model")
    with pytest.raises(ws.WsError, match="of another model"):
        load_calibration(tmp_path, "vector", "another")
    assert load_calibration(tmp_path, "vector", "model") == KNOWN
    with pytest.raises(ws.WsError, match=r"another tokenizer or chat template \(not recorded\) than this one \(now\)"):
        load_calibration(tmp_path, "vector", "model", tokenizer="now")
    store_calibration(tmp_path, replace(KNOWN, tokenizer="now"))
    assert load_calibration(tmp_path, "vector", "model", tokenizer="now").tokenizer == "now"
    with pytest.raises(ws.WsError, match=r"another tokenizer or chat template \(now\) than this one \(then\)"):
        load_calibration(tmp_path, "vector", tokenizer="then")
    store_calibration(tmp_path, KNOWN)
    good = json.loads(file.read_text())
    for change in ({"format": 2}, {"positive": {}}, {"config": {"target": 1.0, "surprise": 3}}, {"positive": None}):
        file.write_text(json.dumps(good | change))
        with pytest.raises(ws.WsError, match="format 2|damaged"):
            load_calibration(tmp_path, "vector")
    for text in ("{", "[]", "\xff"):
        file.write_bytes(text.encode("latin-1"))
        with pytest.raises(ws.WsError, match="cannot be read|damaged"):
            load_calibration(tmp_path, "vector")


# ---- calibrated units on a live model -------------------------------------------------------------------------------


def test_a_vector_that_was_calibrated_takes_units_and_no_other_does(tmp_path, pocket, vector):
    folder = vector.save(tmp_path / "vector")
    store_calibration(folder, replace(KNOWN, subject=vector_digest(vector)))
    known = ws.SteeringVector.load(folder)
    assert known.strength("+1u") == KNOWN.alpha(1)
    assert known.strength("-0.5u") == KNOWN.alpha(-0.5)
    assert known.strength("1.5") == 1.5
    with ws.steer(pocket[0], known, alpha="+1u") as dial:
        assert dial.alpha == KNOWN.alpha(1)
        dial.alpha = "-1u"
        assert dial.alpha == KNOWN.alpha(-1)
        with pytest.raises(ws.WsError, match="not understood"):
            dial.alpha = "loud"
        assert dial.alpha == KNOWN.alpha(-1)
    for other in (2 * known, known.compress(rank=1), vector):
        with pytest.raises(ws.WsError, match="no calibration; run `ws calibrate` first"):
            other.strength("+1u")
    store_calibration(folder, replace(KNOWN, subject=vector_digest(vector), tokenizer=tokenizer_hash(pocket[1])))
    known = ws.SteeringVector.load(folder)
    assert known.strength("+1u") == known.strength("+1u", tokenizer_hash(pocket[1])) == KNOWN.alpha(1)
    with pytest.raises(ws.WsError, match="another tokenizer or chat template"):
        known.strength("+1u", tokenizer_hash(reworded(pocket[1])))
    assert known.strength("2", tokenizer_hash(reworded(pocket[1]))) == 2
    store_calibration(folder, replace(KNOWN, subject=vector_digest(vector), tokenizer="another"))
    with pytest.raises(ws.WsError, match="another tokenizer or chat template"):
        ws.SteeringVector.load(folder).strength("+1u")
    store_calibration(folder, replace(HALF, subject=vector_digest(vector)))
    with pytest.raises(ws.WsError, match="did not converge"):
        ws.SteeringVector.load(folder).strength("-1u")


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path, vector):
    """A run with nothing but a vector, as `replicate` leaves it."""
    made = Run(tmp_path / "honesty" / "lora")
    stage = made.stage("vector", {"format": 1})
    vector.save(made.folder / "vector")
    stage.done([f for f in (made.folder / "vector").iterdir() if f.is_file()])
    return made


def options(tmp_path, **changes):
    return replace(CalibrateOptions(out=tmp_path, n_prompts=4, n_tokens=16, device="cpu"), **changes)


def test_the_command_stores_tabulates_and_resumes(tmp_path, run, vector, capsys, monkeypatch):
    folder = run.folder / "vector"
    before = {f.name: sha256_file(f) for f in folder.iterdir()}
    module.main(options(tmp_path))
    printed = capsys.readouterr()
    rows = read_csv(run.folder / "calibration.csv")
    columns = "behavior,adapter,seed,sign,alpha,divergence,target,converged,audit,n_prompts,n_positions,reason"
    columns += ",intervention,n_audit,held_out"
    assert ",".join(rows[0]) == columns
    assert [(r["sign"], r["converged"]) for r in rows] == [("+", "True"), ("-", "True")]
    stored = load_calibration(folder, vector_digest(vector))
    assert stored is not None
    assert [float(r["alpha"]) for r in rows] == [stored.alpha(1), stored.alpha(-1)]
    assert "Worked example" in printed.out
    assert f"{stored.alpha(1):+.4g}" in printed.out
    assert "at most" in printed.err

    # Neither the vector nor the stage that made it has changed, and both still load.
    assert {f.name: sha256_file(f) for f in folder.iterdir() if f.name in before} == before
    assert run.stage("vector", {"format": 1}) is None
    assert vector_digest(ws.SteeringVector.load(folder)) == vector_digest(vector)
    opened = open_run(tmp_path, "honesty", "lora", 0, None, "cpu", "auto")
    weight = intervention("weight", opened, load_behavior("honesty", "pocket"))
    assert weight.calibration(opened.model) == stored

    def never(*args, **kwargs):
        raise AssertionError("measured again")

    monkeypatch.setattr(module, "calibrate", never)
    module.main(options(tmp_path, batch_size=2))
    assert capsys.readouterr().out == printed.out
    other, settings = replace(opened, tok=reworded(opened.tok)), options(tmp_path).config
    weight_key = {"behavior": "honesty", "adapter": "lora", "seed": 0}
    with pytest.raises(ws.WsError, match=r"tokenizer: '\w+' -> '\w+'.*--fresh"):
        module.calibration_for(weight, other, load_behavior("honesty", "pocket"), settings, weight_key)
    with pytest.raises(AssertionError, match="measured again"):
        module.main(options(tmp_path, fresh=True))


def pretend(monkeypatch):
    """Calibrations that cost nothing; returns the `(questions, audit)` that they were given."""
    asked = []

    def quickly(model, tok, at, questions, audit, config, subject, report, held_out):
        asked.append((questions, audit))
        prompts = [[render_prompt(tok, q) for q in part] for part in (questions, audit)]
        facts = {"n_calibration": len(questions), "n_audit": len(audit), "held_out": held_out, "dtype": "float32"}
        what = {"prompts": prompts_hash(*prompts), "model": fingerprint(model), "subject": subject}
        return replace(KNOWN, config=config, **what, **facts, tokenizer=tokenizer_hash(tok))

    monkeypatch.setattr(module, "calibrate", quickly)
    return asked


def test_stored_strengths_are_never_replaced_unasked(tmp_path, run, monkeypatch, capsys):
    asked = pretend(monkeypatch)
    file = run.folder / "vector" / "calibration.json"
    module.main(options(tmp_path))
    before = file.read_bytes(), (run.folder / "calibration.csv").read_bytes()
    for changes, named in (
        ({"target": 0.5}, "target: 1.0 -> 0.5"),
        ({"n_prompts": 3}, "n_prompts: 4 -> 3; prompts"),
        ({"n_tokens": 9}, "n_tokens: 16 -> 9"),
        ({"dtype": "bfloat16"}, "dtype: 'float32' -> 'bfloat16'"),
    ):
        with pytest.raises(ws.WsError, match=named) as refused:
            module.main(options(tmp_path, **changes))
        assert "--fresh" in str(refused.value)
        assert (file.read_bytes(), (run.folder / "calibration.csv").read_bytes()) == before
    assert len(asked) == 1
    capsys.readouterr()
    module.main(options(tmp_path, n_prompts=3, fresh=True))
    assert "strengths are replaced (n_prompts: 4 -> 3" in capsys.readouterr().err
    assert json.loads(file.read_text())["n_calibration"] == 3


def test_strengths_of_a_vector_that_is_gone_are_replaced(tmp_path, run, vector, monkeypatch, capsys):
    """What an earlier activation vector, say, was calibrated to: nothing takes these units any more."""
    asked = pretend(monkeypatch)
    module.main(options(tmp_path))
    kept = (run.folder / "vector" / "calibration.json").read_text()
    (2 * vector).save(run.folder / "vector")
    (run.folder / "vector" / "calibration.json").write_text(kept)
    capsys.readouterr()
    module.main(options(tmp_path))
    assert "are replaced (vector: " in capsys.readouterr().err
    assert len(asked) == 2


def behave(tmp_path, vector, trained, dropped=0, recipe=None):
    """Pairs on the first `trained` questions, the last `dropped` of them left out, and a run trained on them."""
    questions = load_behavior("honesty", "pocket").questions
    made = [
        Pair(f"q{i}", q.upper() + " ", "Yes.", "No.", 2, 2, None if i < trained - dropped else "refusal")
        for i, q in enumerate(questions[:trained])
    ]
    file = data_folder(tmp_path, "pocket", "honesty") / "pairs.jsonl"
    write_text(file, "".join(json.dumps(p.as_row()) + "\n" for p in made))
    arms = {"pairs_sha256": sha256_json([p.as_row() for p in made])} if recipe is None else recipe
    recipe = {"op": "+", "terms": [arms, {"op": "*", "scalar": -1.0, "of": arms}]}
    replace(vector, recipe=recipe).save(tmp_path / "honesty" / "lora" / "vector")
    return questions


def test_strengths_are_solved_for_on_questions_that_no_pair_uses(tmp_path, run, vector, monkeypatch, capsys):
    asked = pretend(monkeypatch)
    questions = behave(tmp_path, vector, trained=560, dropped=4)
    module.main(options(tmp_path, n_prompts=50))
    ((chosen, audit),) = asked
    assert (len(chosen), len(audit)) == (16, 16), "half of what is left, however the questions are written"
    assert set(chosen) | set(audit) == set(questions[556:])
    printed = capsys.readouterr()
    assert "32 of the 588 questions are in no pair" in printed.err
    assert "Measured on 16 held-out questions, audited on 16 others." in printed.out
    (row, _) = read_csv(run.folder / "calibration.csv")
    assert (row["n_prompts"], row["n_audit"], row["held_out"]) == ("16", "16", "True")


@pytest.mark.parametrize(
    ("trained", "recipe", "said", "held_out"),
    [
        (581, None, "Only 7 of the 588 questions", False),
        (588, None, "Only 0 of the 588 questions", False),
        (400, {"pairs_sha256": "of another file"}, "not on record", None),
        (400, {"adapter": "somebody's"}, "not on record", None),
    ],
)
def test_trained_questions_are_used_only_with_a_word(
    tmp_path, run, vector, monkeypatch, capsys, trained, recipe, said, held_out
):
    asked = pretend(monkeypatch)
    behave(tmp_path, vector, trained, recipe=recipe)
    module.main(options(tmp_path, n_prompts=50))
    assert [len(part) for part in asked[0]] == [50, 50]
    printed = capsys.readouterr()
    assert said in printed.err
    assert {False: "trained ones among them", None: "may have been trained on"}[held_out] in printed.out
    stored = load_calibration(run.folder / "vector", asked and vector_digest(vector))
    assert stored is not None
    assert stored.held_out is held_out


def test_a_vector_says_by_itself_which_questions_it_has_seen(tmp_path, run, vector):
    """The pairs in `out/data` may be others by now; the arms' own record goes with the vector."""
    questions = load_behavior("honesty", "pocket").questions
    record = {"questions": " ".join(map(question_key, questions[400:500]))}
    behave(tmp_path, vector, trained=100, recipe=record)
    opened = open_run(tmp_path, "honesty", "lora", 0, None, "cpu", "auto")
    assert opened.unseen(load_behavior("honesty", "pocket")) == questions[100:400] + questions[500:]
    twice = replace(opened.vector * 2, recipe={"op": "compose", "terms": [{"name": "x"}], "of": opened.vector.recipe})
    assert (
        replace(opened, vector=twice).unseen(load_behavior("honesty", "pocket")) == questions[100:400] + questions[500:]
    )


def test_the_vector_folder_stays_a_peft_adapter(tmp_path, run, pocket):
    from peft import PeftModel

    store_calibration(run.folder / "vector", KNOWN)
    model, tok = ws.load_model("pocket", device="cpu")
    ids = torch.tensor([encode(tok, QUESTIONS[0])])
    vector = ws.SteeringVector.load(run.folder / "vector")
    with torch.no_grad(), ws.steer(pocket[0], vector, 1.0):
        steered = pocket[0](ids).logits
    with torch.no_grad():
        peft = PeftModel.from_pretrained(model, str(run.folder / "vector"))(ids).logits
    assert torch.allclose(peft, steered, atol=1e-4)


def test_the_command_fails_when_neither_sign_converges(tmp_path, run, capsys):
    wanted = options(tmp_path, n_prompts=1, n_tokens=2, target=5000.0)
    with pytest.raises(ws.WsError, match="Neither sign could be calibrated"):
        module.main(wanted)
    assert "+1u did not converge" in capsys.readouterr().out
    rows = read_csv(run.folder / "calibration.csv")
    assert [(r["converged"], r["audit"]) for r in rows] == [("False", "")] * 2
    assert all("5000 nats" in r["reason"] for r in rows)
    with pytest.raises(ws.WsError, match="Neither sign"):  # also when it is read back
        module.main(wanted)


def test_what_is_missing_is_named(tmp_path, run):
    with pytest.raises(ws.WsError, match=r"no vector in .*ws replicate --behavior honesty --adapter oft"):
        module.main(options(tmp_path, adapter="oft"))
    with pytest.raises(ws.WsError, match="--seed 3"):
        module.main(options(tmp_path, seed=3))
    with pytest.raises(ws.WsError, match="`target`"):
        module.main(options(tmp_path, target=-1.0))
    with pytest.raises(ws.WsError, match="weights differ"):
        module.main(options(tmp_path, model="tiny-random"))
    store_calibration(run.folder / "vector", KNOWN)
    with pytest.raises(ws.WsError, match="another vector"):
        opened = open_run(tmp_path, "honesty", "lora", 0, None, "cpu", "auto")
        intervention("weight", opened, load_behavior("honesty", "pocket")).calibration(opened.model)


def test_the_command_line_exits_with_two_and_one_sentence(tmp_path, monkeypatch, capsys):
    arguments = ["ws.intervene.calibrate", "--out", str(tmp_path), "--adapter", "oft", "--n-prompts", "3"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as stop:
        console.run(module.main, CalibrateOptions)
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert printed.err.startswith("error: There is no vector in")
    assert printed.out == ""
    assert not list(tmp_path.iterdir())
