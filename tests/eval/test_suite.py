"""Evaluations wherever they are listed: sweeps, controls, slopes, comparisons, report and card."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import ws
from support.comparisons import KEY, N_BOOT, cell, claims
from support.knowledge import questions_csv
from support.statements import folder as statement_folder
from support.statements import rows as statement_rows
from ws.analysis.compare import main as compare
from ws.analysis.compare_tables import Group, comparison_rows, group_rows
from ws.analysis.compare_tables import render as render_comparison
from ws.analysis.controls import main as controls
from ws.analysis.slope import main as slope
from ws.analysis.slope import mean_score, slope_test
from ws.analysis.sweep_tables import pooled_rows, render, sweep_rows
from ws.behaviors import Preference
from ws.delta import LinearDelta
from ws.eval.context import EvalContext, open_context
from ws.eval.preference import Preferences, evaluate_preference, margins
from ws.eval.readable import PER_TOKEN, SHARE, Readability, worst
from ws.eval.statements import Statements, evaluate_statements, signed_scores
from ws.eval.suite import SUITE, asked_of, evaluations_of, floors_text, headline, headlines, set_notes
from ws.export.card import describe, vector_card
from ws.files.runs import Run, read_csv
from ws.lm.likelihood import takes_masks
from ws.lm.models import fingerprint
from ws.options.check import ControlOptions, SlopeOptions
from ws.options.make import DEFAULT_EVALS, QueueConfig, SweepConfig
from ws.options.measure import CompareOptions
from ws.options.shared import EvalOptions
from ws.report import write_report
from ws.sweep.queue import sweep_jobs

BOTH = ("preference", "statements")
JUDGED = ("judged_trait", "judged_coherence")
KNOWLEDGE = ("truthfulqa", "arithmetic")
QUESTIONS = [(f"What is {n} and {n}?", f"{2 * n}.", f"{n}, and nothing more.", "sums") for n in range(1, 7)]
QUESTIONS += [(f"Is number {n} a number?", "Yes.", "No, never.", "numbers") for n in range(1, 5)]


def behavior_file(path: Path) -> Path:
    """A bundled behaviour with held-out questions and traits of its own."""
    names = ("question", "positive", "negative", "kind")
    rows = [dict(zip(names, q, strict=True)) | {"split": "report" if i % 5 else "dev"} for i, q in enumerate(QUESTIONS)]
    (path / "asked.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    text = (Path(ws.__file__).parent / "behaviors" / "pocket" / "honesty.toml").read_text()
    text += '\n[preferences]\nfile = "asked.jsonl"\n\n[statements]\ntraits = ["kind", "rude"]\n'
    file = path / "mine.toml"
    file.write_text(text.replace('name = "honesty"', 'name = "mine"'))
    return file


@pytest.fixture
def out(tiny, tmp_path):
    """A run on the small random model, of a behaviour with everything that the two evaluations need."""
    model, _ = tiny
    torch.manual_seed(0)
    deltas = {
        f"model.layers.{i}.mlp.up_proj": LinearDelta(96, 64, u=0.3 * torch.randn(96, 2), v=torch.randn(2, 64))
        for i in (1, 2)
    }
    behavior_file(tmp_path)
    statement_folder(tmp_path / "sets", kind=statement_rows("x"), rude=statement_rows("y"))
    run = Run(tmp_path / "mine" / "lora")
    stage = run.stage("vector", {"format": 1})
    ws.SteeringVector(deltas, "tiny-random", fingerprint(model)).save(run.folder / "vector")
    stage.done([f for f in (run.folder / "vector").iterdir() if f.is_file()])
    return tmp_path


def shared(out: Path) -> dict[str, object]:
    return {"out": out, "behavior": str(out / "mine.toml"), "device": "cpu", "dataset": str(out / "sets")}


def context(out: Path) -> EvalContext:
    return open_context(EvalOptions(**shared(out), n_bootstrap=100))


def evaluated(out: Path) -> Path:
    """The run's folder, with both evaluations carried out as a sweep does it."""
    opened = context(out)
    for name in BOTH:
        opened.carry_out(asked_of(SUITE[name], opened))
    return opened.run.folder


def test_what_is_done_by_itself_stays_what_it_was():
    assert SweepConfig().evals == DEFAULT_EVALS == ("sycophancy", "airisk", "tinymfv_airisk")
    assert QueueConfig().evals == ("airisk", "tinymfv_airisk")
    assert CompareOptions().evals == ("sycophancy", "tinymfv_airisk")
    assert SlopeOptions().scores == ("false_claims", "true_claims", "wrongness", "choices")
    assert list(SUITE) == [*DEFAULT_EVALS, *BOTH, "answers", *KNOWLEDGE]
    more = [*JUDGED, "mc2", "mc1", "thought_accuracy", "direct_accuracy"]
    assert list(headlines()) == ["false_claims", "true_claims", "wrongness", "choices", *BOTH, *more]
    assert {s.evaluation for s in headlines().values()} == set(SUITE.values())
    assert [e.name for e in evaluations_of(("statements", "true_claims", "false_claims"))] == [
        "sycophancy",
        "statements",
    ]
    with pytest.raises(ws.WsError, match="Did you mean 'preference'"):
        evaluations_of(("preferences",))


def test_a_score_without_answers_to_count_has_no_mass_and_a_floor_of_its_own():
    assert Readability(None).problem == ""
    assert Readability(None).columns()["mass"] is None
    assert worst([Readability(None), Readability(0.7)]).mass == 0.7
    assert worst([Readability(None), Readability(None)]).mass is None
    assert [headline(s).floor for s in BOTH] == [PER_TOKEN, 0.2]


def test_notes_on_published_sets_follow_the_rows_of_those_sets_alone():
    assert "43 % correct" in " ".join(set_notes([{"score": "choices", "dataset": "kellycyy/AIRiskDilemmas"}]))
    assert "has probably left the hub" in " ".join(set_notes([{"score": "wrongness", "dataset": "some/folder"}]))
    assert (
        set_notes([{"score": "wrongness", "dataset": "pocket"}, {"score": "choices"}, {"score": "nll", "dataset": "x"}])
        == []
    )


def test_a_sweep_tables_both(out):
    at = evaluated(out)
    rows, pooled = sweep_rows([at], BOTH), pooled_rows([at], BOTH, 100)
    assert [r["alpha"] for r in rows] == [-1.0, 0.0, 1.0]
    for name in BOTH:
        table = {float(r["alpha"]): r for r in read_csv(at / f"{name}_summary.csv")}
        assert [float(r[f"{name}_shift"]) for r in rows] == [float(table[a]["shift"]) for a in (-1.0, 0.0, 1.0)]
        assert [r[f"{name}_shift"] for r in pooled] == pytest.approx(
            [float(table[a]["shift"]) for a in (-1.0, 0.0, 1.0)]
        )
        assert [r[f"{name}_n"] for r in pooled] == [int(table[0.0]["n"])] * 3
    assert pooled[0]["preference_mass"] is None
    assert float(pooled[0]["statements_mass"]) < 0.9, "random weights answer nothing"
    text = render(pooled)
    assert "shift of preference, nats per token" in text
    assert f"at least 0.2 nats (0.05 of wrongness; {PER_TOKEN} nats per token of preference)" in text


def test_controls_read_both(out, capsys):
    controls(ControlOptions(**shared(out), scores=BOTH, n_draws=2))
    rows = read_csv(out / "mine" / "lora" / "controls.csv")
    assert {(r["score"], r["control"]) for r in rows} == {(s, c) for s in BOTH for c in ("vector", "random")}
    assert {r["mass"] for r in rows if r["score"] == "preference"} == {""}
    opened = context(out)
    items = Preferences.of_run(replace(opened, options=replace(opened.options, dataset=None))).items
    assert len(items) == 8, "those of the split report"
    base = margins(items, evaluate_preference(opened.model, opened.tok, items))
    with ws.steer(opened.model, opened.vector, 1.0):
        moved = margins(items, evaluate_preference(opened.model, opened.tok, items)) - base
    (own,) = (r for r in rows if (r["score"], r["control"], r["alpha"]) == ("preference", "vector", "1.0"))
    assert float(own["shift"]) == pytest.approx(moved.mean(), abs=1e-5)
    assert "preference" in capsys.readouterr().out


def test_controls_and_slopes_of_a_behaviour_without_claims_are_of_its_preference(out, capsys):
    (out / "mine").rename(out / "tone")
    options = shared(out) | {"behavior": "tone", "limit": 4}
    controls(ControlOptions(**options, n_draws=2))
    slope(SlopeOptions(**options, scores=("false_claims", "true_claims")))
    for name in ("controls", "slope"):
        assert {r["score"] for r in read_csv(out / "tone" / "lora" / f"{name}.csv")} == {"preference"}


@pytest.mark.parametrize("packed", [True, False])
def test_their_slopes_are_finite_differences_of_the_evaluations(out, tiny, monkeypatch, packed):
    if not packed:
        monkeypatch.setattr("ws.lm.likelihood.takes_masks", lambda model: False)
    assert takes_masks(tiny[0])
    model, tok = tiny
    vector, statements = ws.SteeringVector.load(out / "mine/lora/vector"), Statements.of_run(context(out)).items
    items = [
        Preference(f"{i}", *q[:3], "report") for i, q in enumerate([*QUESTIONS, QUESTIONS[0]])
    ]  # one question twice
    measures = {
        "preference": (
            Preferences(items=items),
            lambda: margins(items, evaluate_preference(model, tok, items)),
        ),
        "statements": (
            Statements(items=statements),
            lambda: signed_scores(statements, evaluate_statements(model, tok, statements)),
        ),
    }
    for name, (evaluation, measure) in measures.items():
        (mean,) = evaluation.means(tok, BOTH)
        test = slope_test(model, vector, mean_score(model, tok, mean), batch_size=3)
        assert test.n == {"preference": len(QUESTIONS), "statements": 16}[name]
        assert test.value == pytest.approx(measure().mean(), abs=1e-5)
        at = {}
        for alpha in (-0.02, -0.01, 0.01, 0.02):
            with ws.steer(model, vector, alpha):
                at[alpha] = measure().mean()
        difference = (8 * (at[0.01] - at[-0.01]) - (at[0.02] - at[-0.02])) / 0.12  # exact to the fourth order
        assert test.slope == pytest.approx(difference, rel=2e-2, abs=5e-5)


def test_the_slope_command_takes_both(out, capsys):
    slope(SlopeOptions(**shared(out), scores=BOTH))
    rows = read_csv(out / "mine" / "lora" / "slope.csv")
    assert [(r["score"], r["n"], r["eval"]) for r in rows] == [
        ("preference", "8", "preference"),
        ("statements", "16", "statements"),
    ]


@pytest.mark.slow
def test_a_comparison_measures_both_at_matched_divergence(out, capsys):
    options = CompareOptions(
        **shared(out),
        interventions=("weight", "prompt"),
        evals=BOTH,
        n_prompts=6,
        target=0.01,  # random weights cannot be led far away
        n_draws=2,
        capability=False,
        n_bootstrap=100,
    )
    compare(replace(options, model="tiny-random"))
    rows = read_csv(out / "mine" / "compare.csv")
    assert {(r["intervention"], r["score"]) for r in rows} == {(i, s) for i in ("weight", "prompt") for s in BOTH}
    assert {r["mass"] for r in rows if r["score"] == "preference"} == {""}
    assert all(r["p_random"] for r in rows if (r["intervention"], r["score"]) == ("weight", "preference"))
    assert "span, preference" in capsys.readouterr().out


def test_a_span_of_preference_has_its_own_floor_and_decimals():
    rng = np.random.default_rng(0)
    groups = []
    for name, effect in (("weight", 0.06), ("prompt", 0.01)):
        scores = {"preference": claims(rng, effect, noise=0.01), "statements": claims(rng, 4.0)}
        groups += Group.of([replace(cell(rng, name=name, adapter="lora" if name == "weight" else name), scores=scores)])
    rows, pairs = group_rows(KEY, groups, 1, N_BOOT), comparison_rows(KEY, groups, 1, N_BOOT)
    assert {r["score"] for r in rows} == set(BOTH)
    assert {r["score"]: r["winner"] for r in pairs} == {"preference": "weight", "statements": "neither"}
    (span,) = (r for r in rows if (r["intervention"], r["score"], r["part"]) == ("weight", "preference", "span"))
    text = render_comparison(rows, pairs)
    assert f"{span['shift']:+.3f} [{span['shift_ci_lo']:+.3f}" in text
    assert f"by 0.2 nats or 0.05 of wrongness or {PER_TOKEN} nats per token at least" in text


def test_a_queue_has_jobs_for_both(out):
    config = QueueConfig(
        model="tiny-random",
        behavior="honesty",
        adapters=("lora",),
        evals=(*BOTH, "airisk"),
        traits=("kind",),
        dataset="sets",
    )
    commands = {job.name: " ".join(job.command) for job in sweep_jobs(replace(config, out=out))}
    assert "ws.eval.statements" in commands["statements-lora"]
    assert commands["statements-lora"].endswith("--dataset sets --traits kind")
    assert "--dataset" not in commands["preference-lora"]
    assert "--traits" not in commands["airisk-lora"]


def test_the_report_and_the_card_show_both_and_only_where_they_were_measured(out):
    at = evaluated(out)
    page = write_report(out, str(out / "mine.toml")).read_text()
    assert 'id="preference"' in page
    assert 'id="statements"' in page
    assert "none: the answers are given" in page
    row = next(r for r in read_csv(at / "preference_summary.csv") if r["alpha"] == "1.0")
    assert f"{abs(float(row['shift'])):.3f}" in page
    text = str(vector_card(describe(ws.SteeringVector.load(at / "vector"), "ada/mine", at)))
    assert "| preference " in text
    assert "statements of kind rude" in text
    for name in BOTH:
        for file in at.glob(f"{name}_*.csv"):
            file.unlink()
    page = write_report(out, str(out / "mine.toml")).read_text()
    assert 'id="preference"' not in page
    assert "ws eval preference" not in page, "nothing is missing where the behaviour may bring no such items"


# ---- knowledge and reasoning ----------------------------------------------------------------------------------------


def of_knowledge(out: Path) -> Path:
    """The run's folder, with both carried out as a sweep does it, each on a set of its own."""
    sources = {"truthfulqa": str(questions_csv(out / "truthfulqa")), "arithmetic": "sums"}
    for name, source in sources.items():
        n_think = 4 if name == "arithmetic" else None
        options = {**shared(out), "dataset": source, "n_bootstrap": 100, "limit": 4, "n_think": n_think}
        opened = open_context(EvalOptions(**options))
        opened.carry_out(asked_of(SUITE[name], opened))
    return opened.run.folder


def test_knowledge_and_reasoning_are_in_a_sweep_a_report_and_a_card(out):
    at = of_knowledge(out)
    rows, pooled = sweep_rows([at], KNOWLEDGE), pooled_rows([at], KNOWLEDGE, 100)
    tables = {name: {float(r["alpha"]): r for r in read_csv(at / f"{name}_summary.csv")} for name in KNOWLEDGE}
    for row in rows:
        for name, column in (("truthfulqa", "mc1_shift"), ("truthfulqa", "mc2"), ("arithmetic", "share_closed")):
            assert float(row[f"{name}_{column}"]) == float(tables[name][row["alpha"]][column])
    for row in pooled:
        assert row["truthfulqa_mc2_shift"] == pytest.approx(float(tables["truthfulqa"][row["alpha"]]["mc2_shift"]))
    assert f"{SHARE} share of mc2; {SHARE} share of thought accuracy" in render(pooled)
    page = write_report(out, str(out / "mine.toml")).read_text()
    for name in KNOWLEDGE:
        assert f'id="{name}"' in page
    assert "the model answers but no longer thinks" in page
    text = str(vector_card(describe(ws.SteeringVector.load(at / "vector"), "ada/mine", at)))
    for label in ("TruthfulQA MC2", "TruthfulQA MC1", "arithmetic, after a thought", "arithmetic, at once"):
        assert f"| {label} " in text


def test_a_share_has_a_floor_of_its_own_that_is_named():
    assert [headline(s).floor for s in ("mc1", "mc2", "thought_accuracy", "direct_accuracy")] == [SHARE] * 4
    assert floors_text([headline("wrongness")]) == "0.2 nats (0.05 of wrongness)"
    assert floors_text([headline("mc2")]) == "0.2 nats (0.05 of wrongness; 0.05 share of mc2)"


def test_controls_take_what_needs_no_thought_and_slopes_take_neither(out, capsys):
    options = {**shared(out), "limit": 4}
    asked = ControlOptions(**options | {"dataset": "sums"}, n_draws=2, alphas=(1.0,))
    controls(replace(asked, scores=("direct_accuracy",)))
    rows = read_csv(out / "mine" / "lora" / "controls.csv")
    assert {(r["score"], r["control"], r["n"]) for r in rows} == {
        ("direct_accuracy", control, "4") for control in ("vector", "random")
    }
    with pytest.raises(ws.WsError, match="There is no thought_accuracy"):
        controls(replace(asked, scores=("thought_accuracy",)))
    file = str(questions_csv(out / "truthfulqa"))
    controls(replace(asked, scores=("mc1", "mc2"), dataset=file))
    assert "mc2" in capsys.readouterr().out
    for score, source in (("mc2", file), ("direct_accuracy", "sums")):
        with pytest.raises(ws.WsError, match="has no gradient"):
            slope(SlopeOptions(**options | {"dataset": source}, scores=(score,)))


def test_a_comparison_takes_both_shares():
    rng = np.random.default_rng(0)
    groups = []
    for name, effect in (("weight", 0.4), ("prompt", 0.1)):
        scores = {"mc2": claims(rng, effect, noise=0.01), "thought_accuracy": claims(rng, effect / 20, noise=0.01)}
        groups += Group.of([replace(cell(rng, name=name, adapter="lora" if name == "weight" else name), scores=scores)])
    rows, pairs = group_rows(KEY, groups, 1, N_BOOT), comparison_rows(KEY, groups, 1, N_BOOT)
    assert {r["score"]: r["winner"] for r in pairs} == {"mc2": "weight", "thought_accuracy": "neither"}
    assert f"by 0.2 nats or 0.05 of wrongness or {SHARE} share at least" in render_comparison(rows, pairs)


def test_what_was_thought_is_reported_wherever_answers_come_after_a_thought(out):
    """Sycophancy, statements and tiny-mfv say so of every strength; without a thought the columns are empty."""
    names = ("sycophancy", "statements", "tinymfv_airisk", "airisk")
    sets = {"tinymfv_airisk": "pocket", "airisk": "pocket"}
    for n_think in (5, 0):
        for name in names:
            options = {**shared(out), "dataset": sets.get(name, str(out / "sets"))}
            opened = open_context(EvalOptions(**options, limit=2, n_bootstrap=100, n_think=n_think))
            evaluation = asked_of(SUITE[name], opened)
            text = opened.carry_out(evaluation).text
            rows = read_csv(opened.run.folder / f"{evaluation.table_name}_summary.csv")
            for row in rows:
                closed = row["share_closed"]
                assert (closed != "") == (n_think > 0)
                assert not n_think or (0 <= float(closed) <= 1 and 0 < float(row["mean_thought_tokens"]) <= n_think)
            assert ("Thoughts, mean tokens" in text) == (n_think > 0)
            if n_think:
                base = opened.base_scores(evaluation)
                row = next(r for r in rows if float(r["alpha"]) == 0)
                if name != "sycophancy":  # whose rows are of one kind of claims
                    assert float(row["mean_thought_tokens"]) == pytest.approx(base["n_tokens"].mean())
                    assert float(row["share_closed"]) == pytest.approx(1 - base["forced"].mean())


def test_scores_from_before_thoughts_were_on_record_still_make_tables(out):
    opened = open_context(EvalOptions(**shared(out), limit=2, n_bootstrap=100, n_think=3))
    evaluation = asked_of(SUITE["statements"], opened)
    kept = ("logratio", "pmass", "variants")
    before = {alpha: {name: s[name] for name in kept} for alpha, s in opened.measure(evaluation).items()}
    rows = evaluation.tables({}, before, 100)["summary"]
    assert {(r["mean_thought_tokens"], r["share_closed"]) for r in rows} == {(None, None)}
