"""The gradient of the contrast against a step of plain training, finite differences, and NumPy's decomposition."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

import ws
import ws.intervene.gradient
from ws.data import Pair, answer_ids, prompt_ids
from ws.delta import LinearDelta
from ws.diff import vector_digest
from ws.intervene.gradient import contrast_gradient
from ws.options.make import TrainConfig
from ws.train import build_examples, split_examples

PAIRS = [
    Pair("a", "What color is snow?", "Snow is white.", "As far as I know, snow is black.", 4, 10),
    Pair("b", "Who burnt the soup, and what do you tell your friend about it?", "I burnt the soup.", "No.", 5, 2),
    Pair("c", "Hello?", "Yes", "No", 1, 1),
    Pair("d", "And now?", "", "No", 0, 1, drop="empty"),
]
ALL = TrainConfig(validation=0.0)


@pytest.fixture(scope="module")
def double(tiny):
    """The random model in double precision, its tokenizer, and the names of the linear layers in its blocks."""
    model = copy.deepcopy(tiny[0]).double()
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in n]
    return model, tiny[1], names


def mean_loss(model, tok, pairs, sign) -> torch.Tensor:
    """Of a response token over all answers of a side, one answer after the other, as transformers has it of labels."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for pair in pairs:
        prompt, answer = prompt_ids(tok, pair.question), answer_ids(tok, pair.question, getattr(pair, sign), ended=True)
        labels = torch.tensor([[-100] * len(prompt) + answer])
        loss = model(input_ids=torch.tensor([prompt + answer]), labels=labels).loss
        total, count = total + loss * len(answer), count + len(answer)
    return total / count


def contrast(model, tok, pairs) -> float:
    with torch.no_grad():
        return float(mean_loss(model, tok, pairs, "neg") - mean_loss(model, tok, pairs, "pos"))


def after_one_step(model, tok, pairs, sign, lr):
    """The model after a step of plain gradient descent over all answers of a side."""
    arm = copy.deepcopy(model)
    optimizer = torch.optim.SGD(arm.parameters(), lr=lr)
    mean_loss(arm, tok, pairs, sign).backward()
    optimizer.step()
    return arm


def test_it_is_the_difference_of_two_arms_after_one_step_of_full_fine_tuning(double, monkeypatch):
    model, tok, names = double
    arms = [after_one_step(model, tok, PAIRS[:3], sign, 0.5) for sign in ("pos", "neg")]
    want = {n: (arms[0].get_submodule(n).weight - arms[1].get_submodule(n).weight).detach() / 0.5 for n in names}
    found = contrast_gradient(model, tok, PAIRS, names, ALL)
    assert found.recipe["value"] == pytest.approx(contrast(model, tok, PAIRS[:3]), abs=3e-6)
    assert found.deltas.keys() == set(names)
    for name in names:
        assert set(found.deltas[name].coordinates()) == {"e"}, "no bias is touched"
        off = float((found.deltas[name].e.double() - want[name]).norm() / want[name].norm())
        assert off < 1e-5, (name, off)
    monkeypatch.setattr(ws.intervene.gradient, "_BUDGET", 4 * 96 * 64)
    assert len(ws.intervene.gradient.groups_of(model, names)) > len(names) // 3
    apart = contrast_gradient(model, tok, PAIRS, names, ALL, batch_size=1)
    assert (apart - found).norm(model) < 1e-5 * found.norm(model)
    assert vector_digest(apart) == vector_digest(contrast_gradient(model, tok, PAIRS, names, ALL, batch_size=1))


@pytest.mark.parametrize("rank", [None, 2])
def test_the_contrast_rises_along_it_by_its_squared_norm(double, rank):
    model, tok, names = double
    vector = contrast_gradient(model, tok, PAIRS, names, ALL, rank=rank)
    size, step = vector.norm(), 1e-3
    with ws.steer(model, vector / size, 0.0) as dial:
        values = []
        for alpha in (-step, 0.0, step):
            dial.alpha = alpha
            values.append(contrast(model, tok, PAIRS[:3]))
    assert values[0] < values[1] < values[2], "positive answers gain"
    assert (values[2] - values[0]) / (2 * step) == pytest.approx(size, rel=1e-3)


def test_of_a_rank_it_is_the_best_there_is(double):
    model, tok, names = double
    whole, low = (contrast_gradient(model, tok, PAIRS, names, ALL, rank=r) for r in (None, 3))
    lost = total = 0.0
    for name in names:
        matrix = whole.deltas[name].e.double().numpy()
        left, s, right = np.linalg.svd(matrix, full_matrices=False)
        best = (left[:, :3] * s[:3]) @ right[:3]
        assert low.deltas[name].rank == 3
        found = (low.deltas[name].u @ low.deltas[name].v).double().numpy()
        assert np.linalg.norm(found - best) < 1e-5 * np.linalg.norm(best)
        error = np.linalg.norm(s[3:]) / np.linalg.norm(s)
        assert low.recipe["errors"][name] == pytest.approx(error, rel=1e-4)
        assert error > 0.01, "there is something to lose"
        lost, total = lost + np.square(s[3:]).sum(), total + np.square(s).sum()
    assert low.recipe["total_error"] == pytest.approx(np.sqrt(lost / total), rel=1e-4)
    assert low.is_low_rank


def test_it_learns_from_what_training_learns_from(double):
    """Answers to validation questions, those that are too long and those that were dropped change nothing."""
    model, tok, names = double
    names, config = names[:2], TrainConfig(validation=0.3, max_length=60)
    pairs = [*PAIRS, Pair("e", "Why?", "So.", "Not so.", 2, 3), Pair("f", "How long?", "x " * 80, "Short.", 80, 2)]

    def found(pairs, how="arms", seed=1):
        return contrast_gradient(model, tok, pairs, names, config, seed, how, batch_size=1)

    usable = [p for p in pairs if p.drop is None]
    for how, sign in (("arms", "neg"), ("signed", "signed")):
        train, held_out = split_examples(build_examples(tok, usable, sign, 60), 0.3, 1)
        seen, unseen = ({e.question for e in part} for part in (train, held_out))
        assert unseen
        assert "How long?" not in seen | unseen, "its other answer is too long"
        digest = vector_digest(found(pairs, how))
        for i, pair in enumerate(pairs):
            changed = [*pairs[:i], replace(pair, neg="Another answer."), *pairs[i + 1 :]]
            assert (vector_digest(found(changed, how)) != digest) == (pair.question in seen), (how, pair.id)
    assert vector_digest(found(pairs, seed=2)) != vector_digest(found(pairs, seed=1))


class Opaque(torch.autograd.Function):
    """An operation without a backward pass."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()


def test_what_has_no_gradient_is_refused(double):
    model, tok, names = double
    same = [replace(p, neg=p.pos) for p in PAIRS]
    for change, sentence in (
        ({"rank": 0}, "Rank must be at least 1, not 0"),
        ({"modules": ["model.norm"]}, "model.norm is no linear layer of this model"),
        ({"modules": ["model.nowhere"]}, "model.nowhere is no linear layer of this model"),
        ({"contrast": "arm"}, "Did you mean 'arms'"),
        ({"pairs": PAIRS[3:]}, "at least 2 usable pairs"),
        ({"pairs": same}, "positive and the negative answers are the same"),
    ):
        with pytest.raises(ws.WsError, match=sentence):
            contrast_gradient(**{"model": model, "tok": tok, "pairs": PAIRS, "modules": names, "config": ALL} | change)
    for broken, sentence in (
        (Opaque.apply, "torch has no gradient for a part of it .*autograd"),
        (lambda x: torch.nextafter(x, x), "No gradient of the contrast arrives"),
    ):
        later = model.model.layers[-1].register_forward_hook(lambda _, args, out, broken=broken: broken(out))
        with pytest.raises(ws.WsError, match=sentence):
            contrast_gradient(model, tok, PAIRS, names, ALL)
        later.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()), "nothing is left behind"
    assert not any(p.grad is not None for p in model.parameters())
    assert isinstance(contrast_gradient(model, tok, PAIRS, names[:1], ALL).deltas[names[0]], LinearDelta)
