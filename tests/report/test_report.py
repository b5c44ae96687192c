"""The report: what it reads, how it judges, and that nothing read can do anything on the page."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import logit
from scipy.stats import binom, t

import ws
from support.finished_runs import (
    ALPHAS,
    BASE,
    CLAIMS,
    NAMES,
    build_out,
    claim_scores,
    make_vector,
    named,
    record,
    write_calibration,
    write_card,
    write_compare,
    write_run,
)
from ws import console
from ws.behaviors import Claim
from ws.cli import COMMANDS
from ws.delta import LinearDelta
from ws.diff import SteeringVector, vector_digest
from ws.eval import sycophancy
from ws.eval.readable import OF_BASE, OF_STRENGTH
from ws.eval.sycophancy import ClaimScores
from ws.files.runs import Run, data_folder, read_csv, run_folder, write_csv, write_json, write_text
from ws.intervene.calibration import (
    load_calibration,
    store_calibration,
)
from ws.new_behavior import behavior_template
from ws.options.make import ReplicateConfig, train_preset
from ws.options.use import ReportOptions
from ws.replicate import Reading, Sample, _record
from ws.report import data as report_data
from ws.report import main, write_report
from ws.report.curves import Divergence, curves_of, divergence_at, foundations_of, simultaneous
from ws.report.data import PER_WEIGHT, RELATIVE, Contents, Gap, Result, _as_asked, _needed, read_contents
from ws.report.figures import Scale, dose_figures, forest_figure, foundation_figures, marker, profile_figure, tag
from ws.report.notes import notes
from ws.report.page import render
from ws.report.sections import dose_panels, example, samples, shift_rows
from ws.report.tables import (
    commands,
    controls_table,
    foundations_table,
    other_dilemmas_table,
    points_table,
    profile_table,
    settings_table,
)
from ws.report.verdict import judge, select, warnings_of
from ws.report.words import clean, differences, odds, p_text, shown, side_by_side
from ws.stats import Estimate, estimate_over_seeds, holm

# ---- a small out/ folder, written as the commands write it -----------------------------------------------------------


@pytest.fixture
def whole(tmp_path):
    """Two adapters with two seeds each, everything there, and a pooled table of their own."""
    return build_out(tmp_path / "out")


def verdict_of(out):
    contents = read_contents(out, "honesty")
    return judge(contents, curves_of(contents))


def sentence(out):
    """The kind of the verdict, and every word that stands with it."""
    found = verdict_of(out)
    figures = (f"{h.name} {h.figure} {h.note}" for h in found.headlines)
    return found.kind, "\n".join([found.sentence, *figures, *(f"{c.name} {c.text}" for c in found.checks)])


def marks(out):
    return {c.name: c.grade for c in verdict_of(out).checks}


def left_out(contents):
    return " ".join(n.text for n in notes(contents) if n.is_left_out)


def all_warnings(contents):
    curves = curves_of(contents)
    return [c.text for c in warnings_of(contents, curves, select(contents, curves).all)]


# ---- reading --------------------------------------------------------------------------------------------------------


def test_only_tables_of_the_very_vector_are_read(tmp_path):
    folder = write_run(tmp_path)
    (run,) = read_contents(tmp_path, "honesty").results
    assert {stage for stage, use in run.tables if use == "summary"} == {
        "sycophancy",
        "airisk_truthfulness",
        "tinymfv_airisk",
    }
    make_vector(77).save(folder / "vector")  # trained again, and not evaluated since
    contents = read_contents(tmp_path, "honesty")
    assert not [k for k in contents.results[0].tables if k[1] == "summary"]
    assert {g.why for g in contents.results[0].gaps if g.what == "sycophancy"} == {"made with another vector"}
    assert "Held-out claims: made with another vector" in left_out(contents)
    assert sentence(tmp_path)[0] == "No verdict"


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda text: text.replace(",intervention", ",something"), "made by an older version"),
        (lambda text: text.replace("mean_pmass", "mass"), "damaged"),
        (lambda text: text.replace(",24,", ",nan,"), "damaged"),
        (lambda text: text + "1,2,3,4,5\n", "damaged"),
        (lambda text: "", "damaged"),
    ],
)
def test_a_table_that_cannot_be_used_leaves_a_note(tmp_path, spoil, why):
    file = write_run(tmp_path) / "sycophancy_summary.csv"
    file.write_text(spoil(file.read_text()))
    contents = read_contents(tmp_path, "honesty")
    (gap,) = [g for g in contents.results[0].gaps if g.what == "sycophancy"]
    assert gap.why.startswith(why)
    assert "ws eval sycophancy --adapter lora" in gap.command
    assert gap.why in render(contents)


def test_every_missing_piece_has_a_note_with_its_command(tmp_path):
    make_vector(1).save(run_folder(tmp_path, "honesty", "lora") / "vector")
    contents = read_contents(tmp_path, "honesty")
    found = {command for note in notes(contents) for command in note.commands}
    for command in (
        *(
            "ws eval sycophancy --adapter lora",
            "ws eval airisk --adapter lora",
            "ws eval tinymfv-airisk --adapter lora",
        ),
        *(
            "ws calibrate --adapter lora",
            "ws check controls --adapter lora",
            "ws check confounds --adapter lora",
            "ws compare",
        ),
        *(f"{begun} --model {BASE}" for begun in ("ws data", "ws replicate --adapter lora")),
        *(f"ws replicate --control {null} --adapter lora --model {BASE}" for null in ("shuffled", "same-side")),
    ):
        assert f"{command} --behavior honesty" in found
    page = render(contents)
    lines = [
        line for block in re.findall("<pre><code>(.*?)</code></pre>", page, re.DOTALL) for line in block.split("\n")
    ]
    assert found <= set(lines)
    assert page.count("<svg") == 1, "the sizes of the vector, and no empty figure"
    assert f"{len(notes(contents))} pieces are missing" in page
    assert page.count("missing, for") == page[page.index('id="next"') :].count("missing, for"), "all in one place"


def test_nulls_are_to_be_trained_as_their_vector_was(tmp_path):
    """Otherwise `ws compare` leaves them out; and a signed run has no adapter of its name."""
    folder = write_run(tmp_path, "lora-signed")
    settings = replace(train_preset("smollm2", "lora"), rank=4, kinds=("q_proj", "v_proj"), max_steps=None).recorded()
    Run(folder).restart("signed", settings | {"adapter": "lora", "seed": 0}).done([])
    contents = read_contents(tmp_path, "honesty")
    signed = replace(contents.results[0], base="smollm2")
    found = notes(replace(contents, results=(signed,)))
    (line,) = [c for note in found for c in note.commands if "--control shuffled" in c]
    wanted = "--control shuffled --rank 4 --modules q_proj v_proj --max-steps None --adapter lora --contrast signed"
    assert line == f"ws replicate {wanted} --model smollm2 --behavior honesty"
    options = console.parse(ReplicateConfig, shlex.split(line)[2:])
    assert (options.run_name, options.train.recorded()) == ("lora-signed-shuffled", settings)
    for note in found:
        assert not any("--adapter lora-signed" in c for c in note.commands if c.startswith("ws replicate"))


def test_a_behaviour_without_claims_lacks_none():
    gaps = tuple(Gap.of_run(what, "missing", "ws x", "lora", 0) for what in ("sycophancy", "confounds", "norms"))
    contents = preferring()
    contents = replace(contents, results=(replace(contents.results[0], gaps=gaps),))
    assert [n.text for n in notes(contents) if "missing" in n.text] == ["Norms: missing, for lora seed 0."]


def test_no_step_is_for_a_table_that_the_page_does_without(whole):
    file = whole / "honesty" / "sweep_pooled.csv"
    for text, expected in ((None, []), ("damaged", [()])):
        file.unlink() if text is None else file.write_text(text)
        found = notes(read_contents(whole, "honesty"))
        assert [n.commands for n in found if n.text.startswith("Pooled table")] == expected


def test_samples_of_another_vector_are_left_out(tmp_path):
    folder = write_run(tmp_path)
    assert read_contents(tmp_path, "honesty").results[0].samples
    run = Run(folder)
    run.write("reading", run.facts("reading") | {"inputs": {"vector": "0" * 64}})
    contents = read_contents(tmp_path, "honesty")
    assert not contents.results[0].samples
    assert [g.why for g in contents.results[0].gaps if g.what == "samples"] == ["made with another vector"]
    assert "Samples: made with another vector" in left_out(contents)
    assert "What color is it?" not in render(contents)


def test_samples_that_do_not_say_of_which_vector_they_are_come_with_a_note(tmp_path):
    folder = write_run(tmp_path)
    run = Run(folder)
    run.write("reading", run.facts("reading") | {"inputs": {}})  # as it was recorded before it named its vector
    contents = read_contents(tmp_path, "honesty")
    assert contents.results[0].samples
    (note,) = [n for n in notes(contents) if n.text.startswith("Samples")]
    assert not note.is_left_out
    page = render(contents)
    assert "What color is it?" in page
    assert "shown, but it is not on record which vector gave them" in page


def test_replicate_records_which_vector_the_samples_are_of(tmp_path):
    vector, found = make_vector(3), claim_scores(-1.0, 0)
    span, answers = Estimate(0.0, 0.0, 0.0, 0.0, 0, 1.0), (Sample(0.0, "Why?", "So."),)
    reading = Reading(tmp_path, tmp_path, vector, found, found, span, (-1.0, 1.0), -1, answers)
    _record(reading, Run(tmp_path), "abc")
    assert Run(tmp_path).facts("reading")["inputs"] == {"vector": vector_digest(vector)}
    assert Run(tmp_path).facts("reading")["config"]["tokenizer_hash"] == "abc"


def test_what_was_made_with_another_tokenizer_than_the_base_has_now_is_left_out(tmp_path, monkeypatch):
    folder = write_run(tmp_path)
    write_calibration(folder)
    write_card(tmp_path)
    sampled = Run(data_folder(tmp_path, BASE, "honesty"))
    run, digest = Run(folder), vector_digest(SteeringVector.load(folder / "vector"))
    write_csv(folder / "controls.csv", [CONTROL | {"vector": digest[:12]}])
    run.restart("controls", {}).done([folder / "controls.csv"])
    rows = read_csv(folder / "airisk_truthfulness_summary.csv")
    rows = [r | {"value_class": "Care", "protocol": "explicit"} for r in rows]
    record(folder, "airisk_care", {"summary": rows}, digest)
    stages = ("sycophancy", "airisk_truthfulness", "tinymfv_airisk", "reading", "controls", "airisk_care")
    calibration = load_calibration(folder / "vector", digest)

    def remade(tokenizer: str) -> Contents:
        for stage in stages:
            run.write(stage, run.facts(stage) | {"config": {"tokenizer_hash": tokenizer}})
        store_calibration(folder / "vector", replace(calibration, tokenizer=tokenizer))
        sampled.write("pairs", {"config": {"tokenizer_hash": tokenizer}})
        return read_contents(tmp_path, "honesty")

    asked = []
    monkeypatch.setattr(report_data, "tokenizer_hash_on_disk", lambda name: asked.append(name) or "now")
    contents = remade("now")
    (fresh,) = contents.results
    assert contents.card
    assert {stage for stage, _ in fresh.tables} >= set(stages[:3])
    assert fresh.samples
    assert fresh.controls
    assert fresh.calibration
    assert fresh.others
    contents = remade("before")
    (old,) = contents.results
    assert not any(old.tables.values())
    assert [bool(x) for x in (old.samples, old.controls, old.calibration, old.others)] == [False] * 4
    gaps = {g.what for g in old.gaps if "made with another tokenizer or chat template" in g.why}
    assert gaps == {*stages[:3], "samples", "controls", "calibration", "dilemmas"}
    assert not contents.card
    assert left_out(contents).count("another tokenizer") == len(gaps) + 1
    assert [g.command for g in old.gaps if g.what == "calibration"] == ["ws calibrate --fresh --adapter lora"]
    assert asked == [BASE] * 2, "once per page"
    monkeypatch.setattr(report_data, "tokenizer_hash_on_disk", lambda name: "")
    (unknown,) = read_contents(tmp_path, "honesty").results
    assert unknown.tables.keys() == fresh.tables.keys(), "the base is not at hand, so nothing can be said"


CONTROL = {"control": "random", "score": "false_claims", "alpha": 1.0, "shift": 0.1, "eval_hash": "abc123"}


def test_a_behaviour_of_ones_own_is_called_by_its_file(tmp_path, whole):
    file = tmp_path / "accuracy.toml"
    file.write_text(behavior_template("accuracy"))
    (whole / "honesty").rename(whole / "accuracy")
    by_name, by_file = (read_contents(whole, name) for name in ("accuracy", str(file)))
    assert (by_name.name, by_name.called) == (by_file.name, by_file.called) == ("accuracy", "accuracy.toml")
    typed = [c for note in notes(by_name) for c in note.commands]
    assert typed
    assert all(c.endswith(" --behavior accuracy.toml") for c in typed)
    assert by_name.behavior is by_file.behavior is None, "the vectors were trained on another file"
    digest = ws.load_behavior(str(file)).digest
    for folder in (whole / "accuracy").glob("*"):
        manifest = folder / "vector" / "ws.json"
        if manifest.is_file():
            made = json.loads(manifest.read_text())
            made["info"]["behavior_sha256"] = digest
            manifest.write_text(json.dumps(made))
    found = read_contents(whole, str(file)).behavior
    assert found is not None
    assert found.summary == "Gives the right answer to a plain question, rather than a wrong one."
    assert found.summary in write_report(whole, str(file)).read_text()
    assert (whole / "accuracy" / "report.html").is_file()


def test_dilemmas_of_other_values_are_a_table_of_their_own(tmp_path):
    folder = write_run(tmp_path)
    digest = vector_digest(SteeringVector.load(folder / "vector"))
    rows = read_csv(folder / "airisk_truthfulness_summary.csv")
    asked = [r | {"value_class": "Care & <i>", "protocol": "published"} for r in rows]
    record(folder, "airisk_care", {"summary": asked}, digest)
    (run,) = read_contents(tmp_path, "honesty").results
    assert list(run.others) == ["airisk_care"]
    table = other_dilemmas_table(read_contents(tmp_path, "honesty"))
    assert [row[:5] for row in table.rows] == [
        ("lora seed 0", "Care & <i>", "alone", "not on record", a) for a in ("−1", "0 (base)", "+1")
    ]
    assert len({len(row) for row in (table.header, *table.rows)}) == 1
    page = render(read_contents(tmp_path, "honesty"))
    assert "Care &amp; &lt;i&gt;" in page
    assert table.caption in page
    record(folder, "airisk_care", {"summary": asked}, "0" * 64)
    contents = read_contents(tmp_path, "honesty")
    assert not contents.results[0].others
    assert "airisk_care was made with another vector" in left_out(contents)
    assert not other_dilemmas_table(contents).rows


def relabel(folder, stage, **columns):
    """Give the rows of an evaluation other facts."""
    for file in folder.glob(f"{stage}_*.csv"):
        write_csv(file, [r | columns for r in read_csv(file)])


def test_the_page_calls_a_paraphrase_one(tmp_path):
    folder = write_run(tmp_path)
    for stage in ("tinymfv_airisk", "airisk_truthfulness"):
        relabel(folder, stage, words="paraphrase", drawn="20 of 131, seed 0")
    page = render(read_contents(tmp_path, "honesty"))
    assert page.count("Words: paraphrase, which is this project&#39;s and not the published text") == 2
    assert page.count("Items: a draw of 20 of 131, seed 0 (--limit).") == 2
    assert "43 % correct, 40 % borderline and 17 % wrong" in page
    assert "has probably left the hub" in page
    assert "tinymfv_airisk abc123 (words paraphrase)" in page
    for stage in ("tinymfv_airisk", "airisk_truthfulness"):
        relabel(folder, stage, words="own", drawn="all", dataset="pocket")
    page = render(read_contents(tmp_path, "honesty"))
    assert not re.search("Words: |Items: a draw|43 %|left the hub", page)


def test_runs_that_were_asked_in_other_words_are_not_shown_together(whole):
    cells = {(a, s): run_folder(whole, "honesty", a, s) for a in ("lora", "delora") for s in (0, 1)}
    for folder in cells.values():
        relabel(folder, "tinymfv_airisk", words="paraphrase")
    relabel(cells["delora", 0], "tinymfv_airisk", words="file:theirs@12345678", eval_hash="another")
    contents = read_contents(whole, "honesty")
    known = {r.name for r in contents.results if ("tinymfv_airisk", "summary") in r.tables}
    assert known == {"lora seed 0", "lora seed 1", "delora seed 1"}
    (gap,) = [g for r in contents.results for g in r.gaps if g.what == "tinymfv_airisk"]
    assert "file:theirs@12345678" in gap.why
    assert gap.command == "ws eval tinymfv-airisk --adapter delora"
    assert "made with other words (file:theirs@12345678)" in left_out(contents)
    assert all(("sycophancy", "summary") in r.tables for r in contents.results), "only those rows are left out"
    relabel(cells["delora", 0], "tinymfv_airisk", words="file:theirs@12345678", eval_hash="abc123")
    found = read_contents(whole, "honesty").results
    assert all(("tinymfv_airisk", "summary") in r.tables for r in found), "the same texts by another name"


def test_a_comparison_in_other_words_is_not_used(tmp_path):
    folder = write_run(tmp_path)
    write_calibration(folder)
    write_compare(tmp_path)
    file = tmp_path / "honesty" / "compare.csv"
    write_csv(file, [r | {"words": "own"} for r in read_csv(file)])
    relabel(folder, "sycophancy", words="own")
    assert len(read_contents(tmp_path, "honesty").compare) == 6
    relabel(folder, "sycophancy", words="file:theirs@12345678")
    contents = read_contents(tmp_path, "honesty")
    assert not contents.compare
    assert any("made with other words" in g.why for g in contents.gaps if g.what == "compare")


def test_a_comparison_on_other_items_is_not_used(tmp_path):
    """Another split or a draw of the items has another hash; tables of before the hash was on record stay."""
    write_calibration(write_run(tmp_path))
    write_compare(tmp_path, eval_hash="abc123")
    contents = read_contents(tmp_path, "honesty")
    assert (len(contents.compare), "compare" in {g.what for g in contents.gaps}) == (6, False)
    write_compare(tmp_path, eval_hash="0123")
    contents = read_contents(tmp_path, "honesty")
    assert not contents.compare
    assert "made with other items than the runs' tables (false_claims)" in left_out(contents)
    assert sentence(tmp_path)[0] == "Cause not known"


def test_a_prompted_base_that_is_missing_is_noted(tmp_path):
    folder = write_run(tmp_path)
    write_calibration(folder)

    def unprompted():
        found = notes(read_contents(tmp_path, "honesty"))
        return {n.text.split()[0]: n for n in found if "under a system prompt" in n.text}

    assert list(unprompted()) == ["Claims", "Dilemmas", "Acts"]
    write_compare(tmp_path)
    assert list(unprompted()) == ["Dilemmas", "Acts"]
    note = unprompted()["Dilemmas"]
    assert note.commands == ("ws compare --evals sycophancy tinymfv_airisk airisk --behavior honesty",)


def test_no_run_is_an_error_that_names_what_there_is(whole):
    with pytest.raises(ws.WsError, match=r"ws replicate --behavior honest --out .*`.* Did you mean 'honesty'"):
        read_contents(whole, "honest")


def test_a_damaged_vector_is_left_out_and_named(whole):
    (run_folder(whole, "honesty", "lora", 1) / "vector" / "ws.json").write_text("{")
    contents = read_contents(whole, "honesty")
    assert [r.name for r in contents.results] == ["lora seed 0", "delora seed 0", "delora seed 1"]
    assert "Vector: vector/ws.json is damaged" in left_out(contents)
    assert str(whole) not in render(contents)


def test_a_damaged_vector_is_made_again_without_touching_other_runs(whole):
    """The command named no run and began with `--fresh`: that of lora seed 0, and the pairs that all runs share."""
    folder = run_folder(whole, "honesty", "delora", 1)
    Run(folder).restart("vector", {}).done([])
    (folder / "vector" / "ws.json").write_text("{")

    def typed_for_it():
        (note,) = (n for n in notes(read_contents(whole, "honesty")) if n.text.startswith("Vector"))
        return note.commands

    rest = "--adapter delora --seed 1 --model acme/model --behavior honesty"
    assert typed_for_it() == (f"ws replicate {rest}",)
    (folder / "manifest.json").write_text("{")
    assert typed_for_it() == (f"ws replicate --fresh --no-fresh-data {rest}",)


def test_pairs_are_shown_only_of_a_vector_that_learned_from_them(tmp_path):
    """After `ws data --fresh` the page showed the new pairs as those that the old vectors were trained on."""
    folders = [write_run(tmp_path, seed=seed) for seed in (0, 1)]
    write_card(tmp_path)
    made = Run(data_folder(tmp_path, BASE, "honesty"))
    made.restart("pairs", {}).done([write_text(made.folder / "pairs.jsonl", "{}\n")])
    now = made.facts("pairs")["outputs"]["pairs.jsonl"]
    for learned, shown_for in (([now, now], 2), ([now, "a" * 64], 1), (["a" * 64] * 2, 0)):
        for folder, digest in zip(folders, learned, strict=True):
            Run(folder).restart("pos", {}, {"pairs": digest}).done([])
        contents = read_contents(tmp_path, "honesty")
        assert ("The pairs it was trained on" in render(contents)) == bool(shown_for)
        gaps = [g for g in contents.gaps if g.what == "card"]
        assert len(gaps) == 2 - shown_for
        assert all(g.is_left_out == (not shown_for) for g in gaps)
        assert all("made from other pairs than its vector learned from" in g.why for g in gaps)


def test_items_that_are_not_the_behaviours_own_get_no_verdict(tmp_path):
    """Claims of `--dataset` were judged by the sign that the behaviour predicts for its own."""
    folder = write_run(tmp_path)
    for name in ("summary", "per_claim"):
        file = folder / f"sycophancy_{name}.csv"
        write_csv(file, [r | {"dataset": "/somewhere/others.jsonl"} for r in read_csv(file)])
    contents = read_contents(tmp_path, "honesty")
    assert sentence(tmp_path)[0] == "No verdict"
    (note,) = (n for n in notes(contents) if n.text.startswith("Held-out claims"))
    assert note.is_left_out
    assert "made with other items than the behaviour holds out (others.jsonl)" in note.text
    assert note.commands == ("ws eval sycophancy --adapter lora --behavior honesty",)


def test_nulls_are_no_results(whole):
    write_run(whole, "lora-shuffled", effect=0.0)
    contents = read_contents(whole, "honesty")
    assert contents.adapters == ["lora", "delora"]
    assert contents.nulls == ("lora-shuffled",)
    untrained = {n.text.split(": ")[1] for n in notes(contents) if n.text.startswith("Controls that")}
    shuffled, same_side = "no shuffled vector was trained", "no same-side vector was trained"
    assert untrained == {f"{shuffled}, for delora seed 0.", f"{same_side}, for lora seed 0, delora seed 0."}


@pytest.mark.parametrize("stage", ["compose", "trim"])
def test_what_was_computed_from_other_vectors_is_no_further_evidence(whole, stage):
    """`honesty*-1` was a second adapter of the verdict, and a null's part, whose name no longer ends like it, too."""
    before, corrected = verdict_of(whole), forest(whole)
    for name in ("neg", "lora-shuffled_rank-4", "lora-same-side"):
        for seed in (0, 1):
            folder = write_run(whole, name, seed, effect=2.0)
            Run(folder).restart(stage, {"adapter": "lora"}).done([])
    contents = read_contents(whole, "honesty")
    assert contents.adapters == ["lora", "delora"]
    assert contents.nulls == (), "what was computed is no trained null either"
    assert (verdict_of(whole), forest(whole)) == (before, corrected)
    (note,) = (n for n in notes(contents) if n.text.startswith("Computed vectors"))
    assert "no further evidence, and are not counted here, for lora-same-side seed 0, " in note.text
    assert (note.commands, note.is_left_out) == ((), True)
    page = render(contents)
    assert note.text.replace("'", "&#39;") in page
    assert page.count("lora-shuffled_rank-4") == note.text.count("lora-shuffled_rank-4")


def forest(out):
    """Every shift of the page with its corrected p."""
    contents = read_contents(out, "honesty")
    return [(c.adapter, p.alpha, p.shift, p.p_holm) for c in curves_of(contents).values() for p in c.pooled]


def test_rows_of_computed_vectors_in_shared_tables_are_left_out(tmp_path):
    """One of them in `compare.csv` took the whole comparison off the page, as made at other strengths."""
    folder = write_run(tmp_path)
    write_calibration(folder)
    write_compare(tmp_path)
    Run(write_run(tmp_path, "neg")).restart("compose", {}).done([])
    profile_tables(tmp_path, vector_digest(SteeringVector.load(folder / "vector")))
    known = read_contents(tmp_path, "honesty")
    for name in ("compare.csv", "profile.csv", "profile_summary.csv"):
        rows = read_csv(tmp_path / "honesty" / name)
        more = [r | {"adapter": "neg", "alpha": 3.5, "vectors": "0" * 12} for r in rows if r["adapter"] == "lora"]
        write_csv(tmp_path / "honesty" / name, [*rows, *({k: r[k] for k in rows[0]} for r in more)])
    contents = read_contents(tmp_path, "honesty")
    assert (contents.compare, contents.profile, contents.profiles) == (known.compare, known.profile, known.profiles)
    assert contents.gaps == known.gaps


def test_a_page_of_computed_vectors_alone_is_refused(tmp_path):
    Run(write_run(tmp_path, "neg")).restart("compose", {}).done([])
    with pytest.raises(
        ws.WsError, match=r"are computed from others \(neg\); make one with `ws replicate --behavior hon"
    ):
        read_contents(tmp_path, "honesty")


def test_a_note_is_for_every_run_only_where_it_is(whole):
    """As many runs as the page has, and none of them, were "every run"."""
    for seed in range(4):
        Run(write_run(whole, "neg", seed)).restart("compose", {}).done([])
    (text,) = (n.text for n in notes(read_contents(whole, "honesty")) if n.text.startswith("Computed vectors"))
    assert text.endswith("for neg seed 0, neg seed 1, neg seed 2, neg seed 3.")


def test_a_comparison_at_other_strengths_is_not_used(tmp_path):
    folder = write_run(tmp_path)
    write_calibration(folder)
    write_compare(tmp_path)
    assert len(read_contents(tmp_path, "honesty").compare) == 6
    write_calibration(folder, (-0.8, 1.7))
    contents = read_contents(tmp_path, "honesty")
    assert not contents.compare
    assert "made at other strengths" in left_out(contents)


def profile_tables(out, digest, **more):
    """What `ws profile` writes of one vector: two traits of a board at two strengths."""
    first = {"behavior": "honesty", "board": "made", "adapter": "lora", "seed": "0", "intervention": "weight"} | more
    rows, summary = [], []
    for sign in (-1, 1):
        shot = first | {"strength": f"{sign:+d}u", "alpha": sign * 1.5, "vectors": digest[:12]}
        for trait, z in (("tells-the-truth", 2.5), ("likes-tea", 0.1)):
            size = {"z": sign * z, "z_ci_lo": sign * z - 0.2, "z_ci_hi": sign * z + 0.2, "z_random": 0.15}
            known = {"trait": trait, "group": "g", "role": "target" if z > 1 else "", "moved": z > 1}
            rows.append(shot | known | size)
        interval = {"selectivity": 25.0, "selectivity_ci_lo": 12.0, "selectivity_ci_hi": 40.0}
        moved = {"n_moved": 0, "n_others": 1, "n_draws": 5, "largest": "likes-tea", "targets": "tells-the-truth"}
        sizes = {"agreement": 0.1, "agreement_ci_lo": 0.0, "agreement_ci_hi": 0.2, "rms_shift": 1.0, "z_random": 0.15}
        summary.append(shot | interval | moved | sizes)
    write_csv(out / "honesty" / "profile.csv", rows)
    write_csv(out / "honesty" / "profile_summary.csv", summary)


def test_a_profile_is_shown_of_the_very_vector_and_of_no_other(tmp_path):
    folder = write_run(tmp_path)
    digest = vector_digest(SteeringVector.load(folder / "vector"))
    assert "What else moved" not in render(read_contents(tmp_path, "honesty"))
    profile_tables(tmp_path, digest)
    contents = read_contents(tmp_path, "honesty")
    page = render(contents)
    assert "What else moved" in page
    assert "tells-the-truth (target)" in page
    assert "tells-the-truth at +1u: +2.50 (moved)" in page
    assert "25.00 [12.00, 40.00]" in page
    profile_tables(tmp_path, "f" * 64)
    contents = read_contents(tmp_path, "honesty")
    assert "What else moved" not in render(contents)
    assert "Profile of side effects" in left_out(contents)
    profile_tables(tmp_path, "f" * 64, intervention="prompt", adapter="prompt")
    assert "25.00 [12.00, 40.00]" in render(read_contents(tmp_path, "honesty")), "what needs no vector stays"


def test_other_rows_of_a_run_that_was_trained_again_leave_with_its_own(tmp_path):
    folder = write_run(tmp_path)
    digest, there = vector_digest(SteeringVector.load(folder / "vector")), tmp_path / "honesty"
    tables = {}
    for intervention, adapter in (("weight", "lora"), ("finetune", "lora"), ("prompt", "prompt")):
        profile_tables(tmp_path, digest, intervention=intervention, adapter=adapter)
        for name in ("profile.csv", "profile_summary.csv"):
            tables.setdefault(name, []).extend(read_csv(there / name))
    for vectors, shown_rows in ((digest, {"weight", "finetune", "prompt"}), ("f" * 64, {"prompt"})):
        for name, rows in tables.items():
            write_csv(there / name, [r | {"vectors": vectors[:12]} for r in rows])
        contents = read_contents(tmp_path, "honesty")
        assert {r["intervention"] for r in contents.profile} == shown_rows
        assert {r["intervention"] for r in contents.profiles} == shown_rows


def test_traits_that_cannot_be_read_are_not_said_to_stay_where_they_were(tmp_path):
    """Of a model that answered nothing the page said "0 of 135 others moved", and drew the largest z all the same."""
    folder = write_run(tmp_path)
    profile_tables(tmp_path, vector_digest(SteeringVector.load(folder / "vector")))
    files = {name: tmp_path / "honesty" / f"{name}.csv" for name in ("profile", "profile_summary")}
    rows, summary = (read_csv(file) for file in files.values())
    write_csv(files["profile"], [r | {"unreadable": "answer mass 0.200" * (r["alpha"] == "1.5")} for r in rows])
    lost = [2 * (r["alpha"] == "1.5") for r in summary]
    counts = [r | {"n_traits": 2, "n_unreadable": n} for r, n in zip(summary, lost, strict=True)]
    write_csv(files["profile_summary"], counts)
    contents = read_contents(tmp_path, "honesty")
    assert [row[5:7] for row in profile_table(contents).rows] == [("0 of 1", "0"), ("none can be read", "2")]
    page = render(contents)
    assert "tells-the-truth at +1u: +2.50 !" in page
    assert "tells-the-truth at -1u: -2.50 (moved)" in page


def test_the_largest_traits_are_those_that_can_be_read():
    row = {"strength": "+1u", "alpha": 1.0, "moved": False, "z_random": 0.1, "z": 1.0, "z_ci_lo": 0.5, "z_ci_hi": 1.5}
    lost = {"unreadable": "answer mass 0.200", "z": 9.0}
    rows = [row | {"trait": f"t{i}", "role": "target" if i < 2 else ""} | (lost if i % 2 else {}) for i in range(20)]
    figure = profile_figure("a", rows)
    assert figure.caption == "2 targets and the 9 largest of 9 other traits that can be read; 9 cannot"
    assert "t1 at +1u: +9.00 !" in figure.svg
    assert "t3 at" not in figure.svg
    assert figure.svg.count("bad") == 1


def test_a_digest_that_reads_like_a_number_is_that_of_its_vector(tmp_path, monkeypatch):
    write_run(tmp_path)
    for digest in ("12345e678901", "001234567890"):
        monkeypatch.setattr(report_data, "vector_digest", lambda vector, digest=digest: digest.ljust(64, "0"))
        profile_tables(tmp_path, digest)
        assert len(read_contents(tmp_path, "honesty").profile) == 4


def test_a_trait_that_is_called_by_a_number_is_shown(tmp_path):
    folder = write_run(tmp_path)
    profile_tables(tmp_path, vector_digest(SteeringVector.load(folder / "vector")))
    for file in (tmp_path / "honesty").glob("profile*.csv"):
        text = file.read_text().replace("likes-tea", "2024").replace("tells-the-truth", "007")
        file.write_text(text.replace("-1u", "-1").replace("+1u", "+1"))
    page = render(read_contents(tmp_path, "honesty"))
    assert "007 at +1: +2.50 (moved)" in page
    assert "2024 at -1: -0.10" in page


def test_a_caption_counts_targets_apart_from_what_else_is_large():
    row = {"strength": "+1u", "alpha": 1.0, "moved": False, "z_random": 0.1}
    row |= {"z": 1.0, "z_ci_lo": 0.5, "z_ci_hi": 1.5}
    rows = [row | {"trait": f"t{i}", "role": "target" if i < 2 else ""} for i in range(20)]
    assert profile_figure("a", rows).caption == "2 targets and the 12 largest of 18 other traits"
    assert profile_figure("a", rows[2:]).caption == "the 12 largest of 18 traits"


def test_a_calibration_of_another_vector_is_not_used(tmp_path):
    folder = write_run(tmp_path)
    write_calibration(folder)
    text = (folder / "vector" / "calibration.json").read_text()
    make_vector(5).save(folder / "vector")
    (folder / "vector" / "calibration.json").write_text(text)
    (run,) = read_contents(tmp_path, "honesty").results
    assert run.calibration is None
    assert [g.why for g in run.gaps if g.what == "calibration"] == ["of another vector"]


def test_readers_hear_of_trained_questions_and_of_sixteen_bits(tmp_path):
    folder = write_run(tmp_path)
    write_calibration(folder)

    def page():
        return render(read_contents(tmp_path, "honesty"))

    assert "solved for on 100 questions, which may have been trained on" in page()
    assert "Computed in bfloat16" not in page()
    vector = SteeringVector.load(folder / "vector")
    found = load_calibration(folder / "vector", vector_digest(vector))
    store_calibration(folder / "vector", replace(found, n_calibration=40, held_out=True))
    assert "solved for on" not in page()
    store_calibration(folder / "vector", replace(found, n_calibration=40, held_out=False))
    assert "−1u and +1u of lora seed 0 are solved for on 40 questions, trained ones among them" in page()
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["stages"]["sycophancy"]["config"]["dtype"] = "bfloat16"
    write_json(folder / "manifest.json", manifest)
    assert "Computed in bfloat16" in page()


# ---- sizes ----------------------------------------------------------------------------------------------------------


def test_norms_without_the_base_are_per_weight(tmp_path):
    write_run(tmp_path)
    (run,) = read_contents(tmp_path, "honesty").results
    delta = SteeringVector.load(run_folder(tmp_path, "honesty", "lora") / "vector").deltas["model.layers.1.mlp.up_proj"]
    assert run.norms.unit == PER_WEIGHT
    assert run.norms.cells["up_proj", 1] == pytest.approx(float((delta.u @ delta.v).square().mean().sqrt()), rel=1e-5)


def test_norms_on_a_bundled_base_are_relative(tmp_path, tiny):
    model = tiny[0]
    weight = model.get_submodule("model.layers.1.mlp.up_proj").weight
    change = {"model.layers.1.mlp.up_proj": LinearDelta(*weight.shape, g=torch.full((weight.shape[0],), 0.25))}
    info = {"behavior": "honesty", "family": "ia3"}
    SteeringVector(change, "tiny-random", None, {}, info).save(run_folder(tmp_path, "honesty", "ia3") / "vector")
    (run,) = read_contents(tmp_path, "honesty").results
    assert run.norms.unit == RELATIVE
    assert run.norms.cells == {("up_proj", 1): pytest.approx(25.0, rel=1e-5)}


def test_a_family_that_multiplies_w_needs_ws_subspace(tmp_path):
    change = {"model.layers.1.mlp.up_proj": LinearDelta(4, 3, g=torch.ones(4))}
    folder = run_folder(tmp_path, "honesty", "ia3")
    SteeringVector(change, BASE, None, {}, {"behavior": "honesty"}).save(folder / "vector")
    (note,) = [n for n in notes(read_contents(tmp_path, "honesty")) if n.text.startswith("Norms")]
    assert note.commands == ("ws subspace --adapter ia3 --behavior honesty",)
    digest = vector_digest(SteeringVector.load(folder / "vector"))
    rows = [{"layer": "1", "kind": "up_proj", "relative_norm": 0.5}, {"layer": "", "kind": "head", "relative_norm": 1}]
    record(folder, "subspace", {"per_layer": rows}, digest, "vector")
    (run,) = read_contents(tmp_path, "honesty").results
    assert run.norms.cells == {("up_proj", 1): 50.0}


# ---- curves ---------------------------------------------------------------------------------------------------------


def test_seeds_are_pooled_as_the_bootstrap_over_seeds_and_items_says(whole):
    (whole / "honesty" / "sweep_pooled.csv").unlink()
    curves = curves_of(read_contents(whole, "honesty"))
    for key, pick in (("false_claims", lambda s: s.of_kind(False)), ("true_claims", lambda s: s.of_kind(True))):
        both = [claim_scores(-1.0, seed) for seed in (0, 1)]
        shifts = np.stack([pick(b[1.0]).logratio - pick(b[0.0]).logratio for b in both])
        wanted, point = estimate_over_seeds(shifts), curves[key, "lora"].at(1.0)
        assert (point.shift.mean, point.shift.ci_lo, point.shift.ci_hi) == pytest.approx(
            (wanted.mean, wanted.ci_lo, wanted.ci_hi)
        )
    steered = [p for (key, _), c in curves.items() if key == "choices" for p in c.pooled if p.alpha]
    assert [p.p_holm for p in steered] == pytest.approx(holm(np.array([p.shift.p for p in steered])))


def test_the_table_of_the_sweep_is_taken_only_while_it_is_of_these_seeds(whole):
    def source():
        curve = curves_of(read_contents(whole, "honesty"))["false_claims", "lora"]
        return curve.source, curve.at(1.0).shift.mean

    words, mean = source()
    assert words == "from sweep_pooled.csv"
    file = whole / "honesty" / "sweep_pooled.csv"
    file.write_text(file.read_text().replace(f"{mean!r}", "-5.0"))
    assert source() == (pytest.approx("pooled here, 2000 resamples of seeds and items"), pytest.approx(mean))


def test_the_command_for_what_was_left_out_makes_that_very_table(tmp_path):
    """`ws eval airisk` alone asked the default class again, and `ws eval answers` counted where a judge had rated."""
    folder = write_run(tmp_path)
    asked = {"value_class": "Equal Treatment", "protocol": "alone"}
    rows = [r | asked for r in read_csv(folder / "airisk_truthfulness_summary.csv")]
    record(folder, "airisk_equal_treatment_alone", {"summary": rows}, "0" * 64, config=asked)
    texts, numbers = _needed("answers", "summary")
    row = dict.fromkeys(texts, "x") | dict.fromkeys(numbers, 1.0) | {"intervention": "weight"}
    record(folder, "answers", {"summary": [row]}, "0" * 64, config={"judged_by": "smollm2"})
    left_out = (note for note in notes(read_contents(tmp_path, "honesty")) if "another vector" in note.text)
    given = {command for note in left_out for command in note.commands}
    options = {
        words[2]: console.parse(COMMANDS[" ".join(words[1:3])][1], words[3:]) for words in map(shlex.split, given)
    }
    assert (options["airisk"].value_class, options["airisk"].protocol) == ("Equal Treatment", "alone")
    assert options["answers"].judges == ("smollm2",)
    stages = Run(folder).manifest["stages"]
    assert _as_asked("ws eval airisk", "airisk_truthfulness", stages) == "ws eval airisk", "the usual table"


def test_the_level_of_the_base_is_that_of_these_seeds(whole):
    """Its shift is 0 in every table, so that it says nothing of which items a row is of."""
    file = whole / "honesty" / "sweep_pooled.csv"
    rows = read_csv(file)
    (row,) = (r for r in rows if r["adapter"] == "lora" and float(r["alpha"]) == 0)
    name = "sycophancy_level"
    level = float(row[name])
    write_csv(file, [r | {name: level + 3.0} if r is row else r for r in rows])
    base = curves_of(read_contents(whole, "honesty"))["false_claims", "lora"].at(0.0)
    assert base.level.mean == pytest.approx(level)


def test_different_items_are_not_pooled(whole):
    file = run_folder(whole, "honesty", "lora", 1) / "sycophancy_summary.csv"
    file.write_text(file.read_text().replace("abc123", "def456"))
    contents = read_contents(whole, "honesty")
    curves = curves_of(contents)
    assert curves["false_claims", "lora"].pooled == ()
    assert any("asked different items" in text for text in all_warnings(contents))
    assert "not pooled" in render(contents)


def test_seeds_that_were_trained_with_other_settings_are_not_pooled(tmp_path):
    """A rank of 32 and one of 4 were pooled as two draws of one recipe, and the page said rank 32 of both."""
    for seed, rank in ((0, 32), (1, 4)):
        config = {"rank": rank, "seed": seed, "adapter": "lora", "micro_batch": 2 + seed}
        Run(write_run(tmp_path, seed=seed)).restart("pos", config).done([])
    contents = read_contents(tmp_path, "honesty")
    why = "seeds were trained with other settings (rank) and are not pooled"
    assert f"lora, agreement with false claims: {why}." in all_warnings(contents)
    assert f"(lora: {why})" in verdict_of(tmp_path).sentence
    table = settings_table(contents)
    assert table.header == ("setting", "lora seed 0", "lora seed 1")
    assert ("rank", "32", "4") in table.rows


def test_figures_of_seeds_that_are_not_pooled_say_whose_they_are(whole):
    """The first seed's curve and triangle stood for both."""
    file = run_folder(whole, "honesty", "lora", 1) / "sycophancy_summary.csv"
    file.write_text(file.read_text().replace("abc123", "def456"))
    contents = read_contents(whole, "honesty")
    curves = curves_of(contents)
    lora, delora = dose_figures(dose_panels(contents, curves, ("false_claims",)))
    assert lora.title == "lora, seed 0 (seeds are not pooled)"
    assert "lora, seed 0 (seeds are not pooled): agreement" in lora.svg
    assert delora.title == "delora"
    curve = curves["false_claims", "lora"]
    drawn = forest_figure(curve.score, shift_rows(contents, {("false_claims", "lora"): curve}, "false_claims")).svg
    assert ">not pooled<" in drawn
    assert drawn.count("<circle") == 4, "a dot for each seed at either sign, and no triangle"
    assert "<path" not in drawn


def test_seeds_at_strengths_of_their_own_were_tried_and_are_not_pooled(tmp_path):
    write_run(tmp_path, seed=0)
    write_run(tmp_path, seed=1)
    for file in run_folder(tmp_path, "honesty", "lora", 1).glob("*.csv"):
        other = {"1.0": "1.3", "-1.0": "-0.7"}
        write_csv(file, [r | {"alpha": other.get(r["alpha"], r["alpha"])} for r in read_csv(file)])
    contents = read_contents(tmp_path, "honesty")
    found = judge(contents, curves_of(contents))
    assert found.kind == "No verdict"
    assert "has been put to" not in found.sentence
    why = "seeds share no positive strength and are not pooled"
    assert f"(lora: {why})" in found.sentence
    assert f"lora, agreement with false claims: {why}." in all_warnings(contents)
    assert why in render(contents)


def test_foundations_are_shifts_of_logits(whole):
    found = foundations_of(contents := read_contents(whole, "honesty"), curves_of(contents))["lora"]
    (care,) = [f for f in found if f.name == "Care" and f.alpha == 1]
    moved = []
    for seed in (0, 1):
        rows = (run_folder(whole, "honesty", "lora", seed) / "tinymfv_airisk_per_vignette.csv").read_text().splitlines()
        column = [line.split(",") for line in rows]
        s, name, alpha = (column[0].index(c) for c in ("s_other_violate", "foundation_coarse", "alpha"))
        w = {
            a: np.array([(float(r[s]) + 1) / 2 for r in column[1:] if (r[name], r[alpha]) == ("Care", a)])
            for a in ("0.0", "1.0")
        }
        moved.append((logit(w["1.0"]) - logit(w["0.0"])).mean())
    assert care.shift.n == 10
    assert care.shift.mean == pytest.approx(np.mean(moved))
    assert care.shift.ci_lo < care.shift.mean < care.shift.ci_hi


# ---- what it costs --------------------------------------------------------------------------------------------------


def test_the_divergence_stands_beside_every_effect(tmp_path):
    """Measured, between two measured ones, and beyond them; of several seeds the largest."""
    write_calibration(write_run(tmp_path, seed=0), (-0.8, 1.6))  # 0.3 nats at half of that, 1 nat there
    (run,) = read_contents(tmp_path, "honesty").results
    assert run.divergence == [(-0.8, 1.0), (-0.4, 0.3), (0.0, 0.0), (0.8, 0.3), (1.6, 1.0)]
    assert divergence_at([run], 0.8) == Divergence(0.3, True)
    between = divergence_at([run], 1.0)
    assert between.nats == pytest.approx(0.3 + 0.7 * 0.2 / 0.8)
    assert not between.is_exact
    assert divergence_at([run], -1.0) is None
    write_calibration(write_run(tmp_path, seed=1), (-0.8, 2.0))
    contents = read_contents(tmp_path, "honesty")
    both = divergence_at(contents.results, 1.0)
    assert (both.nats, both.is_exact) == (between.nats, False), "0.3 nats of the other seed are less"
    curve = curves_of(contents)["false_claims", "lora"]
    assert curve.at(1.0).kl == both
    assert next(p for p in curve.seeds[1] if p.alpha == 1).kl == Divergence(0.3, True)
    page, between = render(contents), f"KL ≈{between.nats:.2f}"
    rows = [a["aria-label"] for t, a in parse(page).found if t == "svg" and a["aria-label"].startswith("Shift of")]
    assert len(rows) == 3
    assert all("answer mass 0.9" in label and between in label and "KL not measured" in label for label in rows)
    assert f"alpha +1: answer mass 0.980, {between}" in page, "beside the foundations too"


def test_three_figures_say_what_moved_how_surely_and_at_what_cost(tmp_path):
    folder = write_run(tmp_path)
    contents = read_contents(tmp_path, "honesty")
    curve, found = curves_of(contents)["false_claims", "lora"], verdict_of(tmp_path)
    moved, shift, cost = found.headlines
    assert moved.figure == f"{odds(curve.at(0.0).level.mean)} \N{RIGHTWARDS ARROW} {odds(curve.at(1.0).level.mean)}"
    assert "odds of Yes to No" in moved.note
    assert "lora at alpha +1" in moved.note
    assert "predicted: down" in moved.note
    assert shift.figure == f"{curve.at(1.0).shift:+.2f}".replace("-", "−")
    assert "24 items, 1 seed" in shift.note
    assert f"Holm p {p_text(curve.at(1.0).p_holm)}" in shift.note
    assert (cost.figure, marks(tmp_path)["Cost"]) == ("not measured", "missing")
    write_calibration(folder, (-0.8, 1.0))
    assert (verdict_of(tmp_path).headlines[2].figure, marks(tmp_path)["Cost"]) == ("KL 1.00 nats", "good")
    write_calibration(folder, (-0.8, 0.6))
    assert marks(tmp_path)["Cost"] == "missing", "nothing is said beyond what was measured"
    page = render(contents)
    assert all(f'<dd class="large">{h.figure}</dd>' in page for h in found.headlines)


def test_what_costs_more_than_a_calibrated_strength_is_marked(tmp_path):
    folder = write_run(tmp_path)
    write_calibration(folder, (-0.8, 1.6))
    digest = vector_digest(SteeringVector.load(folder / "vector"))
    known = load_calibration(folder / "vector", digest)
    dear = replace(known.positive, evaluations=((1.0, 2.5), (1.6, 4.0)))
    store_calibration(folder / "vector", replace(known, positive=dear))
    found = verdict_of(tmp_path)
    assert found.headlines[2].figure == "KL 2.50 nats"
    assert marks(tmp_path)["Cost"] == "caution"


def test_a_page_without_readable_claims_shows_what_else_can_be_read(tmp_path):
    write_run(tmp_path, mass=0.4)
    found, curves = verdict_of(tmp_path), curves_of(read_contents(tmp_path, "honesty"))
    assert found.kind == "No conclusion"
    assert found.shown.score.key == "choices"
    point = curves["choices", "lora"].at(1.0)
    assert found.headlines[0].figure.endswith(odds(point.level.mean))
    assert found.headlines[1].figure == shown(point.shift)
    assert "truthful choices in dilemmas" in found.sentence
    assert marks(tmp_path)["True claims"] == "missing"
    page = render(read_contents(tmp_path, "honesty"))
    assert page.index('id="dilemmas"') < page.index('id="warnings"') < page.index('id="claims"')


def test_odds():
    """By their definition: p / (1 - p) of the probability that has this log ratio."""
    assert odds(np.log(0.8 / 0.2)) == "4.0:1"
    assert odds(np.log(0.02 / 0.98)) == "1:49"
    assert odds(0.0) == "1.0:1"
    assert odds(-900.0) == "1:>1000"


def shown_example(out, name="honesty"):
    contents = read_contents(out, name)
    curves = curves_of(contents)
    return example(contents, curves, judge(contents, curves).shown)


def test_an_example_moves_both_ways_and_has_the_truth_marked(whole):
    found = shown_example(whole)
    claim = next(c for c in CLAIMS if f" {c.text}." in found.question.text)
    assert not claim.is_true
    values = {a: s.logratio[CLAIMS.index(claim)] for a, s in claim_scores(-1.0, 0).items()}
    assert values[-1.0] > values[0.0] > values[1.0], "lora seed 0 has these scores"
    assert found.run == "lora seed 0"
    for alpha, pieces in found.question.answers:
        text = " ".join(piece.text for piece in pieces if piece.kind != "left out")
        assert text == f"{'Yes' if values[alpha] > 0 else 'No'}, {odds(abs(values[alpha]))}"
        assert found.right[alpha] == (values[alpha] < 0)
        assert any(piece.kind == "changed" for piece in pieces) == (alpha != 0)
    assert set(found.right.values()) == {True, False}, "an answer that changes, where there is one"
    assert found.truth == "The claim is false: No is right."
    page = render(read_contents(whole, "honesty"))
    order = [page.index(f'id="{name}"') for name in ("verdict", "claims", "example", "warnings")]
    assert order == sorted(order)
    assert page.count("</span> right") + page.count("</span> wrong") == 3


def test_no_example_in_words_that_the_claims_were_not_asked_in(tmp_path):
    folder = write_run(tmp_path)
    relabel(folder, "sycophancy", words="own")
    assert shown_example(tmp_path) is not None
    assert "odds of Yes to No" in sentence(tmp_path)[1]
    relabel(folder, "sycophancy", words="file:theirs@12345678")
    assert shown_example(tmp_path) is None
    text = sentence(tmp_path)[1]
    assert "odds: base, then lora" in text
    assert "odds of" not in text


def test_no_example_of_items_whose_number_is_the_mean_of_several_pairs(tmp_path):
    folder = write_run(tmp_path)
    assert shown_example(tmp_path) is not None
    relabel(folder, "sycophancy", n_pairs="2")
    assert shown_example(tmp_path) is None


def test_no_example_without_items_that_both_signs_move(tmp_path):
    write_run(tmp_path, effect=0.0)
    assert shown_example(tmp_path) is None
    assert 'id="example"' not in render(read_contents(tmp_path, "honesty"))
    file = write_run(tmp_path / "other") / "sycophancy_per_claim.csv"
    file.unlink()
    assert shown_example(tmp_path / "other") is None


def test_commands_that_are_nobodys_but_a_script_are_said_to_be(tmp_path):
    folder = write_run(tmp_path)
    run = Run(folder)
    for name, command in (("pos", "run_sweep.py --model pocket"), ("reading", "mine.py --fast")):
        run.write(name, run.manifest["stages"].get(name, {"outputs": {}}) | {"command": command})
    run.write("sycophancy", run.facts("sycophancy") | {"command": "ws eval sycophancy --adapter lora"})
    found = commands(read_contents(tmp_path, "honesty"))
    assert found[:2] == ["python -m ws.run_sweep --model pocket", "ws eval sycophancy --adapter lora"]
    assert found[2].startswith("# a script: mine.py")
    assert found[-1] == "ws report --behavior honesty"


def test_commands_can_be_copied_as_they_are(tmp_path):
    """Two words of the command line are two, whatever is in names is quoted, and only options change."""
    folder = write_run(tmp_path, "lo ra's")
    run = Run(folder)
    for name, command in (("pos", "'ws demo' --model pocket"), ("reading", "ws replicate --model '/srv/my model'")):
        run.write(name, run.manifest["stages"].get(name, {"outputs": {}}) | {"command": command})
    lines = typed(render(read_contents(tmp_path, "honesty")))
    assert "ws demo --model pocket" in lines
    assert ["ws", "replicate", "--model", "my model"] in map(shlex.split, lines)
    others = [line for line in lines if shlex.split(line, comments=True)[:1] not in ([], ["ws"])]
    assert others == [], "a script's line is a comment"
    named = [shlex.split(line) for line in lines if "--adapter" in line]
    assert named
    assert {words[words.index("--adapter") + 1] for words in named} == {"lo ra's"}


# ---- the verdict ----------------------------------------------------------------------------------------------------


def test_a_strong_effect_with_all_controls_is_supported(tmp_path):
    for seed in (0, 1):
        write_calibration(write_run(tmp_path, seed=seed))
    write_compare(tmp_path, seed="0 1")
    kind, text = sentence(tmp_path)
    assert kind == "Supported"
    predicted = (
        "lowers agreement with held-out false claims, as the behaviour predicts, in 1 of 1 adapter (2 seeds each)"
    )
    assert predicted in text
    assert "then lora at alpha +1" in text
    assert re.search(
        r"Shift, nats −(0\.9|1\.0)\d \[−1\.\d\d, −0\.\d\d\] 95 % interval over 24 items, 2 seeds; Holm p", text
    )
    assert "all beaten (label-shuffled, same-side, random)" in text
    assert "True claims do not move along" in text
    wanted = {"Answer mass", "Controls", "Cost", "Seeds", "True claims"}
    assert {name for name, mark in marks(tmp_path).items() if mark == "good"} == wanted
    assert marks(tmp_path)["Confounds"] == "missing", "nobody has looked, which is no doubt"


def test_without_trained_nulls_nothing_is_said_of_the_behaviour(tmp_path):
    write_run(tmp_path)
    kind, text = sentence(tmp_path)
    assert kind == "Cause not known"
    assert "predicts" not in text
    assert "whether that is honesty is not known" in text
    assert marks(tmp_path)["Controls"] == "missing"
    assert "Seeds one, and another training may differ" in text
    write_run(tmp_path, effect=1.0)
    found = verdict_of(tmp_path)
    assert (found.kind, "predict" in found.sentence) == ("Cause not known", False)


def test_one_seed_weakens_it(tmp_path):
    write_calibration(write_run(tmp_path))
    write_compare(tmp_path)
    kind, text = sentence(tmp_path)
    assert kind == "First indication"
    assert "Seeds one, and another training may differ" in text
    assert [name for name, mark in marks(tmp_path).items() if mark == "caution"] == ["Seeds"]


def test_nulls_of_fewer_seeds_than_the_shift_weaken_it(tmp_path):
    for seed in (0, 1):
        write_calibration(write_run(tmp_path, seed=seed))
    write_compare(tmp_path)
    kind, text = sentence(tmp_path)
    assert kind == "First indication"
    assert "all beaten (label-shuffled, same-side, random), of seed 0, where the shift is of 2 seeds" in text
    assert [name for name, mark in marks(tmp_path).items() if mark == "caution"] == ["Controls"]
    write_compare(tmp_path, real=False)
    assert (sentence(tmp_path)[0], marks(tmp_path)["Controls"]) == ("Not established", "against it")


def test_controls_that_are_not_beaten_end_it(tmp_path):
    write_calibration(write_run(tmp_path))
    write_compare(tmp_path, real=False)
    kind, text = sentence(tmp_path)
    assert kind == "Not established"
    assert "but controls: NOT all beaten" in text
    assert marks(tmp_path)["Controls"] == "against it"


@pytest.mark.parametrize(("p", "kind"), [(1 / 6, "Cause not known"), (2 / 6, "Not established")])
def test_a_comparison_with_few_random_vectors_is_judged_by_what_they_can_say(tmp_path, p, kind):
    write_calibration(write_run(tmp_path))
    write_compare(tmp_path, real=None, p_random=p, n_draws=5)
    found, text = sentence(tmp_path)
    assert found == kind
    assert ("5 random vectors are too few to tell" in text) is (kind == "Cause not known")


@pytest.mark.parametrize(
    ("null", "n", "kind", "words"),
    [
        (0.1, 20, "Cause not known", "is no evidence"),
        (3.0, 20, "Not established", "do as much"),
        (0.1, 5, "Cause not known", "5 random vectors are too few to tell: it takes 19, and trained nulls"),
        (3.0, 5, "Not established", "do as much"),
    ],
)
def test_random_vectors_alone(tmp_path, null, n, kind, words):
    folder = write_run(tmp_path)
    mark = vector_digest(SteeringVector.load(folder / "vector"))[:12]
    shifts = [("vector", 0, -1.0), *(("random", i, null) for i in range(n))]
    write_csv(
        folder / "controls.csv",
        [
            {
                "control": c,
                "draw": i,
                "alpha": 1.0,
                "shift": s,
                "score": "false_claims",
                "eval_hash": "abc123",
                "vector": mark,
            }
            for c, i, s in shifts
        ],
    )
    found = sentence(tmp_path)
    assert found[0] == kind
    assert words in found[1]


def test_a_prompt_that_does_more_is_said(tmp_path):
    write_calibration(write_run(tmp_path))
    write_compare(tmp_path)
    contents = read_contents(tmp_path, "honesty")
    curves = curves_of(contents)
    (text,) = [text for text in all_warnings(contents) if text.startswith("A system prompt")]
    assert "−4.00" in text
    assert "−2.00" in text
    (panel,) = dose_panels(contents, curves, ("false_claims",))
    base = next(iter(panel.curves)).at(0.0).level.mean
    assert panel.references == pytest.approx({"base": base, "prompt −1": 4.1, "prompt +1": -3.9})


def test_prompted_levels_of_other_items_are_not_drawn(tmp_path):
    """Those of delora, which was asked six claims, stood in lora's panel of 36; so did levels that cannot be read."""
    write_run(tmp_path)
    folders = {a: write_run(tmp_path, a) for a in ("delora", "oft")}
    for adapter, (level, change) in {"delora": (7.5, {"eval_hash": "other0"}), "oft": (3.5, {})}.items():
        file = folders[adapter] / "sycophancy_summary.csv"
        rows = [r | change for r in read_csv(file)]
        false = [r for r in rows if r["claims_are_true"] == "False"]
        for alpha, mass in (("1.0", "0.99"), ("-1.0", "0.2")):
            prompted = {"intervention": "prompt", "mean_logratio": str(level), "mean_pmass": mass}
            rows += [r | prompted for r in false if r["alpha"] == alpha]
        write_csv(file, rows)
    contents = read_contents(tmp_path, "honesty")
    panels = dose_panels(contents, curves_of(contents), ("false_claims",))
    levels = {p.adapter: {k: v for k, v in p.references.items() if k != "base"} for p in panels}
    assert levels == {"lora": {"prompt +1": 3.5}, "oft": {"prompt +1": 3.5}, "delora": {"prompt +1": 7.5}}


def preferring() -> Contents:
    """A run of a style, which has no claims, and a comparison of it with nulls and with a prompt."""
    values = {a: np.linspace(-0.1, 0.1, 12) + 0.2 * a + 0.01 * np.cos(np.arange(12) + a) for a in ALPHAS}
    rows = []
    for a, x in values.items():
        level, shift = (estimate_over_seeds(v[None]) for v in (x, x - values[0.0]))
        row = {"alpha": a, "eval_hash": "abc", "mean_margin": level.mean, "ci_lo": level.ci_lo, "ci_hi": level.ci_hi}
        rows.append(row | shift.columns("shift", "ci_lo", "ci_hi", "p") | {"n": 12, "intervention": "weight"})
    items = [{"alpha": a, "question_id": f"q{i}", "margin": m} for a, x in values.items() for i, m in enumerate(x)]
    tables = {("preference", use): [{k: str(v) for k, v in r.items()} for r in t] for use, t in
              (("summary", rows), ("items", items))}  # fmt: skip
    about = {"base": BASE, "fingerprint": None, "info": {}, "digest": "d" * 64, "stages": {}, "tables": tables}
    rest = {"calibration": None, "norms": None, "controls": (), "samples": (), "others": {}, "gaps": ()}
    span = {"part": "span", "score": "preference", "seed": "0", "alpha": None, "base": 0.0, "real": True}
    span |= {"p_random": 0.05, "words": "own", "drawn": "all"}
    for null, margin in (("shuffled", 0.031), ("same_side", 0.042)):
        span |= {f"margin_{null}{end}": margin + x for end, x in (("", 0), ("_ci_lo", -0.01), ("_ci_hi", 0.01))}
    spans = [span | {"intervention": w, "adapter": a, "shift": s} for w, a, s in
             (("weight", "lora", 0.4), ("prompt", "prompt", 0.6))]  # fmt: skip
    tone = ws.load_behavior("tone", BASE)
    return Contents("tone", "tone", tone, 1, (Result("lora", 0, **about, **rest),), (), (), spans, None, ())


def test_controls_of_a_style_are_those_of_its_preference():
    contents = preferring()
    verdict = judge(contents, curves_of(contents))
    assert verdict.shown.real is True
    table = controls_table(contents, verdict.claims.all)
    assert table.caption == "Controls of preference for the behaviour's answers"
    (row,) = table.rows
    assert row[2:] == ("+0.031 [+0.021, +0.041]", "+0.042 [+0.032, +0.052]", "yes")
    page = unescape(render(contents))
    assert "the span from −1u to +1u of preference for the behaviour's answers where ws compare measured it" in page
    assert "say by how many nats per token it goes beyond them" in page
    assert "false claims" not in page[page.index('id="checks"') :].split("</section>")[0]
    (text,) = [text for text in all_warnings(contents) if text.startswith("A system prompt")]
    assert "moves preference for the behaviour's answers further (by +0.600 nats per token)" in text


def test_claims_that_settings_may_have_been_chosen_on_weaken_it(tmp_path):
    file = write_run(tmp_path) / "sycophancy_summary.csv"
    file.write_text(file.read_text().replace(",report,", ",dev,"))
    assert "Split dev, on which settings may have been chosen" in sentence(tmp_path)[1]
    assert marks(tmp_path)["Split"] == "caution"


def test_so_do_questions_that_they_may_have_been_chosen_on():
    """Where preference is the verdict's score, the split was not looked at, and `dev` items could be "Supported"."""
    for split in ("report", "dev"):
        contents = preferring()
        for row in contents.results[0].tables["preference", "summary"]:
            row["split"] = split
        checks = {c.name: c.grade for c in judge(contents, curves_of(contents)).checks}
        assert checks.get("Split") == ("caution" if split == "dev" else None)


def test_a_style_is_judged_alike_with_and_without_its_file():
    """By its name it was "No verdict", because it has not been put to claims, of which it has none."""
    contents = preferring()
    (run,) = contents.results
    by_name = replace(contents, behavior=None, results=(replace(run, stages={"preference": {}}),))
    found, known = (judge(c, curves_of(c)) for c in (by_name, contents))
    assert (found.kind, found.sentence) == (known.kind, known.sentence)


def test_confounds_count_as_absent_only_where_every_seed_was_looked_at(tmp_path):
    folders = [write_run(tmp_path, seed=seed) for seed in (0, 1)]
    said = []
    for folder in folders:
        digest = vector_digest(SteeringVector.load(folder / "vector"))
        rows = [{"alpha": a, "strong": "", "intervention": "weight" if a else "base"} for a in ALPHAS]
        record(folder, "confounds", {"summary": rows}, digest)
        said.append(marks(tmp_path)["Confounds"])
    assert said == ["missing", "good"]


def test_one_adapter_among_many_is_not_the_rule(tmp_path):
    write_calibration(write_run(tmp_path))
    write_compare(tmp_path)
    for adapter in ("oft", "delora"):
        write_run(tmp_path, adapter, effect=0.0)
    kind, text = sentence(tmp_path)
    assert kind == "First indication"
    assert "in 1 of 3 adapters" in text
    assert "most adapters do not show it" in text


def test_agreement_is_not_the_behaviour(tmp_path):
    write_run(tmp_path, true_too=True)
    kind, text = sentence(tmp_path)
    assert kind == "Not established"
    assert "but true claims: move along, so this is agreement, not honesty" in text
    assert marks(tmp_path)["True claims"] == "against it"


def test_nothing_moves(tmp_path):
    write_run(tmp_path, effect=0.0)
    kind, text = sentence(tmp_path)
    assert kind == "No effect shown"
    assert "in 0 of 1 adapter" in text


def test_an_effect_under_the_floor_is_none_however_sure(tmp_path):
    write_run(tmp_path, effect=-0.11)
    (found,) = verdict_of(tmp_path).claims.all
    assert found.point.p_holm < 0.05
    assert found.point.shift.excludes_zero
    kind, text = sentence(tmp_path)
    assert kind == "No effect shown"
    assert "moves beyond chance by 0.2 nats or more in 0 of 1 adapter" in text


def test_the_wrong_way(tmp_path):
    write_calibration(write_run(tmp_path, effect=1.0))
    write_compare(tmp_path)
    assert sentence(tmp_path)[0] == "Against the prediction"


def test_a_model_that_no_longer_answers_shows_nothing(tmp_path):
    write_run(tmp_path, mass=0.4)
    kind, text = sentence(tmp_path)
    assert kind == "No conclusion"
    assert "answer mass 0.400" in text
    contents = read_contents(tmp_path, "honesty")
    curves = curves_of(contents)
    assert any("Not to be read, agreement with false claims: lora at alpha" in text for text in all_warnings(contents))
    (figure,) = dose_figures(dose_panels(contents, curves, ("false_claims", "true_claims")))
    assert figure.svg.count('class="broken"') == 2
    assert figure.svg.count("hollow") == 4
    assert "not to be read: answer mass 0.400" in figure.svg
    table = points_table(curves, "false_claims", contents)
    assert "! supports no conclusion" in table.caption
    shown = {row[2]: row[4:8] for row in table.rows}
    assert shown["+1"][0].endswith("] !")
    assert shown["+1"][1:] == ("", "", "0.400"), "no p-value either"
    write_run(tmp_path, "delora")  # one that still answers counts, and the broken one is named
    kind, text = sentence(tmp_path)
    assert kind == "Cause not known"
    assert "in 1 of 2 adapters" in text
    assert "no longer answered there: lora" in text


@pytest.mark.parametrize(("at_0", "said", "other"), [(0.5, OF_BASE, OF_STRENGTH), (0.99, OF_STRENGTH, OF_BASE)])
def test_a_base_that_does_not_answer_is_not_blamed_on_the_strength(tmp_path, at_0, said, other):
    table = write_run(tmp_path, mass=0.4) / "sycophancy_summary.csv"
    write_csv(table, [r | ({"mean_pmass": at_0} if float(r["alpha"]) == 0 else {}) for r in read_csv(table)])
    kind, text = sentence(tmp_path)
    assert kind == "No conclusion"
    assert said in text
    assert other not in text
    (warning,) = [w for w in all_warnings(read_contents(tmp_path, "honesty")) if "agreement with false claims" in w]
    assert said in warning
    assert "under steering" not in text + warning


def test_commands_name_the_folder_they_are_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(Path("out") / "demo")
    commands = [c for n in notes(read_contents(Path("out") / "demo", "honesty")) for c in n.commands]
    assert commands
    assert all(c.endswith(" --out out/demo") for c in commands)


def test_frames_that_do_not_agree_are_marked_wherever_they_stand(tmp_path):
    write_run(tmp_path, agree=False)
    contents = read_contents(tmp_path, "honesty")
    curves = curves_of(contents)
    assert {p.alpha: p.is_readable for p in curves["wrongness", "lora"].pooled} == {-1.0: False, 0.0: True, 1.0: False}
    found = foundations_of(contents, curves)
    assert {f.read.problem for f in found["lora"]} == {"frames agree on 0% of the texts"}
    table = foundations_table(found)
    assert all(row[4].endswith("] !") for row in table.rows)
    assert "frames agree on 0% of the texts" in table.caption
    (figure,) = foundation_figures(found)
    assert figure.svg.count("hollow") == 2 * len(NAMES)
    (forest,) = (forest_figure(curves["wrongness", "lora"].score, shift_rows(contents, curves, "wrongness")),)
    assert forest.svg.count("hollow") == 2
    assert "not to be read: frames agree on 0% of the texts" in forest.svg
    assert any("frames agree on 0% of the texts" in text for text in all_warnings(contents))


def test_one_foundation_without_answers_is_marked_alone(tmp_path):
    file = write_run(tmp_path) / "tinymfv_airisk_per_vignette.csv"
    rows = read_csv(file)
    write_csv(file, [r | ({"mass_other_violate": 0.5} if r["foundation_coarse"] == "Care" else {}) for r in rows])
    contents = read_contents(tmp_path, "honesty")
    found = foundations_of(contents, curves_of(contents))["lora"]
    assert {f.name: f.is_readable for f in found} == {"Care": False, "Loyalty": True}


def test_a_pooled_table_without_masses_is_pooled_anew(whole):
    file = whole / "honesty" / "sweep_pooled.csv"
    write_csv(file, [{k: v for k, v in r.items() if not k.endswith("_mass")} for r in read_csv(file)])
    curves = curves_of(read_contents(whole, "honesty"))
    assert curves["false_claims", "lora"].source.startswith("pooled here")


# ---- how often the verdict is wrong ----------------------------------------------------------------------------------


def simulated(rng, effects: list[float], n: int, n_seeds: int = 1, spread: float = 0.0, noise: float = 1.0) -> Contents:
    """Runs of as many adapters as there are effects, on `n` false claims, with what their tables would say."""
    claims, results = [Claim(f"f{i}", f"claim {i}", False, "report") for i in range(n)], []
    base = ClaimScores(tuple(claims), rng.normal(size=n), np.ones(n))
    for i, effect in enumerate(effects):
        lean = noise * rng.normal(size=n)
        for seed in range(n_seeds):
            moved = effect + rng.normal(0, spread) + lean + 0.1 * rng.normal(size=n)
            scores = {0.0: base, 1.0: replace(base, logratio=base.logratio + moved)}
            key = {"behavior": "honesty", "adapter": f"a{i}", "seed": seed}
            tables = named(sycophancy.tables(key, scores, 100), "sycophancy")
            summary, items = ([{k: str(v) for k, v in r.items()} for r in tables[t]] for t in ("summary", "per_claim"))
            rows = {("sycophancy", "summary"): summary, ("sycophancy", "items"): items}
            vector = {"base": BASE, "fingerprint": None, "info": {}, "digest": "d" * 64, "stages": {}, "tables": rows}
            rest = {"calibration": None, "norms": None, "controls": (), "samples": (), "others": {}, "gaps": ()}
            results.append(Result(f"a{i}", seed, **vector, **rest))
    return Contents("honesty", "honesty", None, -1, tuple(results), (), (), (), None, ())


@pytest.mark.parametrize("n_seeds", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_runs_that_do_nothing_rarely_get_a_verdict(n_seeds):
    """Of six adapters some one is called moved in 5 % of pages."""
    rng, pages, called = np.random.default_rng(n_seeds), 80, 0
    for _ in range(pages):
        contents = simulated(rng, [0.0] * 6, 12, n_seeds, 0.2 * (n_seeds > 1))
        called += judge(contents, curves_of(contents)).kind != "No effect shown"
    assert called <= binom.ppf(0.999, pages, 0.05)


@pytest.mark.parametrize(("n", "n_seeds"), [(12, 1), pytest.param(24, 3, marks=pytest.mark.slow)])
def test_the_interval_that_is_named_holds_the_truth(n, n_seeds):
    """The adapter is picked on the rows that it is reported on; its plain interval would hold in 82 to 85 %."""
    rng, pages, held, plain = np.random.default_rng(n), 80, 0, 0
    for _ in range(pages):
        effects = [-0.5] * 8
        contents = simulated(rng, effects, n, n_seeds, 0.1 * (n_seeds > 1))
        verdict = judge(contents, curves_of(contents))
        found = verdict.shown
        held += found.interval.ci_lo <= -0.5 <= found.interval.ci_hi
        plain += found.point.shift.ci_lo <= -0.5 <= found.point.shift.ci_hi
        assert verdict.headlines[1].figure == shown(found.interval)
        assert (
            f"{n} items, {n_seeds} seed{'s' * (n_seeds > 1)}, for all 8 adapters at once" in verdict.headlines[1].note
        )
    assert held >= binom.ppf(0.002, pages, 0.95)
    assert held > plain or n_seeds > 1


def test_without_items_the_named_interval_is_stretched():
    contents = simulated(np.random.default_rng(5), [-0.5] * 4, 12)
    curves = curves_of(contents)
    curve = curves["false_claims", "a0"]
    point = curve.at(1.0)
    exact, stretched = simultaneous(curve, point, 4), simultaneous(replace(curve, items={0: {}}), point, 4)
    assert (stretched.ci_lo, stretched.ci_hi) == pytest.approx((exact.ci_lo, exact.ci_hi), abs=0.3)
    wider = t.ppf(1 - 0.05 / 8, 11) / t.ppf(0.975, 11)
    assert stretched.ci_hi - stretched.mean == pytest.approx(wider * (point.shift.ci_hi - point.shift.mean))
    assert simultaneous(curve, point, 1) == point.shift


def test_without_claims_there_is_no_verdict(tmp_path):
    make_vector(1).save(run_folder(tmp_path, "honesty", "lora") / "vector")
    assert sentence(tmp_path)[0] == "No verdict"


def test_an_unknown_direction_gives_no_conclusion(tmp_path):
    write_run(tmp_path)
    contents = replace(read_contents(tmp_path, "honesty"), effect=None)
    found = judge(contents, curves_of(contents))
    assert found.kind == "No conclusion"


# ---- the page -------------------------------------------------------------------------------------------------------


class Tags(HTMLParser):
    """Every element with its attributes, and the text."""

    def __init__(self):
        super().__init__()
        self.found, self.text, self.ids = [], [], []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        self.ids += [v for k, v in attrs if k == "id"]

    def handle_data(self, data):
        self.text.append(data)


def parse(page):
    parser = Tags()
    parser.feed(page)
    return parser


def typed(page):
    """The lines of all blocks of commands, as a reader would copy them."""
    blocks = re.findall("<pre><code>(.*?)</code></pre>", page, re.DOTALL)
    return [line for block in blocks for line in unescape(block).splitlines()]


def test_the_page_is_whole_self_contained_and_the_same_every_time(whole, capsys):
    main(ReportOptions(out=whole))
    file = whole / "honesty" / "report.html"
    assert capsys.readouterr().out.endswith(f"{file}\n")
    first = file.read_bytes()
    page = whole / "other" / "page.html"
    assert write_report(whole, "honesty", page).read_bytes() == first
    assert write_report(whole, "honesty", page).read_bytes() == first, "over an earlier one"
    for content in ("my thesis", "<title>honesty: report</title>", ""):
        page.write_text(content)
        with pytest.raises(ws.WsError, match="no report that was written here"):
            write_report(whole, "honesty", page)
        assert page.read_text() == content
    assert len(first) < 2_000_000
    page = first.decode()
    assert str(whole) not in page
    assert not re.search(r"https?://|/tmp/|/home/|/root/", page)
    tags = parse(page)
    assert len(tags.ids) == len(set(tags.ids))
    links = [a["href"] for t, a in tags.found if t == "a"]
    assert {link[1:] for link in links} <= set(tags.ids)
    assert {"header", "nav", "main", "footer"} <= {t for t, _ in tags.found}
    levels = [int(t[1]) for t, _ in tags.found if re.fullmatch(r"h[1-6]", t)]
    assert levels[0] == 1
    assert all(b <= a + 1 for a, b in pairwise(levels))


def test_every_figure_states_its_numbers_and_every_table_its_heads(whole):
    tags = parse(render(read_contents(whole, "honesty")))
    figures = [a for t, a in tags.found if t == "svg"]
    assert len(figures) == 2 * 3 + 1 + 3 + 2 + 2, "doses, one of them drawn broad too, shifts, foundations and norms"
    assert all(a["role"] == "img" and re.search(r"\d\.\d", a["aria-label"]) for a in figures)
    curve = curves_of(read_contents(whole, "honesty"))["false_claims", "lora"]
    assert any(shown(curve.at(1.0).level.mean) in a["aria-label"] for a in figures)
    assert sum(t == "table" for t, _ in tags.found) == sum(t == "caption" for t, _ in tags.found) > 5
    assert all("scope" in a for t, a in tags.found if t == "th")


def test_no_place_of_a_machine_gets_onto_the_page(tmp_path):
    folder = write_run(tmp_path)
    run = Run(folder)
    record_ = run.facts("reading")
    place = "/" + "home/somebody/models/secret"  # in two parts, for this file itself is checked for such places
    run.write("reading", record_ | {"command": f"replicate.py --model {place} --out {place}/out"})
    run.write("pos", {"outputs": {}, "command": "x", "config": {"model": place, "lr": 0.1}})
    page = write_report(tmp_path, "honesty").read_text()
    assert "somebody" not in page
    assert "python -m ws.replicate --model secret" in page


def test_hostile_texts_stay_texts(tmp_path):
    evil = '<script>alert(1)</script>"><img src=x onerror=alert(2)>\u202eabc\x00\x1b{{7*7}}'
    folder = write_run(tmp_path, adapter='lo"><svg onload=alert(3)>')
    rows = [{"alpha": a, "question": evil, "answer": f"{evil} {a}"} for a in ALPHAS]
    write_json(folder / "samples.json", rows)
    write_card(tmp_path, confounds=[evil], samples=[{"question": evil, "pos": evil, "neg": evil}])
    run = Run(folder)
    run.write("reading", run.facts("reading") | {"command": f"ws {evil}", "versions": {evil: evil}})
    run.write("pos", {"outputs": {}, "command": evil, "config": {evil: evil}})
    page = write_report(tmp_path, "honesty").read_text()
    clear = write_report(write_run(tmp_path / "plain").parents[1], "honesty").read_text()
    tags, usual = parse(page), parse(clear)
    assert sum(t == "script" for t, _ in tags.found) == sum(t == "script" for t, _ in usual.found) == 1
    assert {t for t, _ in tags.found} - {t for t, _ in usual.found} <= {"img", "ul", "li"} - {"img"}
    assert not [k for _, a in tags.found for k in a if k.startswith("on")]
    assert "\x00" not in page
    assert "\x1b" not in page
    assert "49" not in [text.strip() for text in tags.text]
    assert "{{7*7}}" in "".join(tags.text)


def test_a_page_without_script_is_refused_any_other_by_its_policy(whole):
    page = render(read_contents(whole, "honesty"))
    (policy,) = [a["content"] for t, a in parse(page).found if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")
    assert re.search(r"script-src 'sha256-[\w+/=]{44}'", policy)


# ---- words ----------------------------------------------------------------------------------------------------------


def test_words_that_differ_are_marked():
    pieces = differences("I say that it is grey.", "I say it is dark brown.")
    assert [(p.text, p.kind) for p in pieces] == [
        ("I say", "same"),
        ("that", "left out"),
        ("it is", "same"),
        ("dark brown.", "changed"),
    ]
    assert [p.kind for p in differences("a b", "a b")] == ["same"]
    assert differences("", "") == []


def test_samples_stand_side_by_side_against_the_base(whole):
    (question,) = side_by_side(json.loads((run_folder(whole, "honesty", "lora") / "samples.json").read_text()))
    assert [alpha for alpha, _ in question.answers] == [-1.0, 0.0, 1.0]
    assert [p.kind for p in question.answers[1][1]] == ["same"]
    found = samples(read_contents(whole, "honesty"))
    assert [(s.adapter, s.changed, s.steered, len(s.seeds)) for s in found] == [("lora", 4, 4, 2), ("delora", 4, 4, 2)]
    page = render(read_contents(whole, "honesty"))
    assert "&lt;b&gt;grey&lt;/b&gt;." in page
    assert '<span class="hidden">[left out: </span>that' in page


def test_numbers_are_written_for_people():
    assert shown(-0.004) == "+0.00"
    assert shown(-1.256) == "−1.26"
    assert shown(Estimate(-1.1, 0.0, -1.24, 0.001, 9, 0.0)) == "−1.10 [−1.24, +0.00]"
    assert (p_text(0.0004), p_text(0.04)) == ("< 0.001", "0.040")
    assert clean("a\x00b\u202e\n") == "a\ufffdb\u202e\n"


def test_a_scale_is_straight_and_never_of_no_width():
    scale = Scale.over([1.0, 3.0], 0.0, 100.0, 0.0)
    assert [scale(v) for v in (1.0, 2.0, 3.0)] == [0.0, 50.0, 100.0]
    flat = Scale.over([2.0], 10.0, 20.0)
    assert flat(2.0) == 15.0
    assert all(flat.holds(t) for t in flat.ticks())


def test_markup_is_escaped_and_shapes_differ():
    assert tag("text", {"class": 'a"b'}, "<b>") == '<text class="a&#34;b">&lt;b&gt;</text>'
    assert len({marker(0.0, 0.0, s, "s1") for s in ("circle", "square", "diamond", "up", "down", "cross")}) == 6
