"""tiny-mfv and AIRiskDilemmas on a model of Qwen3-0.6B's exact shape (random bfloat16 weights), against the usual way.

`uv run python -m benchmarks.evaluations` builds the model and a rank-32 LoRA vector in a temporary folder and measures,
over alpha -1, 0 and 1,

- tiny-mfv: time in alternation, memory above the loaded model in fresh processes, and the largest difference of scores;
- AIRiskDilemmas with 64 tokens of thought, both orders: time in alternation;
- on the pocket model in float32: the largest difference of scores between ours and the usual procedure.

The opponent is `benchmarks.reference`. Texts are the published samples where `WS_REAL_DATA` names their folder, and the
bundled ones otherwise. A random model never closes its thought, so every row thinks to the end of its budget.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

import ws
from benchmarks import harness, reference
from benchmarks.vector import build, load
from ws.eval import airisk, tinymfv_airisk
from ws.eval.dilemmas import Dilemma, load_dilemmas
from ws.eval.tinymfv_airisk import CHOICES, Vignette, ask, load_vignettes
from ws.lm.models import encode, fingerprint, load_tokenizer, render_prompt

ALPHAS = (-1.0, 0.0, 1.0)
BATCH = 24


def vignettes(count: int) -> tuple[Vignette, ...]:
    folder = os.environ.get("WS_REAL_DATA")
    return load_vignettes(str(Path(folder) / "tiny-mfv") if folder else "pocket", count)


def dilemmas(count: int) -> tuple[Dilemma, ...]:
    """Real dilemmas where there are any: without their values, so labels are meaningless here."""
    folder = os.environ.get("WS_REAL_DATA")
    if not folder:
        return load_dilemmas("pocket", limit=count)
    lines = (
        (Path(folder) / "airisk-dilemmas" / "unlabelled_pairs.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    )
    rows = [json.loads(line) for line in lines]
    actions = [tuple(r[k].split(": ", 1)[1] for k in ("action_1", "action_2")) for r in rows]
    return tuple(
        Dilemma(i, r["dilemma"], (a, b), 1, 1) for i, (r, (a, b)) in enumerate(zip(rows, actions, strict=True))
    )


# ---- the two ways ---------------------------------------------------------------------------------------------------


def tinymfv_ours(
    model: PreTrainedModel, tok: Tokenizer, vector: ws.SteeringVector, items: Sequence[Vignette]
) -> list[np.ndarray]:
    found = []
    for alpha in ALPHAS:
        with ws.steer(model, vector, alpha):
            scores = tinymfv_airisk.evaluate_tinymfv_airisk(model, tok, items, batch_size=BATCH)
        found.append(tinymfv_airisk.signed_wrongness(scores))
    return found


def tinymfv_usual(
    model: PreTrainedModel, tok: Tokenizer, dense: dict[str, torch.Tensor], items: Sequence[Vignette]
) -> list[np.ndarray]:
    prompts, frames = tinymfv_airisk.Prompts(), tinymfv_airisk.FRAMES
    asked = [ask(text, frame, prompts) for v in items for text in (v.other, v.own) for frame in frames]
    rows = [encode(tok, render_prompt(tok, q, opener=opener)) for q, opener in asked]
    found = []
    for alpha in ALPHAS:
        with reference.dense_steering(model, dense, alpha):
            logp = reference.score(model, tok, rows, CHOICES, BATCH).double().cpu().numpy().reshape(len(items), 2, 2, 2)
        p = 1 / (1 + np.exp(logp[..., 1] - logp[..., 0]))
        found.append(p[..., 0] - p[..., 1])
    return found


def airisk_ours(
    model: PreTrainedModel, tok: Tokenizer, vector: ws.SteeringVector, items: Sequence[Dilemma], n_think: int
) -> list[np.ndarray]:
    found = []
    for alpha in ALPHAS:
        with ws.steer(model, vector, alpha):
            scores = airisk.evaluate_airisk(model, tok, items, n_think=n_think, batch_size=BATCH)
        found.append(airisk.logratios(scores))
    return found


def airisk_usual(
    model: PreTrainedModel, tok: Tokenizer, dense: dict[str, torch.Tensor], items: Sequence[Dilemma], n_think: int
) -> list[np.ndarray]:
    prompts = airisk.Prompts()
    questions = [q for d in items for q in airisk.ask(d, "explicit", prompts)]
    found = []
    for alpha in ALPHAS:
        with reference.dense_steering(model, dense, alpha):
            logp = reference.think_and_score(model, tok, questions, airisk.CHOICES, prompts.anchor, n_think, BATCH)
        ratio = (logp[:, 0] - logp[:, 1]).double().cpu().numpy().reshape(len(items), 2)
        found.append((ratio[:, 0] - ratio[:, 1]) / 2)
    return found


def dense_of(vector: ws.SteeringVector, model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Dense dW in the model's dtype, which is what checkpoints hold."""
    return {name: change.to(model.dtype) for name, change in vector.dense(model)}


# ---- measurements ---------------------------------------------------------------------------------------------------


class Rounds:
    """Each call takes the next few items, so that the rounds of a comparison cover all of them once."""

    def __init__(self, items: Sequence[Any], size: int, action: Any) -> None:
        self.items, self.size, self.action, self.at, self.found = items, size, action, 0, []

    def __call__(self) -> None:
        part = self.items[self.at : self.at + self.size]
        self.at += self.size
        self.found.append(self.action(part))


def in_rounds(items: Sequence[Any], rounds: int, ours: Any, usual: Any) -> tuple[harness.Ratio, float]:
    """The ratio over `rounds` shares of the items, and the largest difference between the two results."""
    a, b = (Rounds(items, len(items) // rounds, action) for action in (ours, usual))
    ratio = harness.compare(a, b, rounds, warmup=0)
    gaps = [np.abs(np.stack(x) - np.stack(y)).max() for x, y in zip(a.found, b.found, strict=True)]
    return ratio, float(max(gaps))


def peak_above(folder: Path, way: str) -> None:
    """Memory of tiny-mfv on some vignettes above that of the loaded model."""
    model, tok = load(folder), load_tokenizer("pocket")

    def evaluate() -> None:
        vector = build(model, folder)
        if way == "ours":
            tinymfv_ours(model, tok, vector, vignettes(8))
        else:
            tinymfv_usual(model, tok, dense_of(vector, model), vignettes(8))

    print(json.dumps({"mib_above_model": harness.peak_above(evaluate)}))


def pocket_difference(count: int) -> float:
    """The largest difference of s between the two ways on the pocket model in float32."""
    model, tok = ws.load_model("pocket", device="cpu")
    torch.manual_seed(0)
    deltas = {
        n: ws.LinearDelta(*m.weight.shape, u=torch.randn(m.out_features, 4) * 0.02, v=torch.randn(4, m.in_features))
        for n, m in model.named_modules()
        if n.endswith(("q_proj", "up_proj", "down_proj"))
    }
    vector = ws.SteeringVector(deltas, "pocket", fingerprint(model))
    items = load_vignettes("pocket", count)
    ours = tinymfv_ours(model, tok, vector, items)
    usual = tinymfv_usual(model, tok, dense_of(vector, model), items)
    return float(np.abs(np.stack(ours) - np.stack(usual)).max())


def measure_tinymfv(folder: Path, o: argparse.Namespace) -> dict[str, Any]:
    """Memory, time and agreement of tiny-mfv."""
    part = ["-m", "benchmarks.evaluations", "--folder", str(folder), "--part"]
    done = harness.in_turns({way: [*part, way] for way in ("ours", "usual")}, o.rounds)
    above = {way: [process.output["mib_above_model"] for process in side] for way, side in done.items()}
    results: dict[str, Any] = {f"memory_{way}": {"mib_above_model": max(mib)} for way, mib in above.items()}
    results["memory_ours_over_usual"] = harness.Spread.ratio(*above.values())
    model, tok = load(folder), load_tokenizer("pocket")
    vector = build(model, folder)
    dense, few = dense_of(vector, model), vignettes(BATCH // 4)
    tinymfv_ours(model, tok, vector, few), tinymfv_usual(model, tok, dense, few)  # warm-up
    results["time"], results["largest_difference_of_s"] = in_rounds(
        vignettes(o.vignettes),
        o.rounds,
        lambda part: tinymfv_ours(model, tok, vector, part),
        lambda part: tinymfv_usual(model, tok, dense, part),
    )
    return results | {"pocket_float32_largest_difference_of_s": pocket_difference(24)}


def measure_airisk(folder: Path, o: argparse.Namespace) -> dict[str, Any]:
    """Time of AIRiskDilemmas; bfloat16 thoughts of a random model part ways, so scores are compared in the tests."""
    model, tok = load(folder), load_tokenizer("pocket")
    vector = build(model, folder)
    dense, one = dense_of(vector, model), dilemmas(1)
    airisk_ours(model, tok, vector, one, 2), airisk_usual(model, tok, dense, one, 2)  # warm-up
    ratio, _ = in_rounds(
        dilemmas(o.dilemmas),
        o.airisk_rounds,
        lambda part: airisk_ours(model, tok, vector, part, o.n_think),
        lambda part: airisk_usual(model, tok, dense, part, o.n_think),
    )
    return {"time": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=["tinymfv", "airisk"], nargs="+", default=["tinymfv", "airisk"])
    parser.add_argument("--vignettes", type=int, default=48)
    parser.add_argument("--dilemmas", type=int, default=24)
    parser.add_argument("--n-think", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=4, help="shares of the vignettes")
    parser.add_argument("--airisk-rounds", type=int, default=2, help="shares of the dilemmas")
    parser.add_argument("--part", choices=["ours", "usual"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    o = parser.parse_args()
    if o.part:
        return peak_above(o.folder, o.part)
    settings = {k: v for k, v in vars(o).items() if k not in ("part", "folder", "only")} | {"batch": BATCH}
    texts = "published samples" if os.environ.get("WS_REAL_DATA") else "bundled"
    with tempfile.TemporaryDirectory() as name:
        harness.fresh_process(["-m", "benchmarks.vector", "--folder", name, "--part", "prepare"])
        for what in o.only:
            measure = {"tinymfv": measure_tinymfv, "airisk": measure_airisk}[what]
            results = {"texts": texts, "settings": settings, **measure(Path(name), o)}
            harness.record(f"evaluations_{what}", results, "evaluations")
    return None


if __name__ == "__main__":
    main()
