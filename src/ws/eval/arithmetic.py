"""Arithmetic with and without a thought: does the model still solve problems, and does it still think about them?

Every problem is asked twice, greedily. At once: thinking is off, the number alone is asked for, and "Answer:" is put
into the model's mouth. After a thought: a model with a think block thinks in it for up to `n_think` tokens, the block
is closed, and it writes its answer behind the same opener; a model without one is asked for its reasons
(`ws.lm.rollout.REASONS`), and what it writes is thought and answer in one.

An answer is read by one rule (`read_number`): its last number. It is right where that equals the problem's number. With
`t` and `d` the shares of right answers after a thought and at once, paired problem by problem,

    gain = t - d

A vector that leaves `d` as it is and takes `gain` away has left the model its answers and taken its thinking. How long
thoughts are, how many end by themselves within the budget, and how much of them is repeated (seq-rep-4, Welleck et al.
2020, arXiv 1908.04319) stand beside it. Problems: GSM8K (Cobbe et al. 2021, arXiv 2110.14168), or 60 plain sums.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool
from tabulate import tabulate
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from ws import console
from ws.behaviors.tables import (
    draw,
    draw_fact,
    evenly,
    is_on_hub,
    is_text,
    read_rows,
    require_hub,
    revision_of,
    single_table,
    tolerate,
)
from ws.data import repeated_ngrams
from ws.errors import WsError
from ws.eval.capability import answer_questions
from ws.eval.context import EvalContext, open_context
from ws.eval.evaluation import ByAlpha, Evaluation, HeadlineScore, Rows, Scores, thought_columns
from ws.eval.prompts import OWN, PARAPHRASE, load_prompts, notes_on, words_of
from ws.eval.readable import SHARE
from ws.lm.models import decode_answer, render_prompt
from ws.lm.rollout import REASONS, thinks_aloud, write_out
from ws.options.measure import NUMBER_TOKENS, SOLUTION_TOKENS
from ws.options.measure import ArithmeticOptions as ArithmeticOptions
from ws.stats import estimate_mean, estimate_text

NAME, VERSION = "arithmetic", 1
HUB_ID, PLACE = "openai/gsm8k", ("main", "test")
BUNDLED_SETS = ("sums", "pocket")  # one set; `pocket` is what bundled sets are called everywhere
MARKER = "####"  # behind it stands the number in a row of GSM8K
# A sign, on either side of a currency's, counts unless it stands behind what it would be subtracted from. Digits inside
# a word do not count, and commas between groups of three are no end of a number. An exponent
# belongs to its number; tables of floats have it (`5e-05`).
_MINUS, _CURRENCY = r"[-\N{MINUS SIGN}]", r"[$\N{EURO SIGN}\N{POUND SIGN}]"
_SIGN = rf"(?<![\w)\]%])(?:{_MINUS}{_CURRENCY}?|{_CURRENCY}{_MINUS})"
_DIGITS = r"(?<![^\W_])(?:(?:\d{1,3}(?:,\d{3})+(?![,\d])|\d+)(?:\.\d+)?|(?<!\.)\.\d+)(?:[eE][-+]?\d{1,3}(?![^\W_]))?"
_NUMBER = re.compile(rf"(?P<sign>{_SIGN})?(?P<number>{_DIGITS})")


@dataclass(frozen=True)
class Prompts:
    """The texts around a problem; a TOML file with these keys replaces them.

    Attributes:
        number: with the slot `{question}`; asks for the number alone.
        opener: the start of that answer, at once and behind a think block; a small model would begin to reason.
        reasons: put behind the bare question where the model is to think and has no think block; may be empty.
    """

    number: str = "{question}\n\nAnswer with the number only."
    opener: str = "Answer:"
    reasons: str = REASONS


_SLOTS = {"number": ("question",)}


@dataclass(frozen=True)
class Problem:
    """One problem.

    Attributes:
        id: its number in the set, from 1.
        kind: of the bundled sums, what they are; else empty.
        text: the question.
        number: the right answer, as `read_number` gives it, as text.
    """

    id: str
    kind: str
    text: str
    number: str


# ---- items ----------------------------------------------------------------------------------------------------------


def read_number(text: str) -> Decimal | None:
    """The last number of a text, exactly; None without one.

    Commas between groups of three are left out, a sign (`-` or U+2212, also before a currency sign) counts unless it
    stands behind what it would be subtracted from, and units around a number do not matter: `-$1,234.50`, `1234.5 km`
    and `50%` are -1234.5, 1234.5 and 50, and `5e-05` is 0.00005. Digits inside a word (`CO2`) are no number. There are
    no fractions and no other powers: of `1/2` the last number is 2.
    """
    matches = list(_NUMBER.finditer(text))
    if not matches:
        return None
    number = Decimal(matches[-1]["number"].replace(",", ""))
    return number.copy_negate() if matches[-1]["sign"] else number  # `-number` would round to 28 digits


def load_problems(source: str, revision: str | None = None) -> tuple[Problem, ...]:
    """The problems of a set, in the order of its rows.

    Rows that break the schema are named and left out; more than 5 % stop the run.

    Args:
        source: `sums`, 60 plain sums (also as `pocket`); a table with the columns `question` and `answer`, a folder
            that holds one such table, or a hub id. The number is the last one behind `####` in the answer, or of all of
            it.
        revision: of the hub's data set.

    Raises:
        WsError: no such source, other columns, or too many bad rows.
    """
    if source in BUNDLED_SETS:
        require_hub(source, "--revision", revision)
        return plain_sums()
    rows = read_rows(single_table(source), "test", ("question", "answer"), PLACE, revision=revision)
    made, bad = list[Problem](), list[str]()
    for number, row in enumerate(rows, start=1):
        stated = "" if row["answer"] is None or isinstance(row["answer"], bool) else str(row["answer"])
        right = read_number(stated.rpartition(MARKER)[2])
        if not is_text(row["question"]) or right is None:
            bad.append(f"row {number} has no question or no number for an answer")
        else:
            made.append(Problem(str(number), "", str(row["question"]).strip(), str(right)))
    tolerate(bad, len(rows), source)
    return tuple(made)


def plain_sums(n: int = 15) -> tuple[Problem, ...]:
    """Sums of small numbers, `n` of each kind: an addition, a subtraction, a multiplication, and two additions."""
    pairs = evenly([(a, b) for a in range(2, 10) for b in range(2, 10)], n)
    kinds = {
        "addition": [(f"{a} + {b}", a + b) for a, b in pairs],
        "subtraction": [(f"{a + b} - {b}", a) for a, b in pairs],
        "multiplication": [(f"{a} * {b}", a * b) for a, b in pairs],
        "two additions": [(f"{a} + {b} + {a + 1}", 2 * a + b + 1) for a, b in pairs],
    }
    sums = [(kind, text, right) for kind, made in kinds.items() for text, right in made]
    return tuple(Problem(str(i), kind, f"What is {text}?", str(right)) for i, (kind, text, right) in enumerate(sums, 1))


# ---- scores ---------------------------------------------------------------------------------------------------------


def evaluate_arithmetic(
    model: PreTrainedModel,
    tok: Tokenizer,
    items: Sequence[Problem],
    prompts: Prompts | None = None,
    n_think: int = SOLUTION_TOKENS,
    n_tokens: int = NUMBER_TOKENS,
    batch_size: int | None = None,
) -> Scores:
    """Let the model, as it stands, answer every problem at once and after a thought.

    Args:
        items: the problems.
        prompts: other words.
        n_think: at most so many tokens of thought, or of reasons with their answer; with 0 problems are asked at once
            only.
        n_tokens: at most so many tokens of an answer at once, and of one behind a closed think block.
        batch_size: rows at a time; None starts at 32 and takes fewer while memory does not suffice.

    Returns:
        Per problem `direct`, the answer at once, and `direct_ended`; after a thought `thought` (what was thought in a
        block), `answer` (without a block: all that was written), and of the thought `n_tokens`, `forced` (it was cut
        off) and `repetition`.
    """
    texts = prompts or Prompts()
    questions = [texts.number.format(question=p.text) for p in items]
    at_once = answer_questions(model, tok, questions, n_tokens, batch_size, texts.opener)
    scores = {"direct": at_once["answer"], "direct_ended": at_once["ended"]}
    if n_think == 0:
        return scores
    if not thinks_aloud(tok, n_think):
        written = write_out(model, tok, questions, n_think, n_tokens, batch_size, texts.opener)
        return scores | {
            "thought": np.array([decode_answer(tok, ids) for ids in written.thoughts]),
            "answer": np.array([decode_answer(tok, ids) for ids in written.answers]),
            "n_tokens": np.array([len(ids) for ids in written.thoughts]),
            "forced": written.forced,
            "repetition": np.array([repeated_ngrams(ids) for ids in written.thoughts]),
        }
    aloud = answer_questions(model, tok, [p.text + texts.reasons for p in items], n_think, batch_size)
    kept = {name: aloud[name] for name in ("answer", "n_tokens", "repetition")}
    return scores | kept | {"thought": np.full(len(items), ""), "forced": ~aloud["ended"]}


def is_right(items: Sequence[Problem], answers: Iterable[Any]) -> Bool[np.ndarray, "problems"]:
    """Which answers have the problem's number for their last."""
    return np.array([read_number(str(a)) == Decimal(p.number) for p, a in zip(items, answers, strict=True)])


def right_answers(items: Sequence[Problem], scores: Scores) -> dict[str, np.ndarray]:
    """`thought` and `direct`, 1 for right answers and 0 for others; `[problems]`. Without a thought `direct` alone."""
    texts = {"thought": scores.get("answer"), "direct": scores["direct"]}
    return {name: is_right(items, of).astype(float) for name, of in texts.items() if of is not None}


# ---- tables ---------------------------------------------------------------------------------------------------------


def per_problem_rows(key: Mapping[str, Any], alpha: float, items: Sequence[Problem], scores: Scores) -> Rows:
    """Rows of `arithmetic_per_problem.csv`; `direct` and `thought` are the numbers that were read, empty for none."""
    right, texts = right_answers(items, scores), {"direct": scores["direct"], "thought": scores["answer"]}
    rows = Rows()
    for i, p in enumerate(items):
        row: dict[str, Any] = {**key, "alpha": alpha, "problem_id": p.id, "kind": p.kind, "question": p.text}
        row["number"] = p.number
        for name, of in texts.items():
            read = read_number(str(of[i]))
            row |= {name: None if read is None else str(read), f"{name}_right": int(right[name][i])}
        row |= {"thought_tokens": int(scores["n_tokens"][i]), "closed": not scores["forced"][i]}
        row |= {"repetition": float(scores["repetition"][i]), "direct_answer": str(scores["direct"][i])}
        rows.append(row | {"thought_text": str(scores["thought"][i]), "thought_answer": str(scores["answer"][i])})
    return rows


def summary_row(
    key: Mapping[str, Any], alpha: float, items: Sequence[Problem], scores: Scores, base: Scores, n_boot: int
) -> dict[str, Any]:
    """One row of `arithmetic_summary.csv`; shifts are paired against the base, problem by problem.

    `gain` is the share of right answers after a thought less that at once. `thought_unread` and `direct_unread` count
    the answers without any number, `direct_ended` is the share of answers at once that end within their tokens.
    """
    now, before = _values(items, scores), _values(items, base)
    row: dict[str, Any] = {**key, "alpha": alpha}
    for name in ("thought_accuracy", "direct_accuracy", "gain"):
        moved = f"{name.removesuffix('_accuracy')}_shift"
        row |= estimate_mean(now[name], n_boot).columns(name, "ci_lo", "ci_hi")
        row |= estimate_mean(now[name] - before[name], n_boot).columns(moved, "ci_lo", "ci_hi", "p")
    row |= thought_columns(scores) | {"repetition": float(scores["repetition"].mean())}
    for name in ("thought_tokens", "closed", "repetition"):
        row |= estimate_mean(now[name] - before[name], n_boot).columns(f"{name}_shift", "ci_lo", "ci_hi")
    unread = {name: sum(read_number(str(a)) is None for a in scores[of]) for name, of in _ANSWERS.items()}
    row |= {f"{name}_unread": n for name, n in unread.items()}
    return row | {"direct_ended": float(scores["direct_ended"].mean()), "n": len(items)}


_ANSWERS = {"thought": "answer", "direct": "direct"}


def _values(items: Sequence[Problem], scores: Scores) -> dict[str, np.ndarray]:
    """What shifts, one number per problem."""
    right = right_answers(items, scores)
    return {
        "thought_accuracy": right["thought"],
        "direct_accuracy": right["direct"],
        "gain": right["thought"] - right["direct"],
        "thought_tokens": scores["n_tokens"].astype(float),
        "closed": 1.0 - scores["forced"],
        "repetition": scores["repetition"],
    }


# ---- what a person sees ---------------------------------------------------------------------------------------------


def render(summary: Sequence[Mapping[str, str]]) -> str:
    """The rows of the summary table, read from its file, as tables for people: answers, and thoughts."""
    last = summary[-1]
    answers = {
        "right after a thought": [estimate_text(r, "thought_accuracy", ".3f") for r in summary],
        "shift": [estimate_text(r, "thought_shift", "+.3f") for r in summary],
        "right at once": [estimate_text(r, "direct_accuracy", ".3f") for r in summary],
        "shift ": [estimate_text(r, "direct_shift", "+.3f") for r in summary],
        "gain of thought": [estimate_text(r, "gain", "+.3f") for r in summary],
        "shift  ": [estimate_text(r, "gain_shift", "+.3f") for r in summary],
        "no number": [f"{r['thought_unread']} / {r['direct_unread']}" for r in summary],
    }
    thoughts = {
        "thought, tokens": [f"{float(r['mean_thought_tokens']):.1f}" for r in summary],
        "shift": [estimate_text(r, "thought_tokens_shift", "+.1f") for r in summary],
        "ended by itself": [f"{float(r['share_closed']):.3f}" for r in summary],
        "shift ": [estimate_text(r, "closed_shift", "+.3f") for r in summary],
        "repeated 4-grams": [f"{float(r['repetition']):.3f}" for r in summary],
        "shift  ": [estimate_text(r, "repetition_shift", "+.3f") for r in summary],
    }
    alphas = {"alpha": [f"{float(r['alpha']):+g}" for r in summary]}
    tables = [tabulate(alphas | columns, "keys", disable_numparse=True) for columns in (answers, thoughts)]
    note = f"{last['n']} problems, at most {last['n_think']} tokens of thought. No number: after a thought / at once."
    return "\n\n".join([*tables, note, *notes_on(last)])


# ---- the evaluation -------------------------------------------------------------------------------------------------


def _score(name: str, title: str, label: str) -> HeadlineScore:
    return HeadlineScore(
        f"{name}_accuracy",
        title,
        "share",
        label=label,
        meaning=f"the share of {title}",
        level=f"{name}_accuracy",
        level_ci=f"{name}_accuracy_",
        shift=f"{name}_shift",
        mass=None,
        low=None,
        value=f"{name}_right",
        floor=SHARE,
        digits=3,
    )


@dataclass(frozen=True, kw_only=True)
class Arithmetic(Evaluation):
    """Problems with a number for an answer: are they solved after a thought, and at once? The last number of an answer
    is read; where answers at once stay and those after a thought fall, the model answers but no longer thinks.

    Attributes:
        items: the problems.
        prompts: the texts around them; `reasons` is empty for a model that is not asked for any.
        n_tokens: of an answer.
    """

    name = NAME
    version = VERSION
    options = ArithmeticOptions
    scores = (
        _score("thought", "right answers after a thought", "arithmetic, after a thought"),
        _score("direct", "right answers at once", "arithmetic, at once"),
    )
    columns = (
        *("thought_accuracy", "thought_accuracy_ci_lo", "thought_accuracy_ci_hi"),
        *("thought_shift", "thought_shift_ci_lo", "thought_shift_ci_hi", "n"),
        *("direct_accuracy", "direct_shift", "gain", "mean_thought_tokens", "share_closed", "repetition"),
    )
    item_table, item = "per_problem", "problem_id"
    is_published = thinks = True

    items: Sequence[Problem]
    prompts: Prompts = Prompts()
    n_think: int = SOLUTION_TOKENS
    n_tokens: int = NUMBER_TOKENS

    @classmethod
    def of_run(cls, context: EvalContext) -> Arithmetic:
        """The problems of `--dataset`; a draw of the sums is even over their kinds."""
        options, source = context.options_as(ArithmeticOptions), context.source(HUB_ID)
        whole = load_problems(source, options.revision)
        items = draw(whole, options.limit, lambda p: p.kind)
        n_think = SOLUTION_TOKENS if options.n_think is None else options.n_think
        prompts = load_prompts(Prompts(), options.prompts, _SLOTS)
        words = words_of(options.prompts, OWN if source in BUNDLED_SETS else PARAPHRASE, ("number",))
        facts = {"dataset": source, "n_think": n_think, "words": words, "drawn": draw_fact(items, whole)}
        facts |= {"revision": revision_of(source, options.revision)} if is_on_hub(source) else {}
        return cls(
            items=items,
            prompts=prompts if thinks_aloud(context.tok, n_think) else replace(prompts, reasons=""),
            n_think=n_think,
            n_tokens=options.n_tokens,
            batch_size=options.batch_size,
            facts=facts,
        )

    @property
    def content(self) -> Any:
        """The texts, the tokens of thought and of an answer, and the problems."""
        return [*super().content, self.n_tokens]

    def ask(self, model: PreTrainedModel, tok: Tokenizer) -> Scores:
        """See `evaluate_arithmetic`."""
        texts, numbers = self.prompts, (self.n_think, self.n_tokens)
        return evaluate_arithmetic(model, tok, self.items, texts, *numbers, self.batch_size)

    def headlines(self, scores: Scores) -> dict[str, np.ndarray]:
        """`thought_accuracy` and `direct_accuracy`: 1 or 0 per problem; the latter alone where nothing was thought."""
        return {f"{name}_accuracy": values for name, values in right_answers(self.items, scores).items()}

    def tables(self, key: Mapping[str, Any], scores: ByAlpha, n_bootstrap: int) -> dict[str, Rows]:
        """The rows of both tables."""
        if self.n_think == 0:
            raise WsError("The tables of arithmetic compare answers after a thought with answers at once: --n-think 0.")
        return {
            "per_problem": [row for a, s in scores.items() for row in per_problem_rows(key, a, self.items, s)],
            "summary": [summary_row(key, a, self.items, s, scores[0.0], n_bootstrap) for a, s in scores.items()],
        }

    def render(self, summary: Sequence[Mapping[str, str]], folder: Path) -> str:
        """The rows of the summary table as tables for people."""
        return render(summary)

    def example(self, tok: Tokenizer, scores: ByAlpha) -> str:
        """One worked example, to read by eye: the problem, and both answers at every strength."""
        first = self.items[0]
        prompt = render_prompt(tok, self.prompts.number.format(question=first.text), opener=self.prompts.opener)
        lines = [f"Worked example (problem {first.id}, {first.number}):", prompt, ""]
        for alpha, s in sorted(scores.items()):
            cut = ", cut off" if s["forced"][0] else ""
            thought = " ".join(f"{s['thought'][0]} {s['answer'][0]}".split())
            lines.append(f"  alpha {alpha:+g}  at once: {' '.join(str(s['direct'][0]).split())[:200]}")
            lines.append(f"            after a thought of {int(s['n_tokens'][0])} tokens{cut}: {thought[-400:]}")
        return "\n".join(lines)


# ---- the command ----------------------------------------------------------------------------------------------------


def main(options: ArithmeticOptions) -> None:
    """The command `python -m ws.eval.arithmetic`."""
    context = open_context(options)
    console.show(context.carry_out(Arithmetic.of_run(context)))


if __name__ == "__main__":
    console.run(main, ArithmeticOptions, "python -m ws.eval.arithmetic")
