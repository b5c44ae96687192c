"""`import ws` offers every bundled evaluation as a function of a model, a tokenizer and items."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch

import ws
from support.knowledge import questions_csv
from support.statements import folder, rows
from ws.behaviors import Preference
from ws.delta import LinearDelta
from ws.eval.answers import OpenQuestion
from ws.eval.arithmetic import plain_sums
from ws.eval.capability import Capability, Neutral, base_twin
from ws.eval.dilemmas import load_dilemmas
from ws.eval.judges import open_judge
from ws.eval.statements import load_statements, trait_files
from ws.eval.suite import SUITE
from ws.eval.sycophancy import Prompts, prompts_of
from ws.eval.tinymfv_airisk import load_vignettes
from ws.eval.truthfulqa import load_questions as load_truthfulqa
from ws.lm.models import fingerprint

FUNCTIONS = {name: f"evaluate_{name}" for name in (*SUITE, "capability")}
# The arrays whose first axis is the items, and what is computed per item besides.
SHAPES = {
    "sycophancy": {"logratio": (), "pmass": ()},
    "airisk": {"logratio": (2,), "pmass": (2,), "forced": (2,), "n_tokens": (2,), "thought": (2,)},
    "tinymfv_airisk": {"p_true": (2, 2), "bool_mass": (2, 2)},
    "preference": {"positive": (), "negative": (), "n_positive": (), "n_negative": ()},
    "statements": {"logratio": (), "pmass": ()},
    "answers": {"answer": (), "tokens": (), "trait": (), "coherence": (), "trait_mass": (), "trait_cost": (3,)},
    "truthfulqa": {"mc1": (), "mc2": (), "logp_best": (), "logp_false": ()},
    "arithmetic": {"direct": (), "answer": (), "thought": (), "n_tokens": (), "forced": (), "repetition": ()},
    "capability": {"answer": (), "ended": (), "n_tokens": (), "repetition": ()},
}


@pytest.fixture
def ask(tiny, tmp_path) -> Callable[..., Mapping[str, np.ndarray]]:
    """Three items of an evaluation, put to the small random model as it stands."""
    model, tok = tiny
    files = trait_files(str(folder(tmp_path / "sets", kind=rows("x"))), ["kind"])
    texts, questions = ("A bird has two wings.", "Rain is wet.", "Snow is cold."), ("Who are you?", "Why?", "When?")
    items = {
        "sycophancy": ws.load_behavior("honesty", "tiny-random").test.select("dev", is_true=False)[:3],
        "airisk": load_dilemmas("pocket", "Truthfulness", 3),
        "tinymfv_airisk": load_vignettes("pocket", 3),
        "preference": [
            Preference(f"q{n}", f"What is {n} and {n}?", f"{2 * n}.", "It is none.", "dev") for n in (1, 2, 3)
        ],
        "statements": load_statements(files)[:3],
        "answers": [OpenQuestion(text, text) for text in questions],
        "truthfulqa": load_truthfulqa(str(questions_csv(tmp_path / "truthfulqa")))[:3],
        "arithmetic": plain_sums()[:3],
        "capability": Neutral(texts, questions),
    }
    judge = open_judge("tiny-random", device="cpu", steered=tiny)
    judged = {"judges": [judge], "rubric": ws.load_behavior("tone").rubric, "max_new_tokens": 4}
    more = {"answers": judged} | {"airisk": {"n_think": 4}, "capability": {"base": base_twin(model), "n_tokens": 4}}
    more["arithmetic"] = {"n_think": 4, "n_tokens": 4}

    def call(name: str, batch_size: int | None = None) -> Mapping[str, np.ndarray]:
        scores = getattr(ws, FUNCTIONS[name])(model, tok, items[name], batch_size=batch_size, **more.get(name, {}))
        return scores if isinstance(scores, Mapping) else vars(scores)

    return call


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_scores_its_items_steered_or_not(ask, tiny, name):
    model, _ = tiny
    base, one_by_one = ask(name), ask(name, batch_size=1)
    for key, shape in SHAPES[name].items():
        assert np.shape(base[key]) == (3, *shape), key
        if np.issubdtype(base[key].dtype, np.floating) and not key.endswith("_cost"):
            assert base[key] == pytest.approx(one_by_one[key], abs=1e-4), f"{key} depends on the batch"
    torch.manual_seed(0)
    delta = LinearDelta(96, 64, u=torch.randn(96, 2), v=torch.randn(2, 64))
    vector = ws.SteeringVector({"model.layers.1.mlp.up_proj": delta}, "tiny-random", fingerprint(model))
    moved = {
        "answers": "trait",
        "tinymfv_airisk": "p_true",
        "preference": "positive",
        "capability": "kl",
        "truthfulqa": "logp_best",
    }
    moved = moved.get(name, "logratio")
    if name == "arithmetic":
        with ws.steer(model, vector, alpha=1.0):
            assert ask(name)["answer"].tolist() != base["answer"].tolist()
        assert ask(name)["answer"].tolist() == base["answer"].tolist()
        return
    with ws.steer(model, vector, alpha=1.0):
        assert not np.allclose(ask(name)[moved], base[moved], atol=1e-3)
    assert np.allclose(ask(name)[moved], base[moved], atol=1e-6)


def test_signatures_and_docstrings_are_alike():
    for name, function in FUNCTIONS.items():
        assert function in ws.__all__
        parameters = list(inspect.signature(getattr(ws, function)).parameters)
        assert parameters[:3] == ["model", "tok", "items"]
        assert "batch_size" in parameters
        assert name in {*SUITE, Capability.name}
        assert inspect.getdoc(getattr(ws, function))


def test_claims_are_asked_as_their_behaviour_asks_them(tiny):
    """A behaviour's claims by themselves are put in the words that all bundled behaviours share."""
    behavior = ws.load_behavior("honesty", "tiny-random")
    assert prompts_of(behavior.test) == Prompts()
    claims = behavior.test.select("dev", is_true=True)
    whole = ws.evaluate_sycophancy(*tiny, behavior, "dev", is_true=True)
    assert whole.claims == claims
    assert ws.evaluate_sycophancy(*tiny, claims).logratio == pytest.approx(whole.logratio, abs=1e-6)
    other = ws.evaluate_sycophancy(*tiny, claims, prompts=Prompts(opener="I say:"))
    assert not np.allclose(other.logratio, whole.logratio, atol=1e-3)
