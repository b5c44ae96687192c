"""The command that finds the strength at which an intervention costs a given divergence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tabulate import tabulate

from ws import console
from ws.behaviors import Behavior, bundled_behaviors, load_behavior
from ws.console import command_line
from ws.errors import WsError, choose
from ws.files.reading import kept
from ws.files.runs import Stage, write_csv
from ws.intervene.calibration import (
    Calibration,
    QuestionSplit,
    SideCalibration,
    calibrate,
    prompts_hash,
    read_calibration,
    split_questions,
    store_calibration,
)
from ws.intervene.interventions import Intervention, divergence_of, intervention
from ws.lm.models import fingerprint, render_prompt, tokenizer_hash
from ws.options.measure import CalibrateOptions as CalibrateOptions
from ws.options.shared import INTERVENTIONS, WEIGHT, CalibrationConfig, RunOptions
from ws.run import FinishedRun, open_options


def main(options: CalibrateOptions) -> None:
    """The command `ws calibrate`."""
    options.config.check()
    o = options
    choose("intervention", o.intervention, INTERVENTIONS)
    opened = open_options(o)
    behavior = load_behavior(o.behavior, o.model or opened.vector.base_id)
    chosen = intervention(o.intervention, opened, behavior)
    stage = _stage_name(chosen)
    with chosen.run.alone(stage):
        # What depends on no adapter stands under its own name.
        key = o.key | ({"adapter": chosen.name, "seed": 0} if chosen.is_shared else {})
        calibration = calibration_for(chosen, opened, behavior, o.config, key, o.fresh)
        text = f"{chosen.run.fact(stage, 'example', str)}\n\n{render(calibration)}"
        console.show(console.Result(text, {"calibration": calibration}, chosen.run.outputs(stage)))
    sides = (calibration.positive, calibration.negative)
    if chosen.has_dial and not any(side.converged for side in sides):
        raise WsError(
            f"Neither sign could be calibrated: {calibration.positive.reason}; {calibration.negative.reason}."
        )


# Strengths that differ in one of these cost something else.
_COST = {"target", "quantile", "n_tokens", "vector", "model"}


def calibration_for(
    chosen: Intervention,
    opened: FinishedRun,
    behavior: Behavior,
    config: CalibrationConfig,
    key: Mapping[str, Any],
    fresh: bool = False,
    reuse: bool = False,
) -> Calibration:
    """The calibration of an intervention: what is stored, where it was made in the same way, else measured and stored.

    Every command takes the stored strengths for its units, so they are never replaced unless that is asked for.

    Args:
        chosen: what is calibrated. Without a dial its divergences at -1 and +1 are measured and no side converges.
        opened: the run whose model it acts on.
        behavior: one half of its questions that were not trained on calibrates, the other audits (`split_questions`).
        config: see `CalibrationConfig`.
        key: the first columns of `calibration.csv`.
        fresh: measure again and replace what is stored.
        reuse: take what is stored when it is of the same divergence, however its questions were chosen.

    Raises:
        WsError: something else is stored; the message names the settings that differ.
    """
    name = _stage_name(chosen)
    with chosen.run.alone(name):
        split = split_questions(behavior.questions, config.n_prompts, opened.unseen(behavior))
        wanted = _wanted(chosen, opened, config, split)
        changed = _changes(chosen, wanted)
        named = "; ".join(f"{name}: {was!r} -> {now!r}" for name, (was, now) in changed.items())
        void = "vector" in changed and "model" not in changed  # of a vector that is no more, so that nothing takes them
        if changed and reuse and not set(changed) & _COST:
            console.warn(f"{_label(chosen, key)}: the stored strengths are used, made with other settings ({named}).")
            return _stored(chosen, opened)
        if changed and not fresh and not void:
            raise WsError(_refusal(chosen, key, named, config, opened.out))
        if changed:
            console.warn(f"{_label(chosen, key)}: the stored strengths are replaced ({named}).")
        if split.note:
            console.warn(split.note)
        inputs = {name: wanted.pop(name) for name in ("vector", "model", "prompts")}
        stage = (chosen.run.restart if fresh else chosen.run.refresh)(name, wanted, inputs)
        if stage is not None:
            _carry_out(stage, chosen, opened, config, key, split)
        return _stored(chosen, opened)


def _wanted(
    chosen: Intervention, opened: FinishedRun, config: CalibrationConfig, split: QuestionSplit
) -> dict[str, Any]:
    """Everything that the strengths depend on; the number of questions is that of those there are."""
    parts = (split.calibration, split.audit)
    return {
        **config.settings,
        "n_prompts": len(split.calibration),
        "dtype": str(opened.model.dtype)[6:],
        "tokenizer": tokenizer_hash(opened.tok),
        "vector": chosen.digest,
        "model": fingerprint(opened.model),
        "prompts": prompts_hash(*([render_prompt(opened.tok, q) for q in part] for part in parts)),
    }


def _changes(chosen: Intervention, wanted: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """`(was, now)` of every setting in which the stored calibration differs; empty without one."""
    stored = kept(chosen.calibration_file, read_calibration, "the strengths are measured again")
    was = {} if stored is None else stored.settings
    return {k: (_short(was[k]), _short(now)) for k, now in wanted.items() if was.get(k) not in (None, now)}


def _short(value: Any) -> Any:
    return value[:12] if isinstance(value, str) else value


def _stored(chosen: Intervention, opened: FinishedRun) -> Calibration:
    calibration = chosen.calibration(opened.model)
    assert calibration is not None, "a finished stage has stored its calibration"
    return calibration


def _label(chosen: Intervention, key: Mapping[str, Any]) -> str:
    return chosen.name if chosen.is_shared else f"{chosen.name} of {key['adapter']}, seed {key['seed']}"


def _refusal(chosen: Intervention, key: Mapping[str, Any], named: str, config: CalibrationConfig, out: Path) -> str:
    name = str(key["behavior"])
    run = RunOptions(behavior=name if name in bundled_behaviors() else f"{name}.toml", out=out)
    if not chosen.is_shared:
        run = replace(run, adapter=str(key["adapter"]), seed=int(key["seed"]))
    command = command_line("ws calibrate", run, always=("behavior", *([] if chosen.is_shared else ["adapter"])))
    return (
        f"{_label(chosen, key)}: other strengths are stored in {chosen.calibration_file} ({named}), and every command "
        f"takes its units from there; ask for the same settings, or replace them by `{command} --intervention "
        f"{chosen.name} --target {config.target:g} --n-tokens {config.n_tokens} --fresh`."
    )


def _stage_name(chosen: Intervention) -> str:
    return "calibration" if chosen.name == WEIGHT else f"calibration of {chosen.name}"


def _carry_out(
    stage: Stage,
    chosen: Intervention,
    opened: FinishedRun,
    config: CalibrationConfig,
    key: Mapping[str, Any],
    split: QuestionSplit,
) -> None:
    """Calibrate, and write what was found into the folder of the intervention."""
    questions, audit = split.calibration, split.audit
    console.say(f"{chosen.name}: {config.target:g} nats on {len(questions)} prompts, audit on {len(audit)}")
    model, tok, held_out = opened.model, opened.tok, split.held_out
    if chosen.has_dial:
        calibration = calibrate(
            model, tok, chosen.at, questions, audit, config, chosen.digest, report=console.say, held_out=held_out
        )
    else:
        calibration = _as_it_is(chosen, opened, config, split)
    table = "calibration.csv" if chosen.name == WEIGHT else f"calibration_{chosen.name}.csv"
    written = write_csv(chosen.run.folder / table, rows(key, calibration, chosen.name))
    file = chosen.calibration_file
    stored = store_calibration(file.parent, calibration, file.name)
    stage.done([written, stored], example=example(opened, chosen, questions[0], calibration))


def _as_it_is(
    chosen: Intervention,
    opened: FinishedRun,
    config: CalibrationConfig,
    split: QuestionSplit,
) -> Calibration:
    """The divergences of an intervention that has no dial, at -1 and +1."""
    parts, model, tok = (split.calibration, split.audit), opened.model, opened.tok

    def side(alpha: float) -> SideCalibration:
        divergence, other = (divergence_of(chosen, model, tok, part, alpha, config) if part else None for part in parts)
        assert divergence is not None, "there is at least one question"
        value, audit = divergence.at(config.quantile), None if other is None else other.at(config.quantile)
        reason = f"there is no dial, and the divergence is {value:.3g} nats"
        return SideCalibration(alpha, value, False, reason, audit, ((alpha, value),), divergence.n_positions)

    prompts = prompts_hash(*([render_prompt(tok, q) for q in part] for part in parts))
    asked = (len(split.calibration), len(split.audit), split.held_out, str(model.dtype)[6:], tokenizer_hash(tok))
    return Calibration(side(1.0), side(-1.0), config, prompts, fingerprint(model), chosen.digest, *asked)


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
            "n_prompts": calibration.settings["n_prompts"],
            "n_positions": side.n_positions,
            "reason": side.reason,
            "intervention": name,
            "n_audit": calibration.n_audit,
            "held_out": calibration.held_out,
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
    others = "" if calibration.n_audit is None else f", audited on {calibration.n_audit} others"
    table = tabulate(cells, header, disable_numparse=True)
    return "\n".join([table, *failed, f"Measured on {calibration.questions}{others}."])


if __name__ == "__main__":
    console.run(main, CalibrateOptions, "ws calibrate")
