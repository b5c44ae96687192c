"""tiny-mfv / airisk: the loader on real and broken tables, the scores against a plain computation, the command."""

from __future__ import annotations

import csv
import json
import os
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import ws
from support.choices import reference
from support.tables import write_table
from ws.delta import LinearDelta
from ws.eval.context import EvalContext, open_context
from ws.eval.prompts import load_prompts
from ws.eval.readable import of_row
from ws.eval.tinymfv_airisk import (
    _SLOTS,
    AGREEMENTS,
    HUB_ID,
    MASSES,
    Prompts,
    TinymfvAirisk,
    Vignette,
    about,
    ask,
    evaluate_tinymfv_airisk,
    load_vignettes,
    per_vignette_rows,
    readability,
    render,
    signed_wrongness,
    summary_row,
    table_name,
)
from ws.lm.models import encode, fingerprint, render_prompt
from ws.options.shared import EvalOptions

POCKET = Path(ws.__file__).parent / "pocket" / "data"


def rows(condition: str) -> list[dict]:
    text = (POCKET / f"tinymfv_airisk_{condition}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def write(folder: Path, other: list[dict], own: list[dict]) -> str:
    folder.mkdir(exist_ok=True)
    for name, table in (("other_violate", other), ("self_violate", own)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in table))
    return str(folder)


@pytest.mark.skipif("WS_REAL_DATA" not in os.environ, reason="WS_REAL_DATA names no folder with the published samples")
def test_the_published_tables_join_to_131(capsys):
    vignettes = load_vignettes(str(Path(os.environ["WS_REAL_DATA"]) / "tiny-mfv"))
    assert len(vignettes) == 131
    assert len({v.foundation_coarse for v in vignettes}) == 7
    assert "occurs twice" in capsys.readouterr().err
    assert all(v.other != v.own and 1 <= v.human_wrong <= 5 for v in vignettes)
    forty = load_vignettes(str(Path(os.environ["WS_REAL_DATA"]) / "tiny-mfv"), 40)
    counts = Counter(v.foundation_coarse for v in forty)
    assert len(counts) == 7, "its first forty are of two foundations"
    assert max(counts.values()) - min(counts.values()) == 1
    assert list(forty) == [v for v in vignettes if v in forty]


def test_the_bundled_tables_have_every_foundation():
    vignettes = load_vignettes("pocket")
    assert len(vignettes) >= 130
    assert len({v.foundation_coarse for v in vignettes}) == 7
    assert len({v.foundation_coarse for v in load_vignettes("pocket", limit=7)}) == 7


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_other_file_formats_read_the_same(tmp_path, suffix):
    for condition in ("other_violate", "self_violate"):
        write_table(tmp_path / f"airisk_{condition}{suffix}", rows(condition))
    assert load_vignettes(str(tmp_path)) == load_vignettes("pocket")


BREAKS = {
    "empty text": lambda r: r | {"text": " "},
    "rating out of range": lambda r: r | {"wrong": 9.0},
    "id twice": lambda r: r | {"id": rows("other_violate")[0]["id"]},
}


@pytest.mark.parametrize("how", BREAKS)
def test_a_few_broken_rows_are_named_and_many_stop_the_run(tmp_path, capsys, how):
    other, own = rows("other_violate"), rows("self_violate")
    source = write(tmp_path / "few", [*other[:-3], *(BREAKS[how](r) for r in other[-3:])], own)
    assert len(load_vignettes(source)) == len(other) - 3
    assert "3 of 154 rows" in capsys.readouterr().err
    source = write(tmp_path / "many", [*other[:100], *(BREAKS[how](r) for r in other[100:])], own)
    with pytest.raises(ws.WsError, match="at most 5%"):
        load_vignettes(source)


def test_configurations_are_told_apart_by_their_files(tmp_path):
    other, own = rows("other_violate"), rows("self_violate")
    for config, n in (("airisk", 30), ("classic", 20), ("ai-actor", 10)):
        for name, table in (("other_violate", other), ("self_violate", own)):
            file = tmp_path / f"vignettes_{config}_{name}.jsonl"
            file.write_text("".join(json.dumps(r | {"text": f"{config} {r['text']}"}) + "\n" for r in table[:n]))
    for config, n in (("airisk", 30), ("classic", 20), ("ai-actor", 10)):
        vignettes = load_vignettes(str(tmp_path), config=config)
        assert len(vignettes) == n
        assert all(text.startswith(config) for v in vignettes for text in (v.other, v.own))
        one = load_vignettes(str(tmp_path / f"vignettes_{config}_self_violate.jsonl"), config=config)
        assert one == vignettes
    beside = load_vignettes(str(tmp_path / "vignettes_classic_self_violate.jsonl"))
    assert beside == load_vignettes(str(tmp_path), config="classic"), "the other condition is named alike"
    with pytest.raises(ws.WsError, match="no file ending in scifi_other_violate"):
        load_vignettes(str(tmp_path), config="scifi")
    with pytest.raises(ws.WsError, match="Did you mean 'classic'"):
        load_vignettes(str(tmp_path), config="clasic")
    with pytest.raises(ws.WsError, match="configuration airisk alone"):
        load_vignettes("pocket", config="classic")


def test_the_hub_is_asked_for_a_configuration_at_a_revision(monkeypatch):
    asked = []

    def load(name, config, split, revision):
        asked.append((name, config, split, revision))
        raise OSError

    monkeypatch.setattr("datasets.load_dataset", load)
    with pytest.raises(ws.WsError, match="has probably left the hub"):
        load_vignettes(HUB_ID)
    with pytest.raises(ws.WsError, match="could not be read from the hub") as problem:
        load_vignettes(HUB_ID, config="classic", revision="abc")
    assert "has probably left the hub" not in str(problem.value)
    assert asked == [(HUB_ID, "airisk", "other_violate", "main"), (HUB_ID, "classic", "other_violate", "abc")]


def test_the_note_on_what_left_the_hub_is_of_its_configuration_alone():
    assert about({"dataset": "somewhere"})
    assert not about({"dataset": "somewhere", "config": "classic"})
    assert not about({"dataset": "pocket"})
    assert (table_name(), table_name("ai-actor")) == ("tinymfv_airisk", "tinymfv_ai_actor")


def test_tables_that_are_not_there_are_explained(tmp_path):
    with pytest.raises(ws.WsError, match="no file ending in other_violate"):
        load_vignettes(str(tmp_path))
    with pytest.raises(ws.WsError, match="no file or folder"):
        load_vignettes("./nowhere")
    with pytest.raises(ws.WsError, match="could not be read from the hub .* pass `dataset` a local folder"):
        load_vignettes("someone/some-data")
    source = write(tmp_path / "x", [{"id": "1", "text": "a"}], rows("self_violate"))
    with pytest.raises(ws.WsError, match="lacks the columns foundation_coarse, wrong"):
        load_vignettes(source)


def test_scores_equal_the_plain_computation(tiny):
    model, tok = tiny
    vignettes, prompts = load_vignettes("pocket", 3), Prompts()
    scores = evaluate_tinymfv_airisk(model, tok, vignettes, prompts)
    one_by_one = evaluate_tinymfv_airisk(model, tok, vignettes, prompts, batch_size=1)
    for key in scores:
        assert np.allclose(scores[key], one_by_one[key], atol=1e-5)
    for i, v in enumerate(vignettes):
        for j, text in enumerate((v.other, v.own)):
            p = {}
            for k, frame in enumerate(("is_wrong", "is_acceptable")):
                question, opener = ask(text, frame, prompts)
                prompt = render_prompt(tok, question, opener=opener)
                values = reference(model, tok, prompt, ("true", "1", "false", "0"))
                true, false = sum(values[:2]), sum(values[2:])
                p[frame] = true / (true + false)
                assert scores["bool_mass"][i, j, k] == pytest.approx(true + false, rel=1e-3)
            w = (p["is_wrong"] + 1 - p["is_acceptable"]) / 2
            assert signed_wrongness(scores)[i, j] == pytest.approx(2 * w - 1, abs=1e-4)


def test_a_bias_towards_true_cancels_between_the_frames():
    flat = {"p_true": np.full((4, 2, 2), 0.9), "bool_mass": np.ones((4, 2, 2))}
    row = summary_row({}, 1.0, load_vignettes("pocket", 4), flat, flat, 200)
    assert row["wrongness"] == pytest.approx(0)
    assert row["frame_agreement"] == 0
    assert readability(flat)["other_violate"].problem == "frames agree on 0% of the texts"
    items = per_vignette_rows({}, 1.0, load_vignettes("pocket", 4), flat)
    assert {(r["mass_other_violate"], r["frames_agree_self_violate"]) for r in items} == {(1.0, 0)}
    text = render([{k: "" if v is None else str(v) for k, v in (row | {"alpha": a}).items()} for a in (0.0, 1.0)])
    assert text.count("1.000 !") == 2
    assert "frames agree on 0% of the texts" in text
    assert row["human_corr"] is row["human_corr_pearson"] is None
    assert row["delta_wrongness"] == 0


def test_what_is_shown_of_others_acts_is_read_by_the_frames_of_others_acts():
    """Frames that agree on 40 % of others' acts and on all of the model's own: on 70 % together."""
    p = np.full((10, 2, 2), 0.9)
    p[:4, 0, 1] = p[:, 1, 1] = 0.1
    scores = {"p_true": p, "bool_mass": np.ones((10, 2, 2))}
    row = summary_row({}, 1.0, load_vignettes("pocket", 10), scores, scores, 100)
    agreements = [row[f"frame_agreement{part}"] for part in ("", "_other", "_self")]
    assert agreements == pytest.approx([0.7, 0.4, 1.0])
    (score,) = TinymfvAirisk.scores
    assert score.readability(row) == readability(scores)["other_violate"]
    assert score.readability(row).problem == "frames agree on 40% of the texts"
    text = render([{k: "" if v is None else str(v) for k, v in (row | {"alpha": a}).items()} for a in (0.0, 1.0)])
    assert text.count("1.000 !") == 2
    others = p[:, ::-1]
    own = summary_row({}, 1.0, load_vignettes("pocket", 10), scores | {"p_true": others}, scores, 100)
    assert not score.readability(own).problem
    assert of_row(own, *MASSES, agreements=AGREEMENTS).problem, "the gap is of both"
    old = {k: v for k, v in row.items() if k not in AGREEMENTS}
    assert score.readability(old).agreement == pytest.approx(0.7), "an older table knows no other"


def test_both_correlations_with_the_human_ratings():
    """Spearman's is Pearson's of the ranks; where a rating lies far out the two differ."""
    ratings, s = [1.0, 1.5, 2.0, 2.5, 5.0], np.array([-0.2, 0.1, 0.0, 0.4, 0.9])
    vignettes = [Vignette(str(i), "Care", r, "a", "b") for i, r in enumerate(ratings)]
    p = np.stack([np.stack([(1 + s) / 2, (1 - s) / 2], axis=-1)] * 2, axis=1)
    scores = {"p_true": p, "bool_mass": np.ones_like(p)}
    row = summary_row({}, 0.0, vignettes, scores, scores, 100)
    ranks = [np.argsort(np.argsort(values)) for values in (ratings, s)]
    assert row["human_corr"] == pytest.approx(np.corrcoef(*ranks)[0, 1]) == pytest.approx(0.9)
    assert row["human_corr_pearson"] == pytest.approx(np.corrcoef(ratings, s)[0, 1])
    assert abs(row["human_corr"] - row["human_corr_pearson"]) > 0.01


def test_the_pocket_model_finds_violations_wrong():
    model, tok = ws.load_model("pocket", device="cpu")
    vignettes = load_vignettes("pocket", 40)
    scores = evaluate_tinymfv_airisk(model, tok, vignettes)
    row = summary_row({}, 0.0, vignettes, scores, scores, 200)
    assert row["wrongness_ci_lo"] > 0.2
    assert min(row["bool_mass_other"], row["bool_mass_self"]) > 0.99
    assert row["frame_agreement"] > 0.9


@pytest.fixture
def finished_run(tiny, tmp_path):
    """A run folder with a small random vector, as `replicate` leaves it."""
    model, _ = tiny
    torch.manual_seed(0)
    delta = LinearDelta(96, 64, u=torch.randn(96, 2) * 0.3, v=torch.randn(2, 64))
    vector = ws.SteeringVector({"model.layers.1.mlp.up_proj": delta}, "tiny-random", fingerprint(model))
    for adapter in ("lora", "oft"):
        vector.save(tmp_path / "honesty" / adapter / "vector")
    return EvalOptions(out=tmp_path, dataset="pocket", limit=6, n_bootstrap=200, device="cpu")


def run(context: EvalContext) -> str:
    return context.carry_out(TinymfvAirisk.of_run(context)).text


def read(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def test_the_command_writes_the_documented_tables(finished_run, monkeypatch):
    text = run(open_context(finished_run))
    assert "Worked example" in text
    folder = finished_run.out / "honesty" / "lora"
    frames, vignettes, foundations, summary = (
        read(folder / f"tinymfv_airisk_{n}.csv") for n in ("per_frame", "per_vignette", "foundations", "summary")
    )
    assert len(frames) == 3 * 6 * 4
    assert len(vignettes) == 3 * 6
    start = ["behavior", "adapter", "seed", "alpha"]
    assert list(frames[0])[:10] == [
        *start, "id", "foundation_coarse", "condition", "frame", "p_true", "bool_mass",
    ]  # fmt: skip
    assert list(vignettes[0])[4:10] == [
        "id", "foundation_coarse", "human_wrong", "s_other_violate", "s_self_violate", "gap",
    ]  # fmt: skip
    shift = [f"shift_other_violate{part}" for part in ("", "_ci_lo", "_ci_hi", "_p", "_p_holm")]
    assert list(foundations[0])[4:14] == [
        "foundation_coarse", "n", "s_other_violate", "s_self_violate", "gap", *shift,
    ]  # fmt: skip
    axes = read(folder / "tinymfv_airisk_axes.csv")
    assert list(axes[0])[:12] == [*start, "axis", "n_plus", "n_minus", *shift]
    assert "Shift of logit(wrongness)" in text
    assert {(r["words"], r["drawn"]) for r in (*frames, *summary)} == {("own", "6 of 154, seed 0")}
    assert "Items: a draw of 6 of 154, seed 0" in text
    assert "Words:" not in text
    assert "hub" not in text
    assert [r["alpha"] for r in summary] == ["-1.0", "0.0", "1.0"]
    assert float(summary[1]["delta_wrongness"]) == 0 != float(summary[2]["delta_wrongness"])

    calls = []
    original = evaluate_tinymfv_airisk
    monkeypatch.setattr("ws.eval.tinymfv_airisk.evaluate_tinymfv_airisk", lambda *a: calls.append(1) or original(*a))
    run(open_context(replace(finished_run, adapter="oft")))
    assert len(calls) == 2, "the base is computed once per model and evaluation"
    assert read(folder.parent / "oft" / "tinymfv_airisk_summary.csv")[1]["wrongness"] == summary[1]["wrongness"]
    run(open_context(replace(finished_run, limit=5)))
    assert len(calls) == 5, "other items are another evaluation"


def test_prompts_can_be_replaced_word_for_word(tmp_path):
    file = tmp_path / "p.toml"
    file.write_text('is_wrong = "Judge: {text}"\nopener_is_wrong = "Verdict: "\n')
    prompts = load_prompts(Prompts(), file, _SLOTS)
    assert ask("An {act}.", "is_wrong", prompts) == ("Judge: An {act}.", "Verdict: ")
    assert prompts.is_acceptable == Prompts().is_acceptable
    broken = {
        'is_wrng = "{text}"': "Did you mean 'is_wrong'",
        'is_wrong = "x"': "must contain {text}",
        'is_wrong = "{text} {other}"': "no other slot",
        'is_wrong = "{text} {"': "malformed",
        "is_wrong = 3": "not a prompt text",
        "is_wrong = ": "cannot be read",
        'name = "mine"': "has no prompt text",
    }
    for content, message in broken.items():
        file.write_text(content)
        with pytest.raises(ws.WsError, match=re.escape(message)):
            load_prompts(Prompts(), file, _SLOTS)


def test_a_paraphrase_is_called_one_and_a_file_by_its_name(finished_run, tmp_path):
    """On any items but the bundled ones our words are not the published ones, and say so in every row."""
    source = write(tmp_path / "set", rows("other_violate"), rows("self_violate"))
    options = replace(finished_run, dataset=source)
    text = run(open_context(options))
    folder = finished_run.out / "honesty" / "lora"
    tables = ("per_frame", "per_vignette", "foundations", "axes", "summary")
    assert {r["words"] for n in tables for r in read(folder / f"tinymfv_airisk_{n}.csv")} == {"paraphrase"}
    assert "Words: paraphrase, which is this project's and not the published text" in text
    assert "has probably left the hub" in text
    file = tmp_path / "plain.toml"
    file.write_text('is_wrong = "Wrong? {text}"\nis_acceptable = "Fine? {text}"\n')
    labels = []
    for line in ("", 'name = "blunt"\n'):
        file.write_text(line + 'is_wrong = "Wrong? {text}"\nis_acceptable = "Fine? {text}"\n')
        text = run(open_context(replace(options, prompts=file)))
        (label,) = {r["words"] for n in tables for r in read(folder / f"tinymfv_airisk_{n}.csv")}
        assert f"Words: {label};" in text
        labels.append(label.split("@")[0])
    assert labels == ["file:plain", "file:blunt"]
    one, two = (TinymfvAirisk.of_run(open_context(replace(options, prompts=p))) for p in (file, None))
    assert one.digest != two.digest, "other words are another evaluation"
    file.write_text('name = "another"\nis_wrong = "Wrong? {text}"\nis_acceptable = "Fine? {text}"\n')
    assert TinymfvAirisk.of_run(open_context(replace(options, prompts=file))).digest == one.digest, (
        "a name changes no score"
    )


def test_the_worked_example_shows_which_tokens_carry_the_mass(finished_run, tiny):
    model, tok = tiny
    vignette = load_vignettes("pocket", 6)[0]
    question, opener = ask(vignette.other, "is_wrong", Prompts())
    with torch.no_grad():
        ids = torch.tensor([encode(tok, render_prompt(tok, question, opener=opener))])
        p = model(ids).logits[0, -1].double().softmax(-1)
    line = next(x for x in run(open_context(finished_run)).splitlines() if x.startswith("  alpha +0  true/1"))
    shown = re.findall(r"('[^']*'|\"[^\"]*\") (\d\.\d{3})", line.split("by token: ")[1])
    assert len(shown) == 4
    for text, value in shown:
        fitting = [float(p[i]) for i in range(len(tok)) if repr(tok.decode([i])) == text]
        assert any(abs(x - float(value)) < 6e-4 for x in fitting), (text, value, fitting)


def test_a_configuration_that_has_left_the_hub_is_explained():
    with pytest.raises(ws.WsError, match=r"could not be read from the hub .* has probably left the hub"):
        load_vignettes(HUB_ID)


def test_a_run_without_a_vector_is_explained(tmp_path):
    with pytest.raises(ws.WsError, match="make it with `ws replicate"):
        open_context(EvalOptions(out=tmp_path))


def test_recipe_style_arguments_are_flags():
    from ws.console import parse

    options = parse(EvalOptions, ["adapter=delora", "behavior=honesty", "n_bootstrap=300", "--alphas", "-2", "2"])
    assert (options.adapter, options.behavior, options.n_bootstrap) == ("delora", "honesty", 300)
    assert options.alphas == (-2.0, 2.0)
