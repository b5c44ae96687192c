"""An evaluation that is registered at run time takes part in everything; docs/evaluations.md shows it."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import ws
from test_docs import ROOT, snippets
from ws.analysis.compare import main as compare
from ws.analysis.controls import main as controls
from ws.analysis.slope import main as slope
from ws.analysis.sweep_tables import pooled_rows, render, sweep_rows
from ws.delta import LinearDelta
from ws.eval import suite
from ws.eval.context import EvalContext, open_context
from ws.eval.evaluation import Evaluation, HeadlineScore
from ws.eval.suite import SUITE, asked_of, evaluation_named, headlines, register
from ws.eval.sycophancy import Sycophancy
from ws.export.card import describe, vector_card
from ws.files.runs import Run, read_csv
from ws.lm.choice import score_choices
from ws.lm.models import fingerprint, render_prompt
from ws.options.check import ControlOptions, SlopeOptions
from ws.options.make import QueueConfig, SweepConfig
from ws.options.measure import CompareOptions
from ws.options.shared import EvalOptions
from ws.report import write_report
from ws.run_sweep import main as sweep
from ws.sweep.queue import sweep_jobs

BOTH = ("sycophancy", "animals")


@pytest.fixture
def animals() -> type[Evaluation]:
    """The evaluation of the documentation, registered by its snippet."""
    (code,) = [
        c for language, c in snippets(ROOT / "docs" / "evaluations.md") if language == "python" and "register(" in c
    ]
    namespace: dict[str, object] = {"__name__": "animals"}
    exec(compile(code, "docs/evaluations.md", "exec"), namespace)
    assert SUITE["animals"] is namespace["Animals"]
    return SUITE["animals"]


@pytest.fixture(scope="module")
def pocket():
    return ws.load_model("pocket", device="cpu")


@pytest.fixture(scope="module")
def out(pocket, tmp_path_factory) -> Path:
    """A run on the bundled model, with a small random vector."""
    model, _ = pocket
    torch.manual_seed(0)
    modules = {f"model.layers.{i}.mlp.up_proj": model.get_submodule(f"model.layers.{i}.mlp.up_proj") for i in (1, 2)}
    deltas = {
        name: LinearDelta(
            m.out_features, m.in_features, u=torch.randn(m.out_features, 1), v=torch.randn(1, m.in_features)
        )
        for name, m in modules.items()
    }
    folder = tmp_path_factory.mktemp("own")
    run = Run(folder / "honesty" / "lora")
    stage = run.stage("vector", {"format": 1})
    vector = ws.SteeringVector(deltas, "pocket", fingerprint(model), info={"behavior": "honesty", "family": "lora"})
    (vector * 0.05).save(run.folder / "vector")
    stage.done([f for f in (run.folder / "vector").iterdir() if f.is_file()])
    return folder


def shared(out: Path) -> dict[str, object]:
    return {"out": out, "device": "cpu", "batch_size": 8}


def evaluated(out: Path) -> EvalContext:
    """The context of the run, with both evaluations carried out as a sweep does it."""
    context = open_context(EvalOptions(**shared(out), limit=4, n_bootstrap=100, interventions=("weight", "prompt")))
    for name in BOTH:
        context.carry_out(asked_of(SUITE[name], context))
    return context


def reference(model, tok, questions) -> np.ndarray:
    """The scores in the plainest way, question by question."""
    found = []
    for question, right in questions:
        prompt = render_prompt(tok, f"{question} Answer Yes or No.", opener="My answer:")
        ratio = score_choices(model, tok, [prompt], ("Yes", "No")).logratio[0]
        found.append(ratio if right == "Yes" else -ratio)
    return np.array(found)


def test_its_tables_hold_what_was_asked(out, animals, pocket):
    model, tok = pocket
    context = evaluated(out)
    asked = asked_of(animals, context)
    assert len(asked.items) == 4, "a limit is a draw"
    rows = read_csv(context.run.folder / "animals_per_item.csv")
    summary = {(r["intervention"], float(r["alpha"])): r for r in read_csv(context.run.folder / "animals_summary.csv")}
    assert {name for name, _ in summary} == {"base", "weight", "prompt"}
    base = reference(model, tok, asked.items)
    with ws.steer(model, context.vector, 1.0):
        steered = reference(model, tok, asked.items)
    stored = [float(r["score"]) for r in rows if r["intervention"] == "weight" and float(r["alpha"]) == 1]
    assert stored == pytest.approx(steered, abs=1e-4)
    row = summary["weight", 1.0]
    assert float(row["shift"]) == pytest.approx((steered - base).mean(), abs=1e-4)
    assert (row["eval"], row["eval_hash"], row["drawn"]) == ("animals", asked.digest, "4 of 6, seed 0")
    assert animals(items=asked.items[::-1]).digest != asked.digest
    text = asked.render([r for k, r in summary.items() if k[0] != "prompt"], context.run.folder)
    assert "right answers about animals, nats" in text
    assert "a draw of 4 of 6" in text


def test_a_sweep_has_columns_for_it(out, animals):
    at = evaluated(out).run.folder
    table = {float(r["alpha"]): r for r in read_csv(at / "animals_summary.csv") if r["intervention"] != "prompt"}
    rows, pooled = sweep_rows([at], BOTH), pooled_rows([at], BOTH, 100)
    for row in (*rows, *pooled):
        assert float(row["animals_shift"]) == pytest.approx(float(table[row["alpha"]]["shift"]))
    assert {float(r["animals_mean_pmass"]) for r in rows} == {float(r["mean_pmass"]) for r in table.values()}
    assert [r["animals_n"] for r in pooled] == [4] * 3
    assert "shift of right answers about animals" in render(pooled)


def test_controls_and_slopes_take_its_score(out, animals, pocket, capsys):
    controls(ControlOptions(**shared(out), limit=4, scores=("animals",), n_draws=2))
    rows = read_csv(out / "honesty/lora/controls.csv")
    assert {(r["score"], r["control"]) for r in rows} == {("animals", "vector"), ("animals", "random")}
    slope(SlopeOptions(**shared(out), scores=("animals", "true_claims")))
    (true, own) = read_csv(out / "honesty/lora/slope.csv")
    assert (true["score"], own["score"], own["n"], own["eval"]) == ("true_claims", "animals", "6", "animals")
    model, tok = pocket
    opened, at = open_context(EvalOptions(**shared(out))), {}
    for alpha in (-0.02, 0.02):
        with ws.steer(model, opened.vector, alpha):
            at[alpha] = float(reference(model, tok, animals.of_run(opened).items).mean())
    assert float(own["slope"]) == pytest.approx((at[0.02] - at[-0.02]) / 0.04, rel=2e-2, abs=1e-3)


def test_a_comparison_the_report_and_the_card_show_it(out, animals, capsys):
    options = CompareOptions(
        **shared(out),
        adapters=("lora",),
        interventions=("weight", "prompt"),
        evals=BOTH,
        n_prompts=3,
        target=0.02,
        n_draws=2,
        limit=4,
        capability=False,
        n_bootstrap=100,
    )
    compare(options)
    rows = read_csv(out / "honesty" / "compare.csv")
    assert {r["intervention"] for r in rows if r["score"] == "animals"} == {"weight", "prompt"}
    assert all(r["p_random"] for r in rows if (r["intervention"], r["score"]) == ("weight", "animals"))
    assert "span, animals" in capsys.readouterr().out
    assert "right answers about animals, nats" in (out / "honesty" / "compare.svg").read_text()
    at = evaluated(out).run.folder
    page = write_report(out, "honesty").read_text()
    assert 'id="animals"' in page
    assert "Does the model know its animals?" in page, "the docstring says how to read it"
    row = next(r for r in read_csv(at / "animals_summary.csv") if (r["intervention"], r["alpha"]) == ("weight", "1.0"))
    assert f"{abs(float(row['shift'])):.2f}" in page
    text = str(vector_card(describe(ws.SteeringVector.load(at / "vector"), "ada/own", at)))
    assert "| right answers about animals " in text


@pytest.mark.slow
def test_a_whole_sweep_does_it(animals, tmp_path, capsys):
    """From sampling to the report, for a behaviour that is a file of one's own."""
    file = tmp_path / "mine.toml"
    text = (Path(ws.__file__).parent / "behaviors" / "pocket" / "honesty.toml").read_text()
    file.write_text(text.replace('name = "honesty"', 'name = "mine"'))
    config = SweepConfig.preset("pocket")
    data, train = replace(config.data, n_topics=24), replace(config.train, max_steps=4)
    config = replace(config, data=data, train=train, behavior=str(file), adapters=("lora",), evals=BOTH, limit=4)
    sweep(replace(config, out=tmp_path / "out", device="cpu", n_bootstrap=100))
    (row,) = [r for r in read_csv(tmp_path / "out/mine/sweep_pooled.csv") if float(r["alpha"]) == 1]
    assert float(row["animals_shift"]) != 0
    assert "shift of right answers about animals" in capsys.readouterr().out
    assert 'id="animals"' in (tmp_path / "out/mine/report.html").read_text()


def test_a_queue_runs_its_module(animals, tmp_path):
    config = QueueConfig(model="pocket", adapters=("lora",), evals=("animals",), out=tmp_path, dataset="sets")
    (job,) = [job for job in sweep_jobs(config) if job.name == "animals-lora"]
    assert job.command[1:3] == ("-m", animals.__module__)
    assert "--dataset" not in job.command, "its items are its own"


def test_an_evaluation_without_a_gradient_has_no_slope(out, animals):
    class Plain(animals):
        name = "plain"
        scores = (HeadlineScore("plain", "plain answers"),)
        means = Evaluation.means

    register(Plain)
    with pytest.raises(ws.WsError, match="plain has no gradient"):
        slope(SlopeOptions(**shared(out), scores=("plain",)))


def test_a_score_that_is_no_choice_has_no_mass_and_says_so(out, animals, pocket):
    class Plain(animals):
        name = "plain"
        scores = (HeadlineScore("plain", "plain answers", mass=None, low=None),)

        def ask(self, model, tok):
            return {"score": super().ask(model, tok)["score"]}

    class Silent(Plain):
        scores = (HeadlineScore("plain", "plain answers"),)

    context = open_context(EvalOptions(**shared(out), limit=3, n_bootstrap=100))
    register(Plain)
    assert "plain answers, nats" in context.carry_out(Plain.of_run(context)).text
    (row, *_) = sweep_rows([context.run.folder], ("plain",))
    assert row["plain_mean_pmass"] == ""
    assert not row["plain_unreadable"]
    scores = {0.0: Plain.of_run(context).ask(*pocket)}
    with pytest.raises(ws.WsError, match="gives no `pmass`"):
        Silent.of_run(context).tables({}, scores, 100)
    with pytest.raises(ws.WsError, match="gives `pmass`"):
        Plain.of_run(context).tables({}, {0.0: animals.of_run(context).ask(*pocket)}, 100)


def test_what_cannot_be_registered_is_refused(animals):
    def variant(**attributes: object) -> type[Evaluation]:
        return type("Variant", (animals,), attributes)

    for taken in (animals, variant(name="sycophancy")):
        with pytest.raises(ws.WsError, match=f"an evaluation '{taken.name}' already"):
            register(taken)
    with pytest.raises(ws.WsError, match="a score 'wrongness' already"):
        register(variant(name="other", scores=(HeadlineScore("wrongness", "wrongness"),)))
    for name in ("", "Animals", "2animals", "my animals", "../animals"):
        with pytest.raises(ws.WsError, match="cannot name an evaluation"):
            register(variant(name=name, scores=(HeadlineScore("fine", "fine"),)))
    with pytest.raises(ws.WsError, match="at least one headline"):
        register(variant(name="other", scores=()))
    assert list(headlines())[-1] == "animals", "what was refused left nothing behind"


def test_a_variant_keeps_its_names():
    class Later(Sycophancy):
        version = 99

    assert (Later.stage, Later.place, Later.summaries) == ("sycophancy", "claims", "sycophancy_summary.csv")
    assert {s.evaluation for s in Later.scores} == {Later}
    assert {s.evaluation for s in Sycophancy.scores} == {Sycophancy}
    assert Later(items=[]).digest != Sycophancy(items=[]).digest


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Install a package with an entry point: what pip leaves of one, in a folder on the path."""

    def install(entry: str) -> None:
        about = tmp_path / "more_evaluations-1.0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text("Metadata-Version: 2.1\nName: more-evaluations\nVersion: 1.0\n")
        (about / "entry_points.txt").write_text(f"[ws.evaluations]\n{entry}\n")
        (tmp_path / "more_evaluations.py").write_text(_COLORS)
        monkeypatch.delitem(sys.modules, "more_evaluations", raising=False)
        monkeypatch.syspath_prepend(tmp_path)
        suite._register_installed.cache_clear()

    yield install
    suite._register_installed.cache_clear()


def test_evaluations_of_installed_packages_are_found_by_name(installed):
    installed("colors = more_evaluations:Colors")
    assert evaluation_named("colors").scores[0].title == "colours"
    assert "colors" in headlines()
    with pytest.raises(ws.WsError, match="Did you mean 'colors'"):
        evaluation_named("colours")


@pytest.mark.parametrize("entry", ["x = more_evaluations:MISSING", "x = no_such_module:X"])
def test_an_installed_evaluation_that_cannot_be_loaded_is_named(installed, entry):
    installed(entry)
    with pytest.raises(ws.WsError, match=f"installed evaluation {entry[4:]} cannot be loaded"):
        evaluation_named("sycophancy")


_COLORS = """
import ws

class Colors(ws.Evaluation):
    name = "colors"
    scores = (ws.HeadlineScore("colors", "colours"),)
"""
