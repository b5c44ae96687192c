"""Composition: a linear expression of vectors as a new vector, and what its parts do to each other.

`ws compose "honesty*1.0 + sycophancy*-0.5"` adds the vectors of two runs and files the sum as a run of its
own, which every evaluation takes by `--behavior` and `--adapter`. With `--report` each behaviour's held-out claims are
put to the base, to every term alone and to the sum. Let `s` be the mean log ratio of a condition, and `i` the term of
the behaviour:

    own = s(c_i v_i) - s(base)        others = sum_{j != i} (s(c_j v_j) - s(base))
    interference = (s(sum_j c_j v_j) - s(base)) - own - others

claim by claim, so that zero means that effects add up as the vectors do. The share of its effect that a behaviour keeps
is what its term adds beside the others over what it does alone, `(own + interference) / own`.

The grammar of an expression, where spaces separate and mean nothing else:

    expression = [sign] term { sign term }        term   = name [ "*" [sign] number ] | number "*" name
    sign       = "+" | "-"                        number = digits, a point or an exponent, "u" for calibrated units

A name is a behaviour (its run with `--adapter` and `--seed`), `behavior/adapter[/seed-N]` below `--out`, or the path of
a vector's folder. A hyphen inside a name belongs to it; names with other signs or spaces stand in quotes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from tabulate import tabulate

from ws import console
from ws.behaviors import Behavior, load_behavior
from ws.behaviors.tables import DRAW_SEED
from ws.diff import MANIFEST, SteeringVector, vector_digest
from ws.errors import FLOAT32_MAX, WsError, did_you_mean, require_distinct
from ws.eval.context import TABLES_VERSION, EvalContext
from ws.eval.evaluation import Rows, Scores
from ws.eval.prompts import notes_on
from ws.eval.readable import FLAG, MARK, NATS, Readability, notes, star, worst
from ws.eval.sycophancy import Sycophancy
from ws.files.places import is_plain_name
from ws.files.public import public
from ws.files.runs import Run, finished_runs, read_csv, read_values, run_folder, write_csv
from ws.intervene.calibration import load_calibration, split_questions
from ws.intervene.interventions import Intervention
from ws.lm.divergence import QUANTILE, divergence
from ws.lm.models import load_model, load_tokenizer, render_prompt, tokenizer_hash, tokenizer_hash_on_disk
from ws.options.make import ComposeOptions as ComposeOptions
from ws.options.shared import WEIGHT, RunOptions
from ws.run import measure_with
from ws.stats import N_BOOTSTRAP, estimate_over_seeds, estimate_text, holm, resampled_means, widened
from ws.steer import steer

STAGES = ("compose", "trim")
BASE, TOGETHER = "base", "together"
TABLE = "interference.csv"


# ---- expressions ----------------------------------------------------------------------------------------------------

_TOKEN = re.compile(
    r"""(?P<space>\s+)
      | (?P<quoted>'[^']+'|"[^"]+")
      | (?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?u?)(?![\w.~/])
      | (?P<name>[\w.~/](?:[\w.~/:-]*[\w.~/])?)
      | (?P<sign>[+-])
      | (?P<times>\*)""",
    re.VERBOSE | re.ASCII,
)


@dataclass(frozen=True)
class Term:
    """One vector with its coefficient.

    Attributes:
        name: as written, without quotes.
        number: the coefficient, sign included; finite and not zero.
        in_units: whether `number` counts the vector's calibrated units.
    """

    name: str
    number: float
    in_units: bool = False

    def __str__(self) -> str:
        quote = "" if _kind(self.name) == "name" else '"' if "'" in self.name else "'"
        return f"{quote}{self.name}{quote}*{self.number!r}{'u' if self.in_units else ''}"


def _kind(text: str) -> str | None:
    """What a text is when it is read as a single token."""
    match = _TOKEN.match(text)
    return match.lastgroup if match and match.end() == len(text) else None


def write_expression(terms: Sequence[Term]) -> str:
    """The canonical form, which `parse_expression` reads back as the same terms."""
    return " + ".join(map(str, terms))


def parse_expression(text: str) -> tuple[Term, ...]:
    """The terms of a linear expression; see the module's docstring for the grammar.

    Raises:
        WsError: what is not in the grammar, with its place; a coefficient that is zero or infinite; a name twice.
    """
    reader = _Reader(text)
    if reader.kind == "end":
        raise WsError("The expression is empty; write for example 'honesty*1.0 + sycophancy*-0.5'.")
    terms = [reader.term(reader.sign())]
    while reader.kind != "end":
        if reader.kind != "sign":
            raise reader.wrong("+ or -")
        terms.append(reader.term(reader.sign()))
    names = [t.name for t in terms]
    twice = next((n for n in names if names.count(n) > 1), None)
    if twice:
        raise WsError(f"{twice} occurs more than once in {text!r}; write it as one term.")
    return tuple(terms)


class _Reader:
    """The tokens of an expression, read from left to right."""

    def __init__(self, text: str) -> None:
        self.whole, self.at, self.kind, self.text = text, 0, "", ""
        self.step()

    def step(self) -> str:
        """Go to the next token, and return the text of the one just left."""
        left = self.text
        self.at += len(left)
        match = _TOKEN.match(self.whole, self.at)
        while match and match.lastgroup == "space":
            self.at = match.end()
            match = _TOKEN.match(self.whole, self.at)
        if match:
            self.kind, self.text = str(match.lastgroup), match.group()
        else:
            self.kind, self.text = ("bad" if self.at < len(self.whole) else "end"), self.whole[self.at : self.at + 1]
        return left

    def wrong(self, expected: str) -> WsError:
        """What to say about the current token."""
        token = repr(self.text) if self.text else "the end"
        if self.kind == "bad":
            token += " (a quote without its partner)" if self.text in "'\"" else " (put unusual names in quotes)"
        return WsError(f"In {self.whole!r}, character {self.at + 1}: expected {expected}, found {token}.")

    def sign(self) -> int:
        """+1 or -1; +1 where there is no sign."""
        return -1 if self.kind == "sign" and self.step() == "-" else 1

    def name(self) -> str:
        if self.kind == "quoted":
            return self.step()[1:-1]
        if self.kind != "name":
            raise self.wrong("the name of a vector")
        return self.step()

    def term(self, sign: int) -> Term:
        """A name with or without its coefficient, in either order."""
        start = self.at
        if self.kind == "number":
            value, units = self.number()
            if self.kind != "times":
                raise self.wrong("* and the name of a vector")
            self.step()
            name = self.name()
        elif self.kind in ("name", "quoted"):
            name, value, units = self.name(), 1.0, False
            if self.kind == "times":
                self.step()
                sign *= self.sign()
                value, units = self.number()
        else:
            raise self.wrong("the name of a vector or a number")
        if value == 0 or value > FLOAT32_MAX:
            what = "0, so it adds nothing" if value == 0 else "infinite, or beyond float32"
            raise WsError(f"In {self.whole!r}, character {start + 1}: the coefficient of {name} is {what}.")
        return Term(name, sign * value, units)

    def number(self) -> tuple[float, bool]:
        """A number without its sign, and whether it counts calibrated units."""
        if self.kind != "number":
            raise self.wrong("a number")
        text = self.step()
        return float(text.rstrip("u")), text.endswith("u")


# ---- vectors by name ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operand:
    """A term with its vector.

    Attributes:
        term: as written.
        vector: loaded from the run or folder that the term names.
        alpha: the coefficient as a strength, calibrated units resolved.
    """

    term: Term
    vector: SteeringVector
    alpha: float

    @property
    def behavior(self) -> str | None:
        """What the vector was made for; None for a vector that does not say."""
        return self.vector.info.get("behavior")

    @property
    def change(self) -> SteeringVector:
        """What the term adds to the weights."""
        return self.vector * self.alpha


def open_term(term: Term, out: Path, adapter: str, seed: int) -> Operand:
    """Load the vector of a term, and its calibration where the coefficient is in units.

    Raises:
        WsError: no such vector, or units without a calibration that converged.
    """
    folder = vector_folder(term.name, out, adapter, seed)
    vector = SteeringVector.load(folder)
    if not term.in_units:
        return Operand(term, vector, term.number)
    tokenizer = tokenizer_hash_on_disk(vector.base_id) or None
    # Of which copy of the base, in what precision, does not matter: a vector fits them all.
    calibration = load_calibration(folder, vector_digest(vector), tokenizer=tokenizer)
    if calibration is None:
        raise WsError(f"{term} is in calibrated units and {folder} has no calibration; run `ws calibrate` for it.")
    return Operand(term, vector, calibration.alpha(term.number))


def vector_folder(name: str, out: Path, adapter: str, seed: int) -> Path:
    """Where the vector is that a name in an expression stands for; `WsError` with the nearest name when nowhere."""
    run = run_folder(out, name, adapter, seed) if is_plain_name(name) else out / name
    for folder in (run / "vector", Path(name).expanduser()):
        if any((folder / file).is_file() for file in (MANIFEST, "adapter_config.json")):
            return folder
    known = _known(out, adapter, seed)
    joined = any(name.startswith(f"{k}-") for k in known)
    hint = " Put spaces around - to subtract." if joined else did_you_mean(name, known)
    raise WsError(f"There is no vector named {name!r}, neither in {run} nor as a folder.{hint}")


def _known(out: Path, adapter: str, seed: int) -> list[str]:
    """The names of the runs below `out` that have a vector."""
    names = [run.relative_to(out) for run in finished_runs(out)]
    short = [n.parts[0] for n in names if out / n == run_folder(out, n.parts[0], adapter, seed)]
    return short + [n.as_posix() for n in names]


def compose(operands: Sequence[Operand]) -> SteeringVector:
    """The sum of the terms, with the expression and every term's digest in its recipe.

    Raises:
        WsError: terms of different bases, or a sum that changes nothing.
    """
    first, *others = [o.change for o in operands]
    total = sum(others, first)
    expression = write_expression([o.term for o in operands])
    if total.is_zero:
        raise WsError(f"{expression} is zero: the terms cancel, and there is nothing to steer with.")
    terms = [{"name": o.term.name, "coefficient": o.alpha, "sha256": vector_digest(o.vector)} for o in operands]
    recipe = {"op": "compose", "expression": expression, "terms": terms, "of": total.recipe}
    return replace(total, recipe=recipe)


# ---- a made vector as a run -----------------------------------------------------------------------------------------


def save_run(
    vector: SteeringVector,
    place: tuple[Path, str, str, int],
    stage: str,
    config: Mapping[str, Any],
    inputs: Mapping[str, str],
    fresh: bool = False,
) -> Run:
    """File a vector as a finished run, unless exactly that is there.

    Args:
        vector: made from other vectors.
        place: `out`, the behaviour whose claims measure it, the name that stands where a family's does, the seed.
        stage: which of `STAGES` makes it.
        config, inputs: what it depends on.
        fresh: replace what this command made there with other settings.

    Raises:
        WsError: a name that is not free, or the same name made with other settings.
    """
    from ws.adapters import FAMILIES  # peft takes seconds, and who looks for a vector needs none of it

    out, behavior, name, seed = place
    if not re.fullmatch(r"\w[\w.+-]*", name) or name.startswith("seed-") or name in FAMILIES:
        raise WsError(f"{name!r} cannot name this run: use letters, digits, . + - and _, and no adapter family's name.")
    folder = run_folder(out, behavior, name, seed)
    makers = set(Run(folder).manifest["stages"]) & {*STAGES, "vector"}
    if makers - {stage} or ((folder / "vector").exists() and not makers):
        raise WsError(f"{folder} holds a vector that `ws {stage}` did not make; choose another name by --name.")
    run = Run(folder, fresh)
    with run.alone("vector"):
        begun = run.stage(stage, config, inputs)
        if begun is not None:
            info = dict(vector.info) | {"behavior": behavior}
            made = replace(vector, info=info).save(folder / "vector")
            begun.done(sorted(f for f in made.iterdir() if f.is_file()))
    return run


def default_name(terms: Sequence[Term]) -> str:
    """A folder's name from the terms, such as `honesty1_sycophancy-0.5`."""
    names = [
        t.name if public(t.name) == t.name else f"/{public(t.name)}" for t in terms
    ]  # of a folder only the last part
    parts = [f"{name}{t.number:g}{'u' if t.in_units else ''}" for name, t in zip(names, terms, strict=True)]
    return re.sub(r"[^\w.+-]+", "-", "_".join(parts)).strip("-.+")


# ---- interference ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Conditions:
    """Answers to one behaviour's claims under the base, every term alone and all together, by condition.

    Attributes:
        behavior: whose claims.
        own_terms: the conditions that are terms of this behaviour.
        is_true: of every claim, `[claims]`.
        logratio, pmass: `[seeds, claims]`.
        kl: the 95th percentile of the per-token KL divergence along answers to this behaviour's questions, in nats,
            `[seeds]`; not of the base.
        cosine: with the sum of the own terms, `[seeds]`; not of the base.
        facts: the columns that say which evaluation this is.
    """

    behavior: str
    own_terms: tuple[str, ...]
    is_true: np.ndarray
    logratio: Mapping[str, Float[np.ndarray, "seeds claims"]]
    pmass: Mapping[str, Float[np.ndarray, "seeds claims"]]
    kl: Mapping[str, Float[np.ndarray, "seeds"]]
    cosine: Mapping[str, Float[np.ndarray, "seeds"]]
    facts: Mapping[str, Any] = field(default_factory=dict)

    def shift(self, name: str, is_true: bool = False) -> Float[np.ndarray, "seeds claims"]:
        """Log ratios of a condition minus the base's, on the claims of one kind."""
        return (self.logratio[name] - self.logratio[BASE])[:, self.is_true == is_true]

    @property
    def terms(self) -> list[str]:
        """The conditions that are terms."""
        return [name for name in self.logratio if name not in (BASE, TOGETHER)]


def interference(conditions: Conditions, is_true: bool = False) -> Float[np.ndarray, "seeds claims"]:
    """Claim by claim, what the sum does beyond the sum of what its terms do alone, in nats."""
    alone = [conditions.shift(name, is_true) for name in conditions.terms]
    return conditions.shift(TOGETHER, is_true) - np.sum(alone, axis=0)


def kept_share(
    shifts: Float[np.ndarray, "seeds claims"], extra: Float[np.ndarray, "seeds claims"], n_boot: int = N_BOOTSTRAP
) -> tuple[float, float, float] | None:
    """`(shifts + extra) / shifts`, a ratio of mean shifts, with its percentile interval; both are resampled together.

    None when the interval of the own shift holds zero, or the shift is under 0.2 nats (`ws.eval.readable.NATS`): a
    share of nothing says nothing.
    """
    alone = estimate_over_seeds(shifts, n_boot)
    if not alone.excludes_zero or abs(alone.mean) < NATS:
        return None
    means = resampled_means(widened(np.stack([shifts + extra, shifts])), n_boot, 0)
    low, high = np.quantile(means[0] / means[1], [0.025, 0.975])
    return float((shifts + extra).mean() / shifts.mean()), float(low), float(high)


def interference_rows(conditions: Conditions, key: Mapping[str, Any], n_boot: int = N_BOOTSTRAP) -> Rows:
    """The rows of `interference.csv` of one behaviour: every condition and the interference, on either kind of claims.

    `key` holds the columns adapter and seed; the row of the interference has the share of the own effect that is kept.
    `shift_p_holm` is over all but the base, for either kind of claims on its own; `unreadable` says that the mass of a
    seed is too low, there or at the base, and of the interference at any of the conditions.
    """
    rows = Rows()
    for is_true in sorted(set(conditions.is_true.tolist())):
        own_shifts = np.sum([conditions.shift(name, is_true) for name in conditions.own_terms], axis=0)
        for name in (BASE, *conditions.terms, TOGETHER, "interference"):
            extra = name == "interference"
            values = interference(conditions, is_true) if extra else conditions.shift(name, is_true)
            share = kept_share(own_shifts, values, n_boot) if extra else None
            mask = conditions.is_true == is_true
            used = conditions.logratio if extra else (BASE, name)
            masses = [float(m) for c in used for m in conditions.pmass[c][:, mask].mean(axis=1)]
            rows.append(
                {
                    "behavior": conditions.behavior,
                    **key,
                    "condition": name,
                    "own": name in conditions.own_terms,
                    "claims_are_true": is_true,
                    "mean_logratio": None if extra else float(conditions.logratio[name][:, mask].mean()),
                    **estimate_over_seeds(values, n_boot).columns("shift", "ci_lo", "ci_hi", "p"),
                    "shift_p_holm": None,
                    **dict(zip(("kept", "kept_ci_lo", "kept_ci_hi"), share or (None,) * 3, strict=True)),
                    "mean_pmass": None if extra else float(conditions.pmass[name][:, mask].mean()),
                    FLAG: worst(map(Readability, masses)).problem or None,
                    "kl": _mean(conditions.kl, name),
                    "cosine": _mean(conditions.cosine, name),
                    "n": values.shape[1],
                    "n_seeds": len(values),
                    **conditions.facts,
                }
            )
        tested = [r for r in rows if r["claims_are_true"] == is_true and r["condition"] != BASE]
        for row, p in zip(tested, holm(np.array([r["shift_p"] for r in tested])), strict=True):
            row["shift_p_holm"] = float(p)
    return rows


def _mean(values: Mapping[str, np.ndarray], name: str) -> float | None:
    return float(values[name].mean()) if name in values else None


def verdict(rows: Sequence[Mapping[str, Any]]) -> str:
    """One sentence on one behaviour, from its rows about false claims."""
    by_name = {str(r["condition"]): r for r in rows}
    name, extra = rows[0]["behavior"], by_name["interference"]
    alone = sum(float(r["shift"]) for r in rows if str(r["own"]) == "True")
    numbers = f"alone {alone:+.2f}, beside the others {alone + float(extra['shift']):+.2f} nats"
    beyond = f"interference {estimate_text(extra, 'shift')} nats"
    if extra.get(FLAG):
        return f"{name}: no conclusion, the model is not answering the question: {extra[FLAG]} ({numbers})."
    if extra["kept"] in (None, ""):
        return f"{name} has no effect of its own beyond chance, of {NATS} nats or more ({numbers}); {beyond}."
    return f"{name} keeps {_percent(extra, 'kept')} of its effect ({numbers}); {beyond}."


def _percent(row: Mapping[str, Any], name: str) -> str:
    value, low, high = (100 * float(row[k]) for k in (name, f"{name}_ci_lo", f"{name}_ci_hi"))
    return f"{value:.0f} % [{low:.0f}, {high:.0f}]"


def render_interference(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows, also as read from their file, as one table and one sentence per behaviour."""
    parts = []
    for behavior in dict.fromkeys(str(r["behavior"]) for r in rows):
        mine = [r for r in rows if r["behavior"] == behavior]
        false = [r for r in mine if str(r["claims_are_true"]) == "False"]
        true = {r["condition"]: _true_shift(r) for r in mine if str(r["claims_are_true"]) == "True"}
        table = [
            [
                f"{r['condition']}{' (own)' if str(r['own']) == 'True' else ''}",
                _number(r["mean_logratio"], "+.2f"),
                "" if r["condition"] == BASE else f"{estimate_text(r, 'shift')}{_star(r)}",
                "" if r["condition"] == BASE else true.get(r["condition"], ""),
                _number(r["kl"], ".2f"),
                _number(r["cosine"], "+.2f"),
                _number(r["mean_pmass"], ".3f"),
            ]
            for r in false
        ]
        header = [f"{behavior} claims", "log ratio", "shift [95 %]", "shift, true claims", "KL, nats", "cosine", "mass"]
        parts += [
            tabulate(table, header, tablefmt="github", disable_numparse=True),
            verdict(false),
            *notes_on(false[0]),
        ]
    if any(_star(r) == "*" for r in rows):
        parts.append(f"* p < 0.05 after Holm's correction over the rows of a table, and at least {NATS} nats")
    return "\n\n".join([*parts, *notes(r.get(FLAG) for r in rows)])


def _true_shift(row: Mapping[str, Any]) -> str:
    return f"{float(row['shift']):+.2f}{MARK if row.get(FLAG) else ''}"


def _star(row: Mapping[str, Any]) -> str:
    p = row.get("shift_p_holm")
    return star(float(row["shift"]), 1.0 if p in (None, "") else float(p), NATS, row.get(FLAG))


def _number(value: Any, form: str) -> str:
    return "" if value in (None, "") else format(float(value), form)


def measure(
    context: EvalContext, operands: Sequence[Operand], behavior: Behavior, options: ComposeOptions
) -> Conditions:
    """Put a behaviour's claims and questions to the base, to every term alone and to the context's vector."""
    evaluation = Sycophancy.of_behavior(context, behavior, options.split)
    changes = {str(o.term): o.change for o in operands} | {TOGETHER: context.vector}
    own_terms = tuple(str(o.term) for o in operands if o.behavior == behavior.name)
    mine = [changes[name] for name in own_terms]
    direction = sum(mine[1:], mine[0])
    scores: dict[str, Scores] = {}
    kl: dict[str, np.ndarray] = {}
    split = split_questions(behavior.questions, options.n_prompts, context.opened.unseen(behavior))
    if split.note:
        console.warn(split.note)
    prompts = [render_prompt(context.tok, q) for q in split.calibration]
    for name, change in changes.items():
        console.say(f"{behavior.name}: {name}")
        at = partial(steer, context.model, change)
        added = Intervention(WEIGHT, at, vector_digest(change), context.run)
        by_alpha = context.scores(evaluation, added, [0.0, 1.0])
        scores |= {BASE: by_alpha[0.0], name: by_alpha[1.0]}
        met = divergence(context.model, context.tok, prompts, partial(at, 1.0), options.n_tokens, options.batch_size)
        kl[name] = np.array([met.at(QUANTILE)])
    return Conditions(
        behavior=behavior.name,
        own_terms=own_terms,
        is_true=np.array([claim.is_true for claim in evaluation.items]),
        logratio={name: s["logratio"][None] for name, s in scores.items()},
        pmass={name: s["pmass"][None] for name, s in scores.items()},
        kl=kl,
        cosine={name: np.array([c.cosine(direction, context.model)]) for name, c in changes.items()},
        facts={"split": options.split, "n_prompts": len(prompts)} | evaluation.identity,
    )


# ---- the command ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Composition:
    """A new vector with where it came from and where it is.

    Attributes:
        operands: the terms.
        vector: their sum.
        run: its folder.
        behavior, name: what it is filed under.
    """

    operands: tuple[Operand, ...]
    vector: SteeringVector
    run: Run
    behavior: str
    name: str


def carry_out(options: ComposeOptions) -> Composition:
    """Read the expression, add the vectors up, and file the sum as a run."""
    terms = parse_expression(options.expression)
    operands = tuple(open_term(t, options.out, options.adapter, options.seed) for t in terms)
    vector, name = compose(operands), options.to or default_name(terms)
    behavior = load_behavior(options.behavior).name if options.behavior else operands[0].behavior
    if behavior is None:
        raise WsError(f"{terms[0].name} does not say which behaviour it is of; give --behavior.")
    config = {"expression": write_expression(terms), "coefficients": [o.alpha for o in operands]}
    inputs = {o.term.name: vector_digest(o.vector) for o in operands}
    run = save_run(vector, (options.out, behavior, name, options.seed), "compose", config, inputs, options.fresh)
    return Composition(operands, SteeringVector.load(run.folder / "vector"), run, behavior, name)


def report(made: Composition, options: ComposeOptions) -> Path:
    """Measure the interference unless exactly that is on disk, and write `interference.csv`."""
    o, folder = options, made.run.folder
    eval_options = o.eval_options(made.behavior, made.name)
    base = o.model or made.vector.base_id
    behaviors = [load_behavior(b, base) for b in _measured(made, o)]
    settings = {k: getattr(o, k) for k in ("split", "n_prompts", "n_tokens", "limit", "n_bootstrap", "dtype")}
    settings |= {"behaviors": [b.digest for b in behaviors], "tables": TABLES_VERSION}
    settings |= {"tokenizer_hash": tokenizer_hash(load_tokenizer(base))}
    settings |= {"draw_seed": DRAW_SEED} if o.limit else {}
    with made.run.alone("interference"):
        stage = made.run.refresh("interference", settings, {"vector": vector_digest(made.vector)})
        if stage is not None:
            model, tok = load_model(base, o.device, o.dtype)
            context = EvalContext(eval_options, model, tok, made.vector, made.run)
            key = {"adapter": made.name, "seed": o.seed}
            conditions = [measure(context, made.operands, behavior, o) for behavior in behaviors]
            rows = [r for f in conditions for r in interference_rows(f, key, o.n_bootstrap)]
            stage.done([write_csv(folder / TABLE, public(rows))])
    return folder / TABLE


def _measured(made: Composition, options: ComposeOptions) -> list[str]:
    """The behaviours to measure: those asked for, else those of the terms."""
    of_terms = [o.behavior for o in made.operands if o.behavior]
    names = [load_behavior(wanted).name for wanted in options.behaviors]
    require_distinct("--behaviors", names)
    for name in names:
        if name not in of_terms:
            hint = did_you_mean(name, of_terms)
            raise WsError(f"No term is of the behaviour {name!r}, so there is no effect to keep.{hint}")
    return list(options.behaviors or dict.fromkeys(of_terms))


def main(options: ComposeOptions) -> None:
    """The command `ws compose`."""
    options.check()
    made = carry_out(options)
    strengths = ", ".join(f"{o.term.name} at {o.alpha:+.4g}" for o in made.operands)
    text, files = f"{made.vector.recipe['expression']} ({strengths}): {made.vector}", [made.run.folder / "vector"]
    coefficients = {o.term.name: o.alpha for o in made.operands}
    data = {"expression": made.vector.recipe["expression"], "coefficients": coefficients}
    if options.report:
        table = report(made, options)
        text, files = f"{text}\n\n{render_interference(read_csv(table))}", [*files, table]
        console.show(console.Result(text, {**data, "interference": read_values(table)}, files))
        return
    called = options.behavior or made.behavior
    following = measure_with(RunOptions(behavior=called, adapter=made.name, seed=options.seed, out=options.out))
    console.show(console.Result(text, data, files, following))


if __name__ == "__main__":
    console.run(main, ComposeOptions, "ws compose")
