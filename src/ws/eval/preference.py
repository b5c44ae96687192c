"""Preference: which of two given answers does the model find likelier, the behaviour's or its opposite's?

Every held-out question stands on the stripped prompt (no system prompt, thinking off), joined with either answer as
training joins them. With `n+` and `n-` the tokens of the two answers, the token that ends the turn included, because
training teaches it as well,

    margin = log p(positive | question) / n+  -  log p(negative | question) / n-          in nats per token

and `margin_sum` is the same without the division: the log odds of the whole answers, in which the longer one loses. No
word is asked for and nobody judges, so there is no answer mass: a model that would say neither answer has a margin too.
A question with several pairs of answers counts once, with the mean over them. Shifts are paired, question by question.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped
from tabulate import tabulate
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from ws import console
from ws.behaviors import SPLITS, Behavior, Preference
from ws.behaviors.answered import plain_question, read_preferences
from ws.behaviors.tables import draw, draw_fact
from ws.errors import WsError, choose
from ws.eval.context import EvalContext, open_context
from ws.eval.evaluation import SHIFT, ByAlpha, Evaluation, HeadlineScore, MeanOfAnswers, MeanOfChoices, Rows, Scores
from ws.eval.prompts import OWN, notes_on
from ws.eval.readable import PER_TOKEN, star
from ws.files.runs import read_csv
from ws.lm.likelihood import score_answers
from ws.lm.models import encode, encode_answer, render_prompt, require_plain
from ws.options.measure import PreferenceOptions as PreferenceOptions
from ws.stats import estimate_mean, estimate_text, holm

NAME, VERSION = "preference", 1


# ---- scores ---------------------------------------------------------------------------------------------------------


def evaluate_preference(
    model: PreTrainedModel, tok: Tokenizer, items: Sequence[Preference], batch_size: int | None = None
) -> Scores:
    """`positive` and `negative`, the mean log-probability of a token of either answer in nats, and their numbers of
    tokens `n_positive` and `n_negative`; all `[pairs]`, in the order given."""
    prompts, answers = tokens_of(tok, items)
    positive, negative = zip(*score_answers(model, tok, prompts, answers, batch_size), strict=True)
    return {
        "positive": np.array([logp.mean() for logp in positive]),
        "negative": np.array([logp.mean() for logp in negative]),
        "n_positive": np.array([len(logp) for logp in positive]),
        "n_negative": np.array([len(logp) for logp in negative]),
    }


def tokens_of(tok: Tokenizer, items: Sequence[Preference]) -> tuple[list[list[int]], list[list[list[int]]]]:
    """The prompts and, for each, both answers with the token that ends the turn, as tokens."""
    rendered = [render_prompt(tok, p.question) for p in items]  # a tokenizer that is prompted adds its system text
    answers = [
        [encode_answer(tok, prompt, text, ended=True) for text in (p.positive, p.negative)]
        for prompt, p in zip(rendered, items, strict=True)
    ]
    return [encode(tok, prompt) for prompt in rendered], answers


def question_numbers(items: Sequence[Preference]) -> Int[np.ndarray, "pairs"]:
    """To which question, counted from 0 in the order of their first pairs, every pair belongs."""
    texts = [plain_question(p.question) for p in items]
    numbers = {text: n for n, text in enumerate(dict.fromkeys(texts))}
    return np.array([numbers[text] for text in texts])


def by_question(items: Sequence[Preference], values: Shaped[np.ndarray, "pairs"]) -> Float[np.ndarray, "questions"]:
    """The mean over the pairs of every question."""
    numbers = question_numbers(items)
    return np.bincount(numbers, weights=values) / np.bincount(numbers)


def margins(items: Sequence[Preference], scores: Scores) -> Float[np.ndarray, "questions"]:
    """The margin per token of every question, in nats."""
    return by_question(items, scores["positive"] - scores["negative"])


def margin_sums(items: Sequence[Preference], scores: Scores) -> Float[np.ndarray, "questions"]:
    """The margin between the whole answers of every question, in nats."""
    sums = scores["positive"] * scores["n_positive"] - scores["negative"] * scores["n_negative"]
    return by_question(items, sums)


# ---- tables ---------------------------------------------------------------------------------------------------------


def _questions(items: Sequence[Preference]) -> list[Preference]:
    """The first pair of every question, which stands for it."""
    _, first = np.unique(question_numbers(items), return_index=True)
    return [items[i] for i in first]


def per_question_rows(key: Mapping[str, Any], alpha: float, items: Sequence[Preference], scores: Scores) -> Rows:
    """Rows of `preference_per_question.csv`; log-probabilities are per token, means over the question's pairs."""
    columns = {"margin": margins(items, scores), "margin_sum": margin_sums(items, scores)}
    columns |= {f"logp_{side}": by_question(items, scores[side]) for side in ("positive", "negative")}
    columns |= {f"tokens_{side}": by_question(items, scores[f"n_{side}"]) for side in ("positive", "negative")}
    n_pairs = np.bincount(question_numbers(items))
    return [
        {
            **key,
            "alpha": alpha,
            "question_id": p.id,
            "question": p.question,
            "kind": p.kind,
            **{name: float(values[i]) for name, values in columns.items()},
            "n_pairs": int(n_pairs[i]),
            "split": p.split,
        }
        for i, p in enumerate(_questions(items))
    ]


def summary_row(
    key: Mapping[str, Any], alpha: float, items: Sequence[Preference], scores: Scores, base: Scores, n_boot: int
) -> dict[str, Any]:
    """One row of `preference_summary.csv`; shifts are paired against the base, question by question.

    `shift_positive` and `shift_negative` say how the two answers themselves move, per token: a margin also grows where
    both become less likely. `share_positive` is the share of questions whose margin is above zero.
    """
    margin, moved = margins(items, scores), margins(items, scores) - margins(items, base)
    level, shift = estimate_mean(margin, n_boot), estimate_mean(moved, n_boot)
    sums = {name: margin_sums(items, s) for name, s in (("now", scores), ("base", base))}
    sides = {s: by_question(items, scores[s] - base[s]) for s in ("positive", "negative")}
    row = {**key, "alpha": alpha, "mean_margin": level.mean, "std_margin": level.std}
    row |= {"ci_lo": level.ci_lo, "ci_hi": level.ci_hi, **shift.columns("shift", "ci_lo", "ci_hi", "p"), "n": level.n}
    row |= estimate_mean(sums["now"], n_boot).columns("margin_sum", "ci_lo", "ci_hi")
    row |= estimate_mean(sums["now"] - sums["base"], n_boot).columns("shift_sum", "ci_lo", "ci_hi")
    for side, values in sides.items():
        row |= estimate_mean(values, n_boot).columns(f"shift_{side}", "ci_lo", "ci_hi")
    return row | {"share_positive": float((margin > 0).mean()), "n_pairs": len(items), "split": items[0].split}


def kind_rows(
    key: Mapping[str, Any], alpha: float, items: Sequence[Preference], scores: Scores, base: Scores, n_boot: int
) -> Rows:
    """Rows of `preference_kinds.csv`: level and shift per kind of question, where kinds are said.

    `shift_p_holm` is corrected over the kinds of a strength. A kind with a single question has no interval.
    """
    kinds = np.array([p.kind for p in _questions(items)])
    margin, moved, rows = margins(items, scores), margins(items, scores) - margins(items, base), Rows()
    for kind in sorted(set(kinds) - {""}):
        part, parts = moved[kinds == kind], ("ci_lo", "ci_hi", "p")
        row = {
            **key,
            "alpha": alpha,
            "kind": str(kind),
            "n": len(part),
            "mean_margin": float(margin[kinds == kind].mean()),
        }
        if len(part) > 1:
            row |= estimate_mean(part, n_boot).columns("shift", *parts)
        else:
            row |= {"shift": float(part[0])} | {f"shift_{name}": None for name in parts}
        rows.append(row | {"shift_p_holm": None, "split": items[0].split})
    tested = [row for row in rows if row["shift_p"] is not None]
    for row, p in zip(tested, holm(np.array([r["shift_p"] for r in tested])) if tested else (), strict=True):
        row["shift_p_holm"] = float(p)
    return rows


# ---- what a person sees ---------------------------------------------------------------------------------------------


def render(summary: Sequence[Mapping[str, str]]) -> str:
    """The rows of the summary table, read from its file, as a table for people."""
    rows = [
        [
            f"{float(r['alpha']):+g}",
            estimate_text(r, "mean_margin", "+.3f", ends=""),
            estimate_text(r, "shift", "+.3f"),
            estimate_text(r, "shift_sum"),
            *(f"{float(r[f'shift_{side}']):+.3f}" for side in ("positive", "negative")),
            f"{float(r['share_positive']):.2f}",
        ]
        for r in summary
    ]
    header = ["alpha", "margin, nats per token", "shift", "shift, whole answers", "positive moves", "negative moves"]
    table = tabulate(rows, [*header, "prefers positive"], disable_numparse=True)
    last = summary[-1]
    note = f"{last['n']} questions of the split {last['split']}; the token that ends the turn is one of the answer's."
    return "\n\n".join([table, note, *notes_on(last)])


def render_kinds(kinds: Sequence[Mapping[str, str]]) -> str:
    """The shifts by kind of question, read from their file, a row per kind and a column per strength."""
    alphas = sorted({float(r["alpha"]) for r in kinds} - {0.0})
    cells = {(r["kind"], float(r["alpha"])): _cell(r) for r in kinds}
    names = dict.fromkeys((r["kind"], r["n"]) for r in kinds)
    rows = [[*name, *(cells[name[0], alpha] for alpha in alphas)] for name in names]
    table = tabulate(rows, ["kind", "n", *(f"alpha {a:+g}" for a in alphas)], disable_numparse=True)
    return (
        f"{table}\n\nShift of the margin in nats per token, by kind of question.\n"
        f"* p < 0.05 after Holm's correction over the kinds of a strength, and at least {PER_TOKEN} nats per token."
    )


def _cell(row: Mapping[str, str]) -> str:
    shift, p = float(row["shift"]), row["shift_p_holm"]
    interval = f" [{float(row['shift_ci_lo']):+.3f}, {float(row['shift_ci_hi']):+.3f}]" if p else ""
    return f"{shift:+.3f}{interval}{star(shift, float(p or 1), PER_TOKEN, None)}"


# ---- the evaluation -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Preferences(Evaluation):
    """Of two given answers to a question, is the behaviour's likelier than its opposite's?

    Attributes:
        items: pairs of answers; a question may have several.
    """

    name = NAME
    version = VERSION
    options = PreferenceOptions
    scores = (
        HeadlineScore(
            "preference",
            "preference for the behaviour's answers",
            "nats per token",
            short="preference, nats per token",
            label="preference",
            meaning="log p of the answer that shows the behaviour less log p of its opposite, on held-out questions, "
            "in nats per token",
            level="mean_margin",
            mass=None,
            low=None,
            value="margin",
            floor=PER_TOKEN,
            digits=3,
        ),
    )
    columns = (
        *("mean_margin", "ci_lo", "ci_hi", *SHIFT, "n"),
        *("shift_sum", "shift_sum_ci_lo", "shift_sum_ci_hi", "share_positive"),
    )
    item_table, item = "per_question", "question_id"

    items: Sequence[Preference]

    @classmethod
    def of_run(cls, context: EvalContext) -> Preferences:
        """The held-out questions of the run's behaviour, or of `--dataset`."""
        return cls.of_behavior(context, context.behavior, context.options_as(PreferenceOptions).split)

    @classmethod
    def of_behavior(cls, context: EvalContext, behavior: Behavior, split: str = "report") -> Preferences:
        """The held-out questions of any behaviour (or of `--dataset`), as the options of a run put them."""
        options = context.options
        whole = load_preferences(options.dataset, split) if options.dataset else held_out(behavior, split)
        items, source = draw_questions(whole, options.limit), options.dataset or f"{behavior.name} preferences"
        texts = ((f"{source}, {p.id}", text) for p in items for text in (p.question, p.positive, p.negative))
        require_plain(context.tok, texts)
        n_questions, n_drawn = len(_questions(whole)), len(_questions(items))
        facts = {"dataset": source, "n_think": 0, "words": OWN}
        facts |= {"drawn": draw_fact(range(n_drawn), range(n_questions))}
        return cls(items=items, batch_size=options.batch_size, facts=facts)

    @property
    def content(self) -> Any:
        """The pairs, as plain values."""
        return [asdict(p) for p in self.items]

    def ask(self, model: PreTrainedModel, tok: Tokenizer) -> Scores:
        """See `evaluate_preference`."""
        return evaluate_preference(model, tok, self.items, self.batch_size)

    def headlines(self, scores: Scores) -> dict[str, np.ndarray]:
        """`preference`: the margin in nats per token, one number per question."""
        return {"preference": margins(self.items, scores)}

    def means(self, tok: Tokenizer, wanted: Sequence[str]) -> list[MeanOfChoices | MeanOfAnswers]:
        """The mean margin over questions; a question with several pairs counts once."""
        prompts, answers = tokens_of(tok, self.items)
        numbers = question_numbers(self.items)
        n = int(numbers.max()) + 1
        weights = 1 / np.bincount(numbers)[numbers] / n
        return [MeanOfAnswers("preference", n, prompts, answers, weights.tolist())]

    def tables(self, key: Mapping[str, Any], scores: ByAlpha, n_bootstrap: int) -> dict[str, Rows]:
        """The rows of all tables; that of the kinds only where kinds are said."""
        base, items, rows = scores[0.0], self.items, {name: Rows() for name in ("per_question", "kinds", "summary")}
        for alpha, s in scores.items():
            rows["per_question"] += per_question_rows(key, alpha, items, s)
            rows["kinds"] += kind_rows(key, alpha, items, s, base, n_bootstrap)
            rows["summary"].append(summary_row(key, alpha, items, s, base, n_bootstrap))
        return {name: table for name, table in rows.items() if table}

    def render(self, summary: Sequence[Mapping[str, str]], folder: Path) -> str:
        """The summary, and the kinds of the same interventions where there are several."""
        file, chosen = folder / f"{NAME}_kinds.csv", {r["intervention"] for r in summary}
        digest = summary[0]["eval_hash"]
        kinds = [r for r in (read_csv(file) if file.is_file() else []) if r["intervention"] in chosen]
        kinds = [r for r in kinds if r["eval_hash"] == digest]  # the table of other questions may still lie there
        if len({r["kind"] for r in kinds}) < 2 or not any(float(r["alpha"]) for r in kinds):
            return render(summary)
        return f"{render(summary)}\n\n{render_kinds(kinds)}"

    def example(self, tok: Tokenizer, scores: ByAlpha) -> str:
        """One worked example, to read by eye: the prompt as the model sees it, and both answers at every strength."""
        first = self.items[0]
        lines = [f"Worked example (question {first.id}):", render_prompt(tok, first.question), ""]
        lines += [f"  positive: {first.positive}", f"  negative: {first.negative}"]
        for alpha, s in sorted(scores.items()):
            positive, negative = (float(s[side][0]) for side in ("positive", "negative"))
            lines.append(
                f"  alpha {alpha:+g}  nats per token: positive {positive:.3f} ({int(s['n_positive'][0])} tokens), "
                f"negative {negative:.3f} ({int(s['n_negative'][0])} tokens), margin {positive - negative:+.3f}"
            )
        return "\n".join(lines)


def held_out(behavior: Behavior, split: str) -> tuple[Preference, ...]:
    """The held-out questions of one split, with both answers; `WsError` when there are none."""
    choose("split", split, SPLITS)
    if not behavior.preferences:
        raise WsError(
            f"The behaviour {behavior.name} brings no held-out questions with both answers; give its file a table "
            "[preferences], or pass --dataset a file with the columns question, positive and negative."
        )
    return _of_split(behavior.preferences, split, f"The behaviour {behavior.name}")


def load_preferences(source: str, split: str = "report") -> tuple[Preference, ...]:
    """The same from a table with the columns of `ws.behaviors.answered` (a file, or a hub id)."""
    choose("split", split, SPLITS)
    place = {"file": source} if Path(source).expanduser().is_file() or source.count("/") != 1 else {"hub": source}
    items, _ = read_preferences(place, Path(), f"--dataset {source}", train=False)
    return _of_split(items, split, f"--dataset {source}")


def _of_split(items: Sequence[Preference], split: str, where: str) -> tuple[Preference, ...]:
    chosen = tuple(p for p in items if p.split == split)
    if not chosen:
        raise WsError(f"{where} has no held-out questions of the split {split!r}.")
    return chosen


def draw_questions(items: Sequence[Preference], limit: int | None) -> tuple[Preference, ...]:
    """The pairs of at most `limit` questions, even over kinds; see `ws.behaviors.tables.draw`."""
    first, numbers = _questions(items), question_numbers(items)
    drawn = set(draw(range(len(first)), limit, lambda number: first[number].kind))
    return tuple(p for p, number in zip(items, numbers.tolist(), strict=True) if number in drawn)


# ---- the command ----------------------------------------------------------------------------------------------------


def main(options: PreferenceOptions) -> None:
    """The command `python -m ws.eval.preference`."""
    context = open_context(options)
    console.show(context.carry_out(Preferences.of_run(context)))


if __name__ == "__main__":
    console.run(main, PreferenceOptions, "python -m ws.eval.preference")
