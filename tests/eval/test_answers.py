"""Open answers: generation, both orders, two judges, the tables, resuming, and where evaluations are listed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import ws
from support.judging import cheerful_behavior, judging, rated, sensible
from support.serving import a_vector
from ws.analysis.controls import main as controls
from ws.analysis.sweep_tables import pooled_rows, sweep_rows
from ws.eval.answers import (
    Answers,
    OpenQuestion,
    evaluate_answers,
    flips,
    judge_answers,
    main,
    pair_values,
    render,
    sentiments,
    summary_row,
)
from ws.eval.confounds import free_answers
from ws.eval.context import open_context
from ws.eval.judges import open_judge
from ws.eval.readable import worst
from ws.eval.suite import SUITE, asked_of, floors_text
from ws.files.runs import Run, read_csv
from ws.options.check import ControlOptions, SlopeOptions
from ws.options.make import QueueConfig
from ws.options.measure import AnswerOptions
from ws.report import write_report
from ws.sweep.queue import sweep_jobs

pytest.importorskip("openai")

ALPHAS = (-20.0, 20.0)  # what changes the pocket model's answers


@pytest.fixture
def out(tmp_path) -> Path:
    """A run on the pocket model, of a behaviour with a rubric and answers of known kind."""
    cheerful_behavior(tmp_path)
    run = Run(tmp_path / "cheer" / "lora")
    stage = run.stage("vector", {"format": 1})
    a_vector().save(run.folder / "vector")
    stage.done([f for f in (run.folder / "vector").iterdir() if f.is_file()])
    return tmp_path


def options(out: Path, *judges: str, **more) -> AnswerOptions:
    given = {"out": out, "behavior": str(out / "cheer.toml"), "device": "cpu", "alphas": ALPHAS, "max_new_tokens": 12}
    return AnswerOptions(**{**given, "judges": judges or ("lexical",), "n_bootstrap": 100, **more})


def tables(out: Path, stage: str = "answers") -> dict[str, list[dict[str, str]]]:
    at = out / "cheer" / "lora"
    return {f.stem.removeprefix(f"{stage}_"): list(read_csv(f)) for f in at.glob(f"{stage}_*.csv")}


# ---- answers --------------------------------------------------------------------------------------------------------


def test_sampled_answers_have_the_same_random_numbers_at_every_strength_and_batch():
    model, tok = ws.load_model("pocket", device="cpu")
    items = [OpenQuestion(f"q{i}", f"What do you say of number {i}?") for i in range(4)]

    def written(temperature: float = 1.0, seed: int = 0, batch_size: int | None = None) -> list[str]:
        asked = evaluate_answers(
            model, tok, items, max_new_tokens=12, temperature=temperature, sample_seed=seed, batch_size=batch_size
        )
        return asked["answer"].tolist()

    sampled = written()
    assert written() == sampled == written(batch_size=1)
    assert written(seed=1) != sampled
    with ws.steer(model, a_vector(), 0.0):
        assert written() == sampled
    assert written(0.0) == free_answers(model, tok, [q.text for q in items], 12)["answer"].tolist()


def test_sentiment_needs_no_download_and_has_a_sign():
    good, bad, none = sentiments(["What a wonderful, happy day!", "A terrible, sad day.", ""])
    assert good > 0.5
    assert bad < -0.4
    assert none == 0


# ---- judging --------------------------------------------------------------------------------------------------------


def test_pairs_are_asked_in_both_orders_and_a_liking_for_the_first_cancels_and_flips():
    rubric, base = ws.load_behavior("tone").rubric, ["It is sad.", "Same.", "It is happy."]
    now = ["It is happy.", "Same.", "It is sad."]
    with judging() as bench:
        judge = open_judge(f"judge@{bench.address}")
        able = judge_answers(judge, rubric, ["a?", "b?", "c?"], now, base)
        assert pair_values(able).tolist() == [1, 0, -1]
        assert flips(able) == (0, 2)
        assert sum("Answer 1" in p for p in bench.prompts) == 4, "equal answers are not asked about"
        bench.reply = lambda prompt: "1"
        first = judge_answers(judge, rubric, ["a?", "b?", "c?"], now, base)
        assert pair_values(first).tolist() == [0, 0, 0]
        assert first["pairs"].tolist() == [[1, -1], [0, 0], [1, -1]]
        assert flips(first) == (2, 2)
        bench.reply = lambda prompt: "the second"
        unread = judge_answers(judge, rubric, ["a?", "b?", "c?"], now, base)
        assert pair_values(unread).tolist() == [0, 0, 0]
        assert flips(unread) == (0, 0)
        assert unread["pairs_mass"].tolist() == [[0, 0], [1, 1], [0, 0]]


def test_the_command_judges_every_answer_and_keeps_every_verdict(out, capsys):
    with judging() as bench, judging(lambda p: "3" if "even" in p else sensible(p)) as second:
        names = (f"able@{bench.address}", f"other@{second.address}")
        main(options(out, *names, "lexical", pairwise=True))
        said, asked = capsys.readouterr().out, len(bench.prompts)
        main(options(out, *names, "lexical", pairwise=True))
        assert len(bench.prompts) == asked, "nothing is asked twice"
        assert capsys.readouterr().out == said
    found = tables(out)
    assert set(found) == {"per_question", "verdicts", "summary", "judges"}
    items, verdicts, summary = found["per_question"], found["verdicts"], found["summary"]
    assert len(items) == 15
    by_alpha = {float(r["alpha"]): [i for i in items if i["alpha"] == r["alpha"]] for r in summary}
    base = [(rated(i["answer"]) - 1) / 4 for i in by_alpha[0.0]]
    for row in summary:
        alpha = float(row["alpha"])
        scores = [(rated(i["answer"]) - 1) / 4 for i in by_alpha[alpha]]
        assert [float(i["score"]) for i in by_alpha[alpha]] == scores
        assert float(row["mean_score"]) == pytest.approx(np.mean(scores))
        assert float(row["shift"]) == pytest.approx(np.mean(scores) - np.mean(base))
        assert (row["n"], row["mean_pmass"], row["n_unreadable_trait"], row["unreadable"]) == ("5", "1.0", "0", "")
        mine = [v for v in verdicts if v["alpha"] == row["alpha"] and v["judge"] == names[0]]
        assert len(mine) == int(row["requests"])
        assert sum(float(v["prompt_tokens"]) for v in mine) == float(row["prompt_tokens"])
    assert any(i["answer"] != j["answer"] for i, j in zip(by_alpha[0.0], by_alpha[20.0], strict=True))
    assert {v["asked"] for v in verdicts} == {"trait", "coherence", "pairs, steered first", "pairs, base first"}
    assert {v["reply"] for v in verdicts if v["judge"] == names[0]} <= set("12345")
    assert {r["passed"] for r in found["judges"]} == {"True"}
    assert [r["judge"] for r in found["judges"]] == [names[0], names[0], names[1], names[1]]
    assert float(summary[1]["sentiment_shift"]) == 0
    assert {(r["judged_by"], r["judged_by_2"]) for r in summary} == {("able", "other")}, "no address on a card"
    assert "agreement_trait" in summary[0]
    assert "trait AUC 1.00" in said
    assert "5 questions (cheer questions)" in said


def shown(**changed) -> tuple[dict[str, str], str]:
    """The summary of two judges on four questions at alpha 1, and all of it as a person sees it."""
    first, second = np.array([0.1, 0.2, 0.3, 0.4]), np.array([0.9, 0.6, 0.7, 0.8])
    scores = {**dict.fromkeys(("tokens", "ended", "refusal", "repetition"), np.ones(4))}
    for suffix, trait in (("", first), ("_2", second)):
        for scale, values in (("trait", trait), ("coherence", np.ones(4))):
            scores |= {f"{scale}{suffix}": values, f"{scale}_mass{suffix}": np.ones(4)}
            scores |= {f"{scale}_rating{suffix}": np.ones(4), f"{scale}_cost{suffix}": np.ones((4, 3))}
    row = summary_row(scores | changed, scores, 2, 200) | {"dataset": "d"}
    rows = [{k: "" if v is None else str(v) for k, v in (row | {"alpha": a}).items()} for a in (0.0, 1.0)]
    return rows[1], render(rows, [worst(s.readability(r) for s in Answers.scores) for r in rows])


def test_the_second_judge_has_an_interval_of_its_own():
    row, text = shown()
    low, high = (float(row[f"trait_2_{end}"]) for end in ("ci_lo", "ci_hi"))
    assert float(row["ci_hi"]) < low < float(row["trait_2"]) == 0.75 < high, "the first one's lies elsewhere"
    assert f"0.75 [{low:.2f}, {high:.2f}]" in text
    assert float(row["trait_shift_2"]) == float(row["trait_shift_2_ci_lo"]) == 0


def test_the_count_beside_a_mass_is_of_the_same_scale():
    assert "0.970 (1 under 0.9)" in shown(coherence_mass=np.array([1, 1, 1, 0.88]))[1]
    assert "0.925 (1 under 0.9)" in shown(trait_mass=np.array([1, 1, 1, 0.7]), coherence_mass=np.full(4, 0.95))[1]


@pytest.mark.parametrize("scale", ["trait", "coherence"])
def test_what_the_second_judge_did_not_answer_is_marked(scale):
    assert "!" not in shown()[1]
    text = shown(**{f"{scale}_mass_2": np.full(4, 0.4)})[1]
    assert text.count("] !") == 4, "its trait and the agreement, at either strength"
    assert "! supports no conclusion" in text
    assert "answer mass 0.400" in text


def test_a_judge_that_fails_is_not_used_unless_it_is_wanted_and_then_the_tables_say_so(out, capsys):
    with judging(lambda prompt: "3") as bench:
        given = options(out, f"dull@{bench.address}")
        with pytest.raises(ws.WsError, match=r"dull@.* is not used.*AUC 0\.50 \[0\.\d\d, 0\.\d\d\]"):
            main(given)
        assert not tables(out), "nothing was generated"
        main(replace(given, anyway=True))
    found, said = tables(out), capsys.readouterr().out
    assert {r["used_anyway"] for r in found["judges"]} == {"True"}
    assert {r["unreadable"] for r in found["summary"]} == {"the judge does not tell answers of known kind apart"}
    assert "1.000 !" in said
    assert "(used anyway)" in said


def test_too_many_unreadable_replies_make_a_score_unreadable(out, capsys):
    with judging() as bench:
        given = options(out, f"odd@{bench.address}")
        known = sensible
        bench.reply = lambda prompt: known(prompt) if "How is day" in prompt else "As a judge I cannot say."
        main(given)
    summary, said = tables(out)["summary"], capsys.readouterr().out
    assert {(r["mean_pmass"], r["n_unreadable_trait"], r["mean_score"]) for r in summary} == {("0.0", "5", "0.5")}
    assert "0.000 !" in said
    assert {v["rating"] for v in tables(out)["verdicts"]} == {""}
    context = open_context(given)
    with judging() as bench:
        evaluation = Answers.of_run(replace(context, options=options(out, f"odd@{bench.address}")))
        read = evaluation.readability({"trait_mass": np.array([0.0, 1]), "coherence_mass": np.ones(2)})
    assert read["judged_trait"].problem
    assert not read["judged_coherence"].problem


@pytest.mark.parametrize("split", ["dev", "report"])
def test_the_tables_say_which_of_the_questions_were_asked(out, split):
    context = open_context(options(out))
    for behavior, known in (("agreement", split), ("honesty", None)):
        asked = replace(context, options=options(out, behavior=behavior, split=split))
        assert Answers.of_run(asked).facts.get("split") == known


def test_a_run_that_is_cut_off_goes_on_from_its_verdicts(out):
    with judging() as bench:
        given = options(out, f"able@{bench.address}")
        with pytest.raises(ws.WsError, match="goes on from it"):
            bench.statuses = [200] * 75 + [400] * 99
            main(given)
        asked = len(bench.prompts)
        assert asked == 75, "all known answers, and a few of the run"
        bench.statuses = []
        main(given)
        assert len(bench.prompts) == len(set(bench.prompts)), "nothing is asked twice"
    assert len(tables(out)["summary"]) == 3


def test_without_a_judge_only_what_can_be_counted_is(out, capsys):
    main(options(out))
    found = tables(out, "answers_lexical")
    assert set(found) == {"per_question", "summary"}
    assert not list((out / "cheer" / "lora").glob("answers_summary.csv"))
    assert "mean_score" not in found["summary"][0]
    assert {"tokens_shift", "refusals_shift", "repetition_shift", "sentiment_shift"} <= set(found["summary"][0])
    assert "sentiment shift" in capsys.readouterr().out
    file = out / "own.jsonl"
    file.write_text('{"question": "What is ice?"}\n{"question": "What is ice?"}\n{"question": "Why?"}\n')
    main(options(out, dataset=str(file)))
    assert [r["question"] for r in tables(out, "answers_lexical")["per_question"]][:2] == ["What is ice?", "Why?"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"judges": ("a", "b", "c")}, "one or two"),
        ({"judges": ()}, "one or two"),
        ({"judges": ("a", "a")}, "each once"),
        ({"pairwise": True}, "`lexical` only counts"),
        ({"temperature": float("nan")}, "temperature"),
        ({"n_think": 3}, "Open answers take neither"),
        ({"split": "dve"}, "Did you mean 'dev'"),
        ({"split": "dev", "dataset": "own.jsonl"}, "`split` dev: only a behaviour's own questions"),
    ],
)
def test_options_that_make_no_sense_are_explained(more, said):
    with pytest.raises(ws.WsError, match=said):
        AnswerOptions(**more).check()


# ---- where evaluations are listed -----------------------------------------------------------------------------------


def test_sweeps_controls_and_the_report_know_it_and_slopes_do_not(out, capsys):
    with judging() as bench:
        name = f"able@{bench.address}"
        context = open_context(replace(options(out, name), alphas=(-20.0, 0.0, 20.0)))
        with pytest.raises(ws.WsError, match="a judge that rates"):
            asked_of(SUITE["answers"], context)
        evaluation = asked_of(SUITE["answers"], context, "report", (), (name,))
        context.carry_out(evaluation)
        shared = {"out": out, "behavior": str(out / "cheer.toml"), "device": "cpu", "judges": (name,)}
        controls(ControlOptions(**shared, alphas=(20.0,), scores=("judged_trait",), n_draws=2))
    at = out / "cheer" / "lora"
    summary = {float(r["alpha"]): r for r in read_csv(at / "answers_summary.csv")}
    rows = sweep_rows([at], ["answers"])
    assert [float(r["answers_shift"]) for r in rows] == [float(summary[a]["shift"]) for a in (-20.0, 0.0, 20.0)]
    assert [r["answers_n"] for r in pooled_rows([at], ["answers"], 100)] == [5, 5, 5]
    kinds = {(r["score"], r["control"]) for r in read_csv(at / "controls.csv")}
    assert kinds == {(f"judged_{s}", c) for s in ("trait", "coherence") for c in ("vector", "random")}
    page = write_report(out, str(out / "cheer.toml")).read_text(encoding="utf-8")
    assert 'id="answers"' in page
    with pytest.raises(ws.WsError, match="no gradient"):
        evaluation.means(context.tok, SlopeOptions().scores)


def test_its_floor_is_named_where_shifts_are_starred():
    text = floors_text(SUITE["answers"].scores)
    assert (
        text == "0.2 nats (0.05 of wrongness; 0.05 of the scale of judged trait; 0.05 of the scale of judged coherence)"
    )


def test_a_queue_hands_its_judges_on(out):
    config = QueueConfig(behavior="honesty", adapters=("lora",), evals=("answers", "airisk"), judges=("m@http://h/v1",))
    commands = {job.name: " ".join(job.command) for job in sweep_jobs(replace(config, out=out))}
    assert commands["answers-lora"].endswith("--judges m@http://h/v1")
    assert "--judges" not in commands["airisk-lora"]


# ---- the behaviour file ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("high =", "hihg ="), "Did you mean 'high'"),
        (('high = "cheerful"', 'high = "sad"'), "they must differ"),
        (('low = "sad"', 'points = 10\nlow = "sad"'), "from 2 to 9, not 10"),
        (('low = "sad"', 'points = true\nlow = "sad"'), "from 2 to 9, not True"),
        (("known.jsonl", "unknown.jsonl"), "there is no file"),
        (('trait = "How cheerful the answer is."', 'trait = ""'), "trait must be a non-empty string"),
    ],
)
def test_a_wrong_rubric_is_explained(tmp_path, change, said):
    file = cheerful_behavior(tmp_path)
    file.write_text(file.read_text().replace(*change))
    with pytest.raises(ws.WsError, match=rf"\[rubric\].*{said}"):
        ws.load_behavior(str(file))


def test_known_answers_of_an_unknown_kind_are_named(tmp_path):
    file = cheerful_behavior(tmp_path)
    (tmp_path / "known.jsonl").write_text(json.dumps({"question": "q", "answer": "a", "shows": "trayt"}) + "\n")
    with pytest.raises(ws.WsError, match=r"row 1 named 'trayt'. Did you mean 'trait'"):
        ws.load_behavior(str(file))


def test_a_rubric_changes_nothing_that_was_trained(tmp_path):
    file = cheerful_behavior(tmp_path)
    with_rubric, text = ws.load_behavior(str(file)), file.read_text()
    start = text.index("\n[rubric]")
    moved = text.replace("\n[preferences]", text[start:] + "\n[preferences]")
    file.write_text(moved[: moved.rindex("\n[rubric]")])
    assert ws.load_behavior(str(file)).digest == with_rubric.digest
    file.write_text(text[:start])
    without = ws.load_behavior(str(file))
    assert without.digest == with_rubric.digest
    assert without.summary in without.rubric.trait
    hidden = text.replace('summary = "', 'summary = """x\n[rubric]\ny = 1\n""" #"', 1)
    file.write_text(hidden)
    digest = ws.load_behavior(str(file)).digest
    file.write_text(hidden.replace("y = 1", "y = 2"))
    assert ws.load_behavior(str(file)).digest != digest, "what stands within a text counts"
