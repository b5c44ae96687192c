"""Controls: the sampled null and its p-value, the pairs of the harder nulls, and the command that resumes."""

from __future__ import annotations

import csv
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binom

import ws
import ws.analysis.controls
from conftest import build_model, reworded, tokens
from ws.analysis.controls import (
    beats_random,
    coordinate_parts,
    draw_seed,
    empirical_p,
    exchange_half,
    main,
    measure_controls,
    null_distribution,
    random_like,
    render_controls,
    same_side,
    summarize_controls,
)
from ws.behaviors import tables
from ws.data import Pair
from ws.delta import LinearDelta
from ws.eval.context import open_context
from ws.files.runs import write_csv
from ws.lm.models import fingerprint
from ws.options.check import ControlOptions


def small_vector(model, scale: float = 1.0) -> ws.SteeringVector:
    torch.manual_seed(0)
    deltas = {}
    for name in ("model.layers.1.mlp.up_proj", "model.layers.2.self_attn.q_proj"):
        module = model.get_submodule(name)
        d_out, d_in = module.out_features, module.in_features
        u, v = scale * torch.randn(d_out, 2), torch.randn(2, d_in)
        deltas[name] = LinearDelta(d_out, d_in, g=0.1 * torch.randn(d_out), u=u, v=v)
    return ws.SteeringVector(deltas, "base", fingerprint(model))


# ---- the sampled null -------------------------------------------------------------------------------------------


def test_the_null_is_what_random_vectors_do(qwen3):
    vector = small_vector(qwen3)

    def score() -> np.ndarray:
        with torch.no_grad():
            return qwen3(tokens()).logits[0, -1, :2].numpy()

    null = null_distribution(qwen3, vector, score, n_draws=4, seed=3, alpha=0.5)
    base = score()
    for draw in range(4):
        with ws.steer(qwen3, random_like(vector, qwen3, draw_seed(3, draw)), 0.5):
            assert np.array_equal(null[draw], score().astype(float) - base)
    assert np.array_equal(null[:2], null_distribution(qwen3, vector, score, 2, seed=3, alpha=0.5))
    assert np.array_equal(
        null[:1, 0], null_distribution(qwen3, vector, lambda: float(score()[0]), 1, seed=3, alpha=0.5)
    )
    assert len({draw_seed(s, d) for s in range(20) for d in range(20)}) == 400
    with pytest.raises(ws.WsError, match="at least 1 draw"):
        null_distribution(qwen3, vector, score, n_draws=0)


def test_the_empirical_p_value_counts_both_tails_and_the_shift_itself():
    null = np.array([-3.0, -1.0, 0.5, 2.0])
    assert empirical_p(0.0, null) == 1.0
    assert empirical_p(1.0, null) == pytest.approx(4 / 5), "a tie counts"
    assert empirical_p(-2.5, null) == pytest.approx(2 / 5)
    assert empirical_p(9.0, null) == pytest.approx(1 / 5)
    for shift, draws in ((float("nan"), null), (1.0, np.array([])), (1.0, np.array([1.0, np.inf]))):
        with pytest.raises(ws.WsError, match="finite"):
            empirical_p(shift, draws)


def test_a_shift_that_is_noise_is_rarely_significant():
    """P(p <= 0.05) <= 0.05 whatever the law, here a skewed one with heavy tails."""
    rng = np.random.default_rng(0)
    draws = rng.standard_t(2, size=(4000, 20)) + rng.exponential(size=(4000, 20))
    rate = np.mean([empirical_p(float(row[0]), row[1:]) <= 0.05 for row in draws])
    assert rate == pytest.approx(0.05, abs=0.014), "four binomial standard errors"


def test_all_draws_beaten_says_nothing_before_there_are_nineteen():
    for n, p, beaten in (
        (2, 1 / 3, None),
        (18, 1 / 19, None),
        (19, 1 / 20, True),
        (5, 2 / 6, False),
        (40, 3 / 41, False),
    ):
        assert beats_random(p, n) is beaten, (n, p)
    assert beats_random(None, None) is None
    assert beats_random(0.2, None) is False, "their number is not on record, so they are taken for enough"


def control_rows(shifts, n_draws: int, rng, mass: float = 0.99) -> list[dict]:
    """Rows of `controls.csv`: a vector's shifts by score and strength, and as many draws of a null around zero."""
    plain = {"mass": mass, "frame_agreement": None, "unreadable": f"answer mass {mass:.3f}" if mass < 0.9 else None}
    return [
        {"control": control, "draw": draw, "score": score, "alpha": alpha, "shift": value, **plain}
        for (score, alpha), shift in shifts.items()
        for control, draw, value in (("vector", 0, shift), *(("random", i, rng.normal()) for i in range(n_draws)))
    ]


def test_a_table_of_null_controls_keeps_its_level():
    """Four rows whose vector is one more random draw: some corrected p is under 0.05 in 5 % of tables."""
    rng, tables, keys = np.random.default_rng(1), 400, [(s, a) for s in ("false_claims", "wrongness") for a in (-1, 1)]
    found = [summarize_controls(control_rows({k: rng.normal() for k in keys}, 199, rng)) for _ in range(tables)]
    assert sum(min(r["p_holm"] for r in rows) < 0.05 for rows in found) <= binom.ppf(0.999, tables, 0.05)
    assert all(r["p"] <= r["p_holm"] for rows in found for r in rows)


def test_a_shift_without_answers_has_a_mark_in_place_of_a_p_value():
    rng, shifts = np.random.default_rng(2), {("false_claims", 1.0): 9.0}
    fine, low = (render_controls(summarize_controls(control_rows(shifts, 99, rng, m))) for m in (0.95, 0.73))
    assert "0.010" in fine
    assert "!" not in fine
    assert "+9.000!" in low
    assert "0.730" in low
    assert "! supports no conclusion" in low
    assert "0.010  " not in low


def test_parts_add_up_to_the_change():
    torch.manual_seed(0)
    coordinates = {"g": torch.randn(6), "c": torch.randn(4), "d": torch.randn(2, 2, 2), "bias": torch.randn(6)}
    delta = LinearDelta(6, 4, u=torch.randn(6, 3), v=torch.randn(3, 4), **coordinates)
    parts, w = list(coordinate_parts(delta)), torch.randn(6, 4)
    assert [tuple(p.coordinates()) for p in parts] == [("g",), ("c",), ("d",), ("u", "v"), ("bias",)]
    assert torch.allclose(sum(p.dense(w) for p in parts), delta.dense(w), atol=1e-5)


def test_a_part_of_size_zero_stays_zero():
    model = build_model("qwen3")
    delta = LinearDelta(48, 32, g=torch.zeros(48), u=torch.randn(48, 2), v=torch.randn(2, 32))
    vector = ws.SteeringVector({"model.layers.0.mlp.up_proj": delta}, "base", fingerprint(model))
    (drawn,) = random_like(vector, model, 0).deltas.values()
    assert drawn.is_low_rank
    assert drawn.norm() == pytest.approx(delta.norm(model.model.layers[0].mlp.up_proj.weight), rel=1e-4)


# ---- the harder nulls -------------------------------------------------------------------------------------------


def made_pairs(n: int, prefix: str = "") -> list[Pair]:
    return [
        Pair(f"q{i:04d}-p0-s0", f"Q{i}?", f"{prefix}yes {i}", f"no {i}", 2, 3, "empty" if i % 10 == 9 else None)
        for i in range(n)
    ]


def test_half_of_the_usable_pairs_are_exchanged():
    pairs = made_pairs(41)
    mixed = exchange_half(pairs, seed=1)
    assert [(p.id, p.question, p.drop) for p in mixed] == [(p.id, p.question, p.drop) for p in pairs]
    moved = [(a, b) for a, b in zip(pairs, mixed, strict=True) if a != b]
    assert len(moved) == 37 // 2
    assert all((b.pos, b.neg, b.pos_tokens, b.neg_tokens) == (a.neg, a.pos, 3, 2) for a, b in moved)
    assert not any(a.drop for a, _ in moved)
    assert exchange_half(pairs, seed=1) == mixed
    assert exchange_half(pairs, seed=2) != mixed
    assert exchange_half(mixed, seed=1) == pairs, "the same seed exchanges the same pairs back"


def test_every_pair_is_exchanged_equally_often():
    pairs = made_pairs(8)
    counts = Counter(
        a.id for seed in range(400) for a, b in zip(pairs, exchange_half(pairs, seed), strict=True) if a != b
    )
    assert len(counts) == 8
    assert all(160 <= n <= 240 for n in counts.values()), "half of 400, give or take four standard errors"


def test_exchanging_needs_two_usable_pairs():
    with pytest.raises(ws.WsError, match="at least 2"):
        exchange_half([replace(p, drop="refusal") for p in made_pairs(5)], seed=0)


def test_the_same_side_pairs_two_positive_answers_of_one_question():
    a, b = made_pairs(12), made_pairs(12, prefix="Well, ")
    b[0] = replace(b[0], pos="YES  0")
    b[1] = replace(b[1], drop="truncated")
    b[2] = replace(b[2], question="another question")
    paired = same_side(a, [*reversed(b[:11])])
    assert [p.id for p in paired] == [a[i].id for i in (3, 4, 5, 6, 7, 8, 10)]
    for p in paired:
        i = int(p.id[1:5])
        assert (p.question, p.pos, p.neg) == (f"Q{i}?", f"yes {i}", f"Well, yes {i}")
        assert (p.pos_tokens, p.neg_tokens, p.drop) == (2, 2, None)
    with pytest.raises(ws.WsError, match="different data seeds"):
        same_side(a, a)


# ---- the command ------------------------------------------------------------------------------------------------


@pytest.fixture
def options(tiny, tmp_path):
    model, _ = tiny
    replace(small_vector(model, 0.3), base_id="tiny-random").save(tmp_path / "honesty" / "lora" / "vector")
    return ControlOptions(out=tmp_path, split="dev", limit=4, n_draws=3, device="cpu")


def read(options: ControlOptions) -> list[dict[str, str]]:
    with (Path(options.out) / "honesty" / "lora" / "controls.csv").open() as handle:
        return list(csv.DictReader(handle))


@pytest.fixture
def steered(monkeypatch):
    """The recipes that were really steered with."""
    seen = []

    def spy(model, vector, alpha):
        seen.append((vector.recipe.get("op"), alpha))
        return ws.steer(model, vector, alpha)

    monkeypatch.setattr(ws.analysis.controls, "steer", spy)
    return seen


def test_the_command_compares_the_shift_with_its_null(options, capsys, tiny):
    main(options)
    printed, rows = capsys.readouterr().out, read(options)
    assert list(rows[0])[:7] == ["behavior", "adapter", "seed", "control", "draw", "alpha", "shift"]
    assert Counter((r["control"], r["score"], r["alpha"]) for r in rows) == {
        (control, score, alpha): n
        for control, n in (("vector", 1), ("random", 3))
        for score in ("false_claims", "true_claims")
        for alpha in ("-1.0", "1.0")
    }
    model, tok = tiny
    behavior = ws.load_behavior("honesty", "tiny-random")
    vector = ws.SteeringVector.load(options.out / "honesty/lora/vector")

    def score() -> float:
        every = ws.evaluate_sycophancy(model, tok, behavior, "dev").logratio
        return float(every[list(tables.draw(range(len(every)), 4))].mean())

    null = null_distribution(model, vector, score, n_draws=3)
    found = [
        float(r["shift"]) for r in rows if (r["control"], r["score"], r["alpha"]) == ("random", "false_claims", "1.0")
    ]
    assert found == pytest.approx(null.tolist(), abs=1e-5)
    (shift,) = [
        float(r["shift"]) for r in rows if (r["control"], r["score"], r["alpha"]) == ("vector", "false_claims", "1.0")
    ]
    (line,) = [x for x in printed.splitlines() if x.startswith("false_claims") and "+1 " in x]
    found = next(r for r in summarize_controls(rows) if (r["score"], r["alpha"]) == ("false_claims", 1.0))
    assert found["p"] == empirical_p(shift, null)
    assert f"{null.mean():+.3f}" in line
    assert "p cannot be below 0.250" in printed
    assert "vectors trained on anything beat random ones" in printed
    masses = []
    for alpha in (0.0, 1.0):
        with ws.steer(model, vector, alpha):
            every = ws.evaluate_sycophancy(model, tok, behavior, "dev").pmass
        masses.append(every[list(tables.draw(range(len(every)), 4))].mean())
    assert float(found["mass"]) == pytest.approx(min(masses), abs=1e-5)
    assert f"{shift:+.3f}!" in line, "random weights do not answer Yes or No"
    assert f"{found['p']:.3f} " not in line
    assert "! supports no conclusion" in printed
    assert {r["words"] for r in rows} == {"own"}
    assert f"Items of false claims: a draw of {rows[0]['drawn']} (--limit)." in printed


def test_an_interrupted_run_goes_on_and_more_draws_are_added(options, capsys, steered):
    main(options)
    assert Counter(op for op, _ in steered) == {None: 2, "random_like": 6}
    whole, printed = read(options), capsys.readouterr().out
    file = options.out / "honesty" / "lora" / "controls.csv"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:-4]))
    steered.clear()
    main(options)
    assert len(steered) == 2
    assert sorted(map(str, read(options))) == sorted(map(str, whole))
    assert capsys.readouterr().out == printed
    steered.clear()
    main(replace(options, n_draws=4))
    assert steered == [("random_like", -1.0), ("random_like", 1.0)]
    steered.clear()
    main(options)
    assert not steered
    assert "3 random vectors" in capsys.readouterr().out.split("4 random vectors")[1]


def test_a_table_of_an_earlier_version_is_added_to(options):
    main(options)
    file = options.out / "honesty" / "lora" / "controls.csv"
    whole = read(options)
    write_csv(file, [{k: v for k, v in r.items() if k not in ("words", "drawn")} for r in whole[:-4]])
    main(options)
    assert [{**r, "words": "", "drawn": ""} for r in read(options)] == [{**r, "words": "", "drawn": ""} for r in whole]


def test_another_vector_starts_a_new_table(options, tiny, capsys):
    main(options)
    old = read(options)
    replace(small_vector(tiny[0], 0.6), base_id="tiny-random").save(options.out / "honesty" / "lora" / "vector")
    main(options)
    new = read(options)
    assert len(new) == len(old)
    assert not {r["vector"] for r in new} & {r["vector"] for r in old}


def test_another_template_starts_a_new_table(options, tiny, monkeypatch, capsys):
    context = open_context(options.eval_options(options.alphas))
    first = measure_controls(context, options)
    other = replace(context, tok=reworded(context.tok))
    second = measure_controls(other, options)
    assert len(read(options)) == len(first) == len(second)
    assert [r["eval_hash"] for r in first] == [r["eval_hash"] for r in second]
    assert not {float(r["shift"]) for r in first} & {float(r["shift"]) for r in second}
    monkeypatch.setattr(ws.analysis.controls, "_control_rows", None)
    assert [float(r["shift"]) for r in measure_controls(other, options)] == [float(r["shift"]) for r in second]
    with pytest.raises(TypeError):
        measure_controls(context, options)


def test_another_precision_starts_a_new_table(options, capsys):
    main(options)
    whole = read(options)
    main(replace(options, dtype="bfloat16", n_draws=2))
    rounded = read(options)
    assert len(rounded) == len(whole) - 4
    assert {r["shift"] for r in rounded}.isdisjoint(r["shift"] for r in whole if float(r["shift"]))


def test_other_evaluations_can_be_added(options, capsys):
    main(options)
    main(replace(options, scores=("wrongness", "choices"), limit=2, n_draws=2))
    rows = read(options)
    assert {r["score"] for r in rows} == {"false_claims", "true_claims", "wrongness", "choices"}
    assert {r["n_think"] for r in rows if r["score"] == "choices"} == {"0"}, "no draw is worth a chain of thought"
    printed = capsys.readouterr().out
    assert "wrongness" in printed
    assert "choices" in printed


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"n_draws": 1}, "`n_draws` must be at least 2"),
        ({"alphas": (0.0,)}, "other than 0"),
        ({"alphas": (float("nan"),)}, "`alphas` must be a finite number"),
        ({"scores": ("falsehoods",)}, "no score named 'falsehoods'"),
        ({"scores": ()}, "no scores"),
        ({"adapter": "oft"}, "no vector"),
    ],
)
def test_bad_options_are_refused(options, change, why):
    with pytest.raises(ws.WsError, match=why):
        main(replace(options, **change))
