"""Calibration: the strength at which steering costs a given divergence from the base model.

`alpha = 1` means something else for every vector, so vectors are compared at strengths that change the model's own
answers equally much. Let `y` be the greedy answer of the model steered with strength `alpha` to a prompt `x`. Then

    KL(x, t) = sum_v p_steered(v | x, y_<t) (log p_steered(v | x, y_<t) - log p_base(v | x, y_<t))       in nats
    D(alpha) = the 95th percentile of KL(x, t) over all prompts x and positions t of their answers

and the calibrated strength of a sign solves `D(alpha) = 1 nat`. Matching interventions by their KL divergence from the
base rather than by their coefficients is common practice, and the KL-calibrated unit follows steering-lite; a high
percentile, because steering changes a few tokens of an answer a lot and most of them hardly at all.

`D` need be neither monotone nor continuous, since greedy answers jump. A strength therefore counts as calibrated only
when the divergence measured at it lies within the tolerance of the target, or within three times that at the edge of a
jump over it, which is then known to 2 % as a strength; otherwise it is refused wherever it is used.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
from scipy.optimize import brentq
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from ws.behaviors.tables import evenly
from ws.diff import CALIBRATION, CALIBRATION_FORMAT, RECALIBRATE, Units, check_signs, parse_number, parse_units
from ws.errors import DamagedError, WsError, require_strength
from ws.files.reading import read_json
from ws.files.runs import sha256_json, write_json
from ws.lm.divergence import BrokenError, Divergence, divergence
from ws.lm.models import fingerprint, render_prompt, tokenizer_hash
from ws.options.shared import CalibrationConfig as CalibrationConfig

# With fewer questions on either side, a quantile over their answers says little.
LEAST_PROMPTS = 4
LEAST, MOST = 1e-4, 1e4
# Below the rounding of a KL in float32; keeps the logarithm of a divergence of zero finite.
_FLOOR = 1e-8
_FAR = math.log(1e6)  # of a divergence over its target, however large it is
# Relative width of a bracket of strengths: the search ends at the first, and calls what it sees a jump from the second.
_NARROW, _JUMP = 1e-3, 2e-2
_EDGE = 3  # tolerances that a divergence may be off at the edge of a jump; on other prompts it is off by more

Steerable = Callable[[float], AbstractContextManager[Any]]


# ---- the solver -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Solution:
    """Where a divergence comes nearest to its target.

    Attributes:
        alpha: the strength, with its sign.
        divergence: measured at it.
        converged: whether that is near enough to the target; see the module.
        reason: why it is not; empty when it is.
        evaluations: every `(alpha, divergence)` measured, in order.
    """

    alpha: float
    divergence: float
    converged: bool
    reason: str
    evaluations: tuple[tuple[float, float], ...]


class _Search:
    """`log(D / target)` as a function of `log |alpha|`, with a memory, and zero all over the tolerance.

    That zero is what makes a bracketing solver stop as soon as a measurement is near enough. A strength at which the
    model gives NaN is too large for it, and D counts as infinite there.
    """

    def __init__(self, measure: Callable[[float], float], sign: int, config: CalibrationConfig) -> None:
        self.measure, self.sign, self.config = measure, sign, config
        self.seen: dict[float, float] = {}

    def __call__(self, log_size: float) -> float:
        if log_size not in self.seen:
            try:
                value = self.measure(self.alpha(log_size))
            except BrokenError:
                value = math.inf
            self.seen[log_size] = value if math.isfinite(value) else math.inf
        value = self.seen[log_size]
        return 0.0 if self.near(value) else min(math.log(max(value, _FLOOR) / self.config.target), _FAR)

    def alpha(self, log_size: float) -> float:
        return self.sign * math.exp(log_size)

    def near(self, value: float, tolerances: int = 1) -> bool:
        return abs(value - self.config.target) <= tolerances * self.config.tolerance * self.config.target

    def crossing(self) -> tuple[float, float] | None:
        """The narrowest step across the target, as log sizes; None where there is none."""
        steps = [(a, b) for a, b in pairwise(sorted(self.seen)) if self(a) * self(b) < 0]
        return min(steps, key=lambda step: step[1] - step[0], default=None)

    def best(self) -> tuple[float, bool]:
        """The log size nearest to the target, or the nearer edge of a jump over it, and whether that will do."""

        def off(size: float) -> float:
            return abs(self.seen[size] - self.config.target)

        nearest, step = min(self.seen, key=off), self.crossing()
        if not self.near(self.seen[nearest]) and step is not None and step[1] - step[0] < _JUMP:
            edge = min(step, key=off)
            if self.near(self.seen[edge], _EDGE):
                return edge, True
        return nearest, self.near(self.seen[nearest])

    @property
    def left(self) -> int:
        return self.config.max_evaluations - len(self.seen)


def solve(measure: Callable[[float], float], sign: int, config: CalibrationConfig, start: float = 1.0) -> Solution:
    """The strength of one sign at which `measure` gives the target, by Brent's method on logarithms.

    A bracket is found by at least doubling or halving the size from `start`, within `LEAST` and `MOST`.

    Args:
        measure: the divergence at a strength.
        sign: +1 or -1.
        config: target, tolerance and number of measurements.
        start: the size of the first guess.

    Raises:
        BrokenError: the model gives NaN at every strength that is tried.
    """
    search = _Search(measure, sign, config)
    ends = _bracket(search, math.log(min(max(start, LEAST), MOST)))
    if ends and search.left > 0:
        brentq(search, *ends, xtol=_NARROW, maxiter=search.left, disp=False)
    evaluations = tuple((search.alpha(x), d) for x, d in search.seen.items() if math.isfinite(d))
    if not evaluations:
        raise BrokenError(
            f"The model gives NaN at alpha {search.alpha(min(search.seen)):.5g} and beyond; it is broken."
        )
    best, converged = search.best()
    reason = "" if converged else _why_not(search)
    return Solution(search.alpha(best), search.seen[best], converged, reason, evaluations)


def _bracket(search: _Search, here: float) -> tuple[float, float] | None:
    """Two log sizes with the target between their divergences; None when it is hit, out of reach or takes too long."""
    value = search(here)
    while value and search.left > 0:
        # A divergence grows with the square of a small strength, so half its logarithm is the way to go.
        step = min(max(abs(value) / 2, math.log(2)), math.log(32))
        there = min(max(here - math.copysign(step, value), math.log(LEAST)), math.log(MOST))
        if there == here:
            return None
        next_value = search(there)
        if next_value * value < 0:
            return here, there
        here, value = there, next_value
    return None


def _why_not(search: _Search) -> str:
    """Why a search failed, from what it saw: the narrowest step across the target, or the end it came to."""
    target, sizes = search.config.target, sorted(search.seen)
    goal = f"{target:g} nat{'' if target == 1 else 's'}"
    if (step := search.crossing()) is not None:
        low, high = step
        verb = "jumps" if high - low < _JUMP else "goes"
        below, above = (f"{_nats(search.seen[x])} at alpha {search.alpha(x):.5g}" for x in (low, high))
        tried = f"{len(sizes)} measurements found nothing near enough to {goal}"
        return f"D {verb} from {below} to {above}, and {tried}"
    weak = search(sizes[0]) < 0
    last = sizes[-1] if weak else sizes[0]
    seen = f"D is {_nats(search.seen[last])} at alpha {search.alpha(last):.5g}"
    if last in (math.log(LEAST), math.log(MOST)):
        bound = f"no strength up to {MOST:g} reaches" if weak else f"every strength from {LEAST:g} on is above"
        return f"{bound} {goal} ({seen})"
    return f"{len(sizes)} measurements did not get as far as {goal} ({seen})"


def _nats(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "NaN"


# ---- a calibration --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SideCalibration:
    """What was found for one sign.

    Attributes:
        alpha: the strength, with its sign; where `converged` is False merely the nearest one seen.
        divergence: measured at it, in nats.
        converged: whether that is near enough to the target; see the module.
        reason: why it is not; empty when it is.
        audit: the divergence at `alpha` on other prompts; None when there are none or it did not converge.
        evaluations: every `(alpha, divergence)` measured, in order.
        n_positions: the positions that `divergence` is a quantile of.
    """

    alpha: float
    divergence: float
    converged: bool
    reason: str
    audit: float | None
    evaluations: tuple[tuple[float, float], ...]
    n_positions: int


@dataclass(frozen=True)
class Calibration:
    """The calibrated strengths of both signs.

    Attributes:
        positive, negative: the two sides.
        config: how they were found.
        prompts: hash of the prompts, those of the audit included.
        model: fingerprint of the base model.
        subject: what steers: the digest of the vector, or another name that changes when it does.
        n_calibration, n_audit: the questions there were; None in calibrations that did not record it.
        held_out: False when the vector was trained on such questions; None where that is not on record.
        dtype: of the model.
        tokenizer: `ws.lm.models.tokenizer_hash` of the tokenizer; None in a calibration that does not say.
    """

    positive: SideCalibration
    negative: SideCalibration
    config: CalibrationConfig
    prompts: str
    model: str
    subject: str
    n_calibration: int | None = None
    n_audit: int | None = None
    held_out: bool | None = None
    dtype: str | None = None
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        check_signs(self.negative, self.positive)

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that the strengths depend on; None for what is not on record."""
        number = self.config.n_prompts if self.n_calibration is None else self.n_calibration
        inputs = {"vector": self.subject, "model": self.model, "prompts": self.prompts}
        made_on = {"n_prompts": number, "dtype": self.dtype, "tokenizer": self.tokenizer}
        return {**self.config.settings, **made_on, **inputs}

    @property
    def questions(self) -> str:
        """What the strengths were solved for on, in a few words."""
        kinds = {
            True: "held-out questions",
            False: "questions, trained ones among them",
            None: "questions, which may have been trained on",
        }
        return f"{self.settings['n_prompts']} {kinds[self.held_out]}"

    def side(self, sign: float | int) -> SideCalibration:
        """The side of a sign."""
        return self.negative if sign < 0 else self.positive

    def alpha(self, units: float | int) -> float:
        """So many calibrated units as a strength: `+1` is the positive strength, `-0.5` half of the negative one.

        Raises:
            WsError: units that are not finite, or of a side whose calibration did not converge.
        """
        units = require_strength(units, "Calibrated units")
        if units == 0:
            return 0.0
        side = self.side(units)
        if not side.converged:
            raise WsError(
                f"{units:+g}u is not available, because the calibration of this sign did not converge: {side.reason}; "
                "give the strength as a number, or calibrate again with another --target or more --n-prompts."
            )
        return abs(units) * side.alpha

    @property
    def units(self) -> Units:
        """The strengths alone, and what they are of."""
        negative, positive = (s.alpha if s.converged else None for s in (self.negative, self.positive))
        return Units(self.subject, negative, positive, self.tokenizer or "", self.model)

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return {"format": CALIBRATION_FORMAT, **asdict(self)}


def calibrate(
    model: PreTrainedModel,
    tok: Tokenizer,
    steerable: Steerable,
    questions: Sequence[str],
    audit: Sequence[str] = (),
    config: CalibrationConfig | None = None,
    subject: str = "",
    start: float = 1.0,
    report: Callable[[str], None] | None = None,
    held_out: bool | None = None,
) -> Calibration:
    """Find the strengths at which steering costs the target divergence, for each sign.

    ```python
    found = calibrate(model, tok, lambda alpha: ws.steer(model, dW, alpha), questions)
    with ws.steer(model, dW, found.alpha(+1)): ...
    ```

    Args:
        steerable: makes the context in which the model is steered with a strength: a weight vector, an activation
            vector, anything with a dial.
        questions: the user turns to calibrate on, all of them; better none that the vector was trained on, because
            there it moves the answers more than elsewhere.
        audit: other user turns, to measure the strengths found again.
        subject: see `Calibration`.
        start: the size of the first guess.
        report: gets a line for every measurement.
        held_out: whether the vector was trained on none of them, for the record.

    Raises:
        WsError: no questions, questions that are also in the audit, numbers that make no sense, or a model that gives
            NaN.
    """
    settings = config or CalibrationConfig()
    settings.check()
    if set(questions) & set(audit):
        raise WsError("The audit must not repeat questions that the calibration uses.")
    prompts, others = ([render_prompt(tok, q) for q in part] for part in (questions, audit))
    meter = _Meter(model, tok, steerable, settings, report)
    positive = _calibrate_side(meter, 1, prompts, others, start)
    begin = abs(positive.alpha) if positive.converged else start
    negative = _calibrate_side(meter, -1, prompts, others, begin)
    asked = (prompts_hash(prompts, others), fingerprint(model), subject, len(prompts), len(others), held_out)
    return Calibration(positive, negative, settings, *asked, str(model.dtype)[6:], tokenizer_hash(tok))


class _Meter:
    """Measures `D(alpha)` and tells how long that takes."""

    def __init__(
        self,
        model: PreTrainedModel,
        tok: Tokenizer,
        steerable: Steerable,
        config: CalibrationConfig,
        report: Callable[[str], None] | None,
    ) -> None:
        self.model, self.tok, self.steerable, self.config, self.report = model, tok, steerable, config, report

    def __call__(self, prompts: Sequence[str], alpha: float, left: int | None = None) -> Divergence:
        """The divergences at one strength; `left` further measurements may follow, None for those of an audit."""
        started = time.perf_counter()
        try:
            condition, config = partial(self.steerable, alpha), self.config
            measured = divergence(self.model, self.tok, prompts, condition, config.n_tokens, config.batch_size)
        except WsError as problem:
            raise type(problem)(f"At alpha {alpha:+.5g}: {problem}") from problem
        seconds = time.perf_counter() - started
        if self.report:
            more = "audit on other prompts" if left is None else f"at most {left} more, {left * seconds:.0f} s"
            self.report(f"  alpha {alpha:+.5g}: {measured.at(self.config.quantile):.4g} nats ({seconds:.1f} s; {more})")
        return measured


def _calibrate_side(
    meter: _Meter, sign: int, prompts: Sequence[str], others: Sequence[str], start: float
) -> SideCalibration:
    config, positions = meter.config, dict[float, int]()

    def measure(alpha: float) -> float:
        measured = meter(prompts, alpha, config.max_evaluations - len(positions) - 1)
        positions[alpha] = measured.n_positions
        return measured.at(config.quantile)

    solution = solve(measure, sign, config, start)
    audit = meter(others, solution.alpha).at(config.quantile) if solution.converged and others else None
    return SideCalibration(**vars(solution), audit=audit, n_positions=positions[solution.alpha])


def prompts_hash(prompts: Sequence[str], others: Sequence[str]) -> str:
    """Identifies what a calibration is measured on."""
    return sha256_json([list(prompts), list(others)])


@dataclass(frozen=True)
class QuestionSplit:
    """Which questions strengths are solved for on, and which others audit them.

    Attributes:
        calibration, audit: the two parts.
        held_out: True when the vector was trained on none of them, False when it was, None where that is not on record.
        note: a sentence for people when the questions are fewer than asked for or not held out, else empty.
    """

    calibration: tuple[str, ...]
    audit: tuple[str, ...]
    held_out: bool | None
    note: str = ""


def split_questions(pool: Sequence[str], n: int, unseen: Sequence[str] | None = None) -> QuestionSplit:
    """Up to `n` questions to calibrate on and as many others for the audit, both evenly spread.

    They are taken from those that no training has seen, half of them for either part where these are fewer than `2 n`.
    Where not even `LEAST_PROMPTS` (or `n`) come to a part, they are taken from the whole pool, and the split says so.

    Args:
        pool: the behaviour's questions.
        n: at least 1.
        unseen: those of the pool that the vector was not trained on; None where that is not on record.
    """
    enough = unseen is not None and len(unseen) >= 2 * min(n, LEAST_PROMPTS)
    source = list(unseen) if unseen is not None and enough else list(pool)
    chosen = evenly(source, min(n, max(1, len(source) // 2)))
    taken = set(chosen)
    others = [q for q in source if q not in taken]
    audit = evenly(others, min(n, len(others)))
    note = _split_note(len(pool), n, unseen, enough, len(chosen))
    return QuestionSplit(tuple(chosen), tuple(audit), None if unseen is None else enough, note)


def _split_note(total: int, n: int, unseen: Sequence[str] | None, enough: bool, chosen: int) -> str:
    if unseen is None:
        return (
            f"Which of the {total} questions were trained on is not on record; strengths are solved for on {chosen} of "
            "them, which may be among those."
        )
    if not enough:
        return (
            f"Only {len(unseen)} of the {total} questions are in no pair that was trained on, too few to calibrate on: "
            f"strengths are solved for on {chosen} questions, trained ones among them. Leave some out of the pairs "
            "(--n-topics), or add questions to the behaviour."
        )
    if chosen < n:
        return (
            f"{len(unseen)} of the {total} questions are in no pair that was trained on: half of them calibrate and "
            f"half audit, {chosen} instead of {n}."
        )
    return ""


# ---- strengths as people write them ---------------------------------------------------------------------------------


def parse_alpha(value: str | float | int, calibration: Calibration | None = None) -> float:
    """A strength from a number (`1`, `"1.5"`) or in calibrated units (`"+1u"`, `"-0.5u"`; see `Calibration.alpha`).

    Raises:
        WsError: neither of them, not finite, or units without a calibration that converged.
    """
    text = str(value).strip()
    units = parse_units(text)
    if units is None:
        return parse_number(text)
    if calibration is None:
        raise WsError(f"{text} is in calibrated units and the vector has no calibration; run `ws calibrate` first.")
    return calibration.alpha(units)


def parse_alphas(values: Sequence[str | float | int], calibration: Calibration | None = None) -> tuple[float, ...]:
    """Strengths in the order given, each once; the word `calibrated` stands for -1u, 0 and +1u."""
    words = [w for v in values for w in (("-1u", 0.0, "+1u") if v == "calibrated" else (v,))]
    return tuple(dict.fromkeys(parse_alpha(w, calibration) for w in words))


# ---- files ----------------------------------------------------------------------------------------------------------


def store_calibration(folder: str | Path, calibration: Calibration, name: str = CALIBRATION) -> Path:
    """Write a calibration into a vector's folder, beside `ws.json` and not into it.

    The manifest of a run has the hash of every file that makes up the vector: changing one would have the vector made
    again. A new vector takes the whole folder's place, and an old calibration goes with the old one.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise WsError(f"There is no folder {folder} to store a calibration in.")
    return write_json(folder / name, calibration.to_dict())


def load_calibration(
    folder: str | Path,
    subject: str,
    model: str | None = None,
    name: str = CALIBRATION,
    tokenizer: str | None = None,
) -> Calibration | None:
    """The calibration stored in a folder, None when there is none.

    Args:
        folder: the vector's.
        subject: what steers now, such as `vector_digest(vector)`.
        model: fingerprint of the model it steers, None to leave that unchecked.
        name: of the file.
        tokenizer: `ws.lm.models.tokenizer_hash` of the model's tokenizer, None to leave that unchecked.

    Raises:
        WsError: a damaged file, or the calibration of another vector, model, or tokenizer with its chat template.
    """
    file = Path(folder) / name
    calibration = read_calibration(file)
    if calibration is not None:
        units = replace(calibration.units, tokenizer=calibration.tokenizer or "not recorded")  # which fits no tokenizer
        other = units.mismatch(subject, tokenizer or "", model or "")
        if other is not None:
            what, was, now = other
            raise WsError(f"{file} is of another {what} ({was[:12]}) than this one ({now[:12]}); calibrate again.")
    return calibration


def read_calibration(file: Path) -> Calibration | None:
    """The calibration in a file, whatever it is of; None when there is no file.

    Raises:
        DamagedError: it cannot be read, or has a setting that this version does not know.
        WsError: a newer format.
    """
    if not file.exists():
        return None
    calibration = read_json(file, Calibration, RECALIBRATE, CALIBRATION_FORMAT)
    stored, known = read_json(file, _Settings, RECALIBRATE).config, {f.name for f in fields(CalibrationConfig)}
    if unknown := sorted(stored.keys() - known):
        raise DamagedError(f"{file} is damaged (there is no setting {unknown[0]!r:.40}); {RECALIBRATE}.")
    return calibration


class _Settings(msgspec.Struct):
    config: dict[str, Any]
