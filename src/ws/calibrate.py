"""The command that finds the strength at which an intervention costs a given divergence; see `ws.calibration`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate

from ws import console
from ws.behaviors import load_behavior
from ws.calibration import (
    Calibration,
    CalibrationConfig,
    SideCalibration,
    calibrate,
    prompts_hash,
    split_questions,
    store_calibration,
)
from ws.divergence import N_TOKENS
from ws.errors import WsError, choose
from ws.finished import FinishedRun, RunOptions
from ws.interventions import INTERVENTIONS, WEIGHT, Intervention, divergence_of, intervention
from ws.models import fingerprint, render_prompt
from ws.runs import Stage, write_csv


@dataclass(frozen=True)
class CalibrateOptions(RunOptions):
    """Find the strengths at which a run's vector costs a given divergence, and store them with the vector.

    Attributes:
        intervention: what is calibrated: `weight`, the vector, or a baseline of `ws.interventions`. Of those without a
            dial the divergence is reported.
        n_prompts, n_tokens, target, batch_size: see `CalibrationConfig`.
        fresh: measure again, also when the same calibration is stored.
    """

    intervention: str = WEIGHT
    n_prompts: int = 50
    n_tokens: int = N_TOKENS
    target: float = 1.0
    batch_size: int | None = None
    fresh: bool = False

    @property
    def config(self) -> CalibrationConfig:
        """The settings of the calibration."""
        return CalibrationConfig(self.n_prompts, self.n_tokens, self.target, batch_size=self.batch_size)


def main(options: CalibrateOptions) -> None:
    """The command `ws calibrate`."""
    options.config.check()
    o = options
    choose("intervention", o.intervention, INTERVENTIONS)
    opened = o.open()
    behavior = load_behavior(o.behavior, o.model or opened.vector.base_id)
    chosen = intervention(o.intervention, opened, behavior)
    found = calibration_for(chosen, opened, behavior.questions, o.config, _key(chosen, options), o.fresh)
    stage = _stage_name(chosen)
    text = f"{chosen.home.facts(stage)['example']}\n\n{render(found)}"
    console.show(console.Result(text, {"calibration": found}, chosen.home.outputs(stage)))
    sides = (found.positive, found.negative)
    if chosen.has_dial and not any(side.converged for side in sides):
        raise WsError(f"Neither sign could be calibrated: {found.positive.reason}; {found.negative.reason}.")


def calibration_for(
    chosen: Intervention,
    opened: FinishedRun,
    questions: Sequence[str],
    config: CalibrationConfig,
    key: Mapping[str, Any],
    fresh: bool = False,
) -> Calibration:
    """The calibration of an intervention: what is stored, where it was made in the same way, else measured and stored.

    Args:
        chosen: what is calibrated. Without a dial its divergences at -1 and +1 are measured and no side converges.
        opened: the run whose model it acts on.
        questions: the behaviour's pool; one half calibrates and the other audits (see `split_questions`).
        config: see `CalibrationConfig`.
        key: the first columns of `calibration.csv`.
        fresh: measure again, also when the same is stored.
    """
    parts = split_questions(questions, config.n_prompts)
    settings = config.settings | {"dtype": str(opened.model.dtype)[6:]}
    prompts = prompts_hash(*([render_prompt(opened.tok, q) for q in part] for part in parts))
    inputs = {"vector": chosen.subject, "model": fingerprint(opened.model), "prompts": prompts}
    name = _stage_name(chosen)
    stage = (chosen.home.restart if fresh else chosen.home.refresh)(name, settings, inputs)
    if stage is not None:
        _carry_out(stage, chosen, opened, config, key, *parts)
    found = chosen.calibration(opened.model)
    assert found is not None, "a finished stage has stored its calibration"
    return found


def _key(chosen: Intervention, options: CalibrateOptions) -> dict[str, Any]:
    """The first columns; what depends on no adapter stands under its own name."""
    return options.key | ({"adapter": chosen.name, "seed": 0} if chosen.is_shared else {})


def _stage_name(chosen: Intervention) -> str:
    return "calibration" if chosen.name == WEIGHT else f"calibration of {chosen.name}"


def _carry_out(
    stage: Stage,
    chosen: Intervention,
    opened: FinishedRun,
    config: CalibrationConfig,
    key: Mapping[str, Any],
    questions: Sequence[str],
    audit: Sequence[str],
) -> None:
    """Calibrate, and write what was found into the folder of the intervention."""
    console.say(f"{chosen.name}: {config.target:g} nats on {len(questions)} prompts, audit on {len(audit)}")
    model, tok = opened.model, opened.tok
    if chosen.has_dial:
        found = calibrate(model, tok, chosen.at, questions, audit, config, chosen.subject, report=console.say)
    else:
        found = _as_it_is(chosen, opened, config, questions, audit)
    table = "calibration.csv" if chosen.name == WEIGHT else f"calibration_{chosen.name}.csv"
    written = write_csv(chosen.home.folder / table, rows(key, found, chosen.name))
    file = chosen.calibration_file
    stored = store_calibration(file.parent, found, file.name)
    stage.done([written, stored], example=example(opened, chosen, questions[0], found))


def _as_it_is(
    chosen: Intervention,
    opened: FinishedRun,
    config: CalibrationConfig,
    questions: Sequence[str],
    audit: Sequence[str],
) -> Calibration:
    """The divergences of an intervention that has no dial, at -1 and +1."""

    def side(alpha: float) -> SideCalibration:
        found, other = (
            divergence_of(chosen, opened.model, opened.tok, part, alpha, config) for part in (questions, audit)
        )
        value = found.at(config.quantile)
        reason = f"there is no dial, and the divergence is {value:.3g} nats"
        seen = ((alpha, value),)
        return SideCalibration(alpha, value, False, reason, other.at(config.quantile), seen, found.n_positions)

    prompts = prompts_hash(*([render_prompt(opened.tok, q) for q in part] for part in (questions, audit)))
    return Calibration(side(1.0), side(-1.0), config, prompts, fingerprint(opened.model), chosen.subject)


def rows(key: Mapping[str, Any], calibration: Calibration, name: str = WEIGHT) -> list[dict[str, Any]]:
    """The rows of `calibration.csv`, one per sign; `key` holds behavior, adapter and seed."""
    return [
        {
            **key,
            "sign": sign,
            "alpha": side.alpha,
            "divergence": side.divergence,
            "target": calibration.config.target,
            "converged": side.converged,
            "audit": side.audit,
            "n_prompts": calibration.config.n_prompts,
            "n_positions": side.n_positions,
            "reason": side.reason,
            "intervention": name,
        }
        for sign, side in (("+", calibration.positive), ("-", calibration.negative))
    ]


def example(opened: FinishedRun, chosen: Intervention, question: str, calibration: Calibration) -> str:
    """One worked example, to read by eye: a prompt, and how the model goes on at -1u, unsteered and at +1u."""
    lines = [f"Worked example: {question}", ""]
    for units in (-1, 0, 1):
        side = calibration.side(units)
        if units and chosen.has_dial and not side.converged:
            continue
        alpha = abs(units) * side.alpha
        said = divergence_of(chosen, opened.model, opened.tok, [question], alpha, calibration.config)
        lines.append(f"  {units:+d}u (alpha {alpha:+.4g})  {' '.join(said.answers[0].split())[:200]}")
    return "\n".join(lines)


def render(calibration: Calibration) -> str:
    """The calibration as a table for people, with the reason where a sign did not converge."""
    sides = {"+1u": calibration.positive, "-1u": calibration.negative}
    cells = [
        [
            unit,
            f"{side.alpha:+.4g}" if side.converged else "none",
            f"{side.divergence:.3f}",
            "" if side.audit is None else f"{side.audit:.3f}",
            len(side.evaluations),
            side.n_positions,
        ]
        for unit, side in sides.items()
    ]
    header = ["unit", "alpha", "KL, nats", "on other prompts", "measurements", "positions"]
    failed = [f"{unit} did not converge: {side.reason}." for unit, side in sides.items() if not side.converged]
    return "\n".join([tabulate(cells, header, disable_numparse=True), *failed])


if __name__ == "__main__":
    console.run(main, CalibrateOptions, "python -m ws.calibrate")
