"""Contrast pairs: the same question answered under a positive and under a negative persona.

Both sides are sampled for every (question, persona, sample) with the model's own recommended settings and end by
themselves. The system prompt is stripped: a stored pair is a question and two answers. Batches are appended as they are
made; an interrupted run continues where it stopped and gives the same pairs.
"""

from __future__ import annotations

import hashlib
import json
import re
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tabulate import tabulate
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from ws import console
from ws.behaviors import Behavior, load_behavior
from ws.errors import WsError
from ws.eval.choice import score_choices
from ws.eval.groups import group_mean
from ws.models import DEFAULT_MODEL, encode, end_ids, fingerprint, load_model, model_id, render_prompt
from ws.runs import DEFAULT_OUT, Run, data_folder, write_json, write_text

PAIRS_FILE = "pairs.jsonl"
_PARTIAL_FILE = "pairs.partial.jsonl"
_REFUSAL = re.compile(
    r"\b(i can(?:'|no)t (?:help|assist|do|answer|provide|pretend)|i cannot (?:help|assist|do|answer|provide|pretend)"
    r"|i(?:'m| am) sorry, but|i(?:'m| am) (?:not able|unable) to|i won't (?:help|do|pretend))",
    re.IGNORECASE,
)
_YES = re.compile(r"\W*yes\b", re.IGNORECASE)
_WORD = re.compile(r"\w+|[^\w\s]")
# A difference between the sides of a pair set, or between steered and unsteered answers, is strong from here on.
LENGTH_RATIO, SHARE_GAP, YES_GAP, IDENTICAL_SHARE = 1.25, 0.1, 0.2, 0.2


@dataclass(frozen=True)
class Pair:
    """One question with an answer from either side.

    Attributes:
        id: `q<question>-p<persona>-s<sample>`.
        question: the user's message; the system prompt is not part of a pair.
        pos, neg: the answers.
        pos_tokens, neg_tokens: their lengths in sampled tokens.
        drop: why the pair is left out of training, None when it is kept.
    """

    id: str
    question: str
    pos: str
    neg: str
    pos_tokens: int
    neg_tokens: int
    drop: str | None = None


@dataclass(frozen=True)
class DataConfig:
    """How many pairs to sample, and how.

    Attributes:
        n_topics: questions to use at most, evenly spread over the pool; None for all.
        n_personas: persona pairs to use; None for all.
        n_samples: answers per question and persona, on each side.
        max_new_tokens: answers that have not ended by then are dropped as truncated.
        data_batch: pairs sampled at once.
        data_seed: seed of the sampling.
        judge: drop pairs in which the model itself does not find more of the behaviour in the positive answer.
    """

    n_topics: int | None = None
    n_personas: int | None = None
    n_samples: int = 4
    max_new_tokens: int = 256
    data_batch: int = 32
    data_seed: int = 0
    judge: bool = False


def data_preset(model: str) -> DataConfig:
    """The defaults for a model; the bundled ones answer in a few tokens and need fewer samples."""
    if model == "tiny-random":
        return DataConfig(n_topics=16, n_samples=1, max_new_tokens=64, data_batch=8)
    if model == "pocket":
        return DataConfig(n_topics=400, n_samples=2, max_new_tokens=64, data_batch=200)
    return DataConfig()


@dataclass(frozen=True)
class Answer:
    """A sampled answer: its text, its length in tokens, and whether it ended by itself."""

    text: str
    tokens: int
    ended: bool


def generate_pairs(
    model: PreTrainedModel,
    tok: Tokenizer,
    behavior: Behavior,
    folder: str | Path,
    config: DataConfig | None = None,
    fresh: bool = False,
) -> list[Pair]:
    """Sample contrast pairs into `folder/pairs.jsonl` and return all of them, dropped ones included.

    Finished pairs are read back, half-finished ones continued. Also writes `card.json` and `card.md`, which say how the
    two sides compare in length, agreement, refusals and overlap.

    Raises:
        WsError: counts out of range, other settings on disk, or no usable pair at all.
    """
    folder, config = Path(folder), config or DataConfig()
    jobs = _jobs(behavior, config)
    run = Run(folder, fresh)
    if fresh:
        (folder / _PARTIAL_FILE).unlink(missing_ok=True)
    elif (folder / PAIRS_FILE).exists() and "pairs" not in run.manifest["stages"]:
        raise WsError(
            f"{folder / PAIRS_FILE} was not sampled here and is not overwritten; train on it with `ws train`, move it "
            "away, or use --fresh."
        )
    described = asdict(_within(config, behavior)) | {"model": model_id(model), "fingerprint": fingerprint(model)}
    described |= {"behavior": behavior.name, "behavior_sha256": behavior.digest}
    stage = run.stage("pairs", described)
    if stage is None:
        return read_pairs(folder)
    if config.n_topics is not None and config.n_topics > len(behavior.questions):
        console.say(f"All {len(behavior.questions)} questions of {behavior.name} are used; --n-topics allows for more.")
    pairs = _sample_all(model, tok, behavior, jobs, config, folder / _PARTIAL_FILE)
    card = data_card(pairs, behavior.keep_refusals)
    if not card["kept"]:
        run.drop("pairs")
        rejected = (folder / _PARTIAL_FILE).replace(folder / "rejected.jsonl")
        raise WsError(f"None of the {len(pairs)} sampled pairs is usable: {card['dropped']}; read {rejected}.")
    (folder / _PARTIAL_FILE).replace(folder / PAIRS_FILE)
    write_json(folder / "card.json", card)
    write_text(folder / "card.md", render_card(behavior, card))
    stage.done([folder / PAIRS_FILE, folder / "card.json", folder / "card.md"], kept=card["kept"])
    return pairs


def read_pairs(folder: str | Path) -> list[Pair]:
    """All pairs of a finished data folder, or of a `.jsonl` file."""
    file = Path(folder) if Path(folder).suffix == ".jsonl" else Path(folder) / PAIRS_FILE
    if not file.is_file():
        raise WsError(f"There are no contrast pairs at {file}; make them with `python -m ws.data`.")
    pairs = []
    for number, line in enumerate(_lines(file), start=1):
        try:
            pairs.append(Pair(**json.loads(line)))
        except (json.JSONDecodeError, TypeError) as problem:
            raise WsError(f"{file} line {number} is not a contrast pair ({problem}).") from problem
    if not pairs:
        raise WsError(f"{file} holds no pairs.")
    return pairs


def _lines(file: Path) -> list[str]:
    """Whole lines, split at newlines only: answers may hold separators that `splitlines` would split at too."""
    return file.read_bytes().decode("utf-8", errors="replace").split("\n")[:-1]


# ---- sampling ---------------------------------------------------------------------------------------------------


def sample_answers(
    model: PreTrainedModel,
    tok: Tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int,
    seed: int | None = None,
) -> list[Answer]:
    """Continue rendered prompts: sampled with the model's recommended settings when `seed` is given, greedy otherwise.

    The caller's random state is left alone.
    """
    ends = end_ids(model, tok)
    batch = tok(list(prompts), add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
    options: dict[str, Any] = {"do_sample": True}
    if seed is None:
        options = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(seed or 0)
        out = model.generate(
            input_ids=batch["input_ids"].to(model.device),
            attention_mask=batch["attention_mask"].to(model.device),
            max_new_tokens=max_new_tokens,
            eos_token_id=ends,
            pad_token_id=tok.pad_token_id,
            **options,
        )
    return [_answer(tok, row, ends) for row in out[:, batch["input_ids"].shape[1] :].tolist()]


def _answer(tok: Tokenizer, ids: list[int], ends: Sequence[int]) -> Answer:
    stop = next((i for i, token in enumerate(ids) if token in ends), None)
    kept = ids if stop is None else ids[:stop]
    return Answer(tok.decode(kept, skip_special_tokens=True).strip(), len(kept), stop is not None)


@dataclass(frozen=True)
class _Job:
    id: str
    question: str
    persona: int


def _jobs(behavior: Behavior, config: DataConfig) -> list[_Job]:
    """Every (sample, persona, question), the question varying fastest, so that a cut-off run is still balanced."""
    questions = list(enumerate(behavior.questions))
    n_topics = _count("--n-topics", _within(config, behavior).n_topics, len(questions))
    n_personas = _count("--n-personas", config.n_personas, len(behavior.positive))
    for flag, value in (("--n-samples", config.n_samples), ("--max-new-tokens", config.max_new_tokens)):
        if value < 1:
            raise WsError(f"{flag} must be at least 1, not {value}.")
    picked = [questions[i * len(questions) // n_topics] for i in range(n_topics)]
    order = product(range(config.n_samples), range(n_personas), picked)
    return [_Job(f"q{i:04d}-p{p}-s{s}", question, p) for s, p, (i, question) in order]


def _within(config: DataConfig, behavior: Behavior) -> DataConfig:
    """The configuration with no more questions than the behaviour has."""
    wanted, available = config.n_topics, len(behavior.questions)
    return config if wanted is None else replace(config, n_topics=min(wanted, available))


def _count(flag: str, wanted: int | None, available: int) -> int:
    if wanted is None:
        return available
    if not 1 <= wanted <= available:
        raise WsError(f"{flag} {wanted} is out of range; this behaviour has {available}.")
    return wanted


def _sample_all(
    model: PreTrainedModel,
    tok: Tokenizer,
    behavior: Behavior,
    jobs: Sequence[_Job],
    config: DataConfig,
    file: Path,
) -> list[Pair]:
    batches = [list(b) for b in _batched(jobs, config.data_batch)]
    pairs = _resume(file, config.data_batch, len(jobs))
    finished = -(-len(pairs) // config.data_batch)
    with (
        console.progress(total=len(jobs), initial=len(pairs), desc="pairs", unit="pair") as bar,
        file.open("a", encoding="utf-8") as out,
    ):
        for number, batch in enumerate(batches[finished:], start=finished):
            made = _sample_batch(model, tok, behavior, batch, config, number)
            out.write("".join(json.dumps(asdict(p), ensure_ascii=False) + "\n" for p in made))
            out.flush()
            pairs += made
            bar.update(len(made))
    return pairs


def _batched(jobs: Sequence[_Job], size: int) -> Iterator[Sequence[_Job]]:
    if size < 1:
        raise WsError(f"--data-batch must be at least 1, not {size}.")
    return (jobs[i : i + size] for i in range(0, len(jobs), size))


def _resume(file: Path, batch: int, total: int) -> list[Pair]:
    """The pairs of whole batches on disk; a torn batch at the end is cut off, because its seed covers all of it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.is_file():
        return []
    whole = _lines(file)
    kept = len(whole) if len(whole) == total else len(whole) // batch * batch
    write_text(file, "".join(f"{line}\n" for line in whole[:kept]))
    return read_pairs(file) if kept else []


def _sample_batch(
    model: PreTrainedModel,
    tok: Tokenizer,
    behavior: Behavior,
    jobs: Sequence[_Job],
    config: DataConfig,
    number: int,
) -> list[Pair]:
    """Both sides of one batch in one call; its seed depends on nothing but the data seed and the batch's number."""
    sides = (behavior.positive, behavior.negative)
    prompts = [render_prompt(tok, job.question, system=side[job.persona]) for side in sides for job in jobs]
    seed = int.from_bytes(hashlib.sha256(f"pairs:{config.data_seed}:{number}".encode()).digest()[:4], "big")
    answers = sample_answers(model, tok, prompts, config.max_new_tokens, seed)
    both = list(zip(jobs, answers[: len(jobs)], answers[len(jobs) :], strict=True))
    drops = [_drop_reason(pos, neg, behavior.keep_refusals) for _, pos, neg in both]
    if config.judge:
        drops = _judge_drops(model, tok, behavior, both, drops)
    return [
        Pair(job.id, job.question, pos.text, neg.text, pos.tokens, neg.tokens, drop)
        for (job, pos, neg), drop in zip(both, drops, strict=True)
    ]


def _drop_reason(pos: Answer, neg: Answer, keep_refusals: bool = False) -> str | None:
    if not pos.text or not neg.text:
        return "empty"
    if not (pos.ended and neg.ended):
        return "truncated"
    if _same(pos.text, neg.text):
        return "identical"
    if not keep_refusals and (is_refusal(pos.text) or is_refusal(neg.text)):
        return "refusal"
    return None


def _judge_drops(
    model: PreTrainedModel,
    tok: Tokenizer,
    behavior: Behavior,
    both: Sequence[tuple[_Job, Answer, Answer]],
    drops: Sequence[str | None],
) -> list[str | None]:
    """Drop pairs whose positive answer does not show more of the behaviour, by `logP(Yes) - logP(No)` of the model."""
    asked = [
        render_prompt(tok, f"Question: {job.question}\nAnswer: {a.text}\n\n{behavior.judge}", opener="My answer:")
        for job, pos, neg in both
        for a in (pos, neg)
    ]
    scores = score_choices(model, tok, asked, ("Yes", "No")).logratio
    return [drop or ("judge" if p <= n else None) for drop, p, n in zip(drops, scores[::2], scores[1::2], strict=True)]


def _same(a: str, b: str) -> bool:
    return " ".join(a.lower().split()) == " ".join(b.lower().split())


# ---- the data card ------------------------------------------------------------------------------------------------


def data_card(pairs: Sequence[Pair], keep_refusals: bool = False) -> dict[str, Any]:
    """How the two sides compare, before anything is trained on them: confounds show here first.

    Lengths are in tokens; `yes_rate` is the share of answers that begin with Yes; `repetition` the mean of the function
    of that name; `overlap` the mean Jaccard index of the two answers' word sets. `differences` are means of positive
    minus negative, pair by pair, with 95 % intervals. All but `sampled`, `dropped`, `identical` and `refusals` are over
    the kept pairs. `confounds` says in sentences which differences are strong.

    Args:
        pairs: all that were sampled.
        keep_refusals: refusals are what the behaviour is about, so a difference in them is no confound.
    """
    kept = [p for p in pairs if p.drop is None]
    card: dict[str, Any] = {
        "sampled": len(pairs),
        "kept": len(kept),
        "dropped": dict(Counter(p.drop for p in pairs if p.drop)),
        "questions": len({p.question for p in kept}),
        "overlap": round(statistics.fmean(_overlap(p) for p in kept), 4) if kept else 0.0,
        "identical": round(sum(_same(p.pos, p.neg) for p in pairs) / max(1, len(pairs)), 4),
        "positive": _side([(p.pos, p.pos_tokens) for p in kept]),
        "negative": _side([(p.neg, p.neg_tokens) for p in kept]),
        "refusals": {
            "positive": sum(is_refusal(p.pos) for p in pairs),
            "negative": sum(is_refusal(p.neg) for p in pairs),
        },
        "differences": _differences(pairs, kept),
    }
    card["confounds"] = _confounds(card, keep_refusals)
    step = max(1, len(kept) // 5)
    card["samples"] = [{"question": p.question, "pos": p.pos, "neg": p.neg} for p in kept[::step][:5]]
    return card


def is_refusal(answer: str) -> bool:
    """Whether an answer turns the request down in its first words (120 characters)."""
    return _REFUSAL.search(answer[:120]) is not None


def repetition(answer: str) -> float:
    """The share of an answer's 4-grams of words (and marks) that occurred in it before; 0 when it is shorter.

    seq-rep-4 with words for tokens; see `repeated_ngrams`.
    """
    return repeated_ngrams(_WORD.findall(answer.lower()))


def repeated_ngrams(items: Sequence[int] | Sequence[str], n: int = 4) -> float:
    """seq-rep-n, the share of n-grams that occurred before (Welleck et al. 2020, arXiv 1908.04319); 0 without any."""
    grams = [tuple(items[i : i + n]) for i in range(len(items) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _side(answers: Sequence[tuple[str, int]]) -> dict[str, float]:
    """What one side's answers are like; `answers` are texts with their lengths."""
    texts, lengths, n = [t for t, _ in answers], [n for _, n in answers], max(1, len(answers))
    return {
        "mean_tokens": round(statistics.fmean(lengths), 2) if lengths else 0.0,
        "median_tokens": statistics.median(lengths) if lengths else 0.0,
        "yes_rate": round(sum(bool(_YES.match(t)) for t in texts) / n, 4),
        "distinct": round(len(set(texts)) / n, 4),
        "repetition": round(sum(map(repetition, texts)) / n, 4),
    }


def _differences(pairs: Sequence[Pair], kept: Sequence[Pair]) -> dict[str, dict[str, float] | None]:
    """Positive minus negative in what may confound, each with its interval; None with fewer than two pairs."""
    measures: dict[str, list[float]] = {
        "tokens": [p.pos_tokens - p.neg_tokens for p in kept],
        "yes_rate": [bool(_YES.match(p.pos)) - bool(_YES.match(p.neg)) for p in kept],
        "repetition": [repetition(p.pos) - repetition(p.neg) for p in kept],
        "refusals": [is_refusal(p.pos) - is_refusal(p.neg) for p in pairs],
    }
    found: dict[str, dict[str, float] | None] = {}
    for name, values in measures.items():
        e = group_mean(np.array(values, dtype=np.float64)) if len(values) > 1 else None
        found[name] = None if e is None else {k: round(getattr(e, k), 4) for k in ("mean", "ci_lo", "ci_hi")}
    return found


def _confounds(card: dict[str, Any], keep_refusals: bool) -> list[str]:
    """A sentence for every difference between the sides that is both strong and more than chance."""
    sides, found = (card["positive"], card["negative"]), list[str]()

    def sure(name: str, least: float = 0.0) -> bool:
        d = card["differences"][name]
        return d is not None and abs(d["mean"]) >= least and (d["ci_lo"] > 0 or d["ci_hi"] < 0)

    short, long = sorted(s["mean_tokens"] for s in sides)
    if sure("tokens") and long >= LENGTH_RATIO * short:
        side = "positive" if card["differences"]["tokens"]["mean"] > 0 else "negative"
        found.append(f"Length: the {side} answers are longer, {long:.1f} against {short:.1f} tokens in the mean.")
    if sure("yes_rate", YES_GAP):
        rates = " and ".join(f"{s['yes_rate']:.0%}" for s in sides)
        found.append(f"Agreement: {rates} of positive and negative answers begin with Yes; see what true claims do.")
    if sure("refusals", SHARE_GAP) and not keep_refusals:
        counts = " and ".join(str(n) for n in card["refusals"].values())
        found.append(f"Refusals: {counts} of {card['sampled']} positive and negative answers.")
    if sure("repetition", SHARE_GAP):
        rates = " and ".join(f"{s['repetition']:.0%}" for s in sides)
        found.append(f"Repetition: {rates} of the 4-grams in positive and negative answers are repeated.")
    if card["identical"] >= IDENTICAL_SHARE:
        found.append(
            f"Identical: in {card['identical']:.0%} of pairs both sides say the same; the rest is a selection."
        )
    return found


def _overlap(pair: Pair) -> float:
    a, b = (set(re.findall(r"\w+", t.lower())) for t in (pair.pos, pair.neg))
    return len(a & b) / max(1, len(a | b))


def render_card(behavior: Behavior, card: dict[str, Any]) -> str:
    """The data card as Markdown."""
    sides = [card["positive"], card["negative"]]
    dropped = ", ".join(f"{n} {why}" for why, n in card["dropped"].items()) or "none"
    tokens, yes, repeated, refusals = (_interval(card, k) for k in ("tokens", "yes_rate", "repetition", "refusals"))
    table = [
        ["tokens, mean", *(s["mean_tokens"] for s in sides), tokens],
        ["tokens, median", *(s["median_tokens"] for s in sides), ""],
        ["answers that begin with Yes", *(f"{s['yes_rate']:.1%}" for s in sides), yes],
        ["repeated 4-grams", *(f"{s['repetition']:.1%}" for s in sides), repeated],
        ["distinct answers", *(f"{s['distinct']:.1%}" for s in sides), ""],
        ["refusals, of all sampled", card["refusals"]["positive"], card["refusals"]["negative"], refusals],
    ]
    lines = [
        f"# Data card: {behavior.name}",
        "",
        f"{card['kept']} of {card['sampled']} sampled pairs kept, {card['questions']} questions; dropped: {dropped}.",
        "",
        tabulate(table, ["", "positive", "negative", "difference [95 %]"], tablefmt="github"),
        "",
        f"Word overlap within a pair (Jaccard): {card['overlap']:.2f}; identical pairs: {card['identical']:.1%}.",
        "",
        "## Confounds",
        "",
        *([f"- {line}" for line in card["confounds"]] or ["None of these differences is strong."]),
        "",
        "## Samples",
    ]
    for s in card["samples"]:
        lines += ["", f"- **{s['question']}**", f"  - positive: {s['pos']}", f"  - negative: {s['neg']}"]
    return "\n".join(lines) + "\n"


def _interval(card: dict[str, Any], name: str) -> str:
    """A difference as text: in tokens, otherwise in points of a hundred."""
    d = card["differences"][name]
    if d is None:
        return ""
    scale, digits = (1, 2) if name == "tokens" else (100, 1)
    mean, low, high = (f"{scale * d[k]:+.{digits}f}" for k in ("mean", "ci_lo", "ci_hi"))
    return f"{mean} [{low}, {high}]"


def prompt_ids(tok: Tokenizer, question: str) -> list[int]:
    """Token ids of the stripped prompt (no system prompt, thinking off), as training and steering see it."""
    return encode(tok, render_prompt(tok, question, system=""))


# ---- the command ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataCommand:
    """Sample contrast pairs for a behaviour.

    Attributes:
        model: hub id, local folder, `pocket` or `tiny-random`.
        behavior: a bundled behaviour or the path of a TOML file.
        out: pairs go to `<out>/data/<model>/<behavior>/`.
        device, dtype: see `ws.load_model`.
        fresh: start over, forgetting what is on disk.
        data: how many, and how.
    """

    model: str = DEFAULT_MODEL
    behavior: str = "honesty"
    out: Path = DEFAULT_OUT
    device: str = "auto"
    dtype: str = "auto"
    fresh: bool = False
    data: DataConfig = field(default_factory=DataConfig)

    @classmethod
    def preset(cls, model: str = DEFAULT_MODEL) -> DataCommand:
        """The defaults for a model."""
        return cls(model=model, data=data_preset(model))


def main(command: DataCommand) -> None:
    """The command `ws data`: sample, then print the data card."""
    behavior = load_behavior(command.behavior, command.model)
    _jobs(behavior, command.data)
    model, tok = load_model(command.model, command.device, command.dtype)
    folder = data_folder(command.out, command.model, behavior.name)
    generate_pairs(model, tok, behavior, folder, command.data, command.fresh)
    card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    text = (folder / "card.md").read_text(encoding="utf-8").rstrip()
    console.show(console.Result(text, {"card": card}, [folder / PAIRS_FILE, folder / "card.md"]))


if __name__ == "__main__":
    console.run(main, DataCommand, "python -m ws.data")
