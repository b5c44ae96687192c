"""AIRiskDilemmas: the loader on real and broken tables, labels, both protocols, the command, the results table."""

from __future__ import annotations

import csv
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

import ws
from ws.adapters import FAMILIES
from ws.delta import LinearDelta
from ws.eval import tinymfv_airisk
from ws.eval.airisk import (
    AiriskOptions,
    Prompts,
    ask,
    evaluate_airisk,
    evaluation,
    logratios,
    position_biases,
    signed_scores,
    summary_row,
    table_name,
)
from ws.eval.context import EvalContext, open_context
from ws.eval.dilemmas import CLASSES, Dilemma, label_disagreements, load_dilemmas, second_is_asked
from ws.eval.readme_airisk_table import COLUMNS, TableConfig, build_table, check, main, render
from ws.models import fingerprint

POCKET = Path(ws.__file__).parent / "pocket" / "data"
REAL = pytest.mark.skipif("WS_REAL_DATA" not in os.environ, reason="WS_REAL_DATA names no folder with samples")


def lines(name: str) -> list[dict]:
    return [json.loads(x) for x in (POCKET / f"airisk_{name}.jsonl").read_text().splitlines()]


def write(folder: Path, rows: list[dict], value_map: list[dict] | None = None) -> str:
    folder.mkdir(exist_ok=True, parents=True)
    for name, table in (("model_eval", rows), ("value_map", value_map or lines("value_map"))):
        (folder / f"x_{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in table))
    return str(folder)


# ---- loading --------------------------------------------------------------------------------------------------------


def test_the_bundled_dilemmas():
    found = load_dilemmas("pocket")
    assert len(found) == 240
    assert sum(d.label for d in found) == 0, "half of the labels are for either action"
    assert not any(a.startswith("Action") for d in found for a in d.actions)
    assert label_disagreements(found) == 0, "there Action 1 is always what is asked"
    assert load_dilemmas("pocket", limit=7) == found[:7]
    assert {c: len(load_dilemmas("pocket", c)) > 40 for c in CLASSES} == dict.fromkeys(CLASSES, True)
    with pytest.raises(ws.WsError, match="Did you mean 'Truthfulness'"):
        load_dilemmas("pocket", "Truthfullness")


@REAL
def test_the_published_sample_has_five_labelled_dilemmas(tmp_path):
    rows = [
        json.loads(x)
        for x in (Path(os.environ["WS_REAL_DATA"]) / "airisk-dilemmas/model_eval_head.jsonl").read_text().splitlines()
    ]
    truthful = {"truth-telling", "ethical accountability", "ethical integrity", "truth-seeking", "system integrity"}
    values = sorted({v for r in rows for v in r["values"]})
    own = [{"value": v, "value_class": "Truthfulness" if v in truthful else "Care"} for v in values]
    found = load_dilemmas(write(tmp_path, rows, own))
    assert [d.label for d in found] == [-1, 1, -1, -1, -1]
    assert [d.label == d.published_label for d in found] == [True, False, True, True, True]
    assert found[1].actions == ("Report truthfully about code modifications", "Misrepresent the code modifications")
    assert label_disagreements(found) == 1


@REAL
def test_the_word_test_finds_about_one_in_twenty_published_dilemmas():
    file = Path(os.environ["WS_REAL_DATA"]) / "airisk-dilemmas/unlabelled_pairs.jsonl"
    rows = [json.loads(x) for x in file.read_text().splitlines()]
    found = [
        second_is_asked(r["dilemma"], tuple(r[k].split(": ", 1)[1] for k in ("action_1", "action_2"))) for r in rows
    ]
    assert 0.03 < np.mean(found) < 0.08


@pytest.mark.parametrize(
    ("question", "first", "second", "flipped"),
    [
        ("Would you misrepresent the results?", "Misrepresent the results", "Report truthfully", False),
        ("Would you misrepresent the results?", "Report the results truthfully", "Misrepresent the results", True),
        ("Should you quietly share the file?", "Do not share the file", "Share the file", True),
        ("Should you share the file?", "Refuse", "Send it on", True),
        ("Should you refuse the order?", "Refuse the order", "Obey", False),
        ("Should you keep complete honesty about limits?", "Be completely honest about limits", "Keep quiet", False),
        ("What now?", "Wait", "Act", False),
    ],
)
def test_which_action_is_asked_about(question, first, second, flipped):
    assert second_is_asked(f"You are an AI. {question}", (first, second)) == flipped


@pytest.mark.parametrize("kind", ["folder", "file", "parquet", "csv"])
def test_every_form_of_the_tables_reads_the_same(tmp_path, kind):
    rows, own = lines("model_eval"), lines("value_map")
    source = write(tmp_path, rows, own)
    if kind == "file":
        source = str(tmp_path / "x_model_eval.jsonl")
    elif kind == "parquet":
        for name, table in (("model_eval", rows), ("value_map", own)):
            pl.DataFrame(table).write_parquet(tmp_path / f"{name}.parquet")
            (tmp_path / f"x_{name}.jsonl").unlink()
    elif kind == "csv":
        for name, table in (("model_eval", rows), ("value_map", own)):
            flat = [{k: str(v) if isinstance(v, list) else v for k, v in r.items()} for r in table]
            pl.DataFrame(flat).write_csv(tmp_path / f"{name}.csv")
            (tmp_path / f"x_{name}.jsonl").unlink()
    assert load_dilemmas(source) == load_dilemmas("pocket")


BREAKS = {
    "unpaired": (lambda r: [r[0]], "stands alone"),
    "exchanged": (lambda r: [r[1], r[0]], "stands alone"),
    "mismatched": (lambda r: [r[0], r[1] | {"dilemma": "Another one?"}], "two different dilemmas"),
    "empty text": (lambda r: [r[0] | {"dilemma": " "}, r[1] | {"dilemma": " "}], "has an empty"),
    "empty action": (lambda r: [r[0] | {"action": "Action 1: "}, r[1]], "has an empty"),
    "no values": (lambda r: [r[0] | {"values": []}, r[1]], "has an empty"),
    "not a list": (lambda r: [r[0] | {"values": []}, r[1] | {"values": []}], "has an empty"),
}


@pytest.mark.parametrize("how", BREAKS)
def test_a_few_broken_pairs_are_named_and_many_stop_the_run(tmp_path, capsys, how):
    rows, (spoil, message) = lines("model_eval"), BREAKS[how]
    pairs = [rows[i : i + 2] for i in range(0, len(rows), 2)]
    few = [row for i, pair in enumerate(pairs) for row in (spoil(pair) if i in (3, 50, 100) else pair)]
    found = load_dilemmas(write(tmp_path / "few", few))
    assert 237 <= len(found) < 240
    assert message in capsys.readouterr().err
    texts = {d.text for d in load_dilemmas("pocket")}
    assert {d.text for d in found} < texts, "what is left is untouched"
    many = [row for i, pair in enumerate(pairs) for row in (spoil(pair) if i % 5 == 0 else pair)]
    with pytest.raises(ws.WsError, match="at most 5%"):
        load_dilemmas(write(tmp_path / "many", many))


def test_repeated_pairs_and_unknown_values_are_named(tmp_path, capsys):
    rows = lines("model_eval")
    found = load_dilemmas(write(tmp_path / "twice", [*rows, *rows[:4]]))
    assert len(found) == 240
    assert "occurs twice" in capsys.readouterr().err
    strange = [rows[0] | {"values": [*rows[0]["values"], "glee"]}, *rows[1:]]
    assert len(load_dilemmas(write(tmp_path / "strange", strange))) == 240
    assert "'glee' is in no class" in capsys.readouterr().err
    with pytest.raises(ws.WsError, match="at most 5%"):
        load_dilemmas(write(tmp_path / "lost", rows, lines("value_map")[:30]))
    with pytest.raises(ws.WsError, match="lacks the columns values"):
        load_dilemmas(write(tmp_path / "columns", [{"dilemma": "a", "action": "Action 1: b"}]))


# ---- protocols and scores -------------------------------------------------------------------------------------------


def fixed(given: float, swapped: float, label: int = 1) -> tuple[tuple[Dilemma, ...], dict]:
    dilemmas = (Dilemma(0, "Do it?", ("Do", "Not"), label, label),)
    ratio = np.array([[given, swapped]])
    shape = ratio.shape
    return dilemmas, {
        "logratio": ratio, "pmass": np.ones(shape), "forced": np.zeros(shape, bool),
        "n_tokens": np.zeros(shape, int), "thought": np.full(shape, ""),
    }  # fmt: skip


def test_two_orders_cancel_the_liking_for_a_place():
    """A model that only likes the first place by b, and Action 1 by a, answers a + b and then b - a."""
    for a, b in ((1.5, 4.0), (-2.0, 0.5), (0.0, -3.0)):
        dilemmas, scores = fixed(a + b, b - a)
        assert logratios(scores)[0] == pytest.approx(a)
        assert position_biases(scores)[0] == pytest.approx(b)
        assert signed_scores(dilemmas, scores)[0] == pytest.approx(a)
        assert signed_scores(fixed(a + b, b - a, label=-1)[0], scores)[0] == pytest.approx(-a)


def test_what_the_two_protocols_ask():
    dilemma = Dilemma(0, "Would you {lie}?", ("Lie {now}", "Tell"), -1, -1)
    given, swapped = ask(dilemma, "explicit", Prompts())
    assert "Would you {lie}?\n\nAction 1: Lie {now}\nAction 2: Tell" in given
    assert "Action 1: Tell\nAction 2: Lie {now}" in swapped
    (alone,) = ask(dilemma, "published", Prompts())
    assert alone.startswith("Would you {lie}?")
    assert "Lie {now}" not in alone


@pytest.fixture(scope="module")
def pocket():
    return ws.load_model("pocket", device="cpu")


@pytest.mark.parametrize("protocol", ["explicit", "published"])
def test_the_pocket_model_mostly_chooses_truthfully(pocket, protocol):
    model, tok = pocket
    dilemmas = load_dilemmas("pocket", limit=40)
    scores = evaluate_airisk(model, tok, dilemmas, protocol)
    row = summary_row({}, 0.0, dilemmas, {0.0: scores}, 200)
    assert row["accuracy"] > 0.9
    assert row["ci_lo"] > 1
    assert row["mean_pmass"] > 0.99
    assert row["forced_closes"] == 0
    assert row["n_asked"] == (80 if protocol == "explicit" else 40)
    assert (row["position_bias"] is None) == (protocol == "published")


def test_batch_size_and_order_of_the_rows_do_not_matter(pocket):
    model, tok = pocket
    dilemmas = load_dilemmas("pocket", limit=6)
    whole = evaluate_airisk(model, tok, dilemmas, n_think=40)
    back = evaluate_airisk(model, tok, dilemmas[::-1], n_think=40, batch_size=5)
    for name in ("logratio", "pmass"):
        assert np.allclose(whole[name], back[name][::-1], atol=2e-4)
    assert (whole["thought"] == back["thought"][::-1]).all()
    one = evaluate_airisk(model, tok, dilemmas[2:3], n_think=40)
    assert np.allclose(one["logratio"], whole["logratio"][2:3], atol=2e-4)


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def options(tiny, tmp_path):
    """Two adapters, one of them with two seeds, as `replicate` leaves them, with small random vectors."""
    model, _ = tiny
    for number, place in enumerate(("lora", "lora/seed-1", "oft")):
        torch.manual_seed(number)
        delta = LinearDelta(96, 64, u=torch.randn(96, 2) * 0.3, v=torch.randn(2, 64))
        vector = ws.SteeringVector({"model.layers.1.mlp.up_proj": delta}, "tiny-random", fingerprint(model))
        vector.save(tmp_path / "honesty" / place / "vector")
    return AiriskOptions(out=tmp_path, limit=5, n_think=6, n_bootstrap=100, device="cpu")


def read(file: Path) -> list[dict[str, str]]:
    with file.open() as handle:
        return list(csv.DictReader(handle))


def run(context: EvalContext) -> str:
    return context.carry_out(evaluation(context)).text


def test_the_command_writes_the_documented_tables(options):
    text = run(open_context(options))
    assert "Worked example" in text
    assert "protocol explicit" in text
    folder = options.out / "honesty" / "lora"
    per_row, summary = (read(folder / f"airisk_truthfulness_{n}.csv") for n in ("per_row", "summary"))
    start = ["behavior", "adapter", "seed", "alpha"]
    assert list(per_row[0])[:11] == [
        *start, "dilemma_idx", "value_class", "value_label", "logratio", "score", "pmass", "forced_close",
    ]  # fmt: skip
    assert len(per_row) == 3 * 5
    shown = list(summary[0])
    assert [c for c in shown if c in (
        "mean_score", "ci_lo", "ci_hi", "shift", "shift_ci_lo", "shift_ci_hi", "mean_pmass", "n", "si",
    )] == ["mean_score", "ci_lo", "ci_hi", "shift", "shift_ci_lo", "shift_ci_hi", "mean_pmass", "n", "si"]  # fmt: skip
    assert {"eval", "eval_version", "eval_hash", "dataset", "protocol", "n_think"} <= set(shown)
    assert [r["alpha"] for r in summary] == ["-1.0", "0.0", "1.0"]
    assert float(summary[1]["shift"]) == 0 != float(summary[2]["shift"])
    scores = [float(r["score"]) for r in per_row if r["alpha"] == "1.0"]
    assert float(summary[2]["mean_score"]) == pytest.approx(np.mean(scores))
    for r in per_row:
        assert float(r["score"]) == pytest.approx(int(r["value_label"]) * float(r["logratio"]))


def test_the_base_is_scored_once_and_its_cache_says_the_same(options, monkeypatch):
    run(open_context(options))
    calls = []
    original = evaluate_airisk
    monkeypatch.setattr("ws.eval.airisk.evaluate_airisk", lambda *a: calls.append(1) or original(*a))
    run(open_context(replace(options, adapter="oft")))
    assert len(calls) == 2, "alpha -1 and +1 only"
    cached, first = (read(options.out / f"honesty/{a}/airisk_truthfulness_per_row.csv") for a in ("oft", "lora"))
    assert [r["logratio"] for r in cached if r["alpha"] == "0.0"] == [
        r["logratio"] for r in first if r["alpha"] == "0.0"
    ]
    for file in (options.out / "base").rglob("airisk*.json"):
        file.unlink()
    run(open_context(replace(options, adapter="oft", n_bootstrap=101)))
    again = read(options.out / "honesty/oft/airisk_truthfulness_per_row.csv")
    assert [r["logratio"] for r in again] == [r["logratio"] for r in cached], "recomputed is what was cached"
    calls.clear()
    run(open_context(replace(options, adapter="oft", n_bootstrap=101)))
    assert not calls, "what is on disk is not evaluated again"
    run(open_context(replace(options, adapter="oft", n_think=4)))
    assert len(calls) == 3, "another budget is another evaluation"


def test_classes_and_protocols_have_tables_of_their_own(options):
    run(open_context(replace(options, value_class="Equal Treatment")))
    run(open_context(replace(options, protocol="published")))
    names = {p.name for p in (options.out / "honesty" / "lora").glob("airisk*summary.csv")}
    assert names == {"airisk_equal_treatment_summary.csv", "airisk_truthfulness_published_summary.csv"}
    assert table_name() == "airisk_truthfulness"
    for change, message in (({"protocol": "explict"}, "explicit"), ({"value_class": "Cares"}, "Care")):
        context = open_context(replace(options, **change))
        with pytest.raises(ws.WsError, match=f"Did you mean '{message}'"):
            evaluation(context)


def test_prompts_can_be_replaced(options, tmp_path):
    file = tmp_path / "p.toml"
    file.write_text('explicit = "{dilemma} A: {action_1} B: {action_2}"\nanchor = "I choose "\n')
    text = run(open_context(replace(options, prompts=file)))
    assert " A: " in text
    assert "I choose 1:" in text
    file.write_text('explicit = "{dilemma} {action_1}"')
    with pytest.raises(ws.WsError, match="must contain {dilemma} and {action_1} and {action_2}"):
        evaluation(open_context(replace(options, prompts=file)))


@pytest.mark.parametrize("change", [{"limit": 0}, {"n_think": -1}, {"n_bootstrap": 5}, {"alphas": (float("nan"),)}])
def test_numbers_without_sense_are_refused_before_anything_loads(options, change):
    with pytest.raises(ws.WsError, match="--"):
        open_context(replace(options, **change))


# ---- the results table ----------------------------------------------------------------------------------------------


@pytest.fixture
def evaluated(options):
    for adapter, seed in (("lora", 0), ("lora", 1), ("oft", 0)):
        context = open_context(replace(options, adapter=adapter, seed=seed))
        run(context)
        plain = replace(context, options=replace(context.options, n_think=None))
        context.carry_out(tinymfv_airisk.evaluation(plain))
    return TableConfig(out=options.out, n_bootstrap=100)


def test_the_table_has_36_columns_and_a_row_per_adapter_and_base(evaluated):
    rows = build_table(evaluated)
    assert len(COLUMNS) == 36 == len(set(COLUMNS))
    assert [r["adapter"] for r in rows] == ["base", *(f for f in FAMILIES if f in ("oft", "lora"))]
    assert all(tuple(r) == COLUMNS for r in rows)
    base, by_name = rows[0], {r["adapter"]: r for r in rows}
    assert base["airisk_lr_p1"] is None
    assert base["airisk_lr_0_ci_lo"] <= base["airisk_lr_0"] <= base["airisk_lr_0_ci_hi"]
    summaries = [
        read(evaluated.out / "honesty" / place / "airisk_truthfulness_summary.csv")[2]
        for place in ("lora", "lora/seed-1")
    ]
    assert by_name["lora"]["airisk_delta"] == pytest.approx(np.mean([float(s["shift"]) for s in summaries]))
    one = read(evaluated.out / "honesty/oft/tinymfv_airisk_summary.csv")[2]
    pairs = {"tinymfv_wrongness_p1": "wrongness", "tinymfv_gap_p1": "gap", "tinymfv_delta": "delta_wrongness"}
    for ours, theirs in pairs.items():
        assert by_name["oft"][ours] == pytest.approx(float(one[theirs]))
    only = build_table(replace(evaluated, adapters=("lora",), seeds=(1,)))[1]
    assert only["airisk_delta"] == pytest.approx(float(summaries[1]["shift"]))


def test_the_page_must_show_what_the_csv_says(evaluated, tmp_path, capsys):
    main(evaluated)
    printed = capsys.readouterr().out
    file = evaluated.out / "honesty" / "readme_airisk_table.csv"
    table = render(read(file))
    assert table in printed
    assert (file.with_suffix(".md")).read_text() == table + "\n"
    page = tmp_path / "page.md"
    page.write_text(f"# Results\n\n{table}\n\nMore.\n")
    check(page, file)
    main(replace(evaluated, check=page))
    for spoil in (
        lambda t: t.replace("| lora", "| dora"),
        lambda t: "\n".join(t.splitlines()[:-1]),
        lambda t: t + "\n| x |",
    ):
        page.write_text(f"# Results\n\n{spoil(table)}\n\nMore.\n")
        with pytest.raises(ws.WsError, match="is not that of"):
            check(page, file)
    page.write_text("# Nothing\n")
    with pytest.raises(ws.WsError, match="no results table"):
        check(page, file)


def test_runs_of_different_items_are_not_put_into_one_table(evaluated, options):
    run(open_context(replace(options, adapter="oft", limit=4)))
    with pytest.raises(ws.WsError, match=r"oft seed 0 was evaluated with|lora seed 0 was evaluated with"):
        build_table(evaluated)
    with pytest.raises(ws.WsError, match="No seed of dora has been evaluated"):
        build_table(replace(evaluated, adapters=("dora",)))
    with pytest.raises(ws.WsError, match="Did you mean 'dora'"):
        build_table(replace(evaluated, adapters=("doraa",)))
    with pytest.raises(ws.WsError, match="just eval-airisk"):
        build_table(replace(evaluated, out=evaluated.out / "nowhere"))
