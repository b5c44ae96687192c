"""The whole path on a device: the CPU here, CUDA with `-m gpu`, and a pretended one that refuses what those refuse."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks.serving import exact, logits, random_vector

import ws
from conftest import FAMILY_NAMES
from support import elsewhere
from ws.analysis.slope import mean_score, slope_test
from ws.chat.batching import Request
from ws.chat.engine import Engine
from ws.data import Pair
from ws.eval.airisk import evaluate_airisk, logratios
from ws.eval.dilemmas import load_dilemmas
from ws.eval.evaluation import MeanOfChoices
from ws.eval.sycophancy import evaluate_sycophancy
from ws.eval.tinymfv_airisk import evaluate_tinymfv_airisk, load_vignettes, signed_wrongness
from ws.intervene.calibration import calibrate
from ws.lm.models import encode, end_ids, fingerprint, render_prompt
from ws.lm.sampling import sample_rows, sampling_settings
from ws.options.make import train_preset
from ws.options.shared import CalibrationConfig

PRETENDED = "WS_PRETENDED_DEVICE" in os.environ
if PRETENDED:
    KEPT = elsewhere.register()
# PEFT writes into the weights of the others in ways that a pretended tensor does not have.
FAMILIES = ("ia3", "oft", "lora") if PRETENDED else FAMILY_NAMES


def devices() -> list:
    absent = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
    return [elsewhere.NAME] if PRETENDED else ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, absent])]


@pytest.fixture(scope="module", params=devices())
def device(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def here():
    """The pocket model on the CPU, and a vector for it."""
    model, tok = ws.load_model("pocket", device="cpu")
    return model, tok, random_vector(model, "all", size=0.1, rank=8)


@pytest.fixture
def there(here, device):
    """The same on the device."""
    model, tok = ws.load_model("pocket", device=device)
    assert model.device.type == device
    yield model, tok, here[2]
    assert model.device.type == device
    assert fingerprint(model) == fingerprint(here[0])


IDS = torch.randint(0, 400, (3, 12), generator=torch.Generator().manual_seed(0))
# Of logits against float64: a few roundings of the activations' dtype.
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.cpu().double() - b.cpu().double()).norm() / b.cpu().double().norm())


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_steering_is_that_of_float64(here, device, dtype):
    """The vector is on the CPU, whatever the model is on; the reference is its float64 sum with the same weights."""
    rounded, _, vector = copy.deepcopy(here[0]).to(dtype), *here[1:]
    wanted = exact(rounded, vector, IDS[:1])
    model = rounded.to(device)
    assert model.device.type == device
    with ws.steer(model, vector):
        steered = logits(model, IDS[:1].to(device))
    assert gap(steered, wanted) < ROUNDING[dtype]
    assert gap(logits(model, IDS[:1].to(device)), wanted) > 2 * ROUNDING[dtype]


def test_every_row_has_its_strength(there, device):
    model, _, vector = there
    ids, strengths = IDS.to(device), [-1.0, 0.0, 0.5]
    with torch.inference_mode(), ws.steer(model, vector, torch.tensor(strengths)) as dial:
        together = model(ids).logits
        for row, alpha in enumerate(strengths):
            dial.alpha = alpha
            assert gap(together[row], model(ids[row : row + 1]).logits[0]) < 1e-5


def test_a_steered_model_may_move(here, device):
    model, vector = copy.deepcopy(here[0]), here[2]
    with torch.inference_mode(), ws.steer(model, vector, 0.5):
        before = model(IDS).logits
        model.to(device)
        assert gap(model(IDS.to(device)).logits, before) < 1e-5
        model.to("cpu")
        assert gap(model(IDS).logits, before) < 1e-5


@pytest.mark.skipif(PRETENDED, reason="accelerate spreads models over devices that it knows")
def test_a_model_that_is_spread_over_devices(here, device, tmp_path):
    room = {"cpu": "4MB"} if device == "cpu" else {0: "4MB", "cpu": "1GB"}
    model, _ = ws.load_model("pocket", device="map", offload=tmp_path, max_memory=room)
    assert len(set(map(str, model.hf_device_map.values()))) > 1
    with torch.inference_mode(), ws.steer(here[0], here[2], -0.5):
        wanted = here[0](IDS).logits
    with torch.inference_mode(), ws.steer(model, here[2], -0.5):
        assert gap(model(IDS).logits, wanted) < 1e-5


def test_answers_are_sampled(here, there, device):
    """The random numbers are not the device's, so that a seed gives the same answers; up to rounding, on a real one."""
    made = []
    for model, tok, _ in (here, there):
        prompts = [encode(tok, render_prompt(tok, q)) for q in ws.load_behavior("honesty", "pocket").questions[:6]]
        rest = (range(6), 24, end_ids(model, tok), sampling_settings(model))
        made.append(sample_rows(model, tok.pad_token_id, prompts, *rest))
        assert made[-1] == sample_rows(model, tok.pad_token_id, prompts, *rest)
    assert made[0] == made[1] or device == "cuda"
    assert all(0 < len(row) <= 24 for row in made[1])


def test_evaluations_give_the_scores_of_the_cpu(here, there):
    behavior, dilemmas, vignettes = (
        ws.load_behavior("honesty", "pocket"),
        load_dilemmas("pocket", limit=3),
        load_vignettes("pocket", 3),
    )
    scores = []
    for model, tok, vector in (here, there):
        with ws.steer(model, vector, 0.5):
            scores.append(
                np.concatenate(
                    [
                        logratios(evaluate_airisk(model, tok, dilemmas, n_think=6)),
                        signed_wrongness(evaluate_tinymfv_airisk(model, tok, vignettes)).ravel(),
                        evaluate_sycophancy(model, tok, behavior).logratio,
                    ]
                )
            )
    assert np.abs(scores[0] - scores[1]).max() < 1e-3


def test_strengths_are_calibrated(there):
    model, tok, vector = there
    questions = ws.load_behavior("honesty", "pocket").questions
    config = CalibrationConfig(n_tokens=4, target=0.2, tolerance=0.4)
    found = calibrate(model, tok, lambda alpha: ws.steer(model, vector, alpha), questions[:3], questions[3:5], config)
    assert found.positive.converged
    assert 0.12 <= found.positive.divergence <= 0.28
    assert np.isfinite(found.positive.audit)


def test_the_engine_answers_many_at_once(here, there):
    """Every request with a strength of its own, as the model writes it alone on the CPU."""
    model, tok, vector = there
    questions = ws.load_behavior("honesty", "pocket").questions[:3]
    prompts, strengths = [encode(tok, render_prompt(tok, q)) for q in questions], [-0.5, 0.0, 0.5]
    with Engine(model, tok, {"v": vector}, reproducible=False) as engine:
        asked = [Request(p, {"v": a}, 12) for p, a in zip(prompts, strengths, strict=True)]
        asked.append(Request(prompts[0], {"v": 0.5}, 12, temperature=0.8, top_p=0.9, seed=3))
        answers = [engine.scheduler.submit(request)[0] for request in asked]
        texts = ["".join(piece.text for piece in answer) for answer in answers]
    assert texts[3]
    for prompt, alpha, text in zip(prompts, strengths, texts, strict=False):
        with torch.inference_mode(), ws.steer(here[0], vector, alpha):
            ids = here[0].generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
        assert tok.decode(ids[0, len(prompt) :], skip_special_tokens=True).strip() == text.strip()


PAIRS = [Pair(f"q{i}", f"Is {i} a number?", "Yes, it is.", "No, it is not.", 5, 5) for i in range(16)]


@pytest.mark.parametrize("adapter", FAMILIES)
def test_an_arm_trains_on_a_bfloat16_base(here, device, adapter, tmp_path):
    """The adapter's own numbers stay float32, the base's as they are, and the vector steers where it was trained."""
    model, tok = ws.load_model("pocket", device=device, dtype="bfloat16")
    before = fingerprint(model)
    config = replace(train_preset("pocket", adapter), max_steps=2, batch=4, micro_batch=2, validation=0.0)
    # What is computed again for a gradient is, on a device, by a thread of its own, which ends with a pretended one.
    recomputes = adapter == "lora" and not PRETENDED
    config = replace(config, kl=0.1 if adapter == "pissa" else 0.0, recompute="cheap" if recomputes else "none")
    arms = []
    for sign in ("pos", "neg"):
        ws.train_adapter(model, tok, PAIRS, sign, adapter, tmp_path / sign, config)
        arms.append(ws.SteeringVector.from_adapter(tmp_path / sign, model))
    vector = arms[0] - arms[1]
    assert (model.device.type, model.dtype, fingerprint(model)) == (device, torch.bfloat16, before)
    assert all(t.dtype == torch.float32 for d in vector.deltas.values() for t in d.coordinates().values())
    assert vector.norm(model) > 0
    with ws.steer(model, 30 * vector):
        steered = logits(model, IDS[:1].to(device))
    assert gap(steered, logits(model, IDS[:1].to(device))) > 0


def test_a_checkpoint_on_the_device_is_gone_on_from(device, tmp_path, monkeypatch):
    """Its random states and moments among it: an interrupted arm ends as one that was not."""
    from ws.lm import trainer

    model, tok = ws.load_model("pocket", device=device)
    config = replace(train_preset("pocket", "lora"), max_steps=6, batch=4, micro_batch=4, validation=0.0)

    class Interrupt(trainer._StopOnNaN):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer, "_StopOnNaN", Interrupt)
        ws.train_adapter(model, tok, PAIRS, "pos", "lora", tmp_path / "cut", config)
    assert list((tmp_path / ".cut.work").glob("checkpoint-*"))
    for name in ("cut", "whole"):
        ws.train_adapter(model, tok, PAIRS, "pos", "lora", tmp_path / name, config)
    a, b = (ws.SteeringVector.from_adapter(tmp_path / name, model) for name in ("cut", "whole"))
    assert (a - b).norm() <= 1e-6 * b.norm()


def test_slopes_are_those_of_the_cpu(here, there):
    mean = MeanOfChoices("claims", 2, [("Is water wet?", "My answer:")] * 2, ("Yes", "No"), [0.5, 0.5])
    tests = [slope_test(model, vector, mean_score(model, tok, mean)) for model, tok, vector in (here, there)]
    assert tests[1].slope == pytest.approx(tests[0].slope, rel=1e-4)
    assert tests[1].std == pytest.approx(tests[0].std, rel=1e-4)


@pytest.mark.skipif(PRETENDED, reason="torch asks the pretended device instead")
def test_random_states_are_put_back_on_every_gpu_without_a_warning(monkeypatch):
    from ws.train import _isolated_rng

    put = dict[int, torch.Tensor]()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.full((1,), int(device), dtype=torch.uint8))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: put.update({int(device): state}))
    monkeypatch.setattr(torch.random, "get_rng_state", torch.get_rng_state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with _isolated_rng():
            torch.manual_seed(5)
    assert {device: int(state) for device, state in put.items()} == {0: 0, 1: 1, 2: 2}


@pytest.mark.skipif(PRETENDED, reason="this is the process that it starts")
def test_nothing_stays_on_the_cpu():
    """All of the above on a device that mixes as little with the CPU as CUDA does, and has no float64, as Apple's."""
    command = [sys.executable, "-m", "pytest", __file__, "-n", "0", "-p", "no:cacheprovider", "-x", "-q", "--tb=short"]
    done = subprocess.run(
        command,
        env=os.environ | {"WS_PRETENDED_DEVICE": "1"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
