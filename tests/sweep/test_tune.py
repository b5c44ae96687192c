"""The search for training settings: a planted best is found, what is out is said, and nothing but `dev` is read."""

from __future__ import annotations

import json
import math
import re
import shlex
from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest
import torch

import ws
from support.finished_runs import make_vector
from ws import console
from ws.behaviors import behavior_file
from ws.console import parse
from ws.data import question_key, question_keys, read_pairs
from ws.delta import LinearDelta
from ws.errors import DiskError, NoMemoryError
from ws.eval import sycophancy
from ws.eval.context import EvalContext
from ws.eval.preference import Preferences
from ws.files.runs import Run, finished_runs, read_csv, sha256_file, write_json
from ws.intervene import calibrate
from ws.lm.models import fingerprint
from ws.options.make import DataCommand, ReplicateConfig, TrainConfig, TuneOptions, train_preset
from ws.options.shared import CalibrationConfig
from ws.replicate import as_tuned, replicate
from ws.stats import estimate_mean
from ws.sweep import tune as module
from ws.sweep.tune import SHARES, Measured, Trial, best, draw, main, rungs, search, settings, space, tune

VALUES = {"lr": (1.0, 0.25, 0.5, 2.0, 4.0), "rank": (8, 2, 4, 16), "contrast": ("arms", "signed")}
START = {name: values[0] for name, values in VALUES.items()}


def quality(point):
    """Best, 1.0, at lr 0.5, rank 16, signed, and less with every step away from it."""
    away = abs(math.log2(point["lr"] / 0.5)) + abs(math.log2(point["rank"] / 16)) + (point["contrast"] != "signed")
    return 1 - 0.1 * away


def fake(out=lambda point: ""):
    """A measure with planted effects, larger after longer training; keeps what it was asked."""
    asked = []

    def measure(point, share):
        asked.append((tuple(point.values()), share))
        if problem := out(point):
            return Measured(problem)
        effect = quality(point) * (0.5 + share / 2) + np.linspace(-0.2, 0.2, 40)
        return Measured("", tuple(effect), 0.0, (-1.0, 1.0), (1.0, 1.0))

    return measure, asked


# ---- the draw -------------------------------------------------------------------------------------------------------


def test_a_draw_is_even_over_the_values_and_larger_ones_begin_with_smaller_ones():
    drawn = draw(VALUES, 20, seed=3)
    rows = [tuple(p.values()) for p in drawn]
    assert len(set(rows)) == 20
    assert tuple(START.values()) not in rows
    assert drawn[:7] == draw(VALUES, 7, seed=3)
    assert drawn != draw(VALUES, 20, seed=4)
    for name, values in VALUES.items():
        counts = [sum(p[name] == v for p in drawn) for v in values]
        assert max(counts) - min(counts) <= 3, f"{name} is uneven: {counts}"


def test_a_small_space_is_drawn_whole():
    small = {"lr": (1.0, 2.0), "contrast": ("arms", "signed")}
    assert {tuple(p.values()) for p in draw(small, 50, 0)} == set(product(*small.values())) - {(1.0, "arms")}


@pytest.mark.parametrize("budget", range(4, 40))
def test_halving_stays_within_the_budget(budget):
    sizes = rungs(budget)
    assert 1 + sum(n * share for n, share in zip(sizes, SHARES, strict=True)) <= budget
    assert sizes[2] >= 1
    assert sizes[0] >= 2 * sizes[1] - 1 >= 4 * sizes[2] - 3


# ---- halving --------------------------------------------------------------------------------------------------------


def test_the_planted_best_is_found_and_the_others_are_pruned():
    measure, asked = fake()
    others = draw(VALUES, 39, seed=0)
    trials = search(START, others, rungs(40), measure)
    chosen = best(trials, 200)
    assert chosen.point == {"lr": 0.5, "rank": 16, "contrast": "signed"}
    by_share = {share: [row for row, s in asked if s == share] for share in SHARES}
    sizes = [min(n, len(others)) for n in rungs(40)]
    assert [len(by_share[s]) for s in SHARES] == [sizes[0], sizes[1], sizes[2] + 1], "the start is trained in full once"
    assert len(trials) == len(others) + 1
    assert [t.number for t in trials] == list(range(40))
    names = list(START)
    for shorter, longer in pairwise(SHARES):
        went_on = set(by_share[longer]) - {tuple(START.values())}
        left = set(by_share[shorter]) - went_on
        worst_on = min(quality(dict(zip(names, row, strict=True))) for row in went_on)
        assert all(quality(dict(zip(names, row, strict=True))) <= worst_on + 1e-9 for row in left)


def test_what_the_search_starts_from_wins_where_nothing_is_better():
    measure, _ = fake(out=lambda point: "" if point["rank"] <= 8 and point["contrast"] == "arms" else "it diverges")
    start = {"lr": 0.5, "rank": 8, "contrast": "arms"}
    trials = search(start, [p for p in draw(VALUES, 39, 1) if p != start], rungs(20), measure)
    assert best(trials, 200) is trials[0]


def test_what_the_search_starts_from_is_never_pruned_and_noise_never_beats_it():
    """A candidate that cannot be told from the largest is taken for its selectivity, but never below the start."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        effects = [tuple(rng.normal(1, 1, size=30)) for _ in range(6)]
        trials = [Trial({}, 1.0, Measured("", e, float(rng.normal()), (), ()), i) for i, e in enumerate(effects)]
        chosen = best(trials, 200)
        assert chosen.measured.mean >= trials[0].measured.mean
        top = max(trials, key=lambda t: t.measured.mean)
        difference = estimate_mean(np.array(top.measured.effect) - np.array(chosen.measured.effect), 200)
        assert chosen is top or not difference.excludes_zero
        rivals = [t for t in trials if t.measured.mean >= chosen.measured.mean]
        assert chosen.measured.selectivity == max(t.measured.selectivity for t in rivals) or chosen is not top


def test_of_equal_effects_the_most_selective_is_chosen_and_a_larger_one_beyond_noise_wins():
    same = tuple(np.linspace(0.9, 1.1, 20))
    larger = tuple(np.linspace(1.9, 2.1, 20))
    trials = [Trial({}, 1.0, Measured("", same, s, (), ()), i) for i, s in enumerate((0.1, 0.9, 0.5))]
    assert best(trials, 200) is trials[1]
    trials.append(Trial({}, 1.0, Measured("", larger, -5.0, (), ()), 3))
    assert best(trials, 200) is trials[3]
    pruned = Trial({}, 0.5, Measured("", tuple(9.0 + x for x in same), 9.0, (), ()), 4)
    assert best([*trials, pruned], 200) is trials[3], "one that was not trained in full has not been seen"


def test_nothing_is_chosen_where_all_are_out():
    measure, asked = fake(out=lambda point: "no +1u")
    trials = search(START, draw(VALUES, 12, 0), rungs(10), measure)
    assert best(trials, 200) is None
    assert len(asked) == 13, "what is out goes no further"
    assert {t.measured.problem for t in trials} == {"no +1u"}


# ---- the space ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("adapter", "there", "absent"),
    [
        ("lora", {"lr", "rank", "layers", "kl", "objective", "contrast"}, {"delora_lambda"}),
        ("delora", {"lr", "rank", "layers", "kl", "objective", "contrast", "delora_lambda"}, set()),
        ("ia3", {"lr", "layers", "kl", "objective", "contrast"}, {"rank", "delora_lambda"}),
        ("oft", {"lr", "layers", "kl", "objective", "contrast"}, {"rank", "delora_lambda"}),
    ],
)
def test_only_what_a_family_takes_notice_of_is_searched(tiny, adapter, there, absent):
    options = TuneOptions.preset("tiny-random", adapter)
    values = space(tiny[0], options)
    assert set(values) == there
    start = settings(options, {name: kept[0] for name, kept in values.items()})
    assert start.train == options.train, "the first of all values is what the search starts from"
    assert len(values["layers"]) == 3
    whole = replace(options, train=replace(options.train, layers="0.0:1.0"))
    assert space(tiny[0], whole)["layers"] == ("0.0:1.0", "0.3:0.8", "0.5:1.0"), "`all` would be the same adapter"


def test_a_family_with_nothing_to_vary_is_said(tiny):
    options = replace(TuneOptions.preset("tiny-random", "ia3"), vary=("rank", "delora_lambda"))
    with pytest.raises(ws.WsError, match=r"ia3 adapter .* nothing to vary of rank, delora_lambda"):
        space(tiny[0], options)


def test_a_candidate_is_trained_shorter_by_its_steps_and_keeps_its_scale():
    options = TuneOptions(train=TrainConfig(rank=32, lora_alpha=64.0, epochs=2.0))
    config = settings(options, {"lr": 1e-3, "rank": 8, "contrast": "signed"}, 0.25)
    assert (config.train.lora_alpha, config.train.rank, config.train.epochs) == (16.0, 8, 0.5)
    assert (config.contrast, config.split, config.train.lr) == ("signed", "dev", 1e-3)
    stepped = replace(options, train=replace(options.train, max_steps=10))
    assert [settings(stepped, {}, s).train.max_steps for s in SHARES] == [3, 5, 10]
    assert settings(options, {"lr": 2e-4}).train == options.train, "the family's own rate is on record as none given"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"budget": 3}, "--budget must be at least 4"),
        ({"vary": ("rate",)}, "'rate'"),
        ({"vary": ()}, "--vary must name"),
        ({"contrast": "legs"}, "'legs'"),
        ({"target": 0.0}, "--target must be"),
        ({"n_prompts": 0}, "--n-prompts must be"),
        ({"train": TrainConfig(batch=3)}, "--micro-batch 4 must divide"),
    ],
)
def test_bad_options_are_a_sentence_before_anything_is_loaded(changes, said):
    with pytest.raises(ws.WsError) as problem:
        replace(TuneOptions(), **changes).check()
    assert said in problem.value.args[0]


# ---- reading one candidate ------------------------------------------------------------------------------------------


@pytest.fixture
def options(tmp_path):
    start = TuneOptions.preset("tiny-random")
    return replace(start, out=tmp_path, vary=("lr", "contrast"), budget=4, device="cpu", n_bootstrap=200, n_prompts=2)


def bench_of(options, tiny, behavior):
    folder = options.out / behavior.name / options.adapter / "tune"
    return module._Bench(options, *tiny, behavior, Run(folder), console.Countdown(1))


def test_claims_are_read_in_the_expected_direction_and_true_ones_for_selectivity(options, tiny):
    """Planted: false claims move by 0.5 a side and true ones by 0.1, towards what the behaviour expects."""
    behavior = ws.load_behavior("honesty", "tiny-random")
    bench = bench_of(options, tiny, behavior)
    is_true = np.array([c.is_true for c in bench.evaluation.items])
    assert {c.split for c in bench.evaluation.items} == {"dev"}
    assert is_true.any()

    def scores(units, mass=1.0, false=0.5):
        moved = behavior.effect * units * np.where(is_true, 0.1, false)
        return {"logratio": np.arange(len(is_true)) + moved, "pmass": np.full(len(is_true), mass)}

    read = bench.read
    found = read(scores(-1), scores(0), scores(1))
    assert not found.problem
    assert found.effect == pytest.approx([1.0] * (~is_true).sum())
    assert found.selectivity == pytest.approx(0.8)
    assert "not monotone" in read(scores(1), scores(0), scores(-1)).problem, "the other way round"
    assert "not monotone" in read(scores(-1), scores(2), scores(1)).problem, "the base is not between"
    assert "cannot be read" in read(scores(-1), scores(0), scores(1, mass=0.3)).problem


def test_preference_is_taken_where_there_is_one(options, tiny):
    bench = bench_of(options, tiny, ws.load_behavior("truthfulness", "tiny-random"))
    assert isinstance(bench.evaluation, Preferences)
    assert {p.split for p in bench.evaluation.items} == {"dev"}
    n = len(bench.evaluation.items)
    low, base, high = ({"positive": np.full(n, x), "negative": np.zeros(n)} for x in (-0.2, 0.0, 0.4))
    assert bench.read(low, base, high).mean == pytest.approx(0.6)
    assert "not monotone" in bench.read(high, base, low).problem


def test_for_preference_the_less_moves_on_neutral_text_the_better(options, tiny):
    bench = bench_of(options, tiny, ws.load_behavior("honesty", "tiny-random"))
    name, weight = next((n, p) for n, p in tiny[0].named_parameters() if n.endswith("mlp.up_proj.weight"))
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    delta = LinearDelta(*weight.shape, u=noise[:, :2].contiguous(), v=noise[:2].contiguous())
    deltas = {name.removesuffix(".weight"): delta}
    vector = replace(make_vector(0, "tiny-random"), deltas=deltas, base_fingerprint=fingerprint(tiny[0]))
    chosen = EvalContext(bench.base.options, *tiny, vector, Run(options.out)).intervention()
    weak, strong, both = (bench.restraint(chosen, alphas) for alphas in ([0.01], [1.0], [0.01, 1.0]))
    assert bench.restraint(chosen, [0.0]) == pytest.approx(0.0, abs=1e-9)
    assert strong < weak < 0
    assert both == pytest.approx((weak + strong) / 2)


# ---- a whole search -------------------------------------------------------------------------------------------------


def found_rates(value):
    """The rates in a recipe, wherever they stand."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from [inner] if key == "lr" else found_rates(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from found_rates(inner)


def test_a_search_is_kept_candidate_by_candidate_and_leaves_nothing_in_the_tables(options, monkeypatch, capsys):
    """A kill loses the candidate that it was at; the rest is on record, and the end is the same."""
    tried, killed = [], [3]

    def planted(self, config, trial):
        """The rate alone decides, and more than four times the start's is out."""
        tried.append(trial.folder)
        write_json(trial.folder / "pos" / "x.json", {})
        if len(tried) in killed:
            raise KeyboardInterrupt
        lr = config.train.lr
        return Measured("it did not learn") if lr > 0.03 else Measured("", (lr, lr + 1e-6, lr + 2e-6), 0.0, (-1.0, 1.0))

    monkeypatch.setattr(module._Bench, "tried", planted)
    folder = options.out / "honesty" / "lora" / "tune"
    with pytest.raises(KeyboardInterrupt):
        tune(options)
    assert not (folder / "search.csv").exists()
    assert not (folder / "choice.json").exists()
    left = list(folder.glob("trial-*"))
    assert left == [tried[-1]], "what it was at is there to go on from"
    tuned = tune(options)
    assert tried[3] == tried[2]
    assert len(tried) == 1 + 1 + sum(rungs(options.budget))
    assert not list(folder.glob("trial-*")), "what was trained is gone"

    rows = read_csv(folder / "search.csv")
    assert [int(r["candidate"]) for r in rows] == list(range(5))
    assert tuned.chosen.point["lr"] == max(float(r["lr"]) for r in rows if r["length"] == "1.0" and not r["reason"])
    assert [r["fate"] for r in rows].count("chosen") == 1
    assert all((r["reason"] == "it did not learn") == (float(r["lr"]) > 0.03) for r in rows)
    written = [(folder / name).read_bytes() for name in ("search.csv", "choice.json")]
    main(options)
    assert written == [(folder / name).read_bytes() for name in ("search.csv", "choice.json")]
    assert len(tried) == 2 + sum(rungs(options.budget)), "all is on record"
    said = capsys.readouterr().out
    assert "of 5 noisy numbers is optimistic" in said
    assert re.search(r"Next: ws replicate --model tiny-random --behavior honesty --adapter lora .*--tuned", said)
    with pytest.raises(ws.WsError, match=r"'search'.*seed: 0 -> 1"):
        tune(replace(options, seed=1))
    before = len(tried)
    tune(replace(options, budget=7))
    assert len(tried) - before < 1 + sum(rungs(7)), "a larger budget goes on from a smaller one"
    assert {p.name for p in folder.parent.iterdir()} == {"tune"}, "no loser is in the adapter's own folder"
    assert not finished_runs(options.out)
    tune(replace(options, fresh=True, seed=1))
    assert json.loads((folder / "choice.json").read_text(encoding="utf-8"))["seed"] == 1


def test_nothing_but_dev_is_read_and_strengths_come_from_questions_that_were_not_trained_on(options, monkeypatch):
    asked, solved = [], []
    score, solve = sycophancy.score_claims, calibrate.calibrate

    def spy(model, tok, claims, *given):
        asked.extend(claims)
        return score(model, tok, claims, *given)

    def spy_on_strengths(model, tok, steerable, questions, audit, *given, **named):
        solved.extend([*questions, *audit])
        return solve(model, tok, steerable, questions, audit, *given, **named)

    monkeypatch.setattr(sycophancy, "score_claims", spy)
    monkeypatch.setattr(calibrate, "calibrate", spy_on_strengths)
    monkeypatch.setattr(module, "rungs", lambda budget: [1, 0, 0])
    quick = CalibrationConfig(n_prompts=2, n_tokens=4, target=0.002, max_evaluations=2)
    monkeypatch.setattr(TuneOptions, "calibration", quick)
    tuned = tune(options)
    assert len(tuned.trials) == 2
    assert {c.split for c in asked} == {"dev"}
    pairs = read_pairs(options.out / "data" / "tiny-random" / "honesty")
    assert solved
    assert not {question_key(q) for q in solved} & question_keys(pairs)


def test_where_all_are_out_the_table_says_why_and_nothing_is_chosen(options, monkeypatch, capsys):
    def out(self, config, trial):
        return Measured("there is no -1u: it is weak")

    monkeypatch.setattr(module._Bench, "tried", out)
    with pytest.raises(ws.WsError, match=r"None of the 5 candidates .*search\.csv says why"):
        main(options)
    assert "there is no -1u: it is weak" in capsys.readouterr().out
    assert not (options.out / "honesty" / "lora" / "tune" / "choice.json").exists()


def test_a_full_disk_is_no_property_of_a_candidate(options, tiny, monkeypatch):
    def full(*given):
        raise DiskError("no room")

    monkeypatch.setattr(module, "train_vector", full)
    bench = bench_of(options, tiny, ws.load_behavior("honesty", "tiny-random"))
    candidate = options.candidate(options.train, "arms"), Run(options.out / "x")
    with pytest.raises(DiskError):
        bench.tried(*candidate)
    nan = ws.WsError("The loss is NaN.")
    monkeypatch.setattr(module, "train_vector", lambda *given: (_ for _ in ()).throw(nan))
    assert bench.tried(*candidate) == Measured("The loss is NaN.")


@pytest.mark.parametrize("problem", [torch.OutOfMemoryError(), NoMemoryError("Not even one row at a time fits.")])
def test_what_did_not_fit_is_tried_again_also_with_less_memory_for_each(options, monkeypatch, problem):
    """A busy device put candidates out for ever, and `recompute`, which is no part of a search, was refused."""

    def full(*given):
        raise problem

    monkeypatch.setattr(module, "train_vector", full)
    assert {t.measured.problem for t in tune(options).trials} == {"it does not fit into the memory of the device"}
    monkeypatch.setattr(module._Bench, "tried", lambda self, config, trial: Measured("", (0.1, 0.2, 0.3)))
    less = replace(options, train=replace(options.train, recompute="cheap"))
    assert not any(t.measured.problem for t in tune(less).trials)


# ---- what was chosen, used ------------------------------------------------------------------------------------------


@pytest.fixture
def chosen(options, monkeypatch):
    """A choice on disk: signed, at twice the rate."""

    def tried(self, config, trial):
        good = config.contrast == "signed" and config.train.lr == 2 * options.train.lr
        return Measured("", tuple(good + x for x in (0.1, 0.2, 0.3)), 0.0, (-1.0, 1.0), (1.0, 1.0))

    monkeypatch.setattr(module._Bench, "tried", tried)
    tune(replace(options, budget=20))
    usual = ReplicateConfig.preset("tiny-random")
    return replace(usual, out=options.out, device="cpu", tuned=True, split="dev", alphas=(-1.0, 1.0), n_bootstrap=200)


def test_a_run_takes_what_was_chosen_and_its_recipe_says_so(chosen, options):
    file = options.out / "honesty" / "lora" / "tune" / "choice.json"
    reading = replicate(chosen)
    assert reading.folder == options.out / "honesty" / "lora-signed"
    stored = json.loads((reading.folder / "vector" / "ws.json").read_text(encoding="utf-8"))
    assert stored["info"]["tuned"] == "on dev"
    assert stored["info"]["tuned_sha256"] == sha256_file(file)
    assert set(found_rates(stored["recipe"])) == {2 * options.train.lr}
    plain = replace(as_tuned(chosen), tuned=False)
    assert replicate(plain).folder == reading.folder, "the same settings, typed out, are the same run"
    again = as_tuned(as_tuned(chosen))
    assert (again.train, again.contrast) == (plain.train, "signed")


def test_what_the_adapter_does_not_depend_on_may_be_given_beside_a_choice(chosen, options):
    given = replace(chosen, train=replace(chosen.train, recompute="cheap", report_to=("trackio",)))
    train = as_tuned(given).train
    assert (train.recompute, train.report_to, train.lr) == ("cheap", ("trackio",), 2 * options.train.lr)
    assert train.recorded() == as_tuned(chosen).train.recorded()
    assert as_tuned(as_tuned(given)).train == train


def test_a_choice_is_for_the_behaviour_that_it_was_made_for(chosen, tmp_path):
    """What was `dev` then may be `report` now, and the reading there would be of what the choice has seen."""
    own = tmp_path / "honesty.toml"
    own.write_bytes(behavior_file("honesty", "tiny-random").read_bytes())
    assert as_tuned(replace(chosen, behavior=str(own))).train == as_tuned(chosen).train
    own.write_bytes(own.read_bytes() + b"\n# another version\n")
    with pytest.raises(
        ws.WsError, match=r"another version of the behaviour.*`ws data .* --fresh`.*`ws tune "
    ) as problem:
        as_tuned(replace(chosen, behavior=str(own)))
    anew = re.findall(r"`ws data ([^`]*)`", str(problem.value))
    assert parse(DataCommand, shlex.split(anew[0])).data == chosen.data


def test_what_does_not_go_with_a_choice_is_a_sentence(chosen, options, tmp_path):
    other = replace(chosen.train, epochs=7.0)
    for config, said in (
        (
            replace(chosen, out=tmp_path / "elsewhere"),
            r"there is no .*choice.json; make it with `ws tune --model tiny-",
        ),
        (replace(chosen, model="pocket"), "was chosen for tiny-random, not for pocket"),
        (replace(chosen, train=other), "leave out those that are given beside it"),
        (replace(chosen, adapter="ia3"), "ia3.tune.choice.json"),
    ):
        with pytest.raises(ws.WsError, match=said):
            as_tuned(config)
    with pytest.raises(ws.WsError, match="leave out `contrast` signed"):
        file = options.out / "honesty" / "lora" / "tune" / "choice.json"
        file.write_text(file.read_text(encoding="utf-8").replace('"contrast": "signed"', '"contrast": "arms"'))
        as_tuned(replace(chosen, contrast="signed"))
    file.write_text("{", encoding="utf-8")
    with pytest.raises(ws.WsError, match=r"choice.json is damaged .*; make it again with `ws tune .* --fresh`"):
        as_tuned(chosen)


def test_the_command_line_takes_the_model_s_presets():
    parsed = parse(TuneOptions, ["--model", "pocket", "--adapter", "ia3", "--budget", "7", "--vary", "lr"])
    assert parsed.train == train_preset("pocket", "ia3")
    assert (parsed.budget, parsed.vary) == (7, ("lr",))
    assert parse(ReplicateConfig, ["--tuned"]).tuned
