"""What commands can be told: fields of one meaning, names that agree with what is done, things that are there."""

from __future__ import annotations

import os
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path

import pytest

import ws
from ws import console
from ws.adapters import FAMILIES
from ws.cli import COMMANDS
from ws.eval.airisk import Airisk
from ws.eval.suite import SUITE, headlines
from ws.eval.vignettes import CONFIGS
from ws.intervene.interventions import ACTIVATIONS, OF_A_RUN
from ws.lm import divergence
from ws.options import make, measure, shared, use
from ws.options.check import CheckOptions, ControlOptions
from ws.options.shared import EvalOptions, NamesModel, RunOptions, shared_with


def test_names_that_stand_here_for_a_light_start_are_those_of_what_carries_them_out():
    assert tuple(FAMILIES) == shared.ADAPTERS
    assert set(shared.INTERVENTIONS) == {*OF_A_RUN, "prompt", *ACTIVATIONS}
    assert (divergence.N_TOKENS, divergence.QUANTILE) == (shared.N_TOKENS, shared.QUANTILE)
    assert set(make.DEFAULT_EVALS) <= set(SUITE)
    assert set(shared.HEADLINES) <= set(headlines())
    assert measure.VIGNETTES in CONFIGS
    assert Airisk.options is measure.AiriskOptions


def test_what_two_commands_share_is_handed_on_whole_and_nothing_else_is():
    controls = ControlOptions(adapter="oft", seed=2, limit=7, dtype="4bit", load_in_4bit=True, alphas=(0.5,), n_draws=3)
    made = controls.eval_options((1.0,))
    assert (made.adapter, made.seed, made.limit, made.alphas) == ("oft", 2, 7, (1.0,))
    assert made.precision == "4bit", "packed weights stay packed"
    assert made.n_bootstrap == EvalOptions().n_bootstrap
    for field in fields(RunOptions):
        assert getattr(made, field.name) == getattr(controls, field.name)


def test_a_comparison_asks_one_run_at_a_time_of_its_vector_alone():
    options = measure.CompareOptions(adapters=("lora", "oft"), interventions=("weight", "prompt"), dataset="pocket")
    one = options.eval_options("oft", 1)
    assert (one.adapter, one.seed, one.alphas, one.interventions) == ("oft", 1, ("calibrated",), ("weight",))
    assert one.dataset == "pocket"


def test_a_sweep_hands_its_settings_to_every_cell():
    sweep = make.SweepConfig.preset("pocket")
    cell = shared_with(make.ReplicateConfig, sweep, adapter="ia3", seed=4)
    assert (cell.model, cell.adapter, cell.seed) == ("pocket", "ia3", 4)
    assert cell.data == sweep.data


@pytest.mark.parametrize("command", ["train", "replicate", "tune", "sweep"])
def test_epochs_that_are_asked_for_are_not_overridden_by_the_steps_of_a_preset(command):
    options, words = COMMANDS[command][1], ["--model", "smollm2", "--epochs", "1"]
    given = console.parse(options, words)
    assert (given.train.epochs, given.train.max_steps) == (1.0, None)
    assert console.parse(options, console.words_of(given, ("model",))) == given, "also the epochs of the preset itself"
    assert console.parse(options, [*words, "--max-steps", "5"]).train.max_steps == 5
    assert console.parse(options, words[:2]).train.max_steps == 12


def test_the_run_that_a_demo_has_left_is_offered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out/demo/smollm2/truthfulness/lora/vector").mkdir(parents=True)
    with pytest.raises(ws.WsError, match="take that of `ws demo` with `out` out/demo/smollm2"):
        RunOptions(behavior="truthfulness").require()


def test_a_behaviour_that_is_nowhere_is_not_offered_to_be_made(tmp_path):
    (tmp_path / "mine").mkdir()
    for wrong, right in (("honest", "honesty"), ("mnie", "mine")):
        with pytest.raises(ws.WsError, match=f"nor a behaviour {wrong!r}. Did you mean {right!r}"):
            RunOptions(behavior=wrong, out=tmp_path).require()
    with pytest.raises(ws.WsError, match="make it with `ws replicate --behavior mine"):
        RunOptions(behavior="mine", out=tmp_path).require()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (RunOptions(adapter="oft", seed=1), "ws replicate --behavior honesty --adapter oft --seed 1"),
        (RunOptions(out=Path("my out")), "`ws replicate --behavior honesty --adapter lora --out 'my out'`"),
        (RunOptions(), "`ws demo` makes one on the bundled model, for `out` out/demo"),
        (use.ReportOptions(behavior="honesty", out=Path("o")), "`ws replicate --behavior honesty --out o`"),
        (use.LoraOptions(), "or name one with `vector`"),
        (use.ChatOptions(), "Or name some with `vectors`"),
        (use.ReportOptions(behavior="honesty"), "No run below"),
        (use.InspectConfig("nowhere"), "There is no folder nowhere"),
        (make.ReplicateConfig(behavior="honsty"), "Did you mean 'honesty'"),
        (CheckOptions("mine.toml"), "There is no behaviour file mine.toml"),
    ],
)
def test_what_is_named_and_is_not_there_is_said_before_anything_is_loaded(options, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ws.WsError) as problem:
        options.require()
    assert said in str(problem.value)


@pytest.mark.parametrize(
    "options",
    [c for c in dict.fromkeys(c for _, c in COMMANDS.values()) if issubclass(c, EvalOptions)],
    ids=lambda c: c.__name__,
)
def test_an_evaluation_of_the_base_alone_is_refused_before_anything_is_loaded(options, tmp_path):
    (tmp_path / "honesty" / "lora" / "vector").mkdir(parents=True)
    options(out=tmp_path, alphas=(0.0, "calibrated")).require()
    for alphas in ((0.0,), (-0.0, 0.0), ()):
        if options is measure.LmEvalOptions:
            options(out=tmp_path, alphas=alphas).require()
            continue
        with pytest.raises(ws.WsError, match="a strength other than 0"):
            options(out=tmp_path, alphas=alphas).require()
    for sweep in (make.SweepConfig, make.QueueConfig):
        with pytest.raises(ws.WsError, match="a strength other than 0"):
            sweep(alphas=(0.0,)).check()


def test_a_seed_that_no_run_can_have_is_found_before_a_sweep_begins():
    for sweep in (make.SweepConfig, make.QueueConfig):
        for seed in (-1, 2**32):
            with pytest.raises(ws.WsError, match="Each of `seeds` must lie between 0 and 4294967295"):
                sweep(seeds=(0, seed)).check()


@pytest.mark.parametrize(
    "options",
    [
        use.LoraOptions(vector="some/where"),
        use.ChatOptions(vectors=("a",)),
        use.SubspaceOptions(all=True),
        make.ReplicateConfig(behavior="new", pairs="pairs.jsonl"),
    ],
)
def test_what_is_named_otherwise_need_not_be_in_the_run(options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options.require()


def test_a_field_has_one_type_wherever_it_stands():
    """A name that two commands share means the same in both, or `shared_with` would hand on something else."""
    seen: dict[str, set[str]] = {}
    for _, options in COMMANDS.values():
        for field in fields(options):
            seen.setdefault(field.name, set()).add(str(field.type).replace(" | None", "").removeprefix("Annotated["))
    several = {name: types for name, types in seen.items() if len({t.split(",")[0] for t in types}) > 1}
    assert set(several) <= {"alphas", "vectors", "to", "n_think", "adapters", "model", "seeds", "vector", "behavior"}


def switches(options):
    """The names of what is on or off in a command's options, and whether it is on by itself."""
    for field in fields(options):
        value = getattr(options, field.name)
        if is_dataclass(value):
            yield from switches(value)
        elif isinstance(value, bool):
            yield field.name, value


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_on_or_off_can_be_asked_for_either_way_whatever_it_is_by_itself(command):
    options = COMMANDS[command][1]
    needed = [f for f in fields(options) if f.default is MISSING and f.default_factory is MISSING]
    words = [w for f in needed for w in ([f.name] if "Positional" in str(f.type) else [f"--{f.name}", f.name])]
    models = (["--model", "tiny-random"], []) if hasattr(options, "preset") else ([],)
    for model in models:
        before = dict(switches(console.parse(options, [*words, *model])))
        for name in before:
            for asked in (True, False):
                flag = f"--{'' if asked else 'no-'}{name.replace('_', '-')}"
                after = dict(switches(console.parse(options, [*words, *model, flag])))
                assert after == before | {name: asked}


def test_whatever_names_a_model_takes_one_name_of_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    naming = [cls for _, cls in COMMANDS.values() if "model" in {f.name for f in fields(cls)}]
    assert all(issubclass(cls, NamesModel) for cls in naming)
    assert RunOptions(model="./m/").model == make.ReplicateConfig(model="m").model == os.path.realpath(tmp_path / "m")
    assert RunOptions().model is None
    assert make.TrainCommand.preset("pocket").model == "pocket"
