"""One model, sixteen strengths: tokens per second of the engine below `ws serve`, and of what else one could do.

`uv run python -m benchmarks.serve` puts a random vector on a model, of the rank and on the layers that `lora` has there
by default, and asks sixteen questions, on one thread, in rounds whose order changes:

- A: the engine (`ws.chat.batching`), sixteen requests at once, each with a strength of its own;
- B: the same requests without a strength, by the same engine: what steering costs;
- S: the same requests as sixteen clients of the server on this engine, over HTTP in the same process;
- C: transformers' `generate` under `ws.steer`, one after the other: what there is without the engine.

All are greedy and write the same number of tokens. Beside the ratios stands how long the first token of a request takes
that comes while eight others are written, in steps of those; and how long it takes behind a few hundred tokens that are
known from the request before, as a part of what that took.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import httpx
import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

import ws
from benchmarks import harness
from benchmarks.serving import random_vector
from ws.chat.batching import Request, Scheduler
from ws.chat.engine import Engine
from ws.chat.server import create_server, listen
from ws.lm.models import encode, model_id, render_prompt
from ws.options.make import ReplicateConfig
from ws.options.use import ServeOptions

CLIENTS = 16


def rate(run: Callable[[], int]) -> float:
    """Tokens per second of the clock."""
    start = time.perf_counter()
    return run() / (time.perf_counter() - start)


def at_once(scheduler: Scheduler, prompts: Sequence[list[int]], strengths: Sequence[float], limit: int) -> int:
    """Tokens that the engine writes, for sixteen requests at once."""
    asked = (Request(p, {"v": a}, limit) for p, a in zip(prompts, strengths, strict=True))
    answers = [scheduler.submit(request)[0] for request in asked]
    return sum(sum(1 for _ in answer) for answer in answers)


def over_http(engine: Engine, prompts: Sequence[list[int]], strengths: Sequence[float], limit: int) -> float:
    """Tokens per second that sixteen clients of a server are given, each with a request of its own."""
    options = ServeOptions(port=0, served_name="base")
    listening, address = listen(options)
    server = create_server(engine, options)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})

    def ask(ids: list[int], alpha: float) -> int:
        body = {"model": "base", "prompt": ids, "max_tokens": limit, "temperature": 0, "steering": {"v": alpha}}
        answer = client.post(f"{address}/completions", json=body).raise_for_status()
        return int(answer.json()["usage"]["completion_tokens"])

    thread.start()
    try:
        with httpx.Client(timeout=600) as client, ThreadPoolExecutor(len(prompts)) as threads:
            ask(prompts[0], 0.0)  # once it listens
            return rate(lambda: sum(threads.map(ask, prompts, strengths)))
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


def one_by_one(
    model: PreTrainedModel, vector: ws.SteeringVector, prompts: Sequence[list[int]], strengths: Sequence[float], n: int
) -> int:
    """Tokens that `generate` writes, one answer after the other."""
    written = 0
    for ids, alpha in zip(prompts, strengths, strict=True):
        with ws.steer(model, vector, alpha), torch.inference_mode():
            out = model.generate(
                torch.tensor([ids], device=model.device), max_new_tokens=n, do_sample=False, attention_mask=None
            )
        written += out.shape[1] - len(ids)
    return written


def first_token(scheduler: Scheduler, prompts: Sequence[list[int]], limit: int) -> float:
    """Time to the first token of one request while eight are written, in their steps."""
    others = [iter(scheduler.submit(Request(p, {"v": 0.5}, limit))[0]) for p in prompts[:8]]
    for answer in others:
        next(answer)
    start = time.perf_counter()
    for _ in range(4):
        next(others[0])
    step = (time.perf_counter() - start) / 4
    start = time.perf_counter()
    next(iter(scheduler.submit(Request(prompts[9], {"v": 0.5}, limit))[0]))
    took = time.perf_counter() - start
    for answer in others:
        list(answer)
    return took / step


def behind_known(scheduler: Scheduler, tok: Tokenizer, questions: Sequence[str], alpha: float) -> float:
    """Time to the first token of a prompt that begins as the one before did, over that of the one before."""
    took = list[float]()
    for question in questions[:2]:
        prompt = encode(tok, render_prompt(tok, question, system=" ".join(questions * 2)))
        start = time.perf_counter()
        next(iter(scheduler.submit(Request(prompt, {"v": alpha}, 1))[0]))
        took.append(time.perf_counter() - start)
    return took[1] / took[0]


def measured(model: PreTrainedModel, tok: Tokenizer, rounds: int, limit: int) -> dict[str, object]:
    """Medians over the rounds of one model."""
    model.generation_config.eos_token_id = None  # all answers are of one length
    usual = ReplicateConfig.preset(model_id(model)).train
    vector = random_vector(model, usual.layers, rank=usual.rank)
    questions = ws.load_behavior("truthfulness").questions[:CLIENTS]
    prompts = [encode(tok, render_prompt(tok, q)) for q in questions]
    strengths = torch.linspace(-1, 1, CLIENTS).tolist()
    seen = defaultdict[str, list[float]](list)
    for number in range(rounds):
        engine = Engine(model, tok, {"v": vector}, reproducible=False)
        scheduler = engine.scheduler
        scheduler._ends = frozenset()
        runs = {
            "engine": lambda s=scheduler: at_once(s, prompts, strengths, limit),
            "unsteered": lambda s=scheduler: at_once(s, prompts, [0.0] * CLIENTS, limit),
        }
        for name in sorted(runs, reverse=bool(number % 2)):
            seen[name].append(rate(runs[name]))
        seen["first token"].append(first_token(scheduler, prompts, limit))
        seen["server"].append(over_http(engine, prompts, strengths, limit))
        engine.close()
        remembering = Scheduler(model, tok, {"v": vector}, max_known=2048)
        seen["known"].append(behind_known(remembering, tok, questions, 0.5))
        remembering.close()
        seen["generate"].append(rate(lambda: one_by_one(model, vector, prompts, strengths, limit)))
    medians = {name: statistics.median(values) for name, values in seen.items()}
    ratios = {
        (one, other): sorted(round(a / b, 3) for a, b in zip(seen[one], seen[other], strict=True))
        for one, other in (("engine", "generate"), ("server", "generate"), ("engine", "unsteered"))
    }
    return {
        "tokens per second": {name: round(medians[name], 1) for name in ("engine", "server", "unsteered", "generate")},
        **{f"{one} against {other}": values for (one, other), values in ratios.items()},
        "first token, in steps": [round(x, 2) for x in sorted(seen["first token"])],
        "first token behind a known beginning": [round(x, 3) for x in sorted(seen["known"])],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["pocket", "smollm2"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=48)
    o = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for name in o.models:
        results[name] = measured(*ws.load_model(name, device="cpu"), o.rounds, o.tokens)
    harness.record("serve", {"rounds": o.rounds, "tokens": o.tokens, "clients": CLIENTS, "models": results})


if __name__ == "__main__":
    main()
