"""`ws tune`: a short search for the training settings of one adapter family, judged on `dev` items alone.

A candidate is a point in a small grid around the settings that the search starts from (`space`). It is trained, its
strengths -1u and +1u are solved for on questions that nothing was trained on, as for `ws compare`, and the behaviour's
own `dev` items are asked at both: preference where there are held-out answers, else agreement with claims. Its effect
is the span between the two in the expected direction, which multiplying a vector does not change. Out is what cannot be
trained, has no -1u or +1u, or does not move to either side of the base.

The draw is random and even over the values of every setting (as a Latin hypercube, McKay et al. 1979, Technometrics
21). It is pruned by successive halving (Jamieson & Talwalkar 2016, arXiv 1502.07943): all are trained for a quarter of
the steps, the better half for a half, and the better half of these for all. That is one bracket of Hyperband (Li et al.
2018, arXiv 1603.06560), without the others, which a dozen candidates cannot fill. Every training starts from nothing:
the rate's schedule depends on its end, so a short one is no beginning of a long one. What starts the search is trained
in full and never pruned, so that the choice can be no worse on these items.

The budget is in trainings and not in minutes: a choice must not depend on how busy a machine is. A model-based search
(optuna's TPE) does not earn a dependency here: it needs about ten results before it is more than a random draw, and
those are all that there are.

The largest of N noisy numbers is too large on average, and the interval beside it is that of a single one. So a claim
rests on the split `report`, of which nothing is read here.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from tabulate import tabulate
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from ws import console
from ws.adapters import AdapterSpec, family, peft_config, require_signed
from ws.behaviors import Behavior, load_behavior
from ws.data import PAIRS_FILE, generate_pairs, hashed_pairs
from ws.errors import DiskError, NoMemoryError, WsError
from ws.eval.before import require_readable
from ws.eval.capability import Capability, read_texts
from ws.eval.context import EvalContext
from ws.eval.evaluation import Evaluation, HeadlineScore, Scores
from ws.eval.preference import Preferences
from ws.eval.readable import worst
from ws.eval.sycophancy import Sycophancy
from ws.files.places import require_no_link
from ws.files.runs import Run, data_folder, sha256_json, tune_folder, write_csv, write_json
from ws.files.writing import delete
from ws.intervene.calibrate import calibration_for
from ws.intervene.interventions import Intervention
from ws.lm.models import load_model
from ws.options.make import CONTRASTS, OBJECTIVES, SIGNED, UNRECORDED, ReplicateConfig, TrainConfig
from ws.options.make import TuneOptions as TuneOptions
from ws.options.shared import shared_with
from ws.replicate import CHOICE_FILE, CHOICE_FORMAT, eval_options, train_vector
from ws.stats import Estimate, estimate_mean
from ws.train import adapter_spec, arm_settings

Point: TypeAlias = Mapping[str, Any]  # the settings that are varied, by name
SHARES = (0.25, 0.5, 1.0)  # of the full length; half of the candidates go on to the next


# ---- candidates -----------------------------------------------------------------------------------------------------


def space(model: PreTrainedModel, options: TuneOptions) -> dict[str, tuple[Any, ...]]:
    """The values of every setting that is searched, the one that the search starts from first.

    A setting of which the adapter takes no notice on this model (the rank of an ia3) is left out.

    Raises:
        WsError: none of what `vary` names is there to be varied.
    """
    start, fam = options.train, family(options.adapter)
    steps = [2.0**k for k in (0, -3, -2, -1, 1, 2, 3)]
    values: dict[str, tuple[Any, ...]] = {
        "lr": tuple((start.lr or fam.learning_rate) * f for f in steps),
        "rank": tuple(max(1, round(start.rank * f)) for f in (1, 0.25, 0.5, 2)),
        "layers": (start.layers, "all", "0.3:0.8", "0.5:1.0"),
        "delora_lambda": tuple(start.delora_lambda * f for f in steps),
        "kl": (start.kl, 0.0, 0.1, 1.0),
        "objective": (start.objective, *OBJECTIVES),
        "contrast": (options.contrast, *CONTRASTS) if fam.mirror else (options.contrast,),
    }
    distinct = {name: _distinct(model, options, name, values[name]) for name in options.vary}
    found = {name: kept for name, kept in distinct.items() if len(kept) > 1}
    if not found:
        names = ", ".join(options.vary)
        raise WsError(f"--vary: a {options.adapter} adapter on {options.model} has nothing to vary of {names}.")
    return found


def _distinct(model: PreTrainedModel, options: TuneOptions, name: str, values: Sequence[Any]) -> tuple[Any, ...]:
    """The values that make different adapters, each once; of what is no part of an adapter's shape all of them."""
    if name not in {f.name for f in fields(AdapterSpec)}:
        return tuple(dict.fromkeys(values))
    kept, configs = list[Any](), list[Any]()
    for value in values:
        config = peft_config(model, adapter_spec(settings(options, {name: value}).train, options.adapter))
        if config not in configs:
            kept.append(value)
            configs.append(config)
    return tuple(kept)


def settings(options: TuneOptions, point: Point, share: float = 1.0) -> ReplicateConfig:
    """A candidate, trained for a share of the full length, as a run to make.

    `lora_alpha` goes with the rank, so that a LoRA's own scale, `lora_alpha / rank`, stays.
    """
    start = options.train
    varied = {name: value for name, value in point.items() if name != "contrast"}
    start = start.at_rank(varied["rank"]) if "rank" in varied else start
    if start.lr is None and varied.get("lr") == family(options.adapter).learning_rate:
        del varied["lr"]  # as it is on record where nothing was searched
    if share < 1:
        varied["epochs"] = start.epochs * share
        varied["max_steps"] = None if start.max_steps is None else math.ceil(start.max_steps * share)
    return options.candidate(replace(start, **varied), str(point.get("contrast", options.contrast)))


def draw(values: Mapping[str, Sequence[Any]], n: int, seed: int) -> list[Point]:
    """`n` different points besides that of all first values, or as many as there are; more begin with the same.

    Every setting takes each of its values once, in random order, before it takes one again.
    """
    rng = random.Random(seed)
    decks = [_deck(values[name], random.Random(rng.getrandbits(64))) for name in values]
    first = tuple(v[0] for v in values.values())
    n = min(n, math.prod(map(len, values.values())) - 1)
    return [dict(zip(values, row, strict=True)) for row in islice(_once(zip(*decks, strict=True), first), n)]


def _deck(values: Sequence[Any], rng: random.Random) -> Iterator[Any]:
    while True:
        yield from rng.sample(list(values), len(values))


def _once(rows: Iterator[tuple[Any, ...]], *seen: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    known = set(seen)
    for row in rows:
        if row not in known:
            known.add(row)
            yield row


def label(point: Point) -> str:
    """A point in a few words: `lr 0.001, rank 8, layers all, contrast arms`."""
    return ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in point.items()
    )


# ---- what is known of one -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """What was measured of a candidate.

    Attributes:
        problem: why it is out; empty where it is not.
        effect: `score(+1u) - score(-1u)` of every `dev` item, in the direction that is expected.
        selectivity: of claims, the effect on false ones beyond that on true ones, in nats; of preference, minus the
            mean KL divergence from the base on neutral text at -1u and +1u, in nats per token; None where there are no
            true claims.
        alphas: the strengths -1u and +1u.
        audit: the divergences at them on other questions, in nats.
    """

    problem: str = ""
    effect: tuple[float, ...] = ()
    selectivity: float | None = None
    alphas: tuple[float, ...] = ()
    audit: tuple[float | None, ...] = ()

    @property
    def mean(self) -> float:
        """The effect over all items; of what is out minus infinity."""
        return -math.inf if self.problem else float(np.mean(self.effect))


@dataclass(frozen=True)
class Trial:
    """A candidate at the longest training that it came to.

    Attributes:
        point: its settings.
        share: of the full length that it was trained for.
        measured: what became of it.
        number: of the candidate, in the order of the draw; 0 is what the search starts from.
    """

    point: Point
    share: float
    measured: Measured
    number: int

    @property
    def is_in(self) -> bool:
        """Whether it may be chosen: trained in full, and nothing the matter."""
        return self.share == 1 and not self.measured.problem


Measure = Callable[[Point, float], Measured]


def rungs(budget: int) -> list[int]:
    """How many candidates are trained for each of `SHARES`, at most, next to the one that the search starts from.

    Every length has the same part of the budget: with 10 trainings 12, 6 and 3 candidates.
    """
    return [int((budget - 1) / len(SHARES) / share) for share in SHARES]


def search(start: Point, others: Sequence[Point], sizes: Sequence[int], measure: Measure) -> list[Trial]:
    """Measure candidates by successive halving; every one once, at the longest training that it came to."""
    trials = [Trial(start, 1.0, measure(start, 1.0), 0)]
    going: list[tuple[int, Point]] = list(enumerate(others, start=1))
    for share, size in zip(SHARES, sizes, strict=True):
        done = [Trial(point, share, measure(point, share), number) for number, point in going[:size]]
        # The first of equals goes on, so that the same search ends the same.
        ahead = sorted((t for t in done if not t.measured.problem), key=lambda t: -t.measured.mean)
        n_next = 0 if share == 1 else sizes[SHARES.index(share) + 1]
        going = [(t.number, t.point) for t in ahead[:n_next]]
        trials += [t for t in done if t.number not in dict(going)]
    return sorted(trials, key=lambda t: t.number)


def best(trials: Sequence[Trial], n_boot: int) -> Trial | None:
    """The most selective of those whose effect cannot be told from the largest; None where all are out.

    Told apart are effects whose paired difference, item by item, has a 95 % interval without zero. One with a smaller
    effect than what the search starts from is never chosen.
    """
    usable = [t for t in trials if t.is_in]
    if not usable:
        return None
    top = max(usable, key=lambda t: t.measured.mean)
    least = trials[0].measured.mean if trials[0].is_in else -math.inf
    equals = [t for t in usable if t is top or not gain(top, t, n_boot).excludes_zero]
    equals = [t for t in equals if t.measured.mean >= least]
    return max(equals, key=lambda t: (t.measured.selectivity or 0.0, t.measured.mean))


def gain(one: Trial, other: Trial, n_boot: int) -> Estimate:
    """How much larger the effect of one is, item by item."""
    return estimate_mean(np.array(one.measured.effect) - np.array(other.measured.effect), n_boot)


# ---- measuring one --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Bench:
    """Trains a candidate, measures it, and keeps what was measured; what was trained is deleted."""

    options: TuneOptions
    model: PreTrainedModel
    tok: Tokenizer
    behavior: Behavior
    run: Run
    countdown: console.Countdown

    @property
    def pairs(self) -> Path:
        return data_folder(self.options.out, self.options.model, self.behavior.name) / PAIRS_FILE

    @cached_property
    def inputs(self) -> dict[str, str]:
        return {"pairs": hashed_pairs(self.pairs)[1]}

    @cached_property
    def base(self) -> EvalContext:
        """The base alone."""
        config = self.options.candidate(self.options.train, self.options.contrast)
        return EvalContext.of_base(eval_options(config), self.model, self.tok)

    @cached_property
    def evaluation(self) -> Evaluation:
        """What the behaviour is measured by, with its `dev` items."""
        if self.behavior.held_out("dev"):
            return Preferences.of_behavior(self.base, self.behavior, "dev")
        if self.behavior.claims is None:
            raise WsError(f"The behaviour {self.behavior.name} has nothing held out in the split 'dev' to choose on.")
        return Sycophancy.of_behavior(self.base, self.behavior, "dev")

    @cached_property
    def neutral(self) -> Capability:
        """Neutral text, and the base to compare with."""
        return Capability.of_run(self.base)

    @property
    def is_preference(self) -> bool:
        return isinstance(self.evaluation, Preferences)

    def __call__(self, point: Point, share: float) -> Measured:
        """What is known of a candidate, measured unless it is on record."""
        name, config = f"{label(point)}, at {share:g}", settings(self.options, point, share)
        described = arm_settings(self.model, self.tok, config.adapter, config.train, config.seed)
        described |= {"contrast": config.contrast, "eval": self.evaluation.digest, **self.options.calibration.settings}
        described |= {"behavior": self.behavior.digest}
        stage = self.run.refresh(name, described, self.inputs)
        if stage is not None:
            console.say(f"== {name} of the full length{self.countdown.left}")
            trial = Run(self.run.folder / f"trial-{sha256_json([described, self.inputs])[:12]}")
            try:
                measured = self.tried(config, trial)
                stage.done([], measured=asdict(measured))
            except (torch.OutOfMemoryError, NoMemoryError):  # another call may have more: that is not kept
                self.run.drop(name)
                measured = Measured("it does not fit into the memory of the device")
            _discard(self.run)
        else:
            measured = self.run.fact(name, "measured", Measured)
        for _ in range(_quarters(share)):  # a pace per step and not per candidate
            self.countdown.step(quick=stage is None)
        return measured

    def tried(self, config: ReplicateConfig, trial: Run) -> Measured:
        """What is measured of a candidate, or why it is out."""
        try:
            stages = console.Stages(1 + len(CONTRASTS[config.contrast]))
            vector = train_vector(self.model, self.tok, self.behavior, config, self.pairs, trial, stages)
            return self.measured(EvalContext(eval_options(config), self.model, self.tok, vector, trial))
        except (DiskError, NoMemoryError):  # after which the same command goes on
            raise
        except WsError as problem:
            return Measured(str(problem))

    def measured(self, context: EvalContext) -> Measured:
        """The effect between -1u and +1u, and how selective it is."""
        chosen = context.intervention()
        calibration = calibration_for(chosen, context.opened, self.behavior, self.options.calibration, context.key)
        low, high = calibration.negative, calibration.positive
        for unit, side in (("-1u", low), ("+1u", high)):
            if not side.converged:
                return Measured(f"there is no {unit}: {side.reason}")
        alphas = (low.alpha, high.alpha)
        scores = context.scores(self.evaluation, chosen, [0.0, *alphas])
        found = self.read(scores[low.alpha], scores[0.0], scores[high.alpha])
        if self.is_preference and not found.problem:
            found = replace(found, selectivity=self.restraint(chosen, alphas))
        return found if found.problem else replace(found, alphas=alphas, audit=(low.audit, high.audit))

    def read(self, *scores: Scores) -> Measured:
        """What the scores at -1u, of the base and at +1u say."""
        key, expected = self.evaluation.scores[0].key, 1 if self.is_preference else self.behavior.effect
        low, base, high = (self.evaluation.headlines(s) for s in scores)
        known = [r for s in scores if (r := self.evaluation.readability(s).get(key)) is not None]
        if known and (problem := worst(known).problem):
            return Measured(f"its answers cannot be read: {problem}")
        sides = [float(expected * (a[key] - b[key]).mean()) for a, b in ((base, low), (high, base))]
        if min(sides) <= 0:
            return Measured(f"not monotone: from -1u to the base {sides[0]:+.3g}, from there to +1u {sides[1]:+.3g}")
        effect, selectivity = expected * (high[key] - low[key]), None
        if "true_claims" in base:
            selectivity = float(effect.mean() - (expected * (high["true_claims"] - low["true_claims"])).mean())
        return Measured("", tuple(effect.tolist()), selectivity)

    def restraint(self, chosen: Intervention, alphas: Sequence[float]) -> float:
        """Minus the mean KL divergence from the base on neutral text over some strengths, in nats per token."""
        neutral, moved = self.neutral, list[float]()
        for alpha in alphas:
            with chosen.at(alpha):
                read = read_texts(self.model, self.tok, neutral.neutral.texts, neutral.base, neutral.max_tokens)
            moved.append(float(read["kl"].mean()))
        return -float(np.mean(moved))


# ---- the command ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tuned:
    """What a search came to.

    Attributes:
        options: what was asked for.
        behavior: whose `dev` items.
        score: what the effect is of.
        values: what was searched.
        trials: all candidates, the one that it started from first.
        folder: where it is written.
    """

    options: TuneOptions
    behavior: Behavior
    score: HeadlineScore
    values: Mapping[str, Sequence[Any]]
    trials: Sequence[Trial]
    folder: Path

    @cached_property
    def chosen(self) -> Trial | None:
        """The best candidate; None where all are out."""
        return best(self.trials, self.options.n_bootstrap)

    def effect(self, trial: Trial) -> Estimate:
        """The effect of one that is not out, with its interval."""
        return estimate_mean(np.array(trial.measured.effect), self.options.n_bootstrap)

    def beyond_start(self, trial: Trial) -> Estimate | None:
        """How much more it is than that of what the search started from; None where that is out."""
        start = self.trials[0]
        return gain(trial, start, self.options.n_bootstrap) if start.is_in and trial is not start else None


def tune(options: TuneOptions) -> Tuned:
    """Make the pairs if there are none, search, and write what was chosen.

    Raises:
        WsError: bad settings, nothing held out in `dev`, or a search on record that was made with other settings.
    """
    o = options
    o.check()
    if o.contrast == SIGNED:
        require_signed(family(o.adapter))
    behavior = load_behavior(o.behavior, o.model)
    console.say(f"{behavior.name} x {o.adapter} on {o.model}")
    model, tok = load_model(o.model, o.device, o.dtype)
    values, sizes, run = space(model, o), rungs(o.budget), Run(tune_folder(o.out, behavior.name, o.adapter))
    others = draw(values, sizes[0], o.seed)
    counts = zip(sizes, SHARES, strict=True)
    steps = _quarters(1.0) + sum(min(n, len(others)) * _quarters(share) for n, share in counts)
    bench = _Bench(o, model, tok, behavior, run, console.Countdown(steps))
    require_readable(bench.base, [bench.evaluation], o.data.anyway)
    generate_pairs(model, tok, behavior, bench.pairs.parent, o.data)
    start = replace(o.train, **{name: getattr(TrainConfig(), name) for name in UNRECORDED})
    with run.alone("search"):
        if o.fresh:
            Run(run.folder, fresh=True)
            _discard(run)
        described = {"start": asdict(start), "contrast": o.contrast, "seed": o.seed, "model": o.model}
        described |= {"values": {k: list(v) for k, v in values.items()}, **o.calibration.settings}
        run.require_same("search", described, bench.inputs)
        stage = run.restart("search", described, bench.inputs)  # a larger budget goes on from a smaller one
        trials = search({name: kept[0] for name, kept in values.items()}, others, sizes, bench)
        tuned = Tuned(o, behavior, bench.evaluation.scores[0], values, trials, run.folder)
        stage.done(_write(tuned))
        _discard(run)
    return tuned


def _quarters(share: float) -> int:
    return round(share / SHARES[0])


def _discard(run: Run) -> None:
    """Delete what was trained of candidates, one that a kill has left among them."""
    for trial in run.folder.glob("trial-*"):
        require_no_link(trial)
        delete(trial)


def rows(tuned: Tuned) -> list[dict[str, Any]]:
    """The rows of `search.csv`, one per candidate."""
    o, table = tuned.options, list[dict[str, Any]]()
    for t in tuned.trials:
        m = t.measured
        fate = "chosen" if t is tuned.chosen else "out" if m.problem else "pruned" if t.share < 1 else "measured"
        row = {"behavior": tuned.behavior.name, "adapter": o.adapter, "seed": o.seed, "candidate": t.number}
        row |= {**t.point, "length": t.share, "fate": fate, "score": tuned.score.key}
        row |= dict.fromkeys(("effect", "effect_ci_lo", "effect_ci_hi"))
        row |= {} if m.problem else tuned.effect(t).columns("effect", "ci_lo", "ci_hi")
        row |= {"n": len(m.effect), "selectivity": m.selectivity}
        for side, number in (("-1u", 0), ("+1u", 1)):
            row |= {f"alpha_{side}": m.alphas[number] if m.alphas else None}
            row |= {f"audit_{side}": m.audit[number] if m.audit else None}
        table.append(row | {"split": "dev", "reason": m.problem})
    return table


def _write(tuned: Tuned) -> list[Path]:
    """`search.csv`, and `choice.json` where something was chosen."""
    o, chosen, behavior = tuned.options, tuned.chosen, tuned.behavior
    files, choice = [write_csv(tuned.folder / "search.csv", rows(tuned))], tuned.folder / CHOICE_FILE
    if chosen is None:
        choice.unlink(missing_ok=True)  # of a smaller search
        return files
    config, more = settings(o, chosen.point), tuned.beyond_start(chosen)
    facts: dict[str, Any] = {"format": CHOICE_FORMAT, "model": o.model, "adapter": o.adapter, "split": "dev"}
    facts |= {"behavior": behavior.name, "behavior_sha256": behavior.digest, "start": asdict(o.train)}
    facts |= {"train": asdict(config.train), "contrast": config.contrast, "chosen": dict(chosen.point)}
    facts |= {"candidates": len(tuned.trials), "budget": o.budget, "seed": o.seed, "searched": dict(tuned.values)}
    facts |= {"score": tuned.score.key, "effect": asdict(tuned.effect(chosen))}
    facts |= {"beyond_start": None if more is None else asdict(more), "selectivity": chosen.measured.selectivity}
    return [*files, write_json(choice, facts | {"calibration": o.calibration.settings})]


def render(tuned: Tuned) -> str:
    """The candidates as a table for people, best first, and what was chosen in a few sentences."""
    cells, spec = list[list[Any]](), tuned.score.spec
    for t in sorted(tuned.trials, key=lambda t: (-t.share, -t.measured.mean, t.number)):
        m, words = t.measured, {0: " (start)"}.get(t.number, "")
        cells.append(
            [
                f"{t.number}{words}{' *' if t is tuned.chosen else ''}",
                *(f"{v:.3g}" if isinstance(v, float) else str(v) for v in t.point.values()),
                f"{t.share:g}",
                "" if m.problem else f"{tuned.effect(t):{spec}}",
                "" if m.selectivity is None else f"{m.selectivity:{spec}}",
                ", ".join("" if nats is None else f"{nats:.2f}" for nats in m.audit),
                m.problem,
            ]
        )
    header = ["candidate", *tuned.values, "length", f"effect, {tuned.score.unit}", "selectivity"]
    header += ["KL on other questions", "out, because"]
    widths = [None] * (len(header) - 1) + [60]
    return "\n\n".join([tabulate(cells, header, disable_numparse=True, maxcolwidths=widths), verdict(tuned)])


def verdict(tuned: Tuned) -> str:
    """What was chosen, and how far to believe it."""
    chosen, start, n, spec = tuned.chosen, tuned.trials[0], len(tuned.trials), tuned.score.spec
    if chosen is None:
        return f"All {n} candidates are out, what the search started from among them; nothing was chosen."
    effect, more = tuned.effect(chosen), tuned.beyond_start(chosen)
    said = f"Of {n} candidates {label(chosen.point)}: {effect:{spec}} {tuned.score.unit} on {effect.n} dev items"
    if chosen is start:
        said += ". That is what the search started from, and nothing was better"
    elif more is not None:
        said += f", {more:{spec}} more than what the search started from"
    else:
        said += f"; what the search started from is out: {start.measured.problem.rstrip('.')}"
    return (
        f"{said}.\nThe largest of {n} noisy numbers is optimistic, and its interval is that of a single one: what to "
        "claim is read on the split `report`, of which nothing was seen here."
    )


def main(options: TuneOptions) -> None:
    """The command `ws tune`."""
    tuned, following = tune(options), ""
    files = [file for name in ("search.csv", CHOICE_FILE) if (file := tuned.folder / name).is_file()]
    if tuned.chosen is not None:
        usual = ReplicateConfig.preset(options.model, options.adapter)
        made = shared_with(ReplicateConfig, options, train=usual.train, contrast="arms", tuned=True, fresh=False)
        following = console.command_line("ws replicate", made, always=("model", "behavior", "adapter"))
    data = {"rows": rows(tuned), "chosen": None if tuned.chosen is None else tuned.chosen.point}
    console.show(console.Result(render(tuned), data, files, following))
    if tuned.chosen is None:
        raise WsError(f"None of the {len(tuned.trials)} candidates can be chosen; {files[0]} says why.")


if __name__ == "__main__":
    console.run(main, TuneOptions, "ws tune")
