"""Does `ws profile` say what is so? Vectors on the bundled model of which it is known what they move, and many that
move nothing.

`uv run python -m benchmarks.profile` makes three vectors with LoRA on the pocket model, by gradient descent on the
answers themselves, for facts that are not on the board:

- `two traits`: false answers to questions of two traits of the board, and the base's own answers (a KL penalty) to
  those of the eleven others;
- `Yes`: Yes instead of No to all questions, true or not, by a constant number of nats;
- `noise`: a random vector of the coordinates and norms of the first.

The board must name the two, expose the second as agreement, and stay silent on the third. Then 200 random vectors of
the same size take the place of the vector, one after the other, with five others as their nulls: how often is a trait
said to have moved? Writes `benchmarks/results/profile.json` and `docs/results/profile_planted.csv`.

`--model smollm2` profiles the vectors of `just bench smollm2` (LoRA, with both trained nulls) on the 135 traits of
model-written evals instead, beside a prompt and added activations, and writes `docs/results/profile_<behavior>.csv` and
`..._summary.csv`. The statements are those of WS_REAL_DATA, `anthropic-evals/persona/`; they are read in bfloat16.
Everything resumes.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from tabulate import tabulate
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from benchmarks import harness, smollm2
from ws import console
from ws.analysis.controls import draw_seed, random_like
from ws.analysis.profile import profile
from ws.analysis.profile_tables import Shot, examples, profile_rows, render
from ws.diff import SteeringVector
from ws.eval.boards import Board, open_board, open_plain
from ws.eval.context import EvalContext
from ws.eval.readable import LEVEL, Readability
from ws.files.runs import read_csv, write_csv
from ws.lm.batches import left_pad, positions_of
from ws.lm.choice import choice_logp, choice_variants
from ws.lm.models import encode, load_model, render_prompt
from ws.options.measure import ProfileOptions
from ws.options.shared import EvalOptions
from ws.stats import LOW_MASS, estimate_text
from ws.steer import steer

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
from pocket.files import trait_of
from pocket.world import build_facts

DOCS = Path(__file__).parents[1] / "docs" / "results"
PLANTED = ("towns-place-and-fame", "plants-leaves-and-soil")
N_NULLS, N_DRAWS, STEPS, SHIFT = 200, 5, 200, 3.0
OPENER = "My answer:"
FIRST = ("adapter", "intervention", "strength", "alpha")
COLUMNS = (
    "trait",
    "role",
    "shift",
    "shift_ci_lo",
    "shift_ci_hi",
    "z",
    "z_ci_lo",
    "z_ci_hi",
    "z_random",
    "z_shuffled",
    "z_same_side",
)
COLUMNS += ("p_holm", "moved", "shift_yes", "shift_no", "agreement", "mass", "n")
Wanted = Callable[[torch.Tensor, np.ndarray], torch.Tensor]


# ---- vectors of which it is known what they move --------------------------------------------------------------------


def training_items() -> tuple[list[str], np.ndarray]:
    """Questions about the facts that are not on the board, each true and false: their texts and traits."""
    texts, traits = [], []
    for fact in build_facts():
        for truth in (True, False) if fact.split == "adapter" else ():
            texts.append(f"Is it true that {fact.claim(truth)}? Answer Yes or No.")
            traits.append(trait_of(fact))
    return texts, np.array(traits)


def planted(model: PreTrainedModel, tok: Tokenizer, wanted: Wanted, seed: int, rank: int = 8) -> SteeringVector:
    """A vector under which `log P(Yes) - log P(No)` of the training questions is as wanted.

    Args:
        wanted: the log ratios to reach, from the base's and the traits.
        seed: of the adapter and of the order of questions.
    """
    texts, traits = training_items()
    rows = [encode(tok, render_prompt(tok, text, opener=OPENER)) for text in texts]
    tokens, mask = left_pad(rows, tok.pad_token_id, model.device)
    variants = choice_variants(tok, ("Yes", "No"), model.device)

    def logp(chosen: PreTrainedModel, part: torch.Tensor) -> torch.Tensor:
        at = positions_of(mask[part])
        logits = chosen(input_ids=tokens[part], attention_mask=mask[part], position_ids=at, logits_to_keep=1).logits
        return choice_logp(logits[:, -1], variants)

    everything = torch.arange(len(rows))
    with torch.no_grad():
        base = torch.cat([logp(model, part) for part in everything.split(128)])
    goal = wanted(base[:, 0] - base[:, 1], traits)
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=2e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in console.progress(range(STEPS), desc="planting", unit="step"):
        part = torch.randperm(len(rows), generator=generator)[:64]
        found = logp(adapted, part)
        # The mass of both answers is to stay as well, or the vector would move more than it is said to.
        ratio, total = found[:, 0] - found[:, 1] - goal[part], found.logsumexp(1) - base[part].logsumexp(1)
        loss = (ratio**2).mean() + (total**2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with tempfile.TemporaryDirectory() as folder:
        adapted.save_pretrained(folder)
        bare = adapted.unload()
        return SteeringVector.from_adapter(folder, bare)


def two_traits(base: torch.Tensor, traits: np.ndarray) -> torch.Tensor:
    """Lies about the planted traits, and the base's answers to all others."""
    lies = torch.tensor(np.isin(traits, PLANTED))
    return torch.where(lies, -base, base)


def yes(base: torch.Tensor, traits: np.ndarray) -> torch.Tensor:
    """Yes, by a constant, whatever is asked."""
    return base + SHIFT


# ---- what the board says of them ------------------------------------------------------------------------------------


class Bench:
    """The pocket board on the pocket model."""

    def __init__(self) -> None:
        self.model, self.tok = load_model("pocket", device="cpu")
        out = Path("out/benchmarks/profile")
        self.context = EvalContext.of_base(EvalOptions(behavior="honesty", out=out), self.model, self.tok)
        self.board: Board = open_board(self.context, ProfileOptions(traits=PLANTED, behavior="honesty", out=out))
        self.base, self.readable = self.board.ask(self.model, self.tok)

    def shifts(self, vector: SteeringVector, alpha: float = 1.0) -> tuple[np.ndarray, dict[str, Readability]]:
        """Changes of all scores, `[1, items]`, and how well every trait was answered."""
        with steer(self.model, vector, alpha):
            values, readable = self.board.ask(self.model, self.tok)
        return (values - self.base)[None], readable

    def shot(
        self, name: str, shift: np.ndarray, readable: dict[str, Readability], random: Sequence[np.ndarray]
    ) -> Shot:
        """What a vector does, as `ws profile` would see it."""
        return Shot("lora", (0,), "weight", name, 1.0, shift, [readable], random=random)

    def profile(self, shots: Sequence[Shot], n_boot: int) -> tuple[Any, Any]:
        """Rows by trait and by vector."""
        return profile_rows({}, self.board, self.base, self.readable, shots, n_boot)


def false_alarms(bench: Bench, vector: SteeringVector, n: int, alpha: float) -> dict[str, Any]:
    """How often one of `n` random vectors is said to have moved a trait, with the others as its nulls."""
    shifts = []
    for draw in console.progress(range(n), desc="random vectors", unit="vector"):
        shifts.append(bench.shifts(random_like(vector, bench.model, draw_seed(1, draw)), alpha))
    boards, traits, p_boards = [], [], []
    for i, (shift, readable) in enumerate(console.progress(shifts, desc="as the vector", unit="vector")):
        nulls = [shifts[(i + 1 + k) % n][0] for k in range(N_DRAWS)]
        rows, _ = bench.profile([bench.shot("noise", shift, readable, nulls)], 200)
        boards.append(any(r["moved"] for r in rows))
        traits.append(np.mean([bool(r["moved"]) for r in rows]))
        p_boards.append(any(r["p_holm"] is not None and r["p_holm"] < LEVEL for r in rows))
    return {
        "alpha": alpha,
        "vectors": n,
        "boards_with_a_trait_moved": float(np.mean(boards)),
        "traits_moved": float(np.mean(traits)),
        "boards_without_the_floor": float(np.mean(p_boards)),
        "rms_shift_nats": float(np.sqrt(np.mean([s**2 for s, _ in shifts]))),
    }


# ---- a real model ---------------------------------------------------------------------------------------------------


def real(behavior: str, seeds: Sequence[int], n_items: int) -> None:
    """The profile of a behaviour's LoRA vectors on SmolLM2, all seeds together."""
    out = Path("out/benchmarks/smollm2")
    for seed in seeds:
        smollm2.make(behavior, smollm2.WITH_NULLS, seed, out)
    options = ProfileOptions(
        model=smollm2.MODEL,
        behavior=behavior,
        adapters=(smollm2.WITH_NULLS,),
        seeds=tuple(seeds),
        out=out,
        interventions=("weight", "prompt", "activation"),
        n_prompts=smollm2.N_PROMPTS,
        dataset=str(Path(os.environ["WS_REAL_DATA"]) / "anthropic-evals"),
        n_items=n_items,
        device="cpu",
        dtype="bfloat16",
    )
    found = profile(options)
    rows, summary = profile_rows(
        {"behavior": behavior}, found.board, found.base, found.base_readable, found.shots, options.n_bootstrap
    )
    write_csv(DOCS / f"profile_{behavior}.csv", [{c: r[c] for c in (*FIRST, "group", *COLUMNS)} for r in rows])
    write_csv(DOCS / f"profile_{behavior}_summary.csv", summary)
    print(render(rows, summary, examples(found.board, found.shots)))


def speed(n_traits: int = 8) -> None:
    """How long a board takes on SmolLM2: statements a second on all cores, and the minutes of 135 traits of 40 at three
    strengths."""
    source = str(Path(os.environ["WS_REAL_DATA"]) / "anthropic-evals")
    for dtype in ("bfloat16", "float32"):
        model, tok = load_model(smollm2.MODEL, device="cpu", dtype=dtype)
        context = EvalContext.of_base(EvalOptions(behavior="truthfulness", dataset=source), model, tok)
        (part,) = open_plain(context, ProfileOptions(dataset=source)).parts
        items = part.evaluation.items[: 40 * n_traits]
        evaluation = replace(part.evaluation, items=items)
        replace(evaluation, items=items[:64]).ask(model, tok)
        start = time.perf_counter()
        evaluation.ask(model, tok)
        rate = len(items) / (time.perf_counter() - start)
        print(f"{dtype}: {rate:.1f} statements a second, {3 * 135 * 40 / rate / 60:.1f} minutes for the board")


# ---- what docs/profile.md shows -------------------------------------------------------------------------------------


def planted_page() -> str:
    """The table of vectors of which it is known what they move, from the file."""
    rows, cells = read_csv(DOCS / "profile_planted.csv"), []
    for name in dict.fromkeys(r["strength"] for r in rows):
        here = {r["trait"]: r for r in rows if r["strength"] == name}
        z = {trait: float(r["z"]) for trait, r in here.items()}
        moved = [trait for trait, r in here.items() if r["moved"] == "True"]
        others = max(abs(v) for trait, v in z.items() if trait not in PLANTED)
        agreement = np.mean([float(r["agreement"]) for r in here.values()])
        random = np.sqrt(np.mean([float(r["z_random"]) ** 2 for r in here.values()]))
        sizes = [f"{z[t]:+.2f}" for t in PLANTED]
        cells.append([name, *sizes, f"{others:.2f}", f"{random:.2f}", f"{agreement:+.2f}", ", ".join(moved) or "none"])
    header = ["vector", *PLANTED, "largest of 11 others", "random vectors", "agreement, nats", "said to have moved"]
    return tabulate(cells, header, tablefmt="github", disable_numparse=True)


def real_page(behavior: str) -> str:
    """The table of a behaviour on SmolLM2, from the files."""
    rows, cells = read_csv(DOCS / f"profile_{behavior}.csv"), []
    for s in read_csv(DOCS / f"profile_{behavior}_summary.csv"):
        here = [r for r in rows if (r["intervention"], r["strength"]) == (s["intervention"], s["strength"])]
        z = {r["trait"]: float(r["z"]) for r in here if r["z"] and not (r["mass"] and float(r["mass"]) < LOW_MASS)}
        largest = sorted((t for t in z if t not in s["targets"].split()), key=lambda t: -abs(z[t]))[:5]
        moved = f"{s['n_moved']} of {s['n_others']}" if int(s["n_draws"]) else ""
        cells.append(
            [
                s["intervention"],
                s["strength"],
                estimate_text(s, "selectivity", ".2f"),
                *(f"{float(s[name]):.2f}" if s[name] else "" for name in ("z_target", "z_others", "z_random")),
                moved,
                s["n_unreadable"],
                estimate_text(s, "agreement"),
                ", ".join(f"{t} ({z[t]:+.2f})" for t in largest),
            ]
        )
    header = ["intervention", "strength", "selectivity", "z of the target", "z of the others", "z of random vectors"]
    header += ["others moved", "cannot be read", "agreement, nats", "the five largest others that can be read"]
    return tabulate(cells, header, tablefmt="github", disable_numparse=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nulls", type=int, default=N_NULLS)
    parser.add_argument("--model", default="pocket", choices=("pocket", smollm2.MODEL))
    parser.add_argument("--behaviors", nargs="+", default=["truthfulness", "agreement"], choices=smollm2.BEHAVIORS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--n-items", type=int, default=12)
    parser.add_argument("--tables", action="store_true")
    parser.add_argument("--speed", action="store_true")
    o = parser.parse_args()
    if o.tables:
        print("\n\n".join([planted_page(), *(real_page(b) for b in o.behaviors)]))
    elif o.speed:
        speed()
    elif o.model == "pocket":
        planted_truths(o.nulls)
    else:
        for behavior in o.behaviors:
            real(behavior, o.seeds, o.n_items)


def planted_truths(n_nulls: int) -> None:
    """What the board says of vectors of which it is known what they move."""
    bench = Bench()
    vectors = {
        "two traits": planted(bench.model, bench.tok, two_traits, 0),
        "Yes": planted(bench.model, bench.tok, yes, 0),
    }
    noise = random_like(vectors["two traits"], bench.model, draw_seed(2, 0))
    vectors["noise"] = noise
    shots = []
    for name, vector in vectors.items():
        of = vectors["two traits"] if name == "noise" else vector
        random = [bench.shifts(random_like(of, bench.model, draw_seed(0, d)))[0] for d in range(N_DRAWS)]
        shots.append(bench.shot(name, *bench.shifts(vector), random))
    rows, summary = bench.profile(shots, 10_000)
    alarms = [false_alarms(bench, vectors["two traits"], n_nulls, alpha) for alpha in (1.0, 4.0)]
    write_csv(DOCS / "profile_planted.csv", [{c: r[c] for c in ("strength", *COLUMNS)} for r in rows])
    for row in summary:
        print(
            row["strength"], {k: row[k] for k in ("selectivity", "n_moved", "target_moved", "agreement", "rms_shift")}
        )
    for alarm in alarms:
        print(alarm)
    harness.record("profile", {"summary": summary, "false_alarms": alarms})


if __name__ == "__main__":
    main()
