"""Interventions: each does to the model what its name says, leaves it as it was, and its rows carry its name."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import PeftModel

import ws
import ws.intervene.interventions
from conftest import reworded
from ws.data import read_pairs
from ws.diff import vector_digest
from ws.eval import sycophancy
from ws.eval.context import open_context
from ws.files.runs import Run, read_csv
from ws.intervene.activation import ActivationVector, LayerChoice, LayerScore, activation_steer
from ws.intervene.calibrate import main as calibrate_main
from ws.intervene.calibration import Calibration, SideCalibration, store_calibration
from ws.intervene.gradient import contrast_gradient
from ws.intervene.interventions import arm, divergence_of, intervention
from ws.lm.divergence import prompt_divergence
from ws.lm.models import default_system, encode, fingerprint, render_prompt, tokenizer_hash
from ws.options.make import ReplicateConfig
from ws.options.measure import CalibrateOptions
from ws.options.shared import INTERVENTIONS, CalibrationConfig, EvalOptions
from ws.replicate import render, replicate
from ws.run import open_run


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A finished run on random weights."""
    folder = tmp_path_factory.mktemp("out")
    config = replace(ReplicateConfig.preset("tiny-random", "lora"), out=folder, split="dev", alphas=(1.0,))
    replicate(config)
    return folder


@pytest.fixture(scope="module")
def opened(out):
    return open_run(out, "honesty", "lora", 0, None, "cpu")


@pytest.fixture(scope="module")
def behavior():
    return ws.load_behavior("honesty", "tiny-random")


def logits(opened, at, question="Is the sky green?"):
    """What the model says to a question under an intervention."""
    with at, torch.no_grad():
        ids = torch.tensor([encode(opened.tok, render_prompt(opened.tok, question))])
        return opened.model(ids).logits[0, -1]


def test_weights_do_what_their_names_say(opened, behavior):
    pos, neg = (arm(opened, sign) for sign in ("pos", "neg"))
    expected = {
        ("weight", 0.7): (pos - neg) * 0.7,
        ("finetune", 1.0): pos,
        ("finetune", -1.0): neg,
        ("positive-only", -0.7): pos * -0.7,
        ("negative-only", 0.7): neg * -0.7,
    }
    for (name, alpha), change in expected.items():
        at = intervention(name, opened, behavior).at(alpha)
        assert torch.allclose(logits(opened, at), logits(opened, ws.steer(opened.model, change)), atol=1e-5), name


def test_gradients_are_of_the_run_s_training_and_kept(opened, behavior, monkeypatch):
    pairs = read_pairs(opened.out / "data" / "tiny-random" / "honesty")
    config, modules = ReplicateConfig.preset("tiny-random", "lora").train, list(opened.vector.deltas)
    for name, rank in (("gradient", None), ("gradient-low-rank", config.rank)):
        made = contrast_gradient(opened.model, opened.tok, pairs, modules, config, 0, rank=rank)
        found = intervention(name, opened, behavior)
        assert found.digest == vector_digest(made)
        assert (found.has_dial, found.is_shared, found.run) == (True, False, opened.run)
        assert found.detail == ("" if rank is None else f"rank {rank}")
        at = found.at(0.7 / made.norm())
        assert torch.allclose(logits(opened, at), logits(opened, ws.steer(opened.model, made, 0.7 / made.norm())))
        with monkeypatch.context() as patch:
            patch.setattr(ws.intervene.interventions, "contrast_gradient", None)
            assert intervention(name, opened, behavior).digest == found.digest
            with pytest.raises(TypeError):  # another template is another answer
                intervention(name, replace(opened, tok=reworded(opened.tok)), behavior)


def test_a_run_without_one_training_has_no_gradient(opened, behavior, tmp_path):
    recipe = opened.vector.recipe
    (first, *_) = (term.get("of", term) for term in recipe["terms"])
    for other in ({"op": "checkpoints"}, {"op": "+", "terms": [recipe, first | {"seed": 1}]}):
        with pytest.raises(ws.WsError, match="does not come from one training on contrast pairs"):
            intervention("gradient", replace(opened, vector=replace(opened.vector, recipe=other)), behavior)
    with pytest.raises(ws.WsError, match="are neither there nor in"):
        intervention("gradient", replace(opened, out=tmp_path), behavior)


def test_the_fine_tune_is_peft_s_own(opened, behavior):
    plain, _ = ws.load_model("tiny-random", device="cpu")
    for alpha, sign in ((1.0, "pos"), (-1.0, "neg")):
        ours = logits(opened, intervention("finetune", opened, behavior).at(alpha))
        peft = PeftModel.from_pretrained(plain, str(opened.run.folder / sign))
        with torch.no_grad():
            theirs = peft(torch.tensor([encode(opened.tok, render_prompt(opened.tok, "Is the sky green?"))])).logits
        plain = peft.unload()
        assert torch.allclose(ours, theirs[0, -1], atol=1e-5)


def test_a_prompt_is_told_while_it_lasts_and_forgotten_after(opened, behavior):
    prompt = intervention("prompt", opened, behavior)
    told = render_prompt(opened.tok, "Well?", system=behavior.negative[0])
    plain = render_prompt(opened.tok, "Well?")
    with prompt.at(-1.0):
        assert render_prompt(opened.tok, "Well?") == told
        with pytest.raises(ZeroDivisionError), prompt.at(1.0):
            assert default_system(opened.tok) == behavior.positive[0]
            _ = 1 / 0
        assert render_prompt(opened.tok, "Well?") == told
    assert render_prompt(opened.tok, "Well?") == plain != told
    assert "ws_system" not in vars(opened.tok)


def test_the_divergence_of_a_prompt_is_the_one_measured_without_interventions(opened, behavior):
    config = CalibrationConfig(n_prompts=3, n_tokens=8)
    found = divergence_of(intervention("prompt", opened, behavior), opened.model, opened.tok, QUESTIONS, -1.0, config)
    wanted = prompt_divergence(opened.model, opened.tok, QUESTIONS, behavior.negative[0], n_tokens=8)
    assert found.at(config.quantile) == pytest.approx(wanted, rel=1e-6)
    assert wanted > 0
    still = divergence_of(intervention("weight", opened, behavior), opened.model, opened.tok, QUESTIONS, 0.0, config)
    assert still.at() < 1e-6


QUESTIONS = ["Is the sky green?", "Who are you?", "Name a river."]


def test_strengths_follow_the_dial(opened, behavior):
    prompt, weight = (intervention(name, opened, behavior) for name in ("prompt", "weight"))
    assert prompt.strengths(["calibrated"], opened.model) == [-1.0, 0.0, 1.0]
    assert prompt.strengths(["+1u"], opened.model) == [0.0, 1.0]
    assert weight.strengths([0.5, -2], opened.model) == [-2.0, 0.0, 0.5]
    with pytest.raises(ws.WsError, match="no dial: its strengths are -1 and"):
        prompt.strengths([0.5], opened.model)
    with pytest.raises(ws.WsError, match="no calibration"):
        weight.strengths(["+1u"], opened.model)
    with pytest.raises(ws.WsError, match="[Dd]id you mean 'finetune'"):
        intervention("finetunes", opened, behavior)


def test_a_run_without_arms_says_so(opened, behavior, tmp_path):
    bare = replace(opened, run=Run(tmp_path / "sum"))
    with pytest.raises(ws.WsError, match="only a run of `ws replicate` has arms"):
        intervention("finetune", bare, behavior)
    with pytest.raises(ws.WsError, match="no pairs"):
        intervention("activation-layers", replace(opened, out=tmp_path), behavior)


def test_rows_are_keyed_by_intervention(out, weights_hash):
    names = ("weight", "prompt", "finetune", "activation-layers")
    options = EvalOptions(out=out, interventions=names, limit=3, n_bootstrap=100, device="cpu")
    context = open_context(options)
    before = weights_hash(context.model)
    text = context.carry_out(sycophancy.Sycophancy.of_behavior(context, context.behavior)).text
    assert weights_hash(context.model) == before
    assert all(name in text for name in names)
    rows = read_csv(context.run.folder / "sycophancy_per_claim.csv")
    keys = [(r["intervention"], r["alpha"], r["claim_id"]) for r in rows]
    assert len(set(keys)) == len(keys), "no row twice, the base's least of all"
    assert {(i, a) for i, a, _ in keys} == {("base", "0.0"), *((n, a) for n in names for a in ("-1.0", "1.0"))}
    summary = read_csv(context.run.folder / "sycophancy_summary.csv")
    shift = {(r["intervention"], r["alpha"], r["claims_are_true"]): r["shift"] for r in summary}
    assert len({shift[n, "1.0", "False"] for n in names}) == len(names), "each of them does something else"

    kept = [f.relative_to(out) for f in out.rglob("scores/*.json")]
    shared = {f.parts[1] for f in kept} - {"lora"}
    assert shared == {"prompt", "activation"}, "what needs no adapter is kept for all of them"
    with pytest.raises(ws.WsError, match="each once"):
        open_context(replace(options, interventions=("prompt", "prompt")))
    with pytest.raises(ws.WsError, match="[Dd]id you mean 'prompt'"):
        open_context(replace(options, interventions=("promt",)))


def test_scores_are_asked_for_once(out, monkeypatch):
    context = open_context(EvalOptions(out=out, limit=2, n_bootstrap=100, device="cpu"))
    made = sycophancy.Sycophancy.of_behavior(context, context.behavior)
    first = context.measure(made)

    def never(*_):
        raise AssertionError("asked again")

    monkeypatch.setattr(sycophancy.Sycophancy, "ask", never)
    again = context.measure(made)
    assert {a: s["logratio"].tolist() for a, s in again.items()} == {
        a: s["logratio"].tolist() for a, s in first.items()
    }

    class Later(sycophancy.Sycophancy):
        version = 99

    with pytest.raises(AssertionError, match="asked again"):
        context.measure(Later(items=made.items, prompts=made.prompts))


def test_scores_in_sixteen_bits_say_so_and_are_no_others(out):
    def shown(dtype):
        context = open_context(EvalOptions(out=out, limit=2, n_bootstrap=100, device="cpu", dtype=dtype))
        return context.carry_out(sycophancy.Sycophancy.of_behavior(context, context.behavior))

    short, plain = shown("bfloat16"), shown("float32")
    assert "Computed in bfloat16: with another batch size" in short.text
    assert "Computed in" not in plain.text
    assert [r["mean_logratio"] for r in short.data["rows"]] != [r["mean_logratio"] for r in plain.data["rows"]]


def test_another_template_is_another_question(out, behavior, monkeypatch):
    """Scores, activation vectors and chosen blocks that are kept are of one tokenizer with its chat template."""
    context = open_context(EvalOptions(out=out, limit=2, n_bootstrap=100, device="cpu"))
    other = replace(context, tok=reworded(context.tok))
    first, second = (c.measure(sycophancy.Sycophancy.of_behavior(c, c.behavior)) for c in (context, other))
    for alpha, scores in second.items():
        direct = sycophancy.Sycophancy.of_behavior(other, behavior)
        with ws.steer(context.model, context.vector, alpha):
            assert scores["logratio"] == pytest.approx(direct.ask(context.model, other.tok)["logratio"], abs=1e-6)
        assert not np.allclose(scores["logratio"], first[alpha]["logratio"], atol=1e-4)
    monkeypatch.setattr(sycophancy, "score_claims", None)  # nothing is asked from here on
    again = (c.measure(sycophancy.Sycophancy.of_behavior(c, c.behavior)) for c in (context, other))
    for kept, measured in zip(again, (first, second), strict=True):
        assert all(np.array_equal(kept[a]["logratio"], measured[a]["logratio"]) for a in measured)


def test_tables_of_another_template_are_written_again(out):
    context = open_context(EvalOptions(out=out, limit=2, n_bootstrap=100, device="cpu"))
    other = replace(context, tok=reworded(context.tok))
    texts, hashes = [], []
    for c in (context, other, context):
        found = c.carry_out(sycophancy.Sycophancy.of_behavior(c, c.behavior))
        texts.append(found.text)
        hashes.append({row["eval_hash"] for row in found.data["rows"]})
        assert c.run.facts("sycophancy")["config"]["tokenizer_hash"] == tokenizer_hash(c.tok)
    assert texts[0] == texts[2] != texts[1]
    assert "helper" in texts[1]
    assert hashes[0] == hashes[1], "the same items and protocol, whatever template they go through"


def test_activations_of_another_template_are_read_again(opened, behavior, monkeypatch):
    monkeypatch.setattr(
        ws.intervene.interventions, "_CHOICE", CalibrationConfig(n_prompts=2, n_tokens=6, tolerance=0.9)
    )
    monkeypatch.setattr(ws.intervene.interventions, "choose_layer", lambda *a, **k: LayerChoice(LAYER, (LAYER,)))
    other = replace(opened, tok=reworded(opened.tok))
    made = [ws.intervene.interventions.activation_of(o, behavior) for o in (opened, other)]
    assert made[0][0].digest != made[1][0].digest
    (vector, home), asked = made[1], []
    monkeypatch.setattr(ws.intervene.interventions, "_matched_strengths", lambda *a: asked.append(a) or {})
    for o, count in ((other, 1), (other, 1), (opened, 2)):
        assert ws.intervene.interventions.chosen_layer(o, behavior, vector, home, "last") == LAYER.layer
        assert len(asked) == count


def test_what_is_made_from_activations_in_another_dtype_is_made_again(opened, behavior, monkeypatch):
    monkeypatch.setattr(ws.intervene.interventions, "_CHOICE", CalibrationConfig(n_prompts=2, n_tokens=6))
    monkeypatch.setattr(ws.intervene.interventions, "choose_layer", lambda *a, **k: LayerChoice(LAYER, (LAYER,)))
    asked = []
    monkeypatch.setattr(ws.intervene.interventions, "_matched_strengths", lambda *a: asked.append(a) or {})
    short = replace(opened, model=copy.deepcopy(opened.model).to(torch.bfloat16))
    short.model.name_or_path = opened.model.name_or_path
    found = list[tuple[str, str]]()
    for o in (short, opened, short):
        vector, home = ws.intervene.interventions.activation_of(o, behavior)
        ws.intervene.interventions.chosen_layer(o, behavior, evened(vector), home, "last")
        found.append((vector.digest, intervention("gradient", o, behavior).digest))
    assert found[0] == found[2]
    assert all(a != b for a, b in zip(*found[:2], strict=True))
    assert len(asked) == 3


def evened(vector: ActivationVector) -> ActivationVector:
    """One with the same values whatever it was read in, so that a choice hangs on the dtype alone."""
    return replace(vector, vectors=torch.ones_like(vector.vectors))


LAYER = LayerScore(1, 1.0, -1.0, 1.0, -0.5, None, 0.5, 1.0)


def test_a_strength_in_units_is_of_one_template(opened, behavior):
    side = SideCalibration(2.0, 1.0, True, "", 1.0, ((2.0, 1.0),), 9)
    weight = intervention("weight", opened, behavior)
    sides = side, replace(side, alpha=-2.0)
    made = Calibration(*sides, CalibrationConfig(), "p", fingerprint(opened.model), weight.digest)
    file = weight.calibration_file
    now, other = tokenizer_hash(opened.tok), tokenizer_hash(reworded(opened.tok))
    for tokenizer, good in ((now, True), ("", False), (other, False)):
        store_calibration(file.parent, replace(made, tokenizer=tokenizer), file.name)
        if good:
            assert weight.strengths(["+1u"], opened.model) == [0.0, 2.0]
            continue
        with pytest.raises(ws.WsError, match="another tokenizer or chat template .* calibrate again"):
            weight.strengths(["+1u"], opened.model)
    file.unlink()


def test_what_has_no_dial_is_calibrated_by_saying_what_it_costs(out, capsys):
    options = CalibrateOptions(out=out, intervention="prompt", n_prompts=2, n_tokens=8, device="cpu")
    calibrate_main(options)
    assert "there is no dial" in capsys.readouterr().out
    rows = read_csv(out / "honesty" / "prompt" / "calibration_prompt.csv")
    assert [(r["alpha"], r["converged"], r["intervention"]) for r in rows] == [
        ("1.0", "False", "prompt"),
        ("-1.0", "False", "prompt"),
    ]
    assert all(float(r["divergence"]) > 0 and float(r["audit"]) > 0 for r in rows)
    file, again = out / "honesty" / "prompt" / "calibration_prompt.json", replace(options, fresh=True)
    whole = file.read_text()
    file.write_text(whole[:99])
    calibrate_main(options)
    assert "calibration_prompt.json is damaged" in capsys.readouterr().err
    assert file.read_text() == whole
    calibrate_main(again)
    assert file.read_text() == whole


@pytest.mark.slow
def test_the_activation_layer_is_chosen_at_equal_cost_on_dev_claims(tmp_path, monkeypatch):
    """Two of the pocket model's blocks get a vector, and the one that lowers agreement with false claims is taken."""
    monkeypatch.setattr(
        ws.intervene.interventions, "_CHOICE", CalibrationConfig(n_prompts=3, n_tokens=10, tolerance=0.3)
    )
    model, tok = ws.load_model("pocket", device="cpu")
    behavior = ws.load_behavior("honesty", "pocket")
    context = replace(open_for(model, tok, tmp_path), tok=tok)
    yes, no = (model.get_output_embeddings().weight[tok.encode(w)[0]].detach() for w in ("Yes", "No"))
    vectors = torch.zeros(model.config.num_hidden_layers, model.config.hidden_size)
    vectors[-1], vectors[-2] = no - yes, yes - no
    vector = ActivationVector(vectors, "pocket", ws.intervene.interventions.fingerprint(model))
    home = Run(tmp_path / "activation")
    layer = ws.intervene.interventions.chosen_layer(context, behavior, vector, home, "last")
    assert layer == model.config.num_hidden_layers - 1
    rows = read_csv(home.folder / "layers_last.csv")
    assert [r["chosen"] for r in rows].count("True") == 1
    for r in rows:
        for strength in (float(r["alpha"]), float(r["minus"])):
            at = activation_steer(model, vector, strength, int(r["layer"]), "last")
            with at, torch.no_grad():
                ids = torch.tensor([encode(tok, render_prompt(tok, QUESTIONS[0]))])
                assert torch.isfinite(model(ids).logits).all()
    monkeypatch.setattr(ws.intervene.interventions, "choose_layer", None)
    assert ws.intervene.interventions.chosen_layer(context, behavior, vector, home, "last") == layer, (
        "kept, not chosen again"
    )


def test_of_many_blocks_twelve_are_tried_each_from_where_the_last_search_ended(monkeypatch):
    """Divergence grows with the square of the strength, and with depth."""
    module, measured = ws.intervene.interventions, []

    def divergence(model, tok, prompts, at, n_tokens):
        return SimpleNamespace(at=lambda quantile: at())

    def steered(model, vector, alpha, layers, position):
        measured.append(layers)
        return (0.01 + 0.0001 * layers) * alpha**2

    monkeypatch.setattr(module, "divergence", divergence)
    monkeypatch.setattr(module, "activation_steer", steered)
    monkeypatch.setattr(module, "layer_count", lambda model: 36)
    vector = SimpleNamespace(norms=[1.0] * 35 + [0.0])
    found = module._matched_strengths(SimpleNamespace(model=None, tok=None), [], vector, "last")
    assert list(found) == [i * 35 // 12 for i in range(12)]
    for layer, strengths in found.items():
        assert np.abs(strengths) == pytest.approx((0.01 + 0.0001 * layer) ** -0.5, rel=0.1)
        assert strengths[0] < 0 < strengths[1]
    assert len(measured) < 50


def open_for(model, tok, folder):
    from ws.run import FinishedRun

    vector = ws.SteeringVector({"x": ws.LinearDelta(1, 1)}, "pocket", None)
    return FinishedRun(Run(folder / "honesty" / "lora"), vector, model, tok, folder)


# ---- the two trained nulls ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("control", ["shuffled", pytest.param("same-side", marks=pytest.mark.slow)])
def test_a_trained_null_is_a_run_beside_the_vector_s_own(out, control):
    config = replace(ReplicateConfig.preset("tiny-random", "lora"), out=out, split="dev", alphas=(-1.0, 1.0))
    reading = replicate(replace(config, control=control))
    assert reading.folder == out / "honesty" / f"lora-{control}"
    own = {p.id: p for p in read_pairs(out / "data" / "tiny-random" / "honesty") if p.drop is None}
    made = [p for p in read_pairs(reading.folder) if p.drop is None]
    if control == "shuffled":
        swapped = [p.id for p in made if (p.pos, p.neg) == (own[p.id].neg, own[p.id].pos)]
        assert len(made) == len(own)
        assert len(swapped) == len(own) // 2
        assert all((p.pos, p.neg) == (own[p.id].pos, own[p.id].neg) for p in made if p.id not in swapped)
    else:
        second = {p.id: p for p in read_pairs(out / "data" / "tiny-random" / "honesty" / "second")}
        assert made
        assert all((p.pos, p.neg) == (own[p.id].pos, second[p.id].pos) for p in made)
    plain = ws.SteeringVector.load(out / "honesty" / "lora" / "vector")
    assert vector_digest(reading.vector) != vector_digest(plain)
    text = render(replace(reading, control=control))
    assert "No conclusion" in text or f"with a {control} null" in text
    stages = json.loads((reading.folder / "manifest.json").read_text())["stages"]
    assert stages["reading"]["control"] == control
    again = replicate(replace(config, control=control))
    assert vector_digest(again.vector) == vector_digest(reading.vector)
    context = open_context(EvalOptions(out=out, adapter=f"lora-{control}", limit=2, n_bootstrap=100, device="cpu"))
    assert "Worked example" in context.carry_out(sycophancy.Sycophancy.of_behavior(context, context.behavior)).text


def test_an_unknown_control_is_refused_before_anything_is_loaded(tmp_path):
    config = replace(ReplicateConfig.preset("tiny-random", "lora"), out=tmp_path, control="shuffle")
    with pytest.raises(ws.WsError, match="[Dd]id you mean 'shuffled'"):
        replicate(config)
    assert set(INTERVENTIONS) >= {"weight", "prompt", "finetune", "activation"}
    assert not list(tmp_path.iterdir())
