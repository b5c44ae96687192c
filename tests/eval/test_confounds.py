"""Confounds: planted ones must be caught, clean effects passed, and noise called neither."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import ws
from ws.console import parse
from ws.data import Pair, data_card, is_refusal, render_card, repetition
from ws.delta import LinearDelta
from ws.eval.confounds import (
    AGREEMENT,
    MIXED,
    NO_SHIFT,
    SPECIFIC,
    TRUE_ONLY,
    UNDECIDED,
    AgreementVerdict,
    agreement_verdict,
    free_answers,
    judge,
    length_verdict,
    main,
    position_verdict,
    questions_of,
    share_verdict,
)
from ws.eval.context import EvalContext
from ws.intervene.calibration import split_questions
from ws.lm.choice import choice_tokens
from ws.lm.models import fingerprint
from ws.options.check import ConfoundOptions
from ws.options.shared import CalibrationConfig

N_BOOT = 300
SIMULATED = 200


def at_most(rate: float, n: int) -> int:
    """The most successes that `n` trials of this rate show in 99 % of experiments."""
    return int(stats.binom.ppf(0.99, n, rate))


def shifted(
    f: float, t: float, rng: np.random.Generator, n: tuple[int, int] = (40, 30), noise: float = 0.5, effect: int = 1
) -> AgreementVerdict:
    """The verdict on claims whose log ratios shift by `f` (false) and `t` (true) on average."""
    false, true = (rng.normal(m, 1.5, size=k) for m, k in zip((-1, 1), n, strict=True))
    moved = [x + s + noise * rng.normal(size=len(x)) for x, s in ((false, f), (true, t))]
    return agreement_verdict(false, moved[0], true, moved[1], effect, N_BOOT)


# ---- agreement --------------------------------------------------------------------------------------------------


def test_a_pure_yes_vector_is_called_agreement():
    found = shifted(2.0, 2.0, np.random.default_rng(0))
    assert (found.kind, found.is_confounded) == (AGREEMENT, True)
    assert "comes with an equal shift on true claims: this is agreement, not the behaviour" in found.line
    assert found.agreement.mean == pytest.approx(2, abs=0.3)
    assert not found.specific.excludes_zero
    assert found.yes_false[1] > found.yes_false[0] + 0.3


@pytest.mark.parametrize(
    ("f", "t", "kind", "words"),
    [
        (-1.0, 1.0, SPECIFIC, "move apart"),
        (1.0, 0.0, SPECIFIC, "true claims do not"),
        (0.0, 1.0, TRUE_ONLY, "Only true claims"),
        (2.0, 0.5, MIXED, "share 2"),
        (2.0, 1.3, AGREEMENT, "% of it on true claims"),
        (1.0, 3.0, AGREEMENT, "% of it on true claims"),
        (-1.0, -1.0, AGREEMENT, "an equal shift"),
    ],
)
def test_what_was_planted_is_what_is_said(f, t, kind, words):
    found = shifted(f, t, np.random.default_rng(1), noise=0.3, effect=1 if f >= 0 else -1)
    assert found.kind == kind
    assert words in found.line
    assert "AGAINST" not in found.line
    assert found.is_confounded == (kind in (AGREEMENT, MIXED))


def test_nothing_at_all_is_no_shift_and_an_effect_of_the_wrong_sign_is_said_to_be():
    false, true = np.linspace(-2, 1, 12), np.linspace(-1, 2, 12)
    still = agreement_verdict(false, false, true, true, 1, N_BOOT)
    assert (still.kind, still.specific.mean, still.agreement.mean) == (NO_SHIFT, 0, 0)
    assert still.yes_false[0] == still.yes_false[1]
    wrong = agreement_verdict(false, false - 1, true, true + 1, 1, N_BOOT)
    assert wrong.kind == SPECIFIC
    assert "AGAINST the behaviour's direction" in wrong.line
    assert "AGAINST" not in agreement_verdict(false, false - 1, true, true + 1, -1, N_BOOT).line


def test_too_few_true_claims_and_too_little_mass_decide_nothing():
    false, shift = np.random.default_rng(2).normal(size=(2, 60))
    true, noise = np.zeros(3), np.array([-1.5, 0.8, 2.5])
    assert agreement_verdict(false, false + shift / 3 + 1, true, true + noise, 1, N_BOOT).kind == UNDECIDED
    low = agreement_verdict(false, false + shift / 3 + 1, false, false - shift, 1, N_BOOT, least_mass=0.4)
    assert low.kind == UNDECIDED
    assert "No conclusion" in low.line
    assert "answer mass 0.400" in low.line
    with pytest.raises(ws.WsError, match="at least 2 items"):
        agreement_verdict(false, false, true[:1], true[:1], 1)
    with pytest.raises(ws.WsError, match="a sign"):
        agreement_verdict(false, false, true, true, 0)
    with pytest.raises(ws.WsError, match="NaN"):
        agreement_verdict(false, false * np.nan, true, true, 1)


def test_a_small_shift_is_none_and_a_low_mass_no_verdict_of_any_kind():
    rng = np.random.default_rng(20)
    false, true = rng.normal(size=40), rng.normal(size=30)
    small = agreement_verdict(false, false + 0.15, true, true, 1, N_BOOT)
    assert (small.kind, small.false_shift.excludes_zero) == (NO_SHIFT, True)
    assert "by 0.2 nats or more" in small.line
    flagged = agreement_verdict(false, false + 1, true, true, 1, N_BOOT, flag="the place decides")
    assert flagged.kind == UNDECIDED
    assert "the place decides" in flagged.line
    bias, score = rng.normal(0.5, 1, 40), rng.normal(2, 1, 40)
    for found in (
        position_verdict(bias, bias + 0.15, score, score, N_BOOT),
        position_verdict(bias, bias + 2, score, score, N_BOOT, least_mass=0.6),
    ):
        assert not found.strong
    assert "No conclusion" in found.line
    assert "answer mass 0.600" in found.line


@pytest.mark.parametrize(
    ("f", "t", "kind", "words"),
    [
        (1.0, 0.03, SPECIFIC, "False claims shift and true claims do not"),
        (1.0, -0.03, SPECIFIC, "False claims shift and true claims do not"),
        (0.23, 0.15, SPECIFIC, "False claims shift and true claims do not"),
        (1.0, 0.25, MIXED, "share 2"),
        (0.3, 0.25, AGREEMENT, "an equal shift"),
    ],
)
def test_a_small_shift_of_true_claims_is_none_however_sure(f, t, kind, words):
    found = shifted(f, t, np.random.default_rng(3), n=(113, 113), noise=0.05)
    assert found.true_shift.excludes_zero
    assert (found.kind, found.is_confounded) == (kind, kind != SPECIFIC)
    assert words in found.line


@settings(max_examples=25)
@given(st.floats(-5, 5), st.floats(-5, 5), st.integers(2, 30), st.integers(2, 30))
def test_the_two_components_are_the_two_shifts(f, t, n_false, n_true):
    rng = np.random.default_rng(3)
    found = shifted(f, t, rng, (n_false, n_true))
    assert found.agreement.mean + found.specific.mean == pytest.approx(found.false_shift.mean)
    assert found.agreement.mean - found.specific.mean == pytest.approx(found.true_shift.mean)
    for e in (found.specific, found.agreement, found.false_shift, found.true_shift):
        assert e.ci_lo <= e.mean <= e.ci_hi


@pytest.mark.parametrize("n", [(12, 12), (113, 68)])
@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_neither_noise_nor_agreement_is_called_specific(shift, n):
    """At the number of claims of the bundled behaviours, for real models and for pocket."""
    rng = np.random.default_rng(4)
    kinds = [shifted(shift, shift, rng, n).kind for _ in range(SIMULATED)]
    assert kinds.count(SPECIFIC) <= at_most(0.05, SIMULATED)
    if shift == 0:
        found = len(kinds) - kinds.count(NO_SHIFT)  # two intervals at 95 %, false and true
        assert found <= at_most(0.0975, SIMULATED)
    else:
        assert kinds.count(AGREEMENT) >= SIMULATED - at_most(0.05, SIMULATED)


def test_a_planted_effect_is_found_nearly_always():
    rng = np.random.default_rng(5)
    kinds = [shifted(-1.0, 0.0, rng, (20, 20), effect=-1).kind for _ in range(100)]
    assert kinds.count(SPECIFIC) >= 90


# ---- position, length, refusals, repetition ---------------------------------------------------------------------


def test_a_planted_liking_for_the_first_place_is_caught():
    rng = np.random.default_rng(6)
    bias, score = rng.normal(0.5, 1, 40), rng.normal(2, 1, 40)
    noise = 0.3 * rng.normal(size=(2, 40))
    planted = position_verdict(bias, bias + 1.5 + noise[0], score, score + 0.2 + noise[1], N_BOOT)
    assert planted.strong
    assert "as much as the choice" in planted.line
    assert planted.steered - planted.base == pytest.approx(planted.shift.mean)
    small = position_verdict(bias, bias + 0.3 + noise[0], score, score - 2 + noise[1], N_BOOT)
    assert not small.strong
    assert "less than the choice" in small.line
    none = position_verdict(bias, bias, score, score + 1, N_BOOT)
    assert "does not shift" in none.line
    nulls = [
        position_verdict(bias, bias + rng.normal(size=40), score, score + rng.normal(size=40), N_BOOT).strong
        for _ in range(SIMULATED)
    ]
    assert sum(nulls) <= at_most(0.05, SIMULATED)


def test_lengths_and_shares_are_strong_when_they_are_both_large_and_sure():
    rng = np.random.default_rng(7)
    base = rng.integers(20, 60, size=30).astype(float)
    assert length_verdict(base, 2 * base, N_BOOT).strong
    assert "Answers get longer" in length_verdict(base, 2 * base, N_BOOT).line
    assert "shorter" in length_verdict(base, base / 2, N_BOOT).line
    assert not length_verdict(base, base + 1, N_BOOT).strong, "sure, but small"
    assert not length_verdict(base, np.where(np.arange(30) == 0, 900, base), N_BOOT).strong, "large, but one answer"
    refusing = (np.arange(30) < 12).astype(float)
    assert share_verdict("Refusals", np.zeros(30), refusing, N_BOOT).strong
    assert "Refusals become more (0% to 40%)" in share_verdict("Refusals", np.zeros(30), refusing, N_BOOT).line
    assert "fewer" in share_verdict("Refusals", refusing, np.zeros(30), N_BOOT).line
    assert not share_verdict("Refusals", np.zeros(30), (np.arange(30) < 1).astype(float), N_BOOT).strong


def test_repetition_counts_four_grams_by_hand():
    assert repetition("one two three four five six") == 0
    assert repetition("go on and on") == 0, "one 4-gram"
    assert repetition("a b c d a b c d") == pytest.approx(1 / 5)  # abcd bcda cdab dabc abcd
    assert repetition("!!!!!!!!!!") == pytest.approx(6 / 7), "ten marks, seven equal 4-grams"
    assert repetition("") == repetition("Yes.") == 0


def test_verdicts_come_together_and_refusals_may_be_the_behaviour():
    n = 20
    rng = np.random.default_rng(8)
    claims = [{"is_true": i >= n // 2} for i in range(n)]
    base = {"logratio": rng.normal(size=n), "pmass": np.ones(n)}
    base |= {"tokens": rng.normal(20, 2, n), "refusal": np.zeros(n), "repetition": np.zeros(n)}
    steered = base | {"logratio": base["logratio"] + 2, "refusal": np.ones(n)}
    found = judge(base, steered, claims, [], 1, n_boot=N_BOOT)
    assert found.strong == ("agreement", "refusals")
    assert set(found.lines) == {"agreement", "length", "refusals", "repetition"}
    assert found.columns()["position_shift_ci_lo"] is None
    assert judge(base, steered, claims, [], 1, keep_refusals=True, n_boot=N_BOOT).strong == ("agreement",)
    without_true = judge(base, steered, [{"is_true": False}] * n, [], 1, n_boot=N_BOOT)
    assert without_true.agreement is None
    assert "too few false or too few true claims" in without_true.lines["agreement"]
    assert set(without_true.columns()) == set(found.columns())


def test_free_answers_are_the_models_greedy_ones(tiny):
    model, tok = tiny
    questions = ["What is red?", "Is snow warm, and why would anybody think so?", "Who are you?"]
    found = free_answers(model, tok, questions, 24)
    one = free_answers(model, tok, questions, 24, batch_size=1)
    assert found["answer"].tolist() == one["answer"].tolist()
    assert found["tokens"].tolist() == one["tokens"].tolist()
    cut = free_answers(model, tok, questions, 1)
    assert set(cut["tokens"]) <= {0.0, 1.0}
    assert (cut["ended"] == (cut["tokens"] == 0)).all()


def test_questions_are_those_that_a_calibration_leaves(monkeypatch, capsys):
    def chosen(pool, n, unseen):
        opened = SimpleNamespace(unseen=lambda behavior: unseen)
        monkeypatch.setattr(EvalContext, "behavior", SimpleNamespace(questions=tuple(pool)))
        monkeypatch.setattr(EvalContext, "opened", opened)
        return questions_of(object.__new__(EvalContext), n)

    pool = [f"q{i}" for i in range(300)]
    found = chosen(pool, 30, pool[:280])
    assert len(found) == len(set(found)) == 30
    assert set(found) <= set(pool[:280]) - set(
        split_questions(pool, CalibrationConfig().n_prompts, pool[:280]).calibration
    )
    assert "q" not in capsys.readouterr().err
    assert len(chosen(pool[:7], 30, None)) == 4
    assert "not on record" in capsys.readouterr().err
    assert chosen(["only"], 30, ()) == ["only"]


# ---- the data card ----------------------------------------------------------------------------------------------


def pairs(n: int, pos, neg, **fields) -> list[Pair]:
    """`n` pairs from functions of a number that give a side's text and its length."""
    made = [(pos(i), neg(i)) for i in range(n)]
    return [Pair(f"q{i}", f"q{i}?", p[0], m[0], p[1], m[1], **fields) for i, (p, m) in enumerate(made)]


def plain(i: int) -> tuple[str, int]:
    return f"I would say that number {i} is fine.", 9 + i % 3


def other(i: int) -> tuple[str, int]:
    return f"I would say that number {i} is bad.", 9 + (i + 1) % 3


PLANTED = {
    "Agreement": lambda i: (f"Yes, number {i} is fine.", 9 + i % 3),
    "Length": lambda i: (plain(i)[0], 2 * plain(i)[1]),
    "Refusals": lambda i: ("I'm sorry, but I cannot help with that." if i % 2 else plain(i)[0], 9 + i % 3),
    "Repetition": lambda i: (f"fine {i} fine {i} fine {i} fine {i} fine {i}", 9 + i % 3),
}


@pytest.mark.parametrize("confound", PLANTED)
def test_a_confounded_pair_set_is_flagged_in_the_card(confound):
    made = pairs(40, PLANTED[confound], other)
    card = data_card(made)
    assert [line.split(":")[0] for line in card["confounds"]] == [confound]
    text = render_card(ws.load_behavior("honesty", "pocket"), card)
    assert f"- {card['confounds'][0]}" in text
    assert "None of these" not in text


def test_a_clean_pair_set_is_not_flagged():
    card = data_card(pairs(40, plain, other))
    assert card["confounds"] == []
    assert "None of these differences is strong" in render_card(ws.load_behavior("honesty", "pocket"), card)
    assert card["differences"]["yes_rate"] == {"mean": 0.0, "ci_lo": 0.0, "ci_hi": 0.0}


def test_refusals_are_no_confound_where_they_are_the_behaviour_and_identical_pairs_are_one():
    refusing = pairs(40, PLANTED["Refusals"], other)
    assert data_card(refusing, keep_refusals=True)["confounds"] == []
    assert data_card(refusing)["refusals"] == {"positive": 20, "negative": 0}
    assert is_refusal("I cannot help with that.")
    assert not is_refusal("x" * 121 + " I cannot help with that.")
    same = pairs(10, plain, plain, drop="identical") + pairs(30, plain, other)
    card = data_card(same)
    assert card["identical"] == 0.25
    assert [line.split(":")[0] for line in card["confounds"]] == ["Identical"]


def test_a_card_of_few_pairs_has_no_intervals():
    card = data_card(pairs(1, PLANTED["Length"], other))
    assert set(card["differences"].values()) == {None}
    assert card["confounds"] == []
    assert data_card(pairs(2, plain, plain, drop="judge"))["kept"] == 0
    assert "tokens, mean" in render_card(ws.load_behavior("honesty", "pocket"), card)


# ---- the command ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def yes_vector(tmp_path_factory) -> Path:
    """A run folder with the purest vector of agreement: Yes up and No down whatever the question, as a bias."""
    out = tmp_path_factory.mktemp("yes")
    model, tok = ws.load_model("pocket", device="cpu")
    head = model.get_output_embeddings().weight.detach()
    yes, no = (head[list(choice_tokens(tok, word))].mean(dim=0) for word in ("Yes", "No"))
    name = f"model.layers.{model.config.num_hidden_layers - 1}.mlp.down_proj"
    module = model.get_submodule(name)
    delta = LinearDelta(module.out_features, module.in_features, bias=400 * (yes - no) / (yes - no).norm())
    ws.SteeringVector({name: delta}, "pocket", fingerprint(model)).save(out / "honesty" / "lora" / "vector")
    return out


def read(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def test_the_command_exposes_a_vector_of_agreement(yes_vector, capsys, monkeypatch):
    options = ConfoundOptions(
        out=yes_vector, alphas=(1.0,), limit=15, n_questions=4, max_new_tokens=16, n_dilemmas=3, n_think=8,
        n_bootstrap=N_BOOT, device="cpu",
    )  # fmt: skip
    main(options)
    printed = capsys.readouterr().out
    (row,) = read(yes_vector / "honesty" / "lora" / "confounds_summary.csv")
    assert row["agreement_kind"] == AGREEMENT
    assert "this is agreement, not honesty" in row["verdict_agreement"]
    assert f"! {row['verdict_agreement']}" in printed
    assert "agreement" in row["strong"].split(", ")
    assert float(row["agreement"]) > 1
    assert float(row["yes_false"]) > float(row["yes_false_base"])
    assert list(row)[:5] == ["behavior", "adapter", "seed", "alpha", "agreement_kind"]
    assert (row["words"], row["dilemmas_words"]) == ("own", "own")
    assert row["drawn"].startswith("30 of ")
    assert row["dilemmas_drawn"] == "3 of 240, seed 0"
    assert (row["n_think"], row["dataset"]) == ("8", "honesty claims")
    assert (row["dilemmas_n_think"], row["dilemmas_dataset"], row["value_class"]) == ("8", "pocket", "Truthfulness")
    about = "3 of 240, seed 0 (--n-dilemmas), labelled by Truthfulness, after at most 8 tokens of thought."
    assert f"Dilemmas: pocket, {about}" in printed
    assert {r["drawn"] for r in read(yes_vector / "honesty" / "lora" / "confounds_answers.csv")} == {row["drawn"]}
    assert float(row["position_shift"]) == pytest.approx(float(row["position"]) - float(row["position_base"]))
    answers = read(yes_vector / "honesty" / "lora" / "confounds_answers.csv")
    assert [r["alpha"] for r in answers] == ["0.0"] * 4 + ["1.0"] * 4
    assert "nothing is known" in printed
    monkeypatch.setattr("ws.eval.confounds.sample_answers", lambda *a, **k: pytest.fail("asked again"))
    main(options)
    assert capsys.readouterr().out == printed


def test_verdicts_follow_what_the_behaviour_predicts_now(yes_vector, tmp_path, monkeypatch):
    """The answers are the same, and what is said of them is not."""
    few = {"limit": 5, "n_questions": 2, "max_new_tokens": 4, "n_dilemmas": 0, "n_bootstrap": N_BOOT}
    text = (Path(ws.__file__).parent / "behaviors" / "pocket" / "honesty.toml").read_text(encoding="utf-8")
    file = tmp_path / "honesty.toml"
    options = ConfoundOptions(out=yes_vector, behavior=str(file), alphas=(2.0,), device="cpu", **few)

    judged = list[tuple[int, bool]]()

    def noted(*given):
        judged.append((given[4], given[6]))
        return judge(*given)

    def evaluate(effect: int, keep_refusals: bool) -> None:
        assert text.count("effect = -1") == 1
        changed = text.replace("effect = -1", f"effect = {effect}")
        file.write_text(f"keep_refusals = {str(keep_refusals).lower()}\n{changed}", encoding="utf-8")
        main(options)

    monkeypatch.setattr("ws.eval.confounds.judge", noted)
    evaluate(-1, False)
    monkeypatch.setattr("ws.eval.confounds.sample_answers", lambda *a, **k: pytest.fail("asked again"))
    for predicted in ((-1, False), (-1, True), (1, True)):
        evaluate(*predicted)
    assert judged == [(-1, False), (-1, True), (1, True)]


def test_without_dilemmas_the_place_is_left_out(yes_vector, capsys):
    few = {"limit": 5, "n_questions": 2, "max_new_tokens": 4, "n_dilemmas": 0, "n_bootstrap": N_BOOT}
    main(ConfoundOptions(out=yes_vector, alphas=(-1.0,), device="cpu", **few))
    assert "first place [" not in capsys.readouterr().out
    (row,) = read(yes_vector / "honesty" / "lora" / "confounds_summary.csv")
    assert row["position_shift"] == row["verdict_position"] == row["dilemmas_words"] == row["dilemmas_drawn"] == ""
    assert row["dilemmas_n_think"] == row["dilemmas_dataset"] == row["value_class"] == ""
    assert float(row["false_shift"]) < 0


def test_options_that_make_no_sense_are_explained():
    options = parse(ConfoundOptions, ["adapter=delora", "--n-questions", "5", "--alphas", "-2", "2"])
    assert (options.adapter, options.n_questions, options.alphas) == ("delora", 5, (-2.0, 2.0))
    for change, flag in (
        ({"n_questions": 1}, "`n_questions`"),
        ({"max_new_tokens": 0}, "`max_new_tokens`"),
        ({"n_dilemmas": -1}, "`n_dilemmas`"),
        ({"n_dilemmas": 1}, "`n_dilemmas`: one dilemma has no interval"),
        ({"dataset": "claims.csv", "split": "dev"}, "`split` dev: only a behaviour's own claims"),
        ({"alphas": (0.0,)}, "strength other than 0"),
    ):
        with pytest.raises(ws.WsError, match=flag):
            replace(options, **change).check()
