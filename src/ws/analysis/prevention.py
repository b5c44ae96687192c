"""`ws prevent`: fine-tunes on somebody's examples that are not to learn a trait which some of the examples show.

With `theta` what is trained on the examples, `dW` the vector of the trait and `alpha` a strength that shows it,

    plain       theta
    vector      theta, trained as W + theta + alpha dW and used as W + theta
    subtract    theta - alpha dW, of the plain theta
    prompt      theta, trained behind a system prompt that asks for the trait, and used without

`vector` is preventative steering (Chen et al. 2025, "Persona vectors", arXiv 2507.21509), there with activations and
here with weights: what the vector adds already need not be learned. `prompt` is inoculation (Tan et al. 2025, arXiv
2510.04340). What each has learned of the trait, of the examples and what it costs elsewhere is read off the model that
is used, by the same evaluations; `projection` is `<theta, dW> / <dW, dW>`, the strength at which the vector lies
nearest to the fine-tune.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from tabulate import tabulate
from torch import nn
from transformers import PreTrainedModel, TrainerCallback
from transformers import PreTrainedTokenizerBase as Tokenizer

from ws import console
from ws.behaviors import Behavior, load_behavior, named_columns
from ws.behaviors.answered import HELD_OUT_SHARE, TRAIN, plain_question
from ws.behaviors.tables import draw, draw_fact, is_on_hub, is_text, read_rows
from ws.data import PAIRS_FILE, Pair, pair_lines
from ws.diff import SteeringVector, vector_digest
from ws.errors import WsError, shortened
from ws.eval.capability import Capability
from ws.eval.context import EvalContext
from ws.eval.evaluation import Evaluation, HeadlineScore, Rows, Scores
from ws.eval.preference import Preferences
from ws.eval.readable import PER_TOKEN, notes, star, worst
from ws.eval.sycophancy import Sycophancy
from ws.files.places import plain_name
from ws.files.runs import Run, sha256_json, write_csv, write_text
from ws.intervene.interventions import Intervention
from ws.lm.likelihood import score_answers
from ws.lm.models import encode, encode_answer, model_id, render_prompt, require_plain, tokenizer_hash
from ws.options.make import PLAIN
from ws.options.make import PreventOptions as PreventOptions
from ws.options.shared import BASE
from ws.run import FinishedRun, open_options
from ws.stats import estimate_over_seeds, estimate_text, holm
from ws.steer import Alpha, Dial, steer
from ws.train import Conditions, train_stage

TABLE, FOLDER = "prevention.csv", "prevent"
ROLES = ("question", "answer", "kind")
MIN_QUESTIONS = 10  # with fewer, one or none would be held out
PROJECTION = HeadlineScore("projection", "strength along the vector", "", mass=None, low=None, floor=0.0)
COLUMNS = (
    *("name", "behavior", "adapter", "seed", "strength", "way", "score", "kind", "title", "unit"),
    *("level", "level_ci_lo", "level_ci_hi", "shift", "shift_ci_lo", "shift_ci_hi", "shift_p"),
    *("less_plain", "less_plain_ci_lo", "less_plain_ci_hi", "less_plain_p", "less_plain_p_holm"),
    *("problem", "n", "n_seeds", "floor", "digits"),
    *("eval", "eval_version", "eval_hash", "dataset", "n_think", "words", "drawn"),
)
SCORES = ("false_claims", "true_claims", "preference", "task_loss", "nll", "valid")


# ---- a vector that is active in training ----------------------------------------------------------------------------


@contextmanager
def steer_training(model: nn.Module, vector: SteeringVector, alpha: Alpha = 1.0) -> Iterator[TrainerCallback]:
    """A callback with which a transformers `Trainer` trains `model` while `alpha * vector` is active.

    ```python
    with ws.steer_training(model, vector, alpha=1.0) as steering:
        Trainer(model=model, callbacks=[steering], ...).train()
    ```

    It is active from the first forward pass of every optimiser step to the end of the step, and never when the Trainer
    evaluates, saves or generates: what one wants to know then is the model that will be used, which has no vector. So
    the training loss is that with the vector and the validation loss that without. Nothing is written into the model;
    after the block, also after an exception in it, the model is without the vector, and the callback cannot be used.

    The base is checked when the block begins, so open it before a checkpoint is resumed from. In full fine-tuning the
    coordinates that go with the weight (of dora, oft and ia3) go with the weight as it is then.

    Args:
        model: the base, plain or with a PEFT adapter around it; it may also get one inside the block.
        vector: what need not be learned.
        alpha: its strength, as for `ws.steer`; of the sign that shows what is not to be learned.

    Raises:
        WsError: what `ws.steer` refuses, such as a vector of another base; and from `train`, another model.
    """
    with ExitStack() as stack:
        with _without_adapter(model) as base:
            dial = stack.enter_context(steer(base, vector, alpha))
            modules = {name: base.get_submodule(name) for name in vector.deltas}
        yield _DuringSteps(dial, modules)


class _DuringSteps(TrainerCallback):
    """Turns a dial on when an optimiser step begins, and off when it has ended."""

    def __init__(self, dial: Dial, modules: Mapping[str, nn.Module]) -> None:
        self.dial, self.alpha, self.modules = dial, dial.alpha, modules
        dial.alpha = 0.0

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Refuses a block that has ended, and a model in which the vector's modules are not what is called."""
        self.dial.alpha = 0.0
        inside = set(model.modules())
        copied = {m for w in inside if isinstance(w, AuxiliaryTrainingWrapper) for m in w.modules()}
        if lost := [name for name, module in self.modules.items() if module not in inside or module in copied]:
            raise WsError(
                f"The vector steers {lost[0]}, which the model in training does not call (another model, or a copy of "
                "it by PEFT's modules_to_save); give `steer_training` the model that the Trainer has."
            )

    def on_step_begin(self, args, state, control, **kwargs):
        """Called before the first forward pass of a step."""
        self.dial.alpha = self.alpha

    def on_step_end(self, args, state, control, **kwargs):
        """Called before anything is evaluated or saved."""
        self.dial.alpha = 0.0


@contextmanager
def _without_adapter(model: nn.Module) -> Iterator[nn.Module]:
    """The base inside a model with PEFT's layers; while the block runs its own modules stand in their places."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    wrapped = dict[str, tuple[nn.Module, nn.Module]]()
    for name, module in base.named_modules():
        if any(name.startswith(f"{outer}.") for outer in wrapped):
            continue
        if isinstance(module, BaseTunerLayer):
            wrapped[name] = (module, module.get_base_layer())
        elif isinstance(module, AuxiliaryTrainingWrapper):
            wrapped[name] = (module, module.original_module)
    try:
        for name, (_, original) in wrapped.items():
            base.set_submodule(name, original)
        yield base
    finally:
        for name, (module, _) in wrapped.items():
            base.set_submodule(name, module)


# ---- examples -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TaskExample:
    """A question and the answer that is learned; `kind` says what sort of example it is, empty where none is said."""

    question: str
    answer: str
    kind: str = ""


def read_examples(source: str, columns: Sequence[str] = ()) -> tuple[list[TaskExample], list[TaskExample]]:
    """The examples to train on and those that are held out: every fifth question, evenly over kinds, by a fixed seed.

    Args:
        source: a file (`.jsonl`, `.csv`, `.parquet`) or a hub id.
        columns: `role:column` for roles of `ROLES` whose column has another name.

    Raises:
        WsError: no such source or column, a row without a question or an answer, or fewer than `MIN_QUESTIONS`.
    """
    if not Path(source).expanduser().is_file() and not is_on_hub(source):
        raise WsError(f"There is no file {source}; give examples as .jsonl, .csv or .parquet, or a hub id.")
    named = dict(zip(ROLES, ROLES, strict=True)) | named_columns(columns, ROLES)
    needed = [column for role, column in named.items() if role != "kind" or role != column]
    examples = list[TaskExample]()
    for number, row in enumerate(read_rows(source, Path(source).stem, needed, ("default", TRAIN)), start=1):
        question, answer, kind = (row.get(named[role]) for role in ROLES)
        if not (is_text(question) and is_text(answer)):
            raise WsError(f"{source} row {number}: the question and the answer must be texts that are not empty.")
        texts = str(question).strip(), str(answer).strip()
        examples.append(TaskExample(*texts, kind="" if kind is None else str(kind)))
    kinds = {plain_question(e.question): e.kind for e in examples}
    if len(kinds) < MIN_QUESTIONS:
        raise WsError(f"{source} has {len(kinds)} different questions; give at least {MIN_QUESTIONS}.")
    held = set(draw(list(kinds), len(kinds) // HELD_OUT_SHARE, group=lambda question: kinds[question]))
    parts = [[e for e in examples if (plain_question(e.question) in held) == out] for out in (False, True)]
    return parts[0], parts[1]


@dataclass(frozen=True, kw_only=True)
class TaskLoss(Evaluation):
    """How unlikely are the answers of held-out examples, with the token that ends the turn?

    Attributes:
        items: the examples.
    """

    name = "task"
    scores = (
        HeadlineScore(
            "task_loss", "loss on held-out examples", "nats per token", mass=None, low=None, floor=PER_TOKEN, digits=3
        ),
    )

    items: Sequence[TaskExample]

    @classmethod
    def of_run(cls, context: EvalContext) -> TaskLoss:
        """A run has no examples."""
        raise WsError("The loss on a task is measured by `ws prevent`, on its examples.")

    def ask(self, model: PreTrainedModel, tok: Tokenizer) -> Scores:
        """`score`: `-log p(token)` in nats, the mean over the tokens of every answer."""
        rendered = [render_prompt(tok, e.question) for e in self.items]
        pairs = zip(rendered, self.items, strict=True)
        answers = [[encode_answer(tok, prompt, e.answer, ended=True)] for prompt, e in pairs]
        logp = score_answers(model, tok, [encode(tok, p) for p in rendered], answers, self.batch_size)
        return {"score": np.array([-answer.mean() for (answer,) in logp])}


# ---- the fine-tunes -------------------------------------------------------------------------------------------------


@contextmanager
def _conditions(way: str, opened: FinishedRun, alpha: float, persona: str) -> Iterator[Conditions]:
    """What holds while the examples are learned in one of the ways."""
    if way != "vector":
        yield Conditions(persona if way == "prompt" else "")
        return
    with steer_training(opened.model, opened.vector, alpha) as callback:
        yield Conditions("", callback, {"vector": vector_digest(opened.vector), "alpha": alpha})


def fine_tunes(
    opened: FinishedRun, options: PreventOptions, train: Sequence[TaskExample], alpha: float, persona: str, run: Run
) -> dict[str, SteeringVector]:
    """The change of every way, trained or made unless it is there, each in a folder of its name that PEFT loads."""
    model, tok, file = opened.model, opened.tok, run.folder / PAIRS_FILE
    # Pairs of equal sides, of which the positive one is learned: whatever trains an arm trains this.
    lines = pair_lines([Pair(str(n), e.question, e.answer, e.answer, 0, 0) for n, e in enumerate(train)])
    with run.alone("examples"):
        # With the strength, so that another one is refused before anything is trained.
        stage = run.stage("examples", {"strength": alpha}, {"examples": sha256_json(lines)})
        if stage is not None:
            stage.done([write_text(file, lines)])
    config, changes = options.training(model_id(model)), dict[str, SteeringVector]()
    for way in options.asked:
        console.say(f"{way}, in {run.folder / way}")
        if way == "subtract":
            changes[way] = _subtracted(opened, changes[PLAIN], alpha, run)
            continue
        with _conditions(way, opened, alpha, persona) as under:
            train_stage(model, tok, file, "pos", run, "lora", config, options.seed, way == PLAIN, way, under)
        changes[way] = SteeringVector.from_adapter(run.folder / way, model)
    return changes


def _subtracted(opened: FinishedRun, plain: SteeringVector, alpha: float, run: Run) -> SteeringVector:
    """The plain fine-tune without `alpha` of the vector, saved."""
    made, folder = plain - alpha * opened.vector, run.folder / "subtract"
    with run.alone("subtract"):
        inputs = {PLAIN: vector_digest(plain), "vector": vector_digest(opened.vector)}
        stage = run.stage("subtract", {"alpha": alpha}, inputs)
        if stage is not None:
            made.save(folder)
            stage.done(sorted(f for f in folder.iterdir() if f.is_file()))
    return made


# ---- what they have learned -----------------------------------------------------------------------------------------


def evaluations(
    context: EvalContext, behavior: Behavior, train: Sequence[TaskExample], held: Sequence[TaskExample], split: str
) -> list[tuple[Evaluation, str]]:
    """What is asked, each with the kind of examples that it is of: the trait, the examples, and neutral text."""
    asked: list[Evaluation] = [Sycophancy.of_behavior(context, behavior, split)] if behavior.claims else []
    asked += [Preferences.of_behavior(context, behavior, split)] if behavior.held_out(split) else []
    if not asked:
        raise WsError(f"The behaviour {behavior.name} has nothing held out in the split {split!r} to see the trait by.")
    known = {plain_question(p.question) for p in behavior.held_out(split)}
    if both := known & {plain_question(e.question) for e in train}:
        console.warn(
            f"{len(both)} of the {len(known)} held-out questions by which the trait is seen are among the examples "
            "that are trained on: their answers are learned, and say little of the trait."
        )
    tasks = list[tuple[Evaluation, str]]()
    for kind in sorted({e.kind for e in held}):
        whole = [e for e in held if e.kind == kind]
        items = draw(whole, context.options.limit)
        facts = {"drawn": draw_fact(items, whole)}
        tasks.append((TaskLoss(items=items, facts=facts, batch_size=context.options.batch_size), kind))
    return [*((e, "") for e in asked), *tasks, (Capability.of_run(context), "")]


@dataclass(frozen=True)
class Measured:
    """One score, by way.

    Attributes:
        score: which.
        kind: of the examples that it is of; empty for all others.
        values: of the base and of every fine-tune.
        problems: why a way cannot be read, where it cannot.
        about: what its rows say of the evaluation.
    """

    score: HeadlineScore
    kind: str
    values: Mapping[str, Float[np.ndarray, "seeds items"]]
    problems: Mapping[str, str]
    about: Mapping[str, Any]


def measure(
    context: EvalContext, asked: Sequence[tuple[Evaluation, str]], changes: Mapping[str, SteeringVector]
) -> list[Measured]:
    """The scores of the base and of every fine-tune; all are kept, and asked for once."""
    measured, vector, model = list[Measured](), context.vector, context.model
    for evaluation, kind in asked:
        scores = {BASE: context.base_scores(evaluation)}
        for way, change in changes.items():
            at, digest = partial(steer, model, change), vector_digest(change)
            scores |= {way: context.scores(evaluation, Intervention(way, at, digest, context.run), [1.0])[1.0]}
        values = {way: evaluation.headlines(s) for way, s in scores.items()}
        read = {way: evaluation.readability(s) for way, s in scores.items()}
        for score in (s for s in evaluation.scores if s.key in SCORES and s.key in values[BASE]):
            known = {way: [r[score.key] for r in (read[way], read[BASE]) if score.key in r] for way in scores}
            problems = {way: worst(both).problem for way, both in known.items()}
            by_way = {way: x[score.key].astype(float)[None] for way, x in values.items()}
            measured.append(Measured(score, kind, by_way, problems, evaluation.brief))
    size = vector.inner(vector, model)
    along = {way: change.inner(vector, model) / size for way, change in changes.items()}
    projections = {way: np.array([[x]]) for way, x in ({BASE: 0.0} | along).items()}
    return [*measured, Measured(PROJECTION, "", projections, {}, {})]


def rows_of(measured: Sequence[Measured], key: Mapping[str, Any], n_boot: int) -> Rows:
    """A row for every score and way, the base's first; `less_plain` is the paired difference from plain training.

    It is empty where plain training cannot be read, and `less_plain_p_holm` is corrected over the ways of a score. A
    single number has no interval.
    """
    rows = Rows()
    for m in measured:
        score, tested = m.score, list[dict[str, Any]]()
        seeds, items = m.values[BASE].shape
        for way, x in m.values.items():
            row = {**dict.fromkeys(COLUMNS), **key, "way": way, "score": score.key, "kind": m.kind}
            row |= {"title": score.title, "unit": score.unit, "problem": m.problems.get(way) or None, "n": items}
            for name, reference in (("level", None), ("shift", BASE), ("less_plain", PLAIN)):
                if reference and (way in (reference, BASE) or (reference == PLAIN and m.problems.get(PLAIN))):
                    continue
                difference = x - m.values[reference] if reference else x
                parts = ("ci_lo", "ci_hi", *(["p"] if reference else [])) if x.size > 1 else ()
                row |= estimate_over_seeds(difference, n_boot).columns(name, *parts)
            rows.append(row | dict(m.about) | {"n_seeds": seeds, "floor": score.floor, "digits": score.digits})
            tested += [rows[-1]] if rows[-1]["less_plain_p"] is not None else []
        adjusted = holm(np.array([row["less_plain_p"] for row in tested])) if tested else ()
        for row, p in zip(tested, adjusted, strict=True):
            row["less_plain_p_holm"] = float(p)
    return rows


def render(rows: Rows, form: str = "simple") -> str:
    """A line per score: the base's level, and by how much each way has moved it.

    Args:
        rows: of `rows_of`.
        form: of the table, as `tabulate` calls it.
    """
    ways = list(dict.fromkeys(row["way"] for row in rows if row["way"] != BASE))
    lines = dict[str, dict[str, str]]()
    for row in rows:
        kind, unit = (f" ({row['kind']})" if row["kind"] else "", f", {row['unit']}" if row["unit"] else "")
        lines.setdefault(f"{row['title']}{kind}{unit}", {})[row["way"]] = _cell(row)
    cells = [[title, *(line.get(way, "") for way in (BASE, *ways))] for title, line in lines.items()]
    table = tabulate(cells, ["", BASE, *ways], tablefmt=form, disable_numparse=True)
    over = "items, one seed" if rows[0]["n_seeds"] == 1 else f"{rows[0]['n_seeds']} seeds and items"
    said = f"The base's level, and the shift of every fine-tune from it with its 95 % interval over {over}."
    mark = "* differs from plain training, where that can be read: p < 0.05 after Holm's correction over the ways, and "
    mark += "not under the floor."
    return "\n\n".join([table, f"{said}\n{mark}", *notes(row["problem"] for row in rows)])


def _cell(row: Mapping[str, Any]) -> str:
    """A number of the table with its mark."""
    spec = f"+.{row['digits']}f"
    if row["way"] == BASE:
        return estimate_text({**row, "level_ci_lo": None, "level_ci_hi": None}, "level", spec)
    difference, p = ((row[name] or default) for name, default in (("less_plain", 0.0), ("less_plain_p_holm", 1.0)))
    return f"{estimate_text(row, 'shift', spec)} {star(difference, p, row['floor'], row['problem'])}".rstrip()


# ---- the command ----------------------------------------------------------------------------------------------------


def prevent(options: PreventOptions) -> tuple[Run, list[Measured], dict[str, str]]:
    """Train what is not there yet, and measure it: the run, the scores, and what was done in every way.

    Raises:
        WsError: examples that cannot be read, a strength of 0, or a behaviour without what is asked for.
    """
    options.check()
    train, held = read_examples(options.examples, options.columns)
    name = options.to or re.sub(r"[^\w.+-]+", "-", Path(options.examples).stem).strip("-.+") or "examples"
    opened = open_options(options)
    texts = ((shortened(e.question), text) for e in train + held for text in (e.question, e.answer))
    require_plain(opened.tok, ((f"{options.examples}, {where}", text) for where, text in texts))
    run_place = opened.run.folder / FOLDER / plain_name(name, "the fine-tunes")
    behavior = load_behavior(options.behavior, options.model or opened.vector.base_id)
    alpha = opened.vector.strength(options.strength, tokenizer_hash(opened.tok))
    if alpha == 0:
        raise WsError("--strength is 0, at which no trait shows; give one of the sign that shows what is unwanted.")
    personas = behavior.positive if alpha > 0 else behavior.negative
    if "prompt" in options.asked and not personas:
        raise WsError(f"The behaviour {behavior.name} has no personas to prompt with; leave prompt out of --ways.")
    persona = personas[0] if personas else ""
    context = EvalContext(options.eval_options, opened.model, opened.tok, opened.vector, Run(run_place))
    asked = evaluations(context, behavior, train, held, options.split)
    run = Run(run_place, options.fresh)
    changes = fine_tunes(opened, options, train, alpha, persona, run)
    learned = run.facts(PLAIN)["facts"]["examples"]
    others = f", {len(train) - learned} to watch the loss or too long" if learned < len(train) else ""
    done = {
        PLAIN: f"trained on {learned} examples ({len(held)} held out{others})",
        "vector": f"the same while {alpha:+.3g} of the vector was active",
        "subtract": f"plain, less {alpha:+.3g} of the vector",
        "prompt": f'the same behind the system prompt "{persona}"',
    }
    return run, measure(context, asked, changes), {way: done[way] for way in options.asked}


def main(options: PreventOptions) -> None:
    """The command `ws prevent`."""
    run, measured, done = prevent(options)
    key = {"name": run.folder.name, **options.key, "strength": options.strength}
    rows = rows_of(measured, key, options.n_bootstrap)
    settings = {"strength": options.strength, "split": options.split, "n_bootstrap": options.n_bootstrap}
    with run.alone("prevention"):
        stage = run.restart("prevention", settings | {"ways": options.asked, "limit": options.limit})
        table = write_csv(run.folder / TABLE, rows)
        stage.done([table])
    text = "\n".join([render(rows), "", *(f"{way}: {text}" for way, text in done.items())])
    console.show(console.Result(text, {"rows": rows}, [*(run.folder / way for way in done), table]))


if __name__ == "__main__":
    console.run(main, PreventOptions, "ws prevent")
