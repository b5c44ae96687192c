"""Steering a live model of Qwen3-0.6B's exact shape in bfloat16 (random weights): what it costs, and how exact it is.

`uv run python -m benchmarks.serving` measures

- a forward pass under rank-64 factors in half of the layers and in all, for a prompt and for one decoded token;
- changing the strength, against clone, add and restore of the touched weights (`benchmarks.reference`);
- one decoded token with a static cache, bare and steered, as it is written and under torch.compile;
- five strengths of a vector asked the same prompts, each by itself over what `ws.lm.trunk` makes of it;
- the error of the steered logits against float64 arithmetic with `W + alpha dW`, ours and with dW added to the weights
  in place, for changes of 1e-2 and 1e-3 of the weights. Both run with the activations in bfloat16, where the rounding
  of activations hides that of the weights, and in float32, where only what became of dW is left.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, StaticCache

import ws
from benchmarks import harness, reference
from benchmarks.vector import QWEN3_06B
from ws.adapters import AdapterSpec
from ws.lm.batches import row_logits
from ws.lm.models import target_modules, weight_of
from ws.lm.trunk import shared_trunk

RANK, PROMPT, TOKENS = 64, 512, 8
PLACES = {"half_of_the_layers": "0.25:0.75", "all_layers": "all"}


def random_model() -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(QWEN3_06B).to(torch.bfloat16).eval()


def random_vector(model: PreTrainedModel, layers: str, size: float = 0.01, rank: int = RANK) -> ws.SteeringVector:
    """Low-rank factors whose product has `size` times the Frobenius norm of every matrix it is added to."""
    rng, deltas = torch.Generator().manual_seed(1), {}
    for name in target_modules(model, layers):
        weight = weight_of(model.get_submodule(name)).float()
        u, v = (torch.randn(s, generator=rng) for s in ((weight.shape[0], rank), (rank, weight.shape[1])))
        deltas[name] = ws.LinearDelta(*weight.shape, u=u * float(size * weight.norm() / (u @ v).norm()), v=v)
    return ws.SteeringVector(deltas, "random", None)


# ---- what it costs --------------------------------------------------------------------------------------------------


def prompt_ids(length: int, device: torch.device | str = "cpu") -> Tensor:
    """Tokens of one prompt that every vocabulary has."""
    return torch.randint(0, 90, (1, length), generator=torch.Generator().manual_seed(2)).to(device)


@torch.inference_mode()
def forward_costs(
    model: PreTrainedModel,
    form: Callable[[], AbstractContextManager[object]],
    rounds: int,
    length: int = PROMPT,
    steps: int = TOKENS,
    synced: Callable[[Callable[[], object]], Callable[[], object]] = lambda action: action,
) -> dict[str, harness.Ratio]:
    """The time of a forward pass inside `form` over a bare one: a prompt, and tokens behind it one by one.

    `synced` waits for what an action has begun on a device.
    """
    ids = prompt_ids(length, model.device)
    cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values

    def prompt() -> None:
        model(ids)

    def token() -> None:  # a few of them: one is over before the machine is calm
        for _ in range(steps):
            model(ids[:, :1], past_key_values=cache, logits_to_keep=1)
        cache.crop(-steps)

    actions = {"prompt": synced(prompt), "token": synced(token)}
    return {name: harness.compare(action, action, rounds, around_b=form) for name, action in actions.items()}


def switching(model: PreTrainedModel, vector: ws.SteeringVector, rounds: int) -> harness.Ratio:
    """Two changes of the strength: by the dial, and by clone, add and restore of the touched weights."""
    dense = {name: change.to(torch.bfloat16) for name, change in vector.dense(model)}

    def usual() -> None:
        for alpha in (0.5, -0.5):
            with reference.dense_steering(model, dense, alpha):
                pass

    with ws.steer(model, vector) as dial:

        def ours() -> None:
            for alpha in (0.5, -0.5):
                dial.alpha = alpha

        return harness.compare(ours, usual, rounds)


# ---- compiled -------------------------------------------------------------------------------------------------------


def static_step(model: PreTrainedModel, ids: Tensor, room: int, step: Callable[..., Any]) -> Callable[[], None]:
    """Decodes one token behind a prompt in a cache of fixed size, which stays where it was."""
    cache = StaticCache(config=model.config, max_cache_len=room)
    model(ids, past_key_values=cache, logits_to_keep=1)
    token = ids[:, :1].contiguous()

    def run() -> None:
        torch.compiler.cudagraph_mark_step_begin()
        step(token, past_key_values=cache, logits_to_keep=1)
        for layer in cache.layers:
            layer.cumulative_length.fill_(ids.shape[1])

    return run


@torch.inference_mode()
def compiled(
    model: PreTrainedModel,
    vector: ws.SteeringVector,
    modes: Mapping[str, Mapping[str, Any]],
    prompt: int,
    steps: int,
    rounds: int,
    synced: Callable[[Callable[[], object]], Callable[[], object]] = lambda action: action,
) -> dict[str, Any]:
    """Decoded tokens with a static cache, bare and steered, eager and compiled: over the bare model's eager ones, in
    alternation with them, and steered over bare where both are compiled; and the seconds that compiling takes.

    Eager steering is the one that is not `compilable`, and has rounds of its own: compiled code does not run in it.

    Args:
        modes: options of torch.compile by name.
        synced: waits for what an action has begun on a device.
    """
    ids = prompt_ids(prompt, model.device)
    twin, found = copy.deepcopy(model), dict[str, Any]()

    def action(step: Callable[..., Any]) -> Callable[[], object]:
        run = static_step(model, ids, prompt + 8, step)
        return synced(lambda: [run() for _ in range(steps)])

    def times(actions: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
        turns = [{name: harness.seconds(act) for name, act in actions.items()} for _ in range(rounds + 1)]
        return {name: [turn[name] for turn in turns[1:]] for name in actions}

    with ws.steer(model, vector):
        seconds = times({"bare": action(twin), "ours": action(model)})
    found["eager_ours_over_bare"] = harness.Ratio.of_times(seconds["bare"], seconds["ours"])
    for kind, options in modes.items():
        with ws.steer(model, vector, compilable=True):
            steps_of = {name: action(torch.compile(m, **options)) for name, m in (("bare", twin), ("ours", model))}
            found |= {f"seconds_to_compile_{kind}_{name}": harness.seconds(step) for name, step in steps_of.items()}
            seconds = times({"eager": action(twin), **steps_of})
        for name in steps_of:
            found[f"{kind}_{name}_over_eager_bare"] = harness.Ratio.of_times(seconds["eager"], seconds[name])
        found[f"{kind}_ours_over_{kind}_bare"] = harness.Ratio.of_times(seconds["bare"], seconds["ours"])
    return {name: asdict(value) if isinstance(value, harness.Ratio) else value for name, value in found.items()}


# ---- several strengths ----------------------------------------------------------------------------------------------


@torch.inference_mode()
def strengths(model: PreTrainedModel, rounds: int) -> harness.Ratio:
    """Five strengths of a vector in the default layers asked the same prompts: each by itself over a shared trunk."""
    vector = random_vector(model, AdapterSpec("lora").layers)
    rng = torch.Generator().manual_seed(4)
    batches = torch.randint(0, 1000, (4, 4, 64), generator=rng).tolist()

    def ask() -> None:
        for alpha in (-2.0, -1.0, 1.0, 2.0, 0.0):
            with ws.steer(model, vector, alpha):
                for rows in batches:
                    row_logits(model, 0, rows, keep=1)

    def shared() -> None:
        with shared_trunk(model):
            ask()

    return harness.compare(shared, ask, rounds)


# ---- how exact it is ------------------------------------------------------------------------------------------------


@contextmanager
def computing_in(model: PreTrainedModel, dtype: torch.dtype) -> Iterator[nn.Module]:
    """A copy of the model, with the same values, whose activations are of another dtype."""
    yield model if dtype == model.dtype else copy.deepcopy(model).to(dtype)


@torch.inference_mode()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids).logits[0].cpu().double()


def exact(model: PreTrainedModel, vector: ws.SteeringVector, ids: Tensor) -> Tensor:
    """The logits of `W + dW` in float64 throughout."""
    double = copy.deepcopy(model).double()
    with torch.no_grad():
        for name, delta in vector.deltas.items():
            assert delta.u is not None
            assert delta.v is not None
            double.get_submodule(name).weight += delta.u.double() @ delta.v.double()
    return logits(double, ids)


def gaps(
    model: PreTrainedModel,
    vector: ws.SteeringVector,
    dense: Mapping[str, Tensor],
    ids: Tensor,
    wanted: Tensor,
    dtype: torch.dtype,
) -> dict[str, float]:
    """How far logits are from the wanted ones with activations of a dtype: ours, dW added in place, and their ratio."""
    with computing_in(model, dtype) as computed, ws.steer(computed, vector):
        ours = logits(computed, ids)
    with reference.dense_steering(model, dense, 1.0), computing_in(model, dtype) as computed:
        in_place = logits(computed, ids)
    found = {n: float((g - wanted).norm() / wanted.norm()) for n, g in (("ours", ours), ("in_place", in_place))}
    return found | {"ratio": found["ours"] / found["in_place"]}


def errors(model: PreTrainedModel, size: float) -> dict[str, float]:
    """Relative errors of the logits, for a change of `size` times the weights in half of the layers."""
    vector = random_vector(model, PLACES["half_of_the_layers"], size)
    ids = torch.randint(0, 1000, (1, 16), generator=torch.Generator().manual_seed(3))
    wanted = exact(model, vector, ids)
    dense = {name: change.to(torch.bfloat16) for name, change in vector.dense(model)}
    found = {"effect": float((wanted - exact(model, vector * 0, ids)).norm() / wanted.norm())}
    for dtype in (torch.bfloat16, torch.float32):
        of_dtype = gaps(model, vector, dense, ids, wanted, dtype)
        found |= {f"activations_{str(dtype)[6:]}_{name}": gap for name, gap in of_dtype.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    model = random_model()
    results: dict[str, object] = {"shape": f"1 x {PROMPT} tokens, rank {RANK}"}
    for name, layers in PLACES.items():
        vector = random_vector(model, layers)
        steered = partial(ws.steer, model, vector)
        for what, ratio in forward_costs(model, steered, options.rounds).items():
            results[f"steered_over_bare_{what}_{name}"] = ratio
        if layers != "all":
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            alone = forward_costs(model, steered, options.rounds)["prompt"]
            torch.set_num_threads(threads)
            results[f"steered_over_bare_prompt_{name}_one_thread"] = alone
            results["clone_add_restore_over_dial"] = switching(model, vector, options.rounds)
    results["five_strengths_alone_over_shared"] = strengths(model, options.rounds)
    vector = random_vector(model, PLACES["half_of_the_layers"])
    results |= compiled(model, vector, {"compiled": {}}, 64, 4, options.rounds)
    results |= {f"logits_at_{size:g}": errors(model, size) for size in (1e-2, 1e-3)}
    harness.record("serving", results)


if __name__ == "__main__":
    main()
