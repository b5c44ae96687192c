"""What steering costs in general ability, on neutral text and neutral questions that show none of the behaviour.

With `x_1..x_T` the tokens of a neutral text, and both models reading the same text,

    nll(t) = -log p(x_t | x_<t)                                                                     in nats
    perplexity = exp(mean of nll over all tokens of all texts)
    KL(t) = sum_v p(v | x_<t) (log p(v | x_<t) - log p_base(v | x_<t))                              in nats

and of the model's own greedy answers to neutral questions, the share that is valid and

    seq-rep-4 = 1 - (different 4-grams) / (4-grams)         Welleck et al. 2020, arXiv 1908.04319, of tokens

An answer is valid when it ends by itself within the budget of tokens, holds a letter or a digit, and repeats at most
half of its 4-grams. A system prompt is no part of a text, so there is no nll and no KL under one.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from tabulate import tabulate
from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from ws import console
from ws.behaviors.tables import Row, draw, draw_fact, read_rows
from ws.data import repeated_ngrams
from ws.errors import WsError, decoded
from ws.eval.context import EvalContext, open_context
from ws.eval.evaluation import ByAlpha, Evaluation, HeadlineScore, Rows, Scores
from ws.eval.prompts import notes_on
from ws.eval.readable import PER_TOKEN, SHARE
from ws.files.reading import read_bytes
from ws.lm.batches import in_batches, in_groups, row_logits
from ws.lm.divergence import QUANTILE, token_kl
from ws.lm.generation import generate, without_end
from ws.lm.models import BUNDLED, decode_answer, default_system, encode, encode_text, end_ids, render_prompt
from ws.options.measure import ANSWER_TOKENS, TEXT_TOKENS
from ws.options.measure import CapabilityOptions as CapabilityOptions
from ws.stats import N_BOOTSTRAP, Estimate, columns_of, estimate_mean, estimate_text

NAME, VERSION = "capability", 2
MOST_REPEATED = 0.5
BUNDLED_SETS = ("general", "pocket")
START_BATCH = 32
# Bytes of one model's float32 logits of a batch of texts, and positions whose float32 probabilities are held at once.
_BUDGET, _POSITIONS = 2**29, 128

Item = TypeVar("Item")


@dataclass(frozen=True)
class Neutral:
    """What a model reads and what it is asked.

    Attributes:
        texts: to read, each at least two tokens long.
        questions: user turns to answer.
    """

    texts: tuple[str, ...]
    questions: tuple[str, ...]


# ---- scores ---------------------------------------------------------------------------------------------------------


def base_twin(model: PreTrainedModel) -> PreTrainedModel:
    """The model a second time, on the same tensors: whatever steers `model` from now on does not act on the twin.

    The weights are shared and not copied. Make it before steering; hooks that are there already come along.
    """
    shared: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def evaluate_capability(
    model: PreTrainedModel,
    tok: Tokenizer,
    items: Neutral,
    base: PreTrainedModel,
    max_tokens: int = TEXT_TOKENS,
    n_tokens: int = ANSWER_TOKENS,
    batch_size: int | None = None,
) -> Scores:
    """Let the model, as it stands, read the texts and answer the questions.

    ```python
    base = base_twin(model)
    with ws.steer(model, dW, alpha=1.0):
        scores = evaluate_capability(model, tok, neutral, base)
    ```

    Args:
        items: what is read and what is asked.
        base: what the KL divergence is measured from; see `base_twin`.
        max_tokens: of each text; what is longer is cut.
        n_tokens: at most so many tokens of each answer.
        batch_size: rows at a time; None starts at what memory is budgeted for and takes fewer while it does not
            suffice.

    Returns:
        Per predicted token `text` (the number of its text), `nll` and `kl` in nats, which a tokenizer with a system
        prompt (`ws.intervene.prompt`) has none of: it is no part of a text; per question `answer`, `ended`,
        `n_tokens` (the end of turn not counted) and `repetition`.

    Raises:
        WsError: nothing to read or to ask, a text of a single token, or probabilities that are NaN.
    """
    return {
        **({} if default_system(tok) else read_texts(model, tok, items.texts, base, max_tokens, batch_size)),
        **answer_questions(model, tok, items.questions, n_tokens, batch_size),
    }


@torch.inference_mode()
def read_texts(
    model: PreTrainedModel,
    tok: Tokenizer,
    texts: Sequence[str],
    base: PreTrainedModel,
    max_tokens: int = TEXT_TOKENS,
    batch_size: int | None = None,
) -> Scores:
    """`text`, `nll` and `kl` of every predicted token; see `evaluate_capability`.

    The first token of a text is predicted only where the tokenizer puts a start-of-text token before it. At most
    `_BUDGET` bytes of logits per model are held at once, or those of one text where that is more.
    """
    rows = [encode_text(tok, text)[:max_tokens] for text in texts]
    short = [repr(text) for text, row in zip(texts, rows, strict=True) if len(row) < 2]
    if short or not rows:
        raise WsError(f"Neutral texts need at least two tokens each: {', '.join(short[:3]) or 'there are none'}.")
    vocabulary = int(model.config.get_text_config().vocab_size)
    most = max(1, _BUDGET // (4 * vocabulary * max(map(len, rows))))

    def run(part: Sequence[list[int]]) -> list[Tensor]:
        return in_groups(model, part, partial(_read_batch, model, base, tok.pad_token_id))

    scores = in_batches(rows, run, batch_size and min(batch_size, most), most, len, "neutral texts", "text")
    nll, kl = torch.cat(scores, dim=1).cpu().double().numpy()
    if not (np.isfinite(nll).all() and np.isfinite(kl).all()):
        raise WsError("The model gave NaN probabilities; its weights or the steering strength are broken.")
    return {"text": np.repeat(np.arange(len(rows)), [len(r) - 1 for r in rows]), "nll": nll, "kl": kl}


def _read_batch(
    model: PreTrainedModel, base: PreTrainedModel, pad_id: int, rows: list[list[int]]
) -> list[Float[Tensor, "2 _"]]:
    """`nll` and `kl` at every predicted token of every row."""
    # A text is given as answers are: what acts where a pass is read is to act at each of its tokens.
    steered, plain = (row_logits(m, pad_id, rows, keep=max(map(len, rows))) for m in (model, base))
    return [
        _token_scores(a[-len(row) : -1], b[-len(row) : -1], torch.tensor(row[1:], device=model.device))
        for a, b, row in zip(steered, plain, rows, strict=True)
    ]


def _token_scores(
    steered: Float[Tensor, "n vocab"], base: Float[Tensor, "n vocab"], targets: Int[Tensor, "n"]
) -> Float[Tensor, "2 n"]:
    parts = zip(*(t.split(_POSITIONS) for t in (steered, base, targets)), strict=True)
    return torch.cat([torch.stack([token_nll(a, target), token_kl(a, b)]) for a, b, target in parts], dim=1)


def token_nll(logits: Float[Tensor, "n vocab"], targets: Int[Tensor, "n"]) -> Float[Tensor, "n"]:
    """`-log softmax(logits)[target]` in nats per row, from float32."""
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")


@torch.inference_mode()
def answer_questions(
    model: PreTrainedModel,
    tok: Tokenizer,
    questions: Sequence[str],
    n_tokens: int = ANSWER_TOKENS,
    batch_size: int | None = None,
    opener: str = "",
) -> Scores:
    """`answer`, `ended`, `n_tokens` and `repetition` of the greedy answer to every question; no thinking.

    An `opener`, the start that is put into the model's mouth, is no part of the answer.
    """
    if not questions:
        raise WsError("There are no questions to ask.")
    prompts = [encode(tok, render_prompt(tok, q, opener=opener)) for q in questions]
    ends = end_ids(model, tok)

    def run(part: Sequence[list[int]]) -> list[tuple[list[int], bool]]:
        written = [answer.tokens for answer in generate(model, tok.pad_token_id, part, n_tokens, ends)]
        return [(without_end(ids, ends), ids[-1] in ends) for ids in written]

    answers = in_batches(prompts, run, batch_size, START_BATCH, len, "answers", "answer")
    return {
        "answer": np.array([decode_answer(tok, ids) for ids, _ in answers]),
        "ended": np.array([ended for _, ended in answers]),
        "n_tokens": np.array([len(ids) for ids, _ in answers]),
        "repetition": np.array([repeated_ngrams(ids) for ids, _ in answers]),
    }


def is_valid(scores: Scores) -> Bool[np.ndarray, "n"]:
    """Which answers end by themselves, hold a letter or a digit, and repeat at most half of their 4-grams."""
    words = np.array([any(c.isalnum() for c in str(answer)) for answer in scores["answer"]])
    return scores["ended"] & words & (scores["repetition"] <= MOST_REPEATED)


# ---- what it costs --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CapabilityCost:
    """What a condition costs against the base, for a results table.

    Attributes:
        shift: of the mean negative log-likelihood, in nats per token, from a bootstrap over texts; the perplexity is
            `exp(shift.mean)` times the base's. None, as the next two, under a system prompt.
        kl: the mean KL divergence from the base in nats per token, likewise.
        kl_p95: its 95th percentile over all tokens.
        valid, valid_shift: the share of valid answers, and its paired change.
        repetition, repetition_shift: the mean share of repeated 4-grams, and its paired change.
        n_tokens: the mean length of an answer.
    """

    shift: Estimate | None
    kl: Estimate | None
    kl_p95: float | None
    valid: float
    valid_shift: Estimate
    repetition: float
    repetition_shift: Estimate
    n_tokens: float


def capability_cost(base: Scores, scores: Scores, n_boot: int = N_BOOTSTRAP, seed: int = 0) -> CapabilityCost:
    """Compare the scores of a condition with those of the base on the same texts and questions."""
    text = scores.get("text")
    if len(base["ended"]) != len(scores["ended"]) or (text is not None and not np.array_equal(base["text"], text)):
        raise WsError("The two sets of capability scores are of different texts or questions.")
    valid, repetition = is_valid(scores), scores["repetition"]
    return CapabilityCost(
        shift=None if text is None else per_token(text, scores["nll"] - base["nll"], n_boot, seed),
        kl=None if text is None else per_token(text, scores["kl"], n_boot, seed),
        kl_p95=None if text is None else float(np.quantile(scores["kl"], QUANTILE)),
        valid=float(valid.mean()),
        valid_shift=estimate_mean(valid.astype(float) - is_valid(base), n_boot, seed),
        repetition=float(repetition.mean()),
        repetition_shift=estimate_mean(repetition - base["repetition"], n_boot, seed),
        n_tokens=float(scores["n_tokens"].mean()),
    )


def per_token(
    text: Int[np.ndarray, "n"], values: Float[np.ndarray, "n"], n_boot: int = N_BOOTSTRAP, seed: int = 0
) -> Estimate:
    """The mean of `values` over all tokens, with an interval from a bootstrap over texts.

    Texts differ in length, so the mean is a ratio `r = sum_i s_i / sum_i n_i` of the texts' sums and lengths. Its
    linearisation `r + (s_i - r n_i) / mean(n)` (delta method) has the mean `r` and is resampled.
    """
    totals, lengths = np.bincount(text, weights=values), np.bincount(text)
    ratio = values.mean()
    return estimate_mean(ratio + (totals - ratio * lengths) / lengths.mean(), n_boot, seed)


# ---- tables ---------------------------------------------------------------------------------------------------------


def per_text_rows(key: Mapping[str, Any], alpha: float, texts: Sequence[str], scores: Scores) -> Rows:
    """Rows of `capability_per_text.csv`; `key` holds behavior, adapter and seed."""
    rows = []
    for i, text in enumerate(texts if "text" in scores else ()):
        nll, kl = (scores[name][scores["text"] == i] for name in ("nll", "kl"))
        means = {"nll": float(nll.mean()), "kl_mean": float(kl.mean()), "kl_p95": float(np.quantile(kl, QUANTILE))}
        rows.append({**key, "alpha": alpha, "text_id": i, **means, "n_tokens": len(nll), "begins": text[:60]})
    return rows


def per_answer_rows(key: Mapping[str, Any], alpha: float, questions: Sequence[str], scores: Scores) -> Rows:
    """Rows of `capability_per_answer.csv`."""
    valid = is_valid(scores)
    return [
        {
            **key,
            "alpha": alpha,
            "question_id": i,
            "question": question,
            "valid": bool(valid[i]),
            "ended": bool(scores["ended"][i]),
            "n_tokens": int(scores["n_tokens"][i]),
            "repetition": float(scores["repetition"][i]),
            "answer": str(scores["answer"][i]),
        }
        for i, question in enumerate(questions)
    ]


def summary_row(key: Mapping[str, Any], alpha: float, scores: ByAlpha, n_boot: int) -> dict[str, Any]:
    """One row of `capability_summary.csv`; shifts are paired against the base, the interval of `valid` is Wilson's."""
    from scipy.stats import binomtest  # a third of a second, which all commands that can ask for this would pay for

    s = scores[alpha]
    cost = capability_cost(scores[0.0], s, n_boot)
    level = per_token(s["text"], s["nll"], n_boot) if "text" in s else None
    n = len(s["ended"])
    share = binomtest(int(is_valid(s).sum()), n).proportion_ci(method="wilson")
    with np.errstate(over="ignore"):
        perplexity = None if level is None else float(np.exp(level.mean))
    return {
        **key,
        "alpha": alpha,
        **columns_of(level, "nll", "ci_lo", "ci_hi"),
        "perplexity": perplexity,
        **columns_of(cost.shift, "shift", "ci_lo", "ci_hi", "p"),
        **columns_of(cost.kl, "kl_mean", "ci_lo", "ci_hi"),
        "kl_p95": cost.kl_p95,
        "valid": cost.valid,
        "valid_ci_lo": float(share.low),
        "valid_ci_hi": float(share.high),
        **cost.valid_shift.columns("valid_shift", "ci_lo", "ci_hi"),
        "ended": float(s["ended"].mean()),
        "repetition": cost.repetition,
        **cost.repetition_shift.columns("repetition_shift", "ci_lo", "ci_hi"),
        "mean_answer_tokens": cost.n_tokens,
        "n_texts": None if level is None else level.n,
        "n_positions": None if level is None else len(s["nll"]),
        "n_questions": n,
    }


# ---- what a person sees ---------------------------------------------------------------------------------------------


def render(summary: Sequence[Mapping[str, str]]) -> str:
    """The rows of the summary table, read from its file, as a table for people."""
    rows = [
        [
            f"{float(r['alpha']):+g}",
            f"{float(r['perplexity']):.2f}" if r["perplexity"] else "",
            estimate_text(r, "shift", "+.3f"),
            estimate_text(r, "kl_mean", ".3f"),
            f"{float(r['kl_p95']):.3f}" if r["kl_p95"] else "",
            estimate_text(r, "valid", ".3f"),
            f"{float(r['repetition']):.3f}",
            f"{float(r['mean_answer_tokens']):.1f}",
        ]
        for r in summary
    ]
    first = ["alpha", "perplexity", "shift, nats per token", "KL, mean", "KL, p95"]
    header = [*first, "valid answers", "repeated 4-grams", "tokens"]
    (base,) = (r for r in summary if float(r["alpha"]) == 0)
    note = (
        f"{base['n_texts']} neutral texts with {base['n_positions']} tokens, {base['n_questions']} neutral questions."
    )
    return "\n".join([tabulate(rows, header, disable_numparse=True), "", note, *notes_on(base)])


# ---- the evaluation -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Capability(Evaluation):
    """What steering costs: neutral texts are read and neutral questions answered.

    Attributes:
        items: the texts and the questions.
        base: what the KL divergence is measured from; see `base_twin`.
        max_tokens, n_tokens: see `evaluate_capability`.
    """

    name = NAME
    version = VERSION
    options = CapabilityOptions
    scores = (
        HeadlineScore(
            "nll",
            "negative log-likelihood of neutral text",
            "nats per token",
            label="neutral text",
            meaning="nats per token, what steering costs elsewhere",
            level="nll",
            level_ci="nll_",
            mass=None,
            low=None,
            n="n_texts",
            value="nll",
            floor=PER_TOKEN,
        ),
        HeadlineScore(
            "valid",
            "valid answers",
            "share",
            meaning="the share of answers to neutral questions that end and do not repeat themselves",
            level="valid",
            level_ci="valid_",
            shift="valid_shift",
            mass=None,
            low=None,
            n="n_questions",
            floor=SHARE,
        ),
        HeadlineScore(
            "repetition",
            "repeated 4-grams",
            "share",
            label=None,
            level="repetition",
            shift="repetition_shift",
            mass=None,
            low=None,
            n="n_questions",
            floor=SHARE,
        ),
    )
    item_table, item = "per_text", "text_id"

    items: tuple[tuple[str, ...], tuple[str, ...]]
    base: PreTrainedModel
    max_tokens: int = TEXT_TOKENS
    n_tokens: int = ANSWER_TOKENS

    @classmethod
    def of_run(cls, context: EvalContext) -> Capability:
        """The texts and questions that a run's options name; made before anything steers the context's model."""
        options = context.options_as(CapabilityOptions)
        ours = "pocket" if context.model.name_or_path in BUNDLED else "general"
        source = options.dataset or ours
        whole = load_texts(source, options.config, options.split), load_questions(options.questions or ours)
        texts, questions = (draw(part, options.limit) for part in whole)
        drawn = draw_fact([*texts, *questions], [*whole[0], *whole[1]])
        return cls(
            items=(texts, questions),
            base=base_twin(context.model),
            max_tokens=options.max_tokens,
            n_tokens=options.n_tokens,
            batch_size=options.batch_size,
            facts={"dataset": source, "max_answer_tokens": options.n_tokens, "drawn": drawn},
        )

    @property
    def neutral(self) -> Neutral:
        """The items by their kinds."""
        return Neutral(*self.items)

    @property
    def content(self) -> Any:
        """The numbers of tokens, the texts and the questions."""
        return [self.max_tokens, self.n_tokens, *self.items]

    def ask(self, model: PreTrainedModel, tok: Tokenizer) -> Scores:
        """See `evaluate_capability`."""
        return evaluate_capability(model, tok, self.neutral, self.base, self.max_tokens, self.n_tokens, self.batch_size)

    def headlines(self, scores: Scores) -> dict[str, np.ndarray]:
        """`nll`: nats per token, one number per text; `valid` (0 or 1) and `repetition`: one per answer."""
        heads = {"valid": is_valid(scores).astype(float), "repetition": scores["repetition"]}
        if "text" in scores:
            heads["nll"] = np.bincount(scores["text"], weights=scores["nll"]) / np.bincount(scores["text"])
        return heads

    def tables(self, key: Mapping[str, Any], scores: ByAlpha, n_bootstrap: int) -> dict[str, Rows]:
        """The rows of all three tables."""
        (texts, questions), by_alpha = self.items, scores.items()
        return {
            "per_text": [r for a, s in by_alpha for r in per_text_rows(key, a, texts, s)],
            "per_answer": [r for a, s in by_alpha for r in per_answer_rows(key, a, questions, s)],
            "summary": [summary_row(key, a, scores, n_bootstrap) for a in scores],
        }

    def render(self, summary: Sequence[Mapping[str, str]], folder: Path) -> str:
        """The rows of the summary table as a table for people."""
        return render(summary)

    def example(self, tok: Tokenizer, scores: ByAlpha) -> str:
        """One worked example, to read by eye: a text with its surprise, a question with its answer, by strength."""
        neutral = self.neutral
        lines = ["Worked example:", neutral.texts[0], ""]
        for alpha, s in sorted((alpha, s) for alpha, s in scores.items() if "text" in s):
            nll, kl = (float(s[name][s["text"] == 0].mean()) for name in ("nll", "kl"))
            lines.append(f"  alpha {alpha:+g}  {nll:.3f} nats per token, KL {kl:.4f}")
        lines += ["", neutral.questions[0], ""]
        for alpha, s in sorted(scores.items()):
            end = "" if s["ended"][0] else " ... (not ended)"
            lines.append(f"  alpha {alpha:+g}  {' '.join(str(s['answer'][0]).split())[:400]}{end}")
        return "\n".join(lines)


def load_texts(source: str, config: str = "default", split: str = "test") -> tuple[str, ...]:
    """Texts from a bundled set, a `.txt` file (paragraphs between empty lines), or a table with the column `text`.

    Args:
        source: `general`, `pocket`, a file, a folder with a table whose name ends in `texts`, or a hub id.
        config, split: of the hub's data set.
    """
    if Path(source).suffix == ".txt":
        return _some(re.split(r"\n\s*\n", _read_text(source)), source)
    rows = read_rows(_place(source), "texts", ("text",), (config, split))
    return _some([_cell(r, "text", i, source) for i, r in enumerate(rows, start=1)], source)


def load_questions(source: str) -> tuple[str, ...]:
    """Questions from a bundled set, a `.txt` file (one per line), or a table with the column `question`."""
    if Path(source).suffix == ".txt":
        return _some(_read_text(source).split("\n"), source)
    rows = read_rows(_place(source), "questions", ("question",), ("default", "test"))
    return _some([_cell(r, "question", i, source) for i, r in enumerate(rows, start=1)], source)


def _place(source: str) -> str:
    return str(files("ws") / "eval" / "neutral" / source) if source in BUNDLED_SETS else source


def _read_text(source: str) -> str:
    return decoded(read_bytes(Path(source).expanduser(), "give another file of texts"), source)


def _cell(row: Row, column: str, number: int, source: str) -> str:
    """A text of a table, empty where there is none; `WsError` for anything else."""
    value = row[column]
    if value is not None and not isinstance(value, str):
        raise WsError(f"Row {number} of {source} has {value!r:.60} for a text in `{column}`.")
    return value or ""


def _some(texts: Sequence[str], source: str) -> tuple[str, ...]:
    """The texts that are not blank."""
    non_blank = tuple(t.strip() for t in texts if t.strip())
    if not non_blank:
        raise WsError(f"There is no text in {source}.")
    if Path(source).suffix != ".txt" and len(non_blank) < len(texts):
        console.say(f"note: {len(texts) - len(non_blank)} of {len(texts)} rows of {source} are blank and left out.")
    return non_blank


# ---- the command ----------------------------------------------------------------------------------------------------


def main(options: CapabilityOptions) -> None:
    """The command `python -m ws.eval.capability`."""
    context = open_context(options)
    console.show(context.carry_out(Capability.of_run(context)))


if __name__ == "__main__":
    console.run(main, CapabilityOptions, "python -m ws.eval.capability")
