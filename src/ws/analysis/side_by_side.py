"""The runs of `ws compare` and `ws profile`, one after the other, and the vectors that were trained as their nulls."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from ws import console
from ws.adapters import FAMILIES, family
from ws.analysis.controls import NULLS
from ws.behaviors import behavior_name
from ws.console import command_line
from ws.diff import SteeringVector
from ws.errors import WsError
from ws.eval.context import EvalContext
from ws.files.runs import Run, run_folder
from ws.intervene.calibrate import calibration_for
from ws.intervene.calibration import Calibration
from ws.intervene.interventions import ARMS, OF_A_RUN, Intervention
from ws.options.make import CONTRASTS, SIGNED, run_name
from ws.options.make import SIGNS as ARM_SIGNS
from ws.options.measure import SideBySideOptions
from ws.options.shared import RunOptions, folder_with_vector, shared_with
from ws.run import open_run, sources

SIGNS = (-1, 1)


@dataclass(frozen=True)
class OpenedRun:
    """One run on the model that all of them share.

    Attributes:
        options: of the command.
        context: the run, for evaluations.
        interventions: which of those that are asked for it has; what needs no adapter is of the first run alone.
    """

    options: SideBySideOptions
    context: EvalContext
    interventions: tuple[str, ...]

    def calibrated(self, chosen: Intervention) -> Calibration:
        """The strengths of an intervention at the target divergence, solved for where none are on record."""
        context, key = self.context, self.key(chosen)
        return calibration_for(chosen, context.opened, context.behavior, self.options.calibration, key, reuse=True)

    def key(self, chosen: Intervention) -> dict[str, Any]:
        """The columns that say of which run a row is; what needs no adapter stands under its own name."""
        return self.context.key | ({"adapter": chosen.name, "seed": 0} if chosen.is_shared else {})

    def usable(self, chosen: Intervention, calibration: Calibration) -> dict[int, float]:
        """The calibrated strengths by sign, with a warning for a sign that has none."""
        sides = {sign: calibration.side(sign) for sign in SIGNS}
        alphas = {sign: s.alpha for sign, s in sides.items() if s.converged or not chosen.has_dial}
        for sign in set(SIGNS) - set(alphas):
            console.warn(f"{chosen.name} has no {sign:+d}u: {sides[sign].reason}.")
        return alphas

    def trained_nulls(self) -> dict[str, tuple[EvalContext, float]]:
        """The label-shuffled and the same-side vector of this run, where they were trained, each with the factor that
        gives a strength of it the norm of the run's own vector; with a warning without those that were trained
        otherwise than it, and so are the nulls of another vector."""
        nulls, key = dict[str, tuple[EvalContext, float]](), self.context.key
        for null in NULLS:
            folder = run_folder(self.options.out, str(key["behavior"]), f"{key['adapter']}-{null}", int(key["seed"]))
            if not (folder / "vector").is_dir():
                continue
            null_context = replace(self.context, vector=SteeringVector.load(folder / "vector"), run=Run(folder))
            if changed := _trained_otherwise(self.context, null_context):
                console.warn(
                    f"The vector in {folder} was trained otherwise than that in {self.context.run.folder} "
                    f"({'; '.join(changed)}), so it is no null of it and is left out. Train it again as that one was, "
                    f"with `ws replicate --control {null} --fresh --no-fresh-data` and its settings."
                )
                continue
            ratio = self.context.vector.norm(self.context.model) / null_context.vector.norm(self.context.model)
            nulls[null] = (null_context, ratio)
        return nulls


def _trained_otherwise(of: EvalContext, null: EvalContext) -> list[str]:
    """In what the training of a null differs from that of the vector it is to be held against, as far as both are on
    record: in the settings, and in the pairs that the null's own were made of."""
    changed = list[str]()
    for facts in (_settings, _pairs):
        was, now = facts(of), facts(null)
        names = sorted(was | now) if was and now else []
        changed += [f"{k}: {was.get(k)!r} -> {now.get(k)!r}" for k in names if was.get(k) != now.get(k)]
    return changed


def _settings(context: EvalContext) -> dict[str, Any]:
    return next(sources(context.vector.recipe), {}).get("config") or {}


def _pairs(context: EvalContext) -> dict[str, str]:
    """The hash of the pairs file; of a null that of the behaviour's own, which its `control` stage took."""
    stages = context.run.manifest["stages"]
    inputs = [stages.get(name, {}).get("inputs", {}) for name in ("control", *ARM_SIGNS, SIGNED)]
    return next(({"pairs": i["pairs"][:12]} for i in inputs if "pairs" in i), {})


def opened_runs(options: SideBySideOptions) -> Iterator[OpenedRun]:
    """Every run that the options name, one after the other, on one model.

    Raises:
        WsError: an adapter that there is not, no finished run, or runs of different bases.
    """
    loaded = None
    runs = _runs(options)
    countdown = console.Countdown(len(runs))
    for number, (adapter, seed) in enumerate(runs, start=1):
        console.say(f"== {adapter}, seed {seed} ({countdown})")
        o = options
        opened = open_run(o.out, o.behavior, adapter, seed, o.model, o.device, o.dtype, loaded)
        loaded = (opened.model, opened.tok)
        context = EvalContext(o.eval_options(adapter, seed), opened.model, opened.tok, opened.vector, opened.run)
        # What needs no adapter is measured once.
        wanted = [n for n in o.interventions if n in OF_A_RUN or number == 1]
        if opened.vector.info.get("contrast") == SIGNED and (left_out := [n for n in wanted if n in ARMS]):
            console.warn(f"{adapter} has one signed adapter and no arms, so {', '.join(left_out)} is left out.")
            wanted = [n for n in wanted if n not in ARMS]
        yield OpenedRun(options, context, tuple(wanted))
        countdown.step()


def _runs(options: SideBySideOptions) -> list[tuple[str, int]]:
    """The runs to open; `WsError` when there are none, or one of them has no vector."""
    behavior = behavior_name(options.behavior)
    names = [run_name(a, contrast) for a in FAMILIES for contrast in CONTRASTS]
    folders = {a: run_folder(options.out, behavior, a, options.seeds[0]) for a in names}
    for name in options.adapters:
        family(name.removesuffix(f"-{SIGNED}"))
    adapters = options.adapters or tuple(a for a, folder in folders.items() if (folder / "vector").is_dir())
    if not adapters:
        wanted = shared_with(RunOptions, options, seed=options.seeds[0])
        made = command_line("ws replicate", wanted, always=("behavior",))
        raise WsError(
            f"No run below {options.folder} has a vector; make one with `{made}`, or several with `ws sweep`."
        )
    runs = [(adapter, seed) for adapter in adapters for seed in options.seeds]
    for adapter, seed in runs:  # one that is missing is not found after hours of the others
        folder_with_vector(options.out, options.behavior, adapter, seed, model=options.model)
    return runs
