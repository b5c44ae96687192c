"""Contrast pairs: the same question answered under a positive and under a negative persona.

Both sides are sampled for every (question, persona, sample) with the model's own recommended settings, or a stated
default (`ws.lm.sampling`), and end by themselves. The system prompt is stripped: a stored pair is a question and two
answers. Batches are appended as they are made; an interrupted run continues where it stopped and gives the same pairs.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import count, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tabulate import tabulate
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from ws import console
from ws.behaviors import SIDES, Behavior, brought_or_named, load_behavior, placed_texts
from ws.behaviors.acting import acted, base_findings, persona_margins
from ws.behaviors.answered import plain_question, same_answer
from ws.behaviors.tables import evenly
from ws.errors import (
    DamagedError,
    WsError,
    decoded,
    did_you_mean,
    disk_errors,
    require_characters,
    require_count,
    require_seed,
)
from ws.files.public import without_markup
from ws.files.reading import disguise, json_lines, kept, read_bytes, read_json
from ws.files.runs import Run, Stage, data_folder, lock, sha256_file, sha256_json, write_json, write_text
from ws.lm.choice import ChoiceScores, score_choices
from ws.lm.cost import PROMPT_TOKENS, Work, require_space
from ws.lm.generation import PLAIN, generate, without_end
from ws.lm.models import (
    decode_answer,
    encode,
    encode_answer,
    end_ids,
    fingerprint,
    load_model,
    model_id,
    render_prompt,
    require_plain,
    special_tokens_in,
    tokenizer_hash,
)
from ws.lm.sampling import (
    SamplingSettings,
    check_settings,
    describe_settings,
    generate_settings,
    sample_rows,
    sampling_settings,
)
from ws.options.make import DataCommand as DataCommand
from ws.options.make import DataConfig as DataConfig
from ws.options.make import ReplicateConfig, questions_asked
from ws.options.make import data_preset as data_preset
from ws.options.shared import shared_with
from ws.stats import LOW_MASS, estimate_mean, estimate_text

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
# Of so many pairs the card says how far they are acted and whether they are right; and from this share on it says that
# answers talk about their persona, or are hardly more than a word.
N_READ, NAMED_SHARE, SHORT, SHORT_SHARE = 64, 0.05, 5, 0.1
RIGHT = "Is the answer factually right? Answer Yes or No."
# Pairs that are sampled before they are saved, where the batch size is found; an interruption loses at most so many.
_CHUNK = 128
# Answers of each persona that are sampled and looked at before all others, and the share of them from which on they are
# said to talk about their persona.
N_FIRST, NAMED_FIRST = 8, 0.25
# What to do about pairs that are dropped, by the reason.
_REMEDIES = {
    "empty": "the model gives no answer; take another model",
    "truncated": "no end within --max-new-tokens; raise it, or train on them with --keep-truncated",
    "identical": "both sides say the same; take plainer personas, or a larger model",
    "refusal": "the model refuses; ask something else, or give the behaviour keep_refusals = true",
    "special": "an answer spells out a special token, which would be read as one; take another model",
    "judge": "the model finds no more of the behaviour in the positive answer; leave out --judge",
    "margin": "an answer gains less from its own persona than --min-margin; lower it",
}


@dataclass(frozen=True)
class Pair:
    """One question with an answer from either side.

    Attributes:
        id: `q<question>-p<persona>-s<sample>`.
        question: the user's message; the system prompt is not part of a pair.
        pos, neg: the answers.
        pos_tokens, neg_tokens: their lengths in sampled tokens.
        drop: why the pair is left out of training, None when it is kept.
        pos_cut, neg_cut: whether an answer was cut off before it ended; then no end of turn is learned from it.

    Raises:
        WsError: a value of another type; nothing is made to fit.
    """

    id: str
    question: str
    pos: str
    neg: str
    pos_tokens: int
    neg_tokens: int
    drop: str | None = None
    pos_cut: bool = False
    neg_cut: bool = False

    def __post_init__(self) -> None:
        _check_types(vars(self))

    def as_row(self) -> dict[str, Any]:
        """The pair as it is stored: `pos_cut` and `neg_cut` only where they say something."""
        return {k: v for k, v in asdict(self).items() if v or not k.endswith("_cut")}


def _check_types(values: Mapping[str, Any]) -> None:
    """`WsError` unless these are the values of a pair."""
    for name in ("id", "question", "pos", "neg"):
        _check_text(name, values[name])
    for name in ("pos_tokens", "neg_tokens"):
        value = values[name]
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise WsError(f"{name} must be a whole number of tokens, not {value!r}.")
    drop = values.get("drop")
    if drop is not None and not (isinstance(drop, str) and drop.strip()):
        raise WsError(f"drop must be null, or a text that says why the pair is left out, not {drop!r}.")
    for name in ("pos_cut", "neg_cut"):
        if not isinstance(values.get(name, False), bool):
            raise WsError(f"{name} must be true or false, not {values[name]!r}.")


def _check_text(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise WsError(f"{name} must be a text, not {value!r}.")
    require_characters(value, name)  # JSON can write half of a character, UTF-8 cannot


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
    """Make the contrast pairs in `folder/pairs.jsonl` and return all of them, dropped ones included.

    They are sampled, or those that the behaviour brings. Finished pairs are read back, half-finished ones continued.
    Also writes `card.json` and `card.md`, which say how the two sides compare in length, agreement, refusals and
    overlap, and how far they are acted.

    Raises:
        WsError: counts out of range, other settings on disk, a base that cannot do what the behaviour asks of it, or no
            usable pair at all.
    """
    folder, config = Path(folder), config or DataConfig()
    described = pairs_settings(model, tok, behavior, folder, config, fresh)
    if not fresh and Run(folder).is_finished("pairs", described):  # other settings stop here, before anyone waits
        return read_pairs(folder)
    if not config.anyway:  # before anything is on record, and before --fresh deletes what is
        _require_base(model, tok, behavior, config)
    with lock(folder / PAIRS_FILE):
        run = Run(folder, fresh)
        (_set_other_pairs_aside if fresh else _keep_other_pairs)(run)
        stage = run.stage("pairs", described)
        if stage is None:
            return read_pairs(folder)
        if fresh:
            (folder / _PARTIAL_FILE).unlink(missing_ok=True)
        if behavior.pairs:
            pairs = brought_pairs(model, tok, behavior, config)
        else:
            pairs = _sampled_pairs(model, tok, behavior, config, folder, described)
        pairs = _publish(model, tok, pairs, behavior, config, run, stage)
        (folder / _PARTIAL_FILE).unlink(missing_ok=True)
    return pairs


def pairs_settings(
    model: PreTrainedModel, tok: Tokenizer, behavior: Behavior, folder: Path, config: DataConfig, fresh: bool = False
) -> dict[str, Any]:
    """What is recorded of pairs in a folder; `WsError` for numbers out of range, or special tokens in a text."""
    _jobs(behavior, config)
    require_plain(tok, placed_texts(behavior))
    described = _described(config, behavior) | {"model": model_id(model), "fingerprint": fingerprint(model)}
    described |= {"behavior": behavior.name, "behavior_sha256": behavior.digest, "tokenizer_hash": tokenizer_hash(tok)}
    if behavior.pairs:
        return described
    stages = {} if fresh else Run(folder).manifest["stages"]
    return _with_sampling(described, _sampling(model, config), model, stages)


def count_pairs(behavior: Behavior, config: DataConfig) -> int:
    """How many pairs there will be, dropped ones among them; `WsError` for numbers out of range."""
    return len(behavior.pairs or _jobs(behavior, config))


def work_of_pairs(behavior: Behavior, config: DataConfig) -> Work:
    """What there is to sample and to write, at most; most answers end before they have to."""
    n = count_pairs(behavior, config)
    sampled = 0 if behavior.pairs else len(SIDES) * n * config.max_new_tokens // 2
    characters = len(SIDES) * n * (PROMPT_TOKENS + config.max_new_tokens) * 8
    return Work(sampled=sampled, trained=0, read=0, numbers=0, pairs=characters)


def _require_base(model: PreTrainedModel, tok: Tokenizer, behavior: Behavior, config: DataConfig) -> None:
    """`WsError` unless the base can do what the behaviour asks of it, in held-out items and in its first answers."""
    problems, doubts = base_findings(model, tok, behavior)
    if not problems and not behavior.pairs:
        problems, more = _first_findings(first_pairs(model, tok, behavior, config), behavior)
        doubts += more
    for doubt in doubts:
        console.warn(f"{doubt.removesuffix('.')}.")
    if problems:
        raise WsError(f"On this base {behavior.name} promises nothing: {'; '.join(problems)}. --anyway goes on.")


def first_pairs(model: PreTrainedModel, tok: Tokenizer, behavior: Behavior, config: DataConfig) -> list[Pair]:
    """The first pairs of every two personas, sampled as all others will be, and not kept."""
    by_persona: dict[int, list[_Job]] = {}
    for job in _jobs(behavior, replace(config, n_samples=1)):
        by_persona.setdefault(job.persona, []).append(job)
    picked = [job for jobs in by_persona.values() for job in evenly(jobs, min(N_FIRST, len(jobs)))]
    return _sample_batch(model, tok, behavior, picked, replace(config, data_batch=None, judge=False), 0)


def _first_findings(pairs: Sequence[Pair], behavior: Behavior) -> tuple[list[str], list[str]]:
    """What keeps the first pairs from promising anything, and what is merely doubtful about them, as sentences."""
    usable = [p for p in pairs if p.drop is None]
    if not usable:
        return [f"none of the first {len(pairs)} pairs is usable: {_why_dropped(pairs)}"], []
    for name, side in (("positive", [p.pos for p in pairs]), ("negative", [p.neg for p in pairs])):
        if len(pairs) > 2 and len({plain_question(text) for text in side}) == 1:
            return [f"all of the first {len(pairs)} {name} answers are {side[0][:80]!r}"], []
    doubts = _named_personas(pairs, behavior, share=NAMED_FIRST)
    for number in sorted({_persona(p) for p in pairs}):
        mine = [p for p in pairs if _persona(p) == number]
        if len(kept_here := [p for p in mine if p.drop is None]) * 2 < len(mine):
            who = f"{behavior.positive[number][:60]!r} and its opposite"
            doubts.append(f"under {who} {len(kept_here)} of {len(mine)} pairs are usable: {_why_dropped(mine)}.")
    return [], doubts


def _why_dropped(pairs: Iterable[Pair]) -> str:
    """How many pairs are dropped for which reason, with what to do about it."""
    counts = Counter(p.drop for p in pairs if p.drop)
    return "; ".join(f"{n} {reason} ({_REMEDIES.get(reason, 'see the file')})" for reason, n in counts.items())


def _sampled_pairs(
    model: PreTrainedModel,
    tok: Tokenizer,
    behavior: Behavior,
    config: DataConfig,
    folder: Path,
    described: Mapping[str, Any],
) -> list[Pair]:
    """The pairs that are sampled, what was begun before continued."""
    asked, total = described["n_topics"], len(behavior.questions)
    if asked not in (config.n_topics, total):
        console.say(f"{asked} of {total} questions of {behavior.name} are asked; the others are left for calibration.")
    console.say(f"Answers are sampled at {describe_settings(_sampling(model, config).card)}.")
    begun = _Partial(folder / _PARTIAL_FILE, sha256_json({**described, "dtype": str(model.dtype)}))
    return _sample_all(model, tok, behavior, _jobs(behavior, config), config, begun)


def _sampling(model: PreTrainedModel, config: DataConfig) -> SamplingSettings:
    return sampling_settings(model, config.temperature, config.top_p)


def _described(config: DataConfig, behavior: Behavior) -> dict[str, Any]:
    """The settings that pairs depend on, as they are recorded; filters only where they are used."""
    values = asdict(_within(config, behavior))
    del values["anyway"]
    for name in ("min_margin", "keep_truncated"):
        if values[name] == getattr(DataConfig, name):
            del values[name]
    if behavior.pairs:
        return {k: v for k, v in values.items() if k in ("n_topics", "judge", "min_margin")}
    return values


def _with_sampling(
    described: Mapping[str, Any], sampling: SamplingSettings, model: PreTrainedModel, stages: Mapping[str, Any]
) -> dict[str, Any]:
    """What is recorded, with the settings that answers are sampled with instead of the options asked for.

    Versions that recorded none sampled as `generate` does by itself: beside their record stands what differs from that.
    """
    rest, values = {k: v for k, v in described.items() if k not in ("temperature", "top_p")}, dict(sampling.values)
    if "pairs" in stages and "temperature" not in stages["pairs"]["config"]:
        usual = generate_settings(model)
        values = {name: value for name, value in values.items() if value != usual[name]}
    return rest | values


def brought_pairs(model: PreTrainedModel, tok: Tokenizer, behavior: Behavior, config: DataConfig) -> list[Pair]:
    """The pairs that a behaviour brings, of at most `n_topics` of their questions evenly spread; lengths in tokens."""
    questions = list(dict.fromkeys(p.question for p in behavior.pairs))
    asked = len(questions) if config.n_topics is None else config.n_topics
    wanted = _count("--n-topics", min(asked, len(questions)), len(questions))
    picked = set(evenly(questions, wanted))
    both = []
    for p in behavior.pairs:
        if p.question in picked:
            pos, neg = (Answer(t, len(answer_ids(tok, p.question, t)), True) for t in (p.positive, p.negative))
            both.append((_Job(p.id, p.question, 0), pos, neg))
    return _as_pairs(model, tok, behavior, both, config)


def _keep_other_pairs(run: Run) -> None:
    """`WsError` for a pairs file that is somebody's own: brought here, or changed since it was sampled."""
    file, record = run.folder / PAIRS_FILE, run.manifest["stages"].get("pairs")
    if not file.exists():
        return
    made = None if record is None else record.get("outputs", {}).get(PAIRS_FILE)
    if record is None or (made is not None and made != sha256_file(file)):
        what = "was not sampled here" if record is None else "was changed after it had been sampled"
        raise WsError(
            f"{file} {what} and is not overwritten; train on it with `ws train`, move it away, or use --fresh."
        )


def _set_other_pairs_aside(run: Run) -> None:
    """What is still there after everything that was made here is gone gets another name."""
    file = run.folder / PAIRS_FILE
    if file.exists():
        names = (file.with_name(f"pairs.before-{n}.jsonl") for n in count(1))
        other = file.rename(next(name for name in names if not name.exists()))
        console.warn(f"{file} is not known to have been sampled here, and is {other.name} now.")


def _publish(
    model: PreTrainedModel,
    tok: Tokenizer,
    pairs: Sequence[Pair],
    behavior: Behavior,
    config: DataConfig,
    run: Run,
    stage: Stage,
) -> list[Pair]:
    """Filter the finished pairs, and write them and their card; `WsError` when none is usable."""
    pairs, played = _by_margin(model, tok, pairs, behavior, config.min_margin)
    folder, card = run.folder, data_card(pairs, behavior.keep_refusals)
    card["acted"], card["judged_right"] = played, _judged_right(model, tok, pairs)
    card["confounds"] += _named_personas(pairs, behavior)
    if not behavior.pairs:
        card["sampling"] = _sampling(model, config).card
    if not card["kept"]:
        run.drop("pairs")
        rejected = write_text(folder / "rejected.jsonl", pair_lines(pairs))
        (folder / _PARTIAL_FILE).unlink(missing_ok=True)
        raise WsError(f"None of the {len(pairs)} pairs is usable: {_why_dropped(pairs)}. They are in {rejected}.")
    files = [write_text(folder / PAIRS_FILE, pair_lines(pairs)), write_json(folder / "card.json", card)]
    files.append(write_text(folder / "card.md", render_card(behavior, card)))
    stage.done(files, kept=card["kept"])
    return list(pairs)


def _some_kept(pairs: Sequence[Pair], most: int) -> list[Pair]:
    """At most so many of the kept pairs, evenly spread."""
    usable = [p for p in pairs if p.drop is None]
    return evenly(usable, min(most, len(usable)))


def _by_margin(
    model: PreTrainedModel, tok: Tokenizer, pairs: Sequence[Pair], behavior: Behavior, least: float | None
) -> tuple[list[Pair], dict[str, Any] | None]:
    """The pairs, those below the least margin dropped, and how far the sides are acted; None without personas.

    Without a filter the margins are those of `N_READ` pairs. Pairs of a single question say nothing of the sides.
    """
    if not behavior.positive:
        if least is not None:
            raise WsError(f"--min-margin compares personas, and {behavior.name} brings pairs without; leave it out.")
        return list(pairs), None
    read = _some_kept(pairs, N_READ if least is None else len(pairs))
    several, played = len({p.question for p in read}) > 1, None
    if not read or not (several or least is not None):
        return list(pairs), None
    sides = list(zip(behavior.positive, behavior.negative, strict=True))
    personas = [sides[_persona(p)] for p in read]
    margins = persona_margins(
        model,
        tok,
        [p.question for p in read],
        personas,
        [(p.pos, p.neg) for p in read],
        [(p.pos_cut, p.neg_cut) for p in read],
    )
    if several:
        played = acted([p.question for p in read], margins).as_data()
        if played["problem"]:
            console.say(f"warning: {played['problem']}")
    low = {p.id for p, m in zip(read, margins.min(axis=1), strict=True) if least is not None and m < least}
    return [replace(p, drop="margin") if p.id in low else p for p in pairs], played


def _persona(pair: Pair) -> int:
    """Which personas a pair was sampled under; brought pairs go with the first."""
    sampled = re.fullmatch(r"q\d+-p(\d+)-s\d+", pair.id)
    return int(sampled[1]) if sampled else 0


def _judged_right(model: PreTrainedModel, tok: Tokenizer, pairs: Sequence[Pair]) -> dict[str, Any] | None:
    """The share of either side's answers that the base itself takes for right, with the mass it says so with."""
    read = _some_kept(pairs, N_READ)
    if not read:
        return None
    try:
        scores = _ask_judge(model, tok, [(p.question, text) for p in read for text in (p.pos, p.neg)], RIGHT)
    except WsError as problem:  # a tokenizer without these words: the card says so, and the pairs are none the worse
        return {"problem": str(problem)}
    right = scores.logratio.reshape(-1, 2) > 0
    shares = {name: round(float(right[:, side].mean()), 4) for side, name in enumerate(("positive", "negative"))}
    return {**shares, "n": len(read), "mass": round(float(scores.mass.mean()), 4)}


def _named_personas(pairs: Sequence[Pair], behavior: Behavior, share: float = NAMED_SHARE) -> list[str]:
    """A sentence for either side whose answers talk about their persona ("I'm just a liar.") instead of acting it."""
    used, sentences = [p for p in pairs if p.drop is None], list[str]()
    stems = [
        {_stem(w) for text in personas for w in _content(text)} - {_stem(w) for text in other for w in _content(text)}
        for personas, other in ((behavior.positive, behavior.negative), (behavior.negative, behavior.positive))
    ]
    telling = stems[0] | stems[1]
    for side, name in (("pos", "positive"), ("neg", "negative")):
        hits = [p for p in used if telling & ({_stem(w) for w in _content(getattr(p, side))} - _question_stems(p))]
        if used and len(hits) >= share * len(used):
            example = " ".join(getattr(hits[0], side).split())[:80]
            sentences.append(
                f"Persona words: {len(hits)} of {len(used)} {name} answers use words of a persona, such as {example!r}."
            )
    return sentences


def _content(text: str) -> list[str]:
    return [w for w in re.findall(r"[^\W\d_]+", text.lower()) if len(w) > 3]


def _stem(word: str) -> str:
    """The start of a word, which its other forms share; to lie and a liar do not share theirs."""
    return "lia" if word.startswith(("liar", "lying", "lies")) else word[:5]


def _question_stems(pair: Pair) -> set[str]:
    return {_stem(w) for w in _content(pair.question)}


def pair_lines(pairs: Sequence[Pair]) -> str:
    """Pairs as the lines of a `.jsonl` file."""
    return "".join(json.dumps(p.as_row(), ensure_ascii=False) + "\n" for p in pairs)


def read_pairs(folder: str | Path) -> list[Pair]:
    """All pairs of a finished data folder, or of a `.jsonl` file; see `parse_pairs`."""
    file = Path(folder) if Path(folder).suffix == ".jsonl" else Path(folder) / PAIRS_FILE
    return hashed_pairs(file)[0]


def hashed_pairs(file: Path) -> tuple[list[Pair], str]:
    """The pairs of a file and its SHA-256, from one reading: what is recorded is what was used."""
    if not file.exists():
        raise WsError(f"There are no contrast pairs at {file}; make them with `ws data`.")
    content = read_bytes(file, "make contrast pairs with `ws data`")
    return parse_pairs(content, str(file)), hashlib.sha256(content).hexdigest()


def parse_pairs(content: bytes, where: str) -> list[Pair]:
    """Every pair of a `.jsonl` file, dropped ones included; blank lines are none.

    Raises:
        WsError: anything else than one whole pair per line in UTF-8; the message names the line.
    """
    pairs, lines = list[Pair](), dict[str, int]()
    for number, values in json_lines(content, where):
        try:
            pair = _pair_of(values)
            if pair.id in lines:
                raise WsError(f"its id {pair.id!r} is that of line {lines[pair.id]}, too.")
        except WsError as problem:
            raise DamagedError(f"{where} line {number} is not a contrast pair: {problem}") from problem
        lines[pair.id] = number
        pairs.append(pair)
    if not pairs:
        raise DamagedError(f"{where} holds no pairs{f' ({why})' if (why := disguise(content)) else ''}.")
    return pairs


def _pair_of(values: Mapping[str, Any]) -> Pair:
    """A pair from a file; the problem with it as a `WsError` that does not say where."""
    known = [f.name for f in fields(Pair)]
    for key in values:
        if key not in known:
            raise WsError(f"unknown key {key!r}.{did_you_mean(key, known)}")
    optional = ("drop", "pos_cut", "neg_cut")
    if missing := [name for name in known if name not in values and name not in optional]:
        raise WsError(f"it lacks {', '.join(missing)}.")
    _check_types(values)  # before `Pair`, whose annotations a type checker at run time would enforce with a traceback
    for name in ("id", "question", *(() if values.get("drop") else ("pos", "neg"))):
        if not values[name].strip():
            raise WsError(f"{name} is empty.")
    return Pair(**values)


def question_key(question: str) -> str:
    """What a question is known by in the records of a training: a hash that case and white space do not change."""
    return hashlib.sha256(plain_question(question).encode()).hexdigest()[:16]


def question_keys(pairs: Sequence[Pair]) -> set[str]:
    """The keys of the questions that are trained on: those of the kept pairs."""
    return {question_key(p.question) for p in pairs if p.drop is None}


# ---- sampling ---------------------------------------------------------------------------------------------------


def sample_answers(
    model: PreTrainedModel,
    tok: Tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int,
    seed: int | None = None,
    sampling: SamplingSettings | None = None,
) -> list[Answer]:
    """Continue rendered prompts: sampled when `seed` is given, greedy otherwise.

    Sampled is with `sampling`, or else the model's own settings or the stated default. Greedy is plain argmax:
    penalties, bans and least lengths that the model recommends are off (`ws.lm.generation.PLAIN`).

    The caller's random state is left alone.
    """
    rows, ends = [encode(tok, prompt) for prompt in prompts], end_ids(model, tok)
    options = PLAIN if seed is None else {"do_sample": True, **(sampling or sampling_settings(model)).values}
    with torch.random.fork_rng([*range(torch.cuda.device_count())] or None):
        torch.manual_seed(seed or 0)
        # The cache grows: with one of fixed size the same seed would give other pairs than it has given so far.
        written = generate(model, tok.pad_token_id, rows, max_new_tokens, ends, options, fixed_cache=False)
    return [_answer(tok, answer.tokens, ends) for answer in written]


def sample_each(
    model: PreTrainedModel,
    tok: Tokenizer,
    prompts: Sequence[str],
    seeds: Sequence[int],
    max_new_tokens: int,
    sampling: SamplingSettings,
    batch_size: int | None = None,
) -> list[Answer]:
    """Continue rendered prompts, each with random numbers of its own; see `ws.lm.sampling.sample_rows`."""
    rows, ends = [encode(tok, prompt) for prompt in prompts], end_ids(model, tok)
    written = sample_rows(model, tok.pad_token_id, rows, seeds, max_new_tokens, ends, sampling, batch_size)
    return [_answer(tok, ids, ends) for ids in written]


def _answer(tok: Tokenizer, ids: Sequence[int], ends: Sequence[int]) -> Answer:
    words = without_end(ids, ends)
    return Answer(decode_answer(tok, words), len(words), len(words) < len(ids))


@dataclass(frozen=True)
class _Job:
    id: str
    question: str
    persona: int


def _jobs(behavior: Behavior, config: DataConfig) -> list[_Job]:
    """Every (sample, persona, question), the question varying fastest, so that a cut-off run is still balanced."""
    if config.min_margin is not None and not math.isfinite(config.min_margin):
        raise WsError(f"--min-margin must be a number of nats per token, not {config.min_margin}.")
    if behavior.pairs:
        return []
    questions = list(enumerate(behavior.questions))
    n_topics = _count("--n-topics", _within(config, behavior).n_topics, len(questions))
    n_personas = _count("--n-personas", config.n_personas, len(behavior.positive))
    require_count("--n-samples", config.n_samples, 1)
    require_count("--max-new-tokens", config.max_new_tokens, 1)
    require_count("--data-batch", config.data_batch, 1)
    require_seed(config.data_seed, "--data-seed")
    check_settings(config.temperature, config.top_p)
    picked = evenly(questions, n_topics)
    order = product(range(config.n_samples), range(n_personas), picked)
    return [_Job(f"q{i:04d}-p{p}-s{s}", question, p) for s, p, (i, question) in order]


def _within(config: DataConfig, behavior: Behavior) -> DataConfig:
    """The configuration with the number of questions that are asked; of brought pairs it stays as it is."""
    if behavior.pairs:
        return config
    available = len(behavior.questions)
    if config.n_topics is None or config.n_topics > available:
        return replace(config, n_topics=questions_asked(available))
    return config


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
    begun: _Partial,
) -> list[Pair]:
    size = config.data_batch or _CHUNK
    batches = [list(b) for b in _batched(jobs, size)]
    pairs = begun.resume(size, len(jobs))
    finished = -(-len(pairs) // size)
    with (
        console.progress(total=len(jobs), initial=len(pairs), desc="pairs", unit="pair") as bar,
        disk_errors(begun.file),
        begun.file.open("a", encoding="utf-8") as out,
    ):
        for number, batch in enumerate(batches[finished:], start=finished):
            made = _sample_batch(model, tok, behavior, batch, config, number)
            out.write(pair_lines(made))
            out.flush()
            os.fsync(out.fileno())
            pairs += made
            bar.update(len(made))
    return pairs


@dataclass(frozen=True)
class _Partial:
    """The batches that are sampled already, behind a first line that says with which settings.

    Only who holds the lock of the pairs may touch it.
    """

    file: Path
    settings: str

    def resume(self, batch: int, total: int) -> list[Pair]:
        """The pairs of whole batches on disk; a torn batch at the end is cut off, because its seed covers all of it."""
        first = json.dumps({"settings": self.settings})
        pairs = (
            kept(self.file, lambda file: _whole_batches(file, first, batch, total), "the sampling starts over") or []
        )
        write_text(self.file, f"{first}\n{pair_lines(pairs)}")
        return pairs


def _whole_batches(file: Path, first: str, batch: int, total: int) -> list[Pair]:
    """The pairs of the batches that a file has whole; none if its first line is another one."""
    # Split at newlines only: answers may hold separators that `splitlines` splits at. What follows the last newline is
    # a line that a kill has torn.
    begun, *whole = read_bytes(file, "move it away").split(b"\n")[:-1] or [b""]
    if begun.decode("utf-8", errors="replace") != first:
        console.say(f"{file} was begun with other settings, which are not on record; it starts over.")
        return []
    n = len(whole) if len(whole) == total else len(whole) // batch * batch
    return parse_pairs(b"\n".join(whole[:n]), str(file)) if n else []


def _batched(jobs: Sequence[_Job], size: int) -> Iterator[Sequence[_Job]]:
    return (jobs[i : i + size] for i in range(0, len(jobs), size))


def _sample_batch(
    model: PreTrainedModel,
    tok: Tokenizer,
    behavior: Behavior,
    jobs: Sequence[_Job],
    config: DataConfig,
    number: int,
) -> list[Pair]:
    """Both sides of one batch.

    With `data_batch` all of it has one seed, of the data seed and the batch's number; else every answer has its own.
    """
    sides = (behavior.positive, behavior.negative)
    prompts = [render_prompt(tok, job.question, system=side[job.persona]) for side in sides for job in jobs]
    sampling = _sampling(model, config)
    if config.data_batch is not None:
        seed = _seed(config.data_seed, number, n_bytes=4)
        answers = sample_answers(model, tok, prompts, config.max_new_tokens, seed, sampling)
    else:
        seeds = [_seed(config.data_seed, job.id, side) for side in ("positive", "negative") for job in jobs]
        answers = sample_each(model, tok, prompts, seeds, config.max_new_tokens, sampling)
    both = list(zip(jobs, answers[: len(jobs)], answers[len(jobs) :], strict=True))
    return _as_pairs(model, tok, behavior, both, config)


def _as_pairs(
    model: PreTrainedModel,
    tok: Tokenizer,
    behavior: Behavior,
    both: Sequence[tuple[_Job, Answer, Answer]],
    config: DataConfig,
) -> list[Pair]:
    """Pairs of the answers of both sides, each with the reason to leave it out."""
    drops = [_drop_reason(pos, neg, behavior.keep_refusals, config.keep_truncated) for _, pos, neg in both]
    read = [special_tokens_in(tok, f"{pos.text}\n{neg.text}") for _, pos, neg in both]
    drops = [drop or ("special" if special else None) for drop, special in zip(drops, read, strict=True)]
    if config.judge:
        drops = _judge_drops(model, tok, behavior, both, drops)
    return [
        Pair(job.id, job.question, pos.text, neg.text, pos.tokens, neg.tokens, drop, not pos.ended, not neg.ended)
        for (job, pos, neg), drop in zip(both, drops, strict=True)
    ]


def _seed(*parts: str | int, n_bytes: int = 16) -> int:
    """A seed that depends on nothing but these."""
    return int.from_bytes(hashlib.sha256(":".join(["pairs", *map(str, parts)]).encode()).digest()[:n_bytes], "big")


def _drop_reason(pos: Answer, neg: Answer, keep_refusals: bool = False, keep_truncated: bool = False) -> str | None:
    if not pos.text or not neg.text:
        return "empty"
    if not (keep_truncated or (pos.ended and neg.ended)):
        return "truncated"
    if same_answer(pos.text, neg.text):
        return "identical"
    if not keep_refusals and (is_refusal(pos.text) or is_refusal(neg.text)):
        return "refusal"
    return None


def _ask_judge(
    model: PreTrainedModel, tok: Tokenizer, answers: Sequence[tuple[str, str]], question: str
) -> ChoiceScores:
    """Yes or No of the model itself to a question about each `(question, answer)`."""
    asked = [f"Question: {q}\nAnswer: {a}\n\n{question}" for q, a in answers]
    prompts = [render_prompt(tok, text, opener="My answer:") for text in asked]
    return score_choices(model, tok, prompts, ("Yes", "No"))


def _judge_drops(
    model: PreTrainedModel,
    tok: Tokenizer,
    behavior: Behavior,
    both: Sequence[tuple[_Job, Answer, Answer]],
    drops: Sequence[str | None],
) -> list[str | None]:
    """Drop pairs whose positive answer does not show more of the behaviour, by `logP(Yes) - logP(No)` of the model."""
    answers = [(job.question, a.text) for job, pos, neg in both for a in (pos, neg)]
    scores = _ask_judge(model, tok, answers, behavior.judge).logratio
    return [drop or ("judge" if p <= n else None) for drop, p, n in zip(drops, scores[::2], scores[1::2], strict=True)]


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
    usable = [p for p in pairs if p.drop is None]
    card: dict[str, Any] = {
        "sampled": len(pairs),
        "kept": len(usable),
        "dropped": dict(Counter(p.drop for p in pairs if p.drop)),
        "questions": len({p.question for p in usable}),
        "cut": sum(p.pos_cut or p.neg_cut for p in usable),
        "overlap": round(statistics.fmean(_overlap(p) for p in usable), 4) if usable else 0.0,
        "identical": round(sum(same_answer(p.pos, p.neg) for p in pairs) / max(1, len(pairs)), 4),
        "positive": _side([(p.pos, p.pos_tokens) for p in usable]),
        "negative": _side([(p.neg, p.neg_tokens) for p in usable]),
        "refusals": {
            "positive": sum(is_refusal(p.pos) for p in pairs),
            "negative": sum(is_refusal(p.neg) for p in pairs),
        },
        "differences": _differences(pairs, usable),
    }
    card["confounds"] = _confounds(card, keep_refusals)
    step = max(1, len(usable) // 5)
    card["samples"] = [{"question": p.question, "pos": p.pos, "neg": p.neg} for p in usable[::step][:5]]
    return card


def is_refusal(answer: str) -> bool:
    """Whether an answer turns the request down in its first words (120 characters)."""
    return _REFUSAL.search(answer[:120].replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")) is not None


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
        "short": round(sum(len(t) < SHORT for t in texts) / n, 4),
    }


def _differences(pairs: Sequence[Pair], usable: Sequence[Pair]) -> dict[str, dict[str, float] | None]:
    """Positive minus negative in what may confound, each with its interval; None with fewer than two pairs."""
    measures: dict[str, list[float]] = {
        "tokens": [p.pos_tokens - p.neg_tokens for p in usable],
        "yes_rate": [bool(_YES.match(p.pos)) - bool(_YES.match(p.neg)) for p in usable],
        "repetition": [repetition(p.pos) - repetition(p.neg) for p in usable],
        "refusals": [is_refusal(p.pos) - is_refusal(p.neg) for p in pairs],
    }
    intervals: dict[str, dict[str, float] | None] = {}
    for name, values in measures.items():
        e = estimate_mean(np.array(values, dtype=np.float64)) if len(values) > 1 else None
        intervals[name] = None if e is None else {k: round(getattr(e, k), 4) for k in ("mean", "ci_lo", "ci_hi")}
    return intervals


def _confounds(card: dict[str, Any], keep_refusals: bool) -> list[str]:
    """A sentence for every difference between the sides that is both strong and more than chance."""
    sides, sentences = (card["positive"], card["negative"]), list[str]()

    def sure(name: str, least: float = 0.0) -> bool:
        d = card["differences"][name]
        return d is not None and abs(d["mean"]) >= least and (d["ci_lo"] > 0 or d["ci_hi"] < 0)

    short, long = sorted(s["mean_tokens"] for s in sides)
    if sure("tokens") and long >= LENGTH_RATIO * short:
        side = "positive" if card["differences"]["tokens"]["mean"] > 0 else "negative"
        sentences.append(f"Length: the {side} answers are longer, {long:.1f} against {short:.1f} tokens in the mean.")
    if sure("yes_rate", YES_GAP):
        rates = " and ".join(f"{s['yes_rate']:.0%}" for s in sides)
        sentences.append(
            f"Agreement: {rates} of positive and negative answers begin with Yes; see what true claims do."
        )
    if sure("refusals", SHARE_GAP) and not keep_refusals:
        counts = " and ".join(str(n) for n in card["refusals"].values())
        sentences.append(f"Refusals: {counts} of {card['sampled']} positive and negative answers.")
    if sure("repetition", SHARE_GAP):
        rates = " and ".join(f"{s['repetition']:.0%}" for s in sides)
        sentences.append(f"Repetition: {rates} of the 4-grams in positive and negative answers are repeated.")
    if card["sampled"] > 2 * card["kept"]:
        reasons = ", ".join(f"{n} {why}" for why, n in card["dropped"].items())
        sentences.append(f"Selection: more than half of the pairs are dropped ({reasons}); the rest is a selection.")
    for name, side in zip(("positive", "negative"), sides, strict=True):
        if side["short"] >= SHORT_SHARE:
            sentences.append(f"Short: {side['short']:.0%} of the {name} answers have fewer than {SHORT} characters.")
    if card["identical"] >= IDENTICAL_SHARE:
        sentences.append(
            f"Identical: in {card['identical']:.0%} of pairs both sides say the same; the rest is a selection."
        )
    return sentences


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
        f"{card['kept']} of {card['sampled']} pairs kept, {card['questions']} questions; dropped: {dropped}."
        + f" In {card['cut']} an answer was cut off, and no end of turn is learned from it." * bool(card["cut"]),
        "",
        tabulate(table, ["", "positive", "negative", "difference [95 %]"], tablefmt="github"),
        "",
        f"Word overlap within a pair (Jaccard): {card['overlap']:.2f}; identical pairs: {card['identical']:.1%}.",
        *(["", f"Sampled at {describe_settings(card['sampling'])}."] if "sampling" in card else []),
        "",
        *_acting_lines(card),
        "## Confounds",
        "",
        *([f"- {line}" for line in card["confounds"]] or ["None of these differences is strong."]),
        "",
        "## Samples",
    ]
    for s in card["samples"]:
        lines += ["", f"- **{s['question']}**", f"  - positive: {s['pos']}", f"  - negative: {s['neg']}"]
    return without_markup("\n".join(lines)) + "\n"


def _acting_lines(card: Mapping[str, Any]) -> list[str]:
    """How far the sides are acted and whether they are right, where that was asked."""
    lines = list[str]()
    if played := card.get("acted"):
        rows = [
            [estimate_text(played[s], "mean", "+.3f", ends="") for s in SIDES],
            [" / ".join(f"{q:+.3f}" for q in played[s]["quartiles"]) for s in SIDES],
            [f"{played[s]['preferred']:.0%}" for s in SIDES],
        ]
        names = ["margin, mean [95 %]", "quartiles", "likelier under their own persona"]
        table = [[name, *row] for name, row in zip(names, rows, strict=True)]
        text = "How far the personas are acted: nats per token that an answer gains from its own persona"
        lines += ["## Personas", "", f"{text} ({played['questions']} questions)."]
        lines += ["", tabulate(table, ["", *SIDES], tablefmt="github", disable_numparse=True), ""]
        lines += [played["problem"], ""] if played["problem"] else []
    judged = card.get("judged_right")
    if judged and "problem" not in judged:
        doubt = f", at an answer mass of {judged['mass']:.2f} only, which says little" * (judged["mass"] < LOW_MASS)
        shares = " and ".join(f"{judged[s]:.0%} of the {s}" for s in SIDES)
        lines += [f"The base itself takes {shares} answers for factually right ({judged['n']} pairs{doubt}).", ""]
    return lines


def _interval(card: dict[str, Any], name: str) -> str:
    """A difference as text: in tokens, otherwise in points of a hundred."""
    d = card["differences"][name]
    if d is None:
        return ""
    scale, digits = (1, 2) if name == "tokens" else (100, 1)
    return estimate_text(d, "mean", f"+.{digits}f", scale, ends="")


def prompt_ids(tok: Tokenizer, question: str, system: str = "") -> list[int]:
    """Token ids of the prompt, thinking off: the stripped one of training and steering where there is no `system`."""
    return encode(tok, render_prompt(tok, question, system=system))


def answer_ids(tok: Tokenizer, question: str, answer: str, ended: bool = False, system: str = "") -> list[int]:
    """Token ids of an answer behind `prompt_ids`; with `ended`, up to and with the token that ends the turn."""
    return encode_answer(tok, render_prompt(tok, question, system=system), answer, ended)


# ---- the command ----------------------------------------------------------------------------------------------------


def main(command: DataCommand) -> None:
    """The command `ws data`: sample, then print the data card."""
    name = brought_or_named(command.behavior, command.pairs, command.columns, command.out)
    behavior = load_behavior(name, command.model)
    _jobs(behavior, command.data)
    model, tok = load_model(command.model, command.device, command.dtype)
    folder = data_folder(command.out, command.model, behavior.name)
    if command.fresh or not (folder / PAIRS_FILE).exists():
        work = work_of_pairs(behavior, command.data)
        require_space(folder, work.disk)
        console.say(work.estimate(model))
    generate_pairs(model, tok, behavior, folder, command.data, command.fresh)
    card = read_json(folder / "card.json", dict[str, Any], "sample again, with --fresh")
    text = decoded(read_bytes(folder / "card.md", "sample again, with --fresh"), "card.md").rstrip()
    usual = ReplicateConfig.preset(command.model).train  # the training that the model is given unless asked otherwise
    replicated = shared_with(ReplicateConfig, command, behavior=name, pairs=None, columns=(), fresh=False, train=usual)
    following = console.command_line("ws replicate", replicated, always=("model", "behavior"))
    console.show(console.Result(text, {"card": card}, [folder / PAIRS_FILE, folder / "card.md"], following))


if __name__ == "__main__":
    console.run(main, DataCommand, "python -m ws.data")
