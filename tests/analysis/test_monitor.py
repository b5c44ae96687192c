"""The monitor: planted movements, honest nulls, three routes to one change, and a callback that only looks."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from scipy import stats
from transformers import Trainer, TrainingArguments

import ws
from conftest import build_adapter, build_model
from support.statements import folder as folder_of
from support.statements import rows as statement_rows
from ws.adapters import AdapterSpec, peft_config
from ws.analysis.controls import random_like
from ws.analysis.monitor import (
    Monitor,
    MonitorCallback,
    NoMovementError,
    main,
    open_change,
    open_library,
    per_layer,
    random_cosine_sd,
)
from ws.analysis.monitor_profile import _summary, joint_projection, render_profiles
from ws.delta import LinearDelta
from ws.files.runs import read_csv
from ws.lm.models import fingerprint
from ws.options.check import MonitorOptions

UP, QUERY = "model.layers.1.mlp.up_proj", "model.layers.2.self_attn.q_proj"


def vector_of(model, seed: int, modules: tuple[str, ...] = (UP, QUERY), size: float = 1.0) -> ws.SteeringVector:
    """A random low-rank vector, so different in size from module to module that weights matter."""
    rng = torch.Generator().manual_seed(seed)
    deltas = {}
    for number, name in enumerate(modules, start=1):
        d_out, d_in = model.get_submodule(name).weight.shape
        u, v = torch.randn(d_out, 3, generator=rng), torch.randn(3, d_in, generator=rng)
        deltas[name] = LinearDelta(d_out, d_in, u=size * number * u, v=v)
    return ws.SteeringVector(deltas, "base", fingerprint(model), info={"behavior": f"b{seed}"})


def flat(vector: ws.SteeringVector, model, modules: tuple[str, ...] = (UP, QUERY)) -> np.ndarray:
    """The dense change of the modules, one after the other; zero where the vector has none."""
    parts = []
    for name in modules:
        weight = model.get_submodule(name).weight.detach().double()
        parts.append(vector.deltas[name].dense(weight) if name in vector.deltas else torch.zeros_like(weight))
    return torch.cat([p.flatten() for p in parts]).numpy()


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


# ---- what is measured -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [-2.0, 0.1, 3.0])
def test_a_planted_movement_is_found(qwen3, strength):
    v, w, noise = vector_of(qwen3, 1), vector_of(qwen3, 2), vector_of(qwen3, 3, size=0.2)
    change = strength * v + noise
    first, second = Monitor({"v": v, "w": w}, qwen3).read(change)
    for found, vector in ((first, v), (second, w)):
        c, direction = flat(change, qwen3), flat(vector, qwen3)
        assert found.cosine == pytest.approx(cosine(c, direction), abs=1e-6)
        assert found.projection == pytest.approx(c @ direction / (direction @ direction), abs=1e-6)
        assert found.norm == pytest.approx(np.linalg.norm(c), rel=1e-6)
        assert found.cosine == pytest.approx(change.cosine(vector), abs=1e-6)
    assert first.projection == pytest.approx(strength, abs=0.05)
    assert abs(second.projection) < 0.2 * abs(strength) + 0.05


def test_only_the_modules_of_the_vector_count_and_all_of_them(qwen3):
    v, elsewhere = vector_of(qwen3, 1), vector_of(qwen3, 2, ("model.layers.0.mlp.down_proj",), size=9.0)
    inside = vector_of(qwen3, 3, (UP,)) + v.select(modules=["up_proj"])
    monitor = Monitor({"v": v}, qwen3)
    (alone,), (both,) = monitor.read(inside), monitor.read(inside + elsewhere)
    assert alone.cosine == both.cosine == pytest.approx(cosine(flat(inside, qwen3), flat(v, qwen3)), abs=1e-6)
    assert {t.module: t.change > 0 for t in alone.terms} == {UP: True, QUERY: False}


def test_what_tied_modules_share_counts_once():
    """As in the inner products and norms of vectors; read off a vector and off a whole checkpoint."""
    model, rng = ws.load_model("pocket", device="cpu")[0], torch.Generator().manual_seed(0)
    table = 0.01 * torch.randn(model.lm_head.weight.shape, generator=rng)
    shared = LinearDelta(*table.shape, e=table, kind="embedding")
    tied = ws.SteeringVector({"model.embed_tokens": shared, "lm_head": shared}, "pocket", fingerprint(model))
    low = replace(vector_of(model, 1, size=0.02), base_id="pocket")
    library = {"whole": tied + low, "low": low}
    merged = copy.deepcopy(model)
    library["whole"].merge_into(merged)
    monitor = Monitor(library, model)
    for change in (library["whole"], merged):
        whole, part = monitor.read(change)
        assert (whole.projection, whole.cosine) == pytest.approx((1.0, 1.0), abs=1e-4)
        assert whole.norm == pytest.approx(library["whole"].norm(model), rel=1e-4)
        assert part.norm == pytest.approx(low.norm(model), rel=1e-4)
        along = [sum(t.inner for t in m.terms) for m in (whole, part)]
        assert joint_projection(library, model, along) == pytest.approx([1.0, 0.0], abs=1e-3)
    (apart,) = Monitor({"whole": library["whole"]}, model).read(low)
    assert apart.cosine == pytest.approx(low.cosine(library["whole"], model), abs=1e-5), "nor where it stays untouched"


def test_a_module_that_the_vector_leaves_as_it_is_is_none_of_its_modules(qwen3):
    still, moved = (vector_of(qwen3, 1, (name,)) for name in (UP, QUERY))
    vector = 0 * still + moved
    monitor, change = Monitor({"v": vector}, qwen3), vector_of(qwen3, 2)
    with pytest.raises(ws.WsError, match="'v' have no module in common"):
        monitor.read(still)
    (found,), (alone,) = monitor.read(change), Monitor({"v": moved}, qwen3).read(change)
    assert (found.cosine, found.norm, found.p) == (alone.cosine, alone.norm, alone.p)


def test_layers_add_up(qwen3):
    change = vector_of(qwen3, 1) + vector_of(qwen3, 2, (UP,))
    v = vector_of(qwen3, 1) + vector_of(qwen3, 4, ("model.layers.0.mlp.down_proj",))
    (movement,) = Monitor({"v": v}, qwen3).read(change)
    rows = {r["layer"]: r for r in per_layer(movement)}
    assert list(rows) == ["0", "1", "2"]
    assert rows["0"]["cosine"] is None
    assert sum(r["share"] for r in rows.values()) == pytest.approx(1)
    for layer, name in (("1", UP), ("2", QUERY)):
        assert rows[layer]["cosine"] == pytest.approx(
            cosine(flat(change, qwen3, (name,)), flat(v, qwen3, (name,))), abs=1e-6
        )


def test_an_adapter_and_its_merged_checkpoint_are_the_same_change(base, family, tmp_path):
    size = {"ia3": 0.3, "oft": 0.3, "delora": 0.3}.get(family, 0.01)  # of a fine-tune, smaller than the weights
    merged = build_adapter(base, family, tmp_path / "adapter", seed=3, size=size)
    library = {f"v{s}": ws.SteeringVector.from_adapter(_other(base, family, tmp_path, s), base) for s in (4, 5)}
    monitor = Monitor(library, base)
    for a, b in zip(monitor.read(open_change(str(tmp_path / "adapter"), base)), monitor.read(merged), strict=True):
        assert b.cosine == pytest.approx(a.cosine, abs=2e-4)
        assert b.projection == pytest.approx(a.projection, rel=1e-2, abs=2e-4)
        assert b.norm == pytest.approx(a.norm, rel=1e-3)
        assert b.null_sd == pytest.approx(a.null_sd, rel=1e-3)


def _other(base, family: str, folder: Path, seed: int) -> Path:
    build_adapter(base, family, folder / str(seed), seed=seed)
    return folder / str(seed)


# ---- the null ---------------------------------------------------------------------------------------------------


def test_the_p_value_is_that_of_a_t_test_with_one_sample_of_one(qwen3):
    v, controls = vector_of(qwen3, 0), [vector_of(qwen3, s) for s in range(10, 15)]
    monitor, change = Monitor({"v": v}, qwen3, iter(controls)), vector_of(qwen3, 20) + 0.05 * vector_of(qwen3, 0)
    (found,) = monitor.read(change)
    null = [c.cosine(v) for c in controls]
    assert monitor.controls["v"] == pytest.approx(null)
    assert found.p == pytest.approx(stats.ttest_ind([change.cosine(v)], null).pvalue)
    assert found.z == pytest.approx((change.cosine(v) - np.mean(null)) / np.std(null, ddof=1))
    assert (found.null, found.n_controls) == ("controls", 5)


def test_two_behaviours_share_the_false_positive_rate():
    """200 benign fine-tunes with a common drift, 6 controls each: the family-wise rate holds, and power is there."""
    base, rng = torch.nn.Sequential(torch.nn.Linear(16, 12)), torch.Generator().manual_seed(0)

    def drawn() -> ws.SteeringVector:
        return ws.SteeringVector({"0": LinearDelta(12, 16, e=torch.randn(12, 16, generator=rng))}, "base", None)

    library = {"v": drawn(), "w": drawn()}
    drift = library["v"] + drawn()
    flagged = caught = alone = 0
    for trial in range(200):
        monitor, benign = Monitor(library, base, (drift + drawn() for _ in range(6))), drift + drawn()
        movements = monitor.read(benign)
        flagged += any(m.flagged for m in movements)
        alone += movements[0].p_rank == pytest.approx(1 / 7)
        if trial < 20:
            caught += monitor.read(benign - 2.0 * library["v"])[0].flagged
    assert 0 < flagged / 200 <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 200)
    assert alone / 200 == pytest.approx(1 / 7, abs=0.08)
    assert caught >= 19


def test_few_controls_widen_what_is_allowed(qwen3):
    v, change, p = vector_of(qwen3, 1), vector_of(qwen3, 2) + 0.1 * vector_of(qwen3, 1), {}
    monitor = Monitor({"v": v}, qwen3, (vector_of(qwen3, s) for s in range(10, 13)))
    for n in (3, 5, 30):
        spread = np.arange(n) - (n - 1) / 2
        monitor.controls["v"] = 0.01 * spread / spread.std(ddof=1)  # always mean 0, sd 0.01
        (found,) = monitor.read(change)
        assert found.z == pytest.approx(found.cosine / 0.01)
        p[n] = found.p
        assert p[n] == pytest.approx(2 * stats.t.sf(abs(found.z) / np.sqrt(1 + 1 / n), n - 1))
    assert p[3] > 10 * p[5] > 100 * p[30]


def test_the_rank_p_value_is_exact_whatever_the_law(qwen3):
    """Each of n + 1 exchangeable cosines is the fine-tune's equally often; at most k of them may get k / (n + 1)."""
    monitor = Monitor({"v": vector_of(qwen3, 1)}, qwen3, (vector_of(qwen3, s) for s in range(10, 13)))
    change = vector_of(qwen3, 2)
    own = monitor.read(change)[0].cosine
    for seed in range(20):
        cosines = np.random.default_rng(seed).standard_cauchy(8)
        ranks = []
        for i, value in enumerate(cosines):
            monitor.controls["v"] = np.delete(cosines, i) - value + own  # shifts leave the ranks alone
            ranks.append(monitor.read(change)[0].p_rank)
        assert all(sum(p <= k / 8 + 1e-9 for p in ranks) <= k for k in range(1, 9))


def test_the_random_null_has_the_spread_of_sampled_directions(qwen3):
    v, change = vector_of(qwen3, 1), vector_of(qwen3, 2, (QUERY, UP))
    (found,) = Monitor({"v": v}, qwen3).read(change)
    sampled = np.array([change.cosine(random_like(v, qwen3, seed)) for seed in range(300)])
    assert found.null_sd == pytest.approx(sampled.std(), rel=0.15)
    assert found.null_sd == random_cosine_sd(found.terms)
    assert (found.null, found.n_controls, found.null_mean, found.p_rank) == ("random", 0, 0.0, None)
    assert found.p == pytest.approx(2 * stats.norm.sf(abs(found.z)))


def test_noise_is_rarely_flagged_by_the_random_null(qwen3):
    monitor = Monitor({"v": vector_of(qwen3, 1)}, qwen3)
    changes = [random_like(vector_of(qwen3, 2), qwen3, seed) for seed in range(200)]
    flagged = sum(monitor.read(change)[0].flagged for change in changes)
    assert 0 < flagged / 200 <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 200)


# ---- what is refused --------------------------------------------------------------------------------------------


def test_another_base_is_refused(qwen3):
    v = vector_of(qwen3, 1)
    monitor, stranger = Monitor({"v": v}, qwen3), build_model("qwen2")
    with pytest.raises(ws.WsError, match="library's base is another"):
        monitor.read(replace(v, base_fingerprint="0" * 16))
    with pytest.raises(ws.WsError, match="this model's weights differ"):
        Monitor({"v": v}, stranger)
    other = copy.deepcopy(qwen3)
    with torch.no_grad():
        for p in other.parameters():
            p.copy_(torch.randn_like(p) * p.std())
    with pytest.raises(ws.WsError, match="no fine-tune of this base"):
        monitor.read(other)
    with pytest.raises(ws.WsError, match=r"no such module.*another base"):
        monitor.read(torch.nn.Sequential(torch.nn.Linear(4, 4)))
    small = LinearDelta(4, 4, u=torch.ones(4, 1), v=torch.ones(1, 4))
    with pytest.raises(ws.WsError, match=r"\(4, 4\).*another base"):
        monitor.read(ws.SteeringVector({UP: small}, "unknown", None))


def test_a_change_of_nothing_is_refused(qwen3):
    v = vector_of(qwen3, 1)
    monitor = Monitor({"v": v}, qwen3)
    for change in (0 * v, copy.deepcopy(qwen3)):
        with pytest.raises(NoMovementError, match="leaves every module of 'v' as it was"):
            monitor.read(change)
    with pytest.raises(ws.WsError, match="'v' have no module in common"):
        monitor.read(vector_of(qwen3, 2, ("model.layers.0.mlp.down_proj",)))
    with pytest.raises(ws.WsError, match="load the base a second time"):
        monitor.read(qwen3)


def test_unusable_libraries_and_controls_are_refused(qwen3):
    v, control = vector_of(qwen3, 1), vector_of(qwen3, 2)
    for library, controls, fpr, why in (
        ({}, [], 0.05, "library is empty"),
        ({"v": 0 * v}, [], 0.05, "'v' of the library is zero"),
        ({"v": v}, [control] * 2, 0.05, "at least 3 controls, not 2"),
        ({"v": v}, [control] * 4, 0.05, "the same cosine"),
        ({"v": v}, [], 1.0, "between 0 and 1"),
    ):
        with pytest.raises(ws.WsError, match=why):
            Monitor(library, qwen3, controls, fpr)


# ---- in training ------------------------------------------------------------------------------------------------


def adapted(model, family: str = "lora"):
    torch.manual_seed(0)
    return get_peft_model(
        copy.deepcopy(model), peft_config(model, AdapterSpec(family, rank=4, lora_alpha=6.0, layers="all", oft_block=8))
    )


def trainer_of(model, folder: Path, steps: int = 5, lr: float = 1e-2, **options) -> Trainer:
    rows = torch.randint(0, 96, (16, 7), generator=torch.Generator().manual_seed(1)).tolist()
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, learning_rate=lr, warmup_steps=1, per_device_train_batch_size=4,
        seed=1, logging_steps=2, report_to=[], disable_tqdm=True, use_cpu=True, save_strategy="no", **options,
    )  # fmt: skip
    return Trainer(model=model, args=arguments, train_dataset=[{"input_ids": r, "labels": r} for r in rows])


@pytest.fixture
def monitor(qwen3):
    names = [f"model.layers.{i}.{kind}" for i in range(3) for kind in ("self_attn.v_proj", "mlp.down_proj")]
    return Monitor({f"b{s}": vector_of(qwen3, s, tuple(names)) for s in (1, 2)}, copy.deepcopy(qwen3))


def test_a_live_adapter_reads_like_its_saved_folder(qwen3, monitor, family, tmp_path):
    live = adapted(qwen3, family)
    torch.manual_seed(4)
    with torch.no_grad():
        for name, p in live.named_parameters():
            if p.requires_grad and "lambda" not in name:
                p.add_(0.05 * torch.randn_like(p))
    if family == "pissa":
        with pytest.raises(ws.WsError, match="monitor its saved adapters"):
            monitor.read(live)
        return
    live.save_pretrained(tmp_path / "saved")
    saved = ws.SteeringVector.from_adapter(tmp_path / "saved", qwen3)
    assert [m.columns for m in monitor.read(live)] == [m.columns for m in monitor.read(saved)]


@pytest.mark.parametrize("setting", [{"alora_invocation_tokens": [9, 27]}, {"layer_replication": [(0, 2), (1, 2)]}])
def test_a_live_adapter_whose_settings_are_not_understood_is_refused_by_name(qwen3, monitor, setting):
    config = LoraConfig(r=4, target_modules=["v_proj", "down_proj"], task_type="CAUSAL_LM", **setting)
    live = get_peft_model(
        build_model("qwen2"), config
    )  # layers are replicated only where the model is a Llama or alike
    with pytest.raises(ws.WsError, match=f"The adapter in training has {min(setting)}="):
        monitor.read(live)


@pytest.mark.parametrize("kind", ["adapter", "full"])
def test_the_callback_reads_what_is_there_and_touches_nothing(qwen3, monitor, kind, tmp_path):
    def model():
        torch.manual_seed(0)
        return adapted(qwen3) if kind == "adapter" else copy.deepcopy(qwen3)

    quiet, watched = trainer_of(model(), tmp_path / "a"), trainer_of(model(), tmp_path / "b")
    callback = MonitorCallback(monitor, every=2, file=tmp_path / "monitor.csv").attach(watched)
    quiet.train()
    watched.train()
    for (name, a), b in zip(quiet.model.state_dict().items(), watched.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name

    rows = read_csv(tmp_path / "monitor.csv")
    assert [(r["step"], r["behavior"]) for r in rows] == [(s, b) for s in ("2", "4", "5") for b in ("b1", "b2")]
    offline = monitor.read(watched.model)
    assert [{k: str("" if v is None else v) for k, v in m.columns.items()} for m in offline] == [
        {k: v for k, v in r.items() if k != "step"} for r in rows[-2:]
    ]
    logged = [h for h in watched.state.log_history if "monitor/b1/cos" in h]
    assert [h["step"] for h in logged] == [2, 4, 5]
    assert (logged[-1]["monitor/b2/cos"], logged[-1]["monitor/b2/z"]) == (offline[1].cosine, offline[1].z)
    losses = [[(h["step"], h["loss"]) for h in t.state.log_history if "loss" in h] for t in (quiet, watched)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 2
    assert callback.rows[0]["step"] == 2


def test_without_a_trainer_the_callback_writes_the_log_history(qwen3, monitor, tmp_path):
    trainer = trainer_of(adapted(qwen3), tmp_path, steps=3)
    trainer.add_callback(MonitorCallback(monitor, every=3))
    trainer.train()
    assert [h["step"] for h in trainer.state.log_history if "monitor/b1/z" in h] == [3]


def test_a_step_that_moves_nothing_is_left_out_and_old_rows_stay(qwen3, monitor, tmp_path):
    file = tmp_path / "monitor.csv"
    trainer = trainer_of(adapted(qwen3), tmp_path, steps=2)
    MonitorCallback(monitor, every=1, file=file).attach(trainer)
    trainer.train()
    assert {r["step"] for r in read_csv(file)} == {"2"}, "the first step of the warm-up has a learning rate of 0"
    again = MonitorCallback(monitor, every=1, file=file)
    for step, kept in ((2, 2), (1, 0)):
        again.on_train_begin(None, type("State", (), {"global_step": step}), None, model=trainer.model)
        assert len(again.rows) == kept


def test_the_callback_refuses_what_it_cannot_read(qwen3, monitor, tmp_path):
    moved = copy.deepcopy(qwen3)
    with torch.no_grad():
        for p in moved.parameters():
            p.mul_(1.5)
    on_another = trainer_of(adapted(moved), tmp_path)
    MonitorCallback(monitor, every=1).attach(on_another)
    with pytest.raises(ws.WsError, match="frozen weights of .* differ"):
        on_another.train()
    apart = Monitor({"v": vector_of(qwen3, 1, ("model.layers.0.self_attn.q_proj",))}, copy.deepcopy(qwen3))
    elsewhere = trainer_of(adapted(qwen3, "ia3"), tmp_path)
    MonitorCallback(apart, every=1).attach(elsewhere)
    with pytest.raises(ws.WsError, match="no module in common"):
        elsewhere.train()
    itself = trainer_of(qwen3, tmp_path)
    MonitorCallback(Monitor({"v": vector_of(qwen3, 1)}, qwen3), every=1).attach(itself)
    with pytest.raises(ws.WsError, match="load the base a second time"):
        itself.train()
    with pytest.raises(ws.WsError, match="every 1 or more steps"):
        MonitorCallback(monitor, every=0)


# ---- the command ------------------------------------------------------------------------------------------------


@pytest.fixture
def options(tiny, tmp_path):
    model, _ = tiny
    for seed in range(1, 8):
        replace(vector_of(model, seed), base_id="tiny-random").save(tmp_path / f"v{seed}")
    moved = replace(vector_of(model, 1) * -3.0 + vector_of(model, 9), base_id="tiny-random")
    moved.save(tmp_path / "moved")
    return MonitorOptions(
        changes=(str(tmp_path / "moved"),),
        library=(tmp_path / "v1", tmp_path / "v2"),
        controls=tuple(str(tmp_path / f"v{s}") for s in range(3, 8)),
        out=tmp_path / "out",
    )


def test_the_command_says_which_behaviour_has_moved(options, capsys):
    main(options)
    printed, rows = capsys.readouterr().out, read_csv(options.out / "monitor.csv")
    assert [(r["change"], r["behavior"], r["flagged"]) for r in rows] == [
        (options.changes[0], "b1", "True"),
        (options.changes[0], "b2", "False"),
    ]
    assert "b1: FLAGGED, moved further away from it than the null allows: -3.0" in printed
    assert "b2: no movement beyond the null" in printed
    assert "5 control fine-tunes" in printed
    assert "cannot be below 0.167" in printed
    assert {r["layer"] for r in read_csv(options.out / "monitor_per_layer.csv")} == {"1", "2"}
    main(replace(options, controls=()))
    printed = capsys.readouterr().out
    assert "a benign one too" in printed
    assert {r["null"] for r in read_csv(options.out / "monitor.csv")} == {"random"}


# ---- what it has moved by behaviour ---------------------------------------------------------------------------------


def test_the_joint_projection_is_least_squares_over_all_weights(qwen3):
    """Against the coordinates of whole vectors, with a library whose vectors are far from right angles."""
    first, second, rest = (vector_of(qwen3, seed) for seed in (1, 2, 3))
    library = {"a": first, "b": first * 0.8 + second}
    change = first * 0.5 - second * 2.0 + rest
    along = [sum(t.inner for t in m.terms) for m in Monitor(library, qwen3).read(change)]
    matrix = np.stack([flat(v, qwen3) for v in library.values()], axis=1)
    expected, *_ = np.linalg.lstsq(matrix, flat(change, qwen3), rcond=None)
    assert joint_projection(library, qwen3, along) == pytest.approx(expected, rel=1e-3)
    doubled = {"a": first, "twice": first * 2.0}
    along = [sum(t.inner for t in m.terms) for m in Monitor(doubled, qwen3).read(first)]
    a, twice = joint_projection(doubled, qwen3, along)
    assert a + 2 * twice == pytest.approx(1.0, rel=1e-3), "one direction has one strength"


@pytest.fixture
def on_pocket(tmp_path):
    """Small random vectors of the pocket model, which answers its board; the first two are the library."""
    model, _ = ws.load_model("pocket", device="cpu")
    names = ("model.layers.1.mlp.up_proj", "model.layers.2.self_attn.q_proj")
    for seed in range(7):
        vector = replace(vector_of(model, seed, names, size=0.05), base_id="pocket")
        vector.save(tmp_path / f"p{seed}")
    (ws.SteeringVector.load(tmp_path / "p0") * 0.7).save(tmp_path / "along")
    library = (tmp_path / "p0", tmp_path / "p1")
    changes = (str(tmp_path / "along"), str(tmp_path / "p2"))
    return MonitorOptions(changes=changes, library=library, profile="pocket", n_items=4, out=tmp_path / "out")


def test_a_fine_tune_along_the_library_is_explained_and_another_is_not(on_pocket, capsys):
    main(on_pocket)
    printed, rows = capsys.readouterr().out, read_csv(on_pocket.out / "monitor_profile.csv")
    assert len(rows) == 2 * 13
    along, other = ([r for r in rows if r["change"] == change] for change in on_pocket.changes)
    assert [float(r["z"]) for r in along] == pytest.approx([float(r["z_explained"]) for r in along], abs=1e-3)
    assert "rank correlation +1.00" in printed
    assert "No benign fine-tunes are given (--benign), so no trait counts as moved." in printed
    size, said = (np.array([float(r[name]) for r in other]) for name in ("z", "z_explained"))
    assert np.abs(size - said).max() > 0.5 * np.abs(size).max()


def test_benign_fine_tunes_are_what_a_trait_must_move_beyond(on_pocket, tmp_path, capsys):
    benign = tuple(str(tmp_path / f"p{i}") for i in (3, 4, 5))
    main(replace(on_pocket, changes=(str(tmp_path / "p6"),), controls=benign))
    assert "0 of 13 traits moved beyond 3 benign fine-tunes." in capsys.readouterr().out
    same = {"group": "", "board": "b", "change": "c", "shift": 1.0, "shift_ci_lo": 0.5, "shift_ci_hi": 1.5}
    same |= {"z_explained": 1.0, "moved": None}
    rows = [same | {"trait": f"t{i}", "z": float(i), "unreadable": "mass" if i < 4 else None} for i in range(9)]
    said = render_profiles(rows, [_summary("c", rows, {f"t{i}": i * 1.0 for i in range(9)}, {"honesty": 1.0}, 3)])
    assert "over 5 traits; 4 cannot be read." in said
    assert "0 of 5 traits moved beyond" in said
    with pytest.raises(ws.WsError, match="antropic.*anthropic"):
        main(replace(on_pocket, profile="antropic"))


def test_a_full_checkpoint_is_read_by_its_folder(options, tiny, capsys):
    model, folder = copy.deepcopy(tiny[0]), options.out.parent / "checkpoint"
    change = ws.SteeringVector.load(options.changes[0]) * 0.001
    change.merge_into(model)
    model.save_pretrained(folder)
    tiny[1].save_pretrained(folder)
    main(replace(options, changes=(str(folder),)))
    rows = read_csv(options.out / "monitor.csv")
    monitor = Monitor(open_library(options.library), tiny[0])
    expected = [m.cosine for m in monitor.read(change)]
    assert [float(r["cosine"]) for r in rows] == pytest.approx(expected, abs=1e-4)


def test_a_full_checkpoint_is_asked_itself(options, tiny, capsys):
    """The same traits move, whether the change is steered with or merged."""
    model, folder = copy.deepcopy(tiny[0]), options.out.parent / "checkpoint"
    change = ws.SteeringVector.load(options.changes[0]) * 0.001
    change.save(options.out.parent / "steered")
    change.merge_into(model)
    model.save_pretrained(folder)
    tiny[1].save_pretrained(folder)
    board = folder_of(options.out.parent / "board", tea=statement_rows("tea"), rain=statement_rows("rain"))
    changes = (str(folder), str(options.out.parent / "steered"))
    main(replace(options, changes=changes, controls=(), profile=str(board)))
    rows = read_csv(options.out / "monitor_profile.csv")
    merged, steered = (
        {r["trait"]: float(r["shift"]) for r in rows if r["change"].endswith(end)} for end in ("checkpoint", "steered")
    )
    assert merged == pytest.approx(steered, abs=1e-4)
    assert max(map(abs, steered.values())) > 1e-3
    assert "cannot be compared on this board" in capsys.readouterr().out, "random weights give no answers"


def test_vectors_of_one_behaviour_go_by_their_folders(options):
    twice = open_library([*options.library, options.library[0].parent / "moved"])
    assert set(twice) == {"b1", "b2", str(options.library[0].parent / "moved")}
    vector = ws.SteeringVector.load(options.library[0])
    vector.save(options.out / "same")
    assert set(open_library([options.library[0], options.out / "same"])) == {
        str(options.library[0]),
        str(options.out / "same"),
    }


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"changes": ()}, "nothing to monitor"),
        ({"library": ()}, "library is empty"),
        ({"fpr": 0.0}, "between 0 and 1"),
        ({"n_items": -1}, "`n_items` must be at least 4"),
        ({"changes": ("tiny-random",)}, "tiny-random: The change leaves every module"),
        ({"changes": ("no/such/folder",)}, "no folder no/such/folder"),
    ],
)
def test_bad_options_are_refused(options, change, why):
    with pytest.raises(ws.WsError, match=why):
        main(replace(options, **change))


def test_a_fine_tune_is_no_control_of_itself(options):
    with pytest.raises(ws.WsError, match="its own control"):
        main(replace(options, changes=(options.controls[0],)))


def test_a_control_counts_once(options):
    with pytest.raises(ws.WsError, match="`benign` names .* twice"):
        main(replace(options, controls=(*options.controls, options.controls[0])))
