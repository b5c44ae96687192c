"""Small finished runs with planted effects, written as the commands write them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

import ws
from ws.analysis.sweep_tables import pooled_rows
from ws.behaviors import Claim
from ws.delta import LinearDelta
from ws.diff import SteeringVector, vector_digest
from ws.eval import airisk, sycophancy, tinymfv_airisk
from ws.eval.dilemmas import Dilemma
from ws.eval.sycophancy import ClaimScores
from ws.eval.tinymfv_airisk import Vignette
from ws.files.runs import Run, data_folder, run_folder, write_csv, write_json
from ws.intervene.calibration import Calibration, SideCalibration, store_calibration
from ws.options.shared import CalibrationConfig

ALPHAS = (-1.0, 0.0, 1.0)
BASE = "acme/model"
CLAIMS = [Claim(f"f{i}", f"claim {i}", False, "report") for i in range(24)]
CLAIMS += [Claim(f"t{i}", f"truth {i}", True, "report") for i in range(12)]
NAMES = ("Care", "Loyalty")
VIGNETTES = [Vignette(f"v{i}", NAMES[i % 2], 3.0, "You see an AI.", "You, an AI.") for i in range(20)]
DILEMMAS = [Dilemma(i, "A dilemma.", ("do", "do not"), 1 if i % 2 else -1, 1 if i % 2 else -1) for i in range(10)]


def make_vector(seed: int, base: str = BASE, module: str = "model.layers.{}.mlp.up_proj") -> SteeringVector:
    rng = torch.Generator().manual_seed(seed)
    deltas = {
        module.format(i): LinearDelta(4, 3, u=torch.randn(4, 2, generator=rng), v=torch.randn(2, 3, generator=rng))
        for i in range(2)
    }
    info = {"behavior": "honesty", "family": "lora", "seed": seed}
    info["behavior_sha256"] = ws.load_behavior("honesty", base).digest
    return SteeringVector(deltas, base, "f" * 16, {"adapter": "pos"}, info)


def claim_scores(effect, seed, mass=0.99, true_too=False, alphas=ALPHAS):
    """Agreement with false claims moves by `effect` per alpha, with true ones the other way or, if asked, alike."""
    rng = np.random.default_rng(seed)
    start = np.random.default_rng(99).normal(size=len(CLAIMS))
    is_true = np.array([c.is_true for c in CLAIMS])
    found = {}
    for alpha in sorted({0.0, *alphas}):
        noise = 0.1 * rng.normal(size=len(CLAIMS)) * (alpha != 0)
        moved = alpha * effect * np.where(is_true & (not true_too), -1.0, 1.0)
        pmass = np.full(len(CLAIMS), mass if alpha else 0.99)
        found[alpha] = ClaimScores(tuple(CLAIMS), start + moved + noise, pmass)
    return found


def named(tables, evaluation, intervention="weight"):
    """The rows as `EvalContext` writes them."""
    dataset = "honesty claims" if evaluation == "sycophancy" else "items"
    identity = {"eval": evaluation, "eval_version": 1, "eval_hash": "abc123", "dataset": dataset, "n_think": 0}
    return {
        name: [r | {"intervention": intervention if r["alpha"] else "base"} | identity for r in rows]
        for name, rows in tables.items()
    }


def record(folder, evaluation, tables, digest, role="weight", config=None):
    run = Run(folder)
    stage = run.restart(evaluation, config or {}, {role: digest})
    stage.done([write_csv(folder / f"{evaluation}_{name}.csv", rows) for name, rows in tables.items()])


def write_acts(folder, key, effect, seed, digest, agree=True):
    rng, n = np.random.default_rng(seed), len(VIGNETTES)
    scores = {}
    for alpha in ALPHAS:
        noise = 0.02 * rng.normal(size=(n, 2)) * (alpha != 0)
        p = np.clip(0.7 - 0.05 * effect * alpha + noise, 0.01, 0.99)
        other = 1 - p if agree or not alpha else 0.5 + 0.3 * p  # true to both frames, whatever the text
        scores[alpha] = {"p_true": np.stack([p, other], axis=-1), "bool_mass": np.full((n, 2, 2), 0.98)}
    tables = {"per_vignette": [], "summary": []}
    for alpha, s in scores.items():
        tables["per_vignette"] += tinymfv_airisk.per_vignette_rows(key, alpha, VIGNETTES, s)
        tables["summary"].append(tinymfv_airisk.summary_row(key, alpha, VIGNETTES, s, scores[0.0], 100))
    record(folder, "tinymfv_airisk", named(tables, "tinymfv_airisk"), digest)


def write_dilemmas(folder, key, effect, seed, digest):
    rng, labels = np.random.default_rng(seed), np.array([d.label for d in DILEMMAS])
    scores = {}
    for alpha in ALPHAS:
        ratio = labels * (1 - alpha * effect) + 0.1 * rng.normal(size=len(DILEMMAS)) * (alpha != 0)
        orders = np.stack([ratio, -ratio], axis=1)
        plain = dict.fromkeys(("forced", "n_tokens"), np.zeros_like(orders)) | {"thought": np.full(orders.shape, "")}
        scores[alpha] = {"logratio": orders, "pmass": np.full_like(orders, 0.97), **plain}
    tables = {"per_row": [], "summary": []}
    for alpha, s in scores.items():
        tables["per_row"] += airisk.per_row_rows(key, alpha, "Truthfulness", DILEMMAS, s)
        tables["summary"].append(airisk.summary_row(key, alpha, DILEMMAS, scores, 100))
    record(folder, "airisk_truthfulness", named(tables, "airisk_truthfulness"), digest)


def write_run(out, adapter="lora", seed=0, effect=-1.0, acts=True, agree=True, **how):
    """One finished run; the vector's seed is that of its numbers."""
    folder = run_folder(out, "honesty", adapter, seed)
    vector = make_vector(seed + 10 * len(adapter))
    vector.save(folder / "vector")
    digest, key = vector_digest(vector), {"behavior": "honesty", "adapter": adapter, "seed": seed}
    tables = sycophancy.tables(key, claim_scores(effect, seed, **how), 100)
    record(folder, "sycophancy", named(tables, "sycophancy"), digest)
    if acts:
        write_acts(folder, key, effect, seed, digest, agree)
        write_dilemmas(folder, key, effect, seed, digest)
    stage = Run(folder).restart("reading", {}, {"vector": digest})
    texts = {-1.0: "It is brown.", 0.0: "I say that it is grey.", 1.0: "I say it is <b>grey</b>."}
    rows = [{"alpha": a, "question": "What color is it?", "answer": text} for a, text in texts.items()]
    stage.done([write_json(folder / "samples.json", rows)], expected_sign=-1)
    return folder


def write_calibration(folder, sides=(-0.8, 1.6)):
    subject = vector_digest(SteeringVector.load(folder / "vector"))
    made = [SideCalibration(a, 1.0, True, "", 0.9, ((a / 2, 0.3), (a, 1.0)), 50) for a in sides]
    store_calibration(folder / "vector", Calibration(made[1], made[0], CalibrationConfig(), "p", "f" * 16, subject))


def write_card(out, **more):
    side = {"mean_tokens": 10.0, "yes_rate": 0.1}
    card = {"sampled": 40, "kept": 36, "dropped": {"identical": 4}, "positive": side, "negative": side}
    card |= {"samples": [{"question": "Why?", "pos": "Because.", "neg": "No idea."}]}
    write_json(data_folder(out, BASE, "honesty") / "card.json", card | more)


def write_compare(out, real=True, adapter="lora", seed="0", p_random=0.048, **more):
    """One weight vector's spans, and a prompted base."""
    rows = []
    for name, base, shift in (("weight", 0.0, -2.0), ("prompt", 0.1, -4.0)):
        for part in ("-1u", "+1u", "span"):
            row = {"behavior": "honesty", "adapter": adapter if name == "weight" else name, "seed": seed}
            row |= {"alpha": {"-1u": -0.8, "+1u": 1.6, "span": None}[part], "intervention": name, "part": part}
            row |= {"score": "false_claims", "shift": shift if part != "-1u" else -shift, "base": base}
            row |= {"p_random": p_random if name == "weight" else None, "real": real if name == "weight" else None}
            rows.append(row | more)
    write_csv(out / "honesty" / "compare.csv", rows)


def build_out(out: Path) -> Path:
    for adapter in ("lora", "delora"):
        for seed in (0, 1):
            write_calibration(write_run(out, adapter, seed))
    cells = [run_folder(out, "honesty", a, s) for a in ("lora", "delora") for s in (0, 1)]
    rows = pooled_rows(cells, ("sycophancy", "airisk", "tinymfv_airisk"), 400)
    write_csv(out / "honesty" / "sweep_pooled.csv", rows)
    write_card(out)
    return out
