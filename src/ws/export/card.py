"""Model cards: what a published vector, or a model with one written into it, is, does, and must not be taken for.

Everything on a card comes from the vector and from its run: the recipe, the manifest, and those tables whose recorded
vector is this very one. Numbers of another vector, and folders of the machine it was made on, never get there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from tabulate import tabulate

from ws.analysis.controls import NULLS
from ws.behaviors import Behavior, load_behavior
from ws.diff import SteeringVector, vector_digest
from ws.errors import WsError
from ws.eval import dilemmas
from ws.eval.capability import Capability
from ws.eval.evaluation import Evaluation, HeadlineScore
from ws.eval.readable import MARK, NATS, PER_TOKEN, SHARE, WRONGNESS, worst
from ws.eval.suite import evaluations
from ws.files.public import is_local as is_local
from ws.files.public import public as public
from ws.files.public import public_command as public_command
from ws.files.public import public_name as public_name
from ws.files.public import without_markup
from ws.files.runs import CARD_TAG, Run, read_csv, reads_otherwise
from ws.lm.hub import parse_id
from ws.lm.models import BUNDLED, tokenizer_hash_on_disk
from ws.options.make import SIGNED
from ws.options.shared import BASE, WEIGHT
from ws.stats import LOW_MASS, estimate_text

_MAKERS = ("pos", "neg", SIGNED, "vector", "trim", "compose", "checkpoints")
_PERSONAS_SHOWN = 5
_CONTRASTS = ("pos - neg", "signed at +1 - (signed at -1)")  # as `_formula` has them


@dataclass(frozen=True)
class Subject:
    """What a card is about; made by `describe`.

    Attributes:
        vector: the vector.
        place: what a reader loads: `user/name` on the hub, or a folder's name.
        run: the folder of the run that made the vector, None when unknown.
        license: such as `apache-2.0`; None when it is not known, and then the card has none.
        digest: of the vector (`vector_digest`).
        stages: the finished stages of the run, by name.
        behavior: the behaviour exactly as it was when the vector was trained, None when that is not to be had.
        tokenizer: hash of the base's tokenizer with its chat template as it is now; empty when it is not at hand.
    """

    vector: SteeringVector
    place: str
    run: Path | None
    license: str | None
    digest: str
    stages: Mapping[str, Any]
    behavior: Behavior | None
    tokenizer: str = ""

    @property
    def control(self) -> str:
        """Which null the vector is, or was computed from; empty for any other."""
        known = self.stages.get("control", {}).get("config", {}).get("control")
        part_of = str(self.stages.get("trim", {}).get("config", {}).get("adapter"))
        named = (null for null in NULLS if part_of.endswith(f"-{null}"))
        return str(self.vector.info.get("control") or known or next(named, ""))

    @property
    def direction(self) -> int:
        """1 where adding the vector gives more of its behaviour, -1 where less, 0 where nothing says so."""
        return 0 if self.control else _direction(self.vector.recipe)

    def is_measured(self, stage: str, role: str = "weight") -> bool:
        """Whether a finished stage is on record with this very vector as its input `role`, and with this tokenizer."""
        record = self.stages.get(stage, {})
        return record.get("inputs", {}).get(role) == self.digest and not reads_otherwise(record, self.tokenizer)

    def tables(self, pattern: str) -> list[Path]:
        """Summary tables in the run's folder, whosever they are."""
        return sorted(self.run.glob(pattern)) if self.run else []


def describe(
    vector: SteeringVector,
    place: str,
    run: Path | None = None,
    behavior: str | None = None,
    license: str | None = None,
) -> Subject:
    """Collect what a card says of a vector; see `Subject`.

    Args:
        vector, place, run, license: see there.
        behavior: a name or a TOML file, None for the behaviour that the vector names.
    """
    stages = Run(run).manifest["stages"] if run else {}
    finished = {name: record for name, record in stages.items() if "outputs" in record}
    known = vector_digest(vector), finished, _behavior(vector, behavior), tokenizer_hash_on_disk(vector.base_id)
    return Subject(vector, place, run, license, *known)


def _behavior(vector: SteeringVector, name: str | None) -> Behavior | None:
    name = name or vector.info.get("behavior")
    if name is None:
        return None
    try:
        behavior = load_behavior(name, vector.base_id)
    except WsError:  # renamed, or somebody's own file that is not at hand
        return None
    return behavior if behavior.digest == vector.info.get("behavior_sha256") else None


def vector_card(about: Subject) -> ModelCard:
    """The card of a repository that holds a vector."""
    vector = about.vector
    family = str(vector.info.get("family", "mixed"))
    library = "peft" if vector.is_low_rank else "weight-steering"
    data = _front_matter(about, "adapter", library, [family, *(["lora"] if vector.is_low_rank else [])])
    return _card(data, [f"# {_title(about)}", _about_vector(about), _use_vector(about), *_shared(about, _MEASURED)])


def merged_card(about: Subject, alpha: float | int, lost: float | int, dtype: str) -> ModelCard:
    """The card of a whole model into which `alpha dW` was written.

    Args:
        about: the vector; `place` is where the model goes.
        alpha: the strength.
        lost: `‖written - wanted‖ / ‖wanted‖` over all changed parameters, as `SteeringVector.merge_into` returns it.
        dtype: of the weights, such as `bfloat16`.
    """
    data = _front_matter(about, "finetune", "transformers", ["merge"], pipeline_tag="text-generation")
    title = f"# {_title(about)}, written into the weights at alpha {alpha:+g}"
    measured = f"{_MEASURED} That was steering at the strengths listed, not this checkpoint."
    return _card(data, [title, _about_merged(about, alpha, lost, dtype), _use_merged(about), *_shared(about, measured)])


def stale_evaluations(about: Subject) -> list[str]:
    """Evaluations in the run's folder that are left off the card: made with another vector, or another tokenizer."""
    stages = {_stage_of(table) for cls in _measures() for table in about.tables(cls.summaries)}
    return sorted(name for name in stages if not about.is_measured(name))


# ---- the front matter and the words ---------------------------------------------------------------------------------


def _front_matter(
    about: Subject,
    relation: str,
    library: str,
    tags: Sequence[str],
    pipeline_tag: str | None = None,
) -> ModelCardData:
    """`base_model` only where the base has a name on the hub: the hub refuses others, and a folder's says nothing."""
    vector = about.vector
    base = vector.base_id if _is_on_hub(vector.base_id) else None
    behavior = [str(vector.info["behavior"])] if "behavior" in vector.info else []
    return ModelCardData(
        base_model=base,
        base_model_relation=relation if base else None,
        library_name=library,
        license=about.license,
        pipeline_tag=pipeline_tag,
        tags=list(dict.fromkeys([CARD_TAG, "steering-vector", *tags, *behavior])),
    )


def _is_on_hub(name: str) -> bool:
    return name not in BUNDLED and not is_local(name) and parse_id(name) == (name, None)


def _card(data: ModelCardData, parts: Sequence[str]) -> ModelCard:
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + without_markup("\n\n".join(parts)) + "\n")


def _title(about: Subject) -> str:
    behavior = about.vector.info.get("behavior") if about.direction == 1 else None
    return (
        f"{'A' if behavior is None else str(behavior).capitalize() + ': a'} steering vector for {_base(about.vector)}"
    )


def _base(vector: SteeringVector) -> str:
    return public_name(vector.base_id)


def _whose_base(vector: SteeringVector) -> str:
    """Where the base can be had, as far as that is known."""
    name = _base(vector)
    if vector.base_id in BUNDLED:
        return f"`{name}`, which comes with the package weight-steering"
    if _is_on_hub(vector.base_id):
        return f"`{name}`"
    if name == "unknown":
        return "a base model that is not recorded"
    return f"`{name}`, a model that was read from a folder and has no public name here"


def _about_vector(about: Subject) -> str:
    vector, use = about.vector, "The model is used with `W + alpha * dW`"
    change = f"A change `dW` of the weights of {_whose_base(vector)}"
    if not about.direction:
        return f"{change}, {_computed(about)}. {use}; what a positive `alpha` does is known from measurements alone."
    more, less = ("more", "less")[:: about.direction]
    what = f" More of it means: {about.behavior.summary}" if about.behavior else ""
    return (
        f"{change}, made by contrastive weight steering (Fierro & Roger 2025, arXiv 2511.05408): {_contrast(vector)}. "
        f"{use}; a positive `alpha` gives {more} of the behaviour, a negative one {less}.{what}"
    )


def _computed(about: Subject) -> str:
    """Of what the vector is, where that says nothing of its direction."""
    null = (
        f"; it is a null ({about.control}), trained on pairs whose sides do not differ in the behaviour, to show what "
        "any training does"
    )
    return f"computed as `vector` says below{null if about.control else ''}"


def _contrast(vector: SteeringVector) -> str:
    """What was trained, and what of it the vector is."""
    changed = "" if vector.recipe.get("op") == "+" else ", changed as `vector` says below"
    if vector.info.get("contrast") == SIGNED:
        return (
            "one adapter is trained, used with its change at +1 on answers that show a behaviour and at -1 on answers "
            f"that show its opposite (contrast: signed), and `dW` is its change at +1 minus that at -1{changed}"
        )
    return (
        "a model is fine-tuned twice from one start, on answers that show a behaviour and on answers that show its "
        f"opposite, and `dW` is `theta_pos - theta_neg`{changed}"
    )


def _about_merged(about: Subject, alpha: float | int, lost: float | int, dtype: str) -> str:
    more = {1: "more", -1: "less"}.get(about.direction)
    what = f" A positive strength means {more} of this: {about.behavior.summary}" if about.behavior and more else ""
    made = f"contrastive weight steering, Fierro & Roger 2025, arXiv 2511.05408: {_contrast(about.vector)}"
    made = made if more else _computed(about)
    return (
        f"The whole model {_whose_base(about.vector)} with a steering vector `dW` ({made}) written into its weights at "
        f"one fixed strength, `W + ({alpha:g}) * dW`, summed in float32 and cast to {dtype}. The cast destroyed "
        f"{lost:.2%} of `alpha * dW`: the Frobenius norm of what was written less what was wanted, over that of what "
        f"was wanted, all changed parameters together.{what}"
    )


def _use_vector(about: Subject) -> str:
    vector, base = about.vector, _base(about.vector)
    known = vector.base_id in BUNDLED or _is_on_hub(vector.base_id)
    code = [
        f"model, tok = ws.load_model({_literal(base if known else f'path/to/{base}')})",
        f"with ws.steer(model, ws.SteeringVector.load({_literal(about.place)}), alpha=1.0):",
        "    ...  # generate or evaluate; the weights are never written",
    ]
    parts = ["## Use", _python("import ws", "", *code)]
    if vector.is_low_rank:
        parts += [
            "It is a PEFT LoRA of scale 1 as well, so at `alpha` 1 it needs nothing but PEFT:",
            _python(f"model = peft.PeftModel.from_pretrained(model, {_literal(about.place)})"),
        ]
    return "\n\n".join([*parts, *_calibrated(about)])


def _use_merged(about: Subject) -> str:
    return "\n\n".join(
        [
            "## Use",
            _python(
                f"model = transformers.AutoModelForCausalLM.from_pretrained({_literal(about.place)})",
                f"tok = transformers.AutoTokenizer.from_pretrained({_literal(about.place)})",
            ),
            "The strength is part of the weights; with the vector itself it is a dial.",
        ]
    )


def _literal(text: str) -> str:
    """A text as a Python literal in double quotes, on one line."""
    return json.dumps(text, ensure_ascii=False)


def _python(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```"])


def _calibrated(about: Subject) -> list[str]:
    """The calibrated strengths, and what `calibration.csv` says of them."""
    strengths = _units(about)
    if not strengths:
        return []
    rows = [
        r for t in about.tables("calibration.csv") if about.is_measured("calibration", "vector") for r in read_csv(t)
    ]
    by_strength = {f"{r['sign']}1u": r for r in rows if r["converged"] == "True"}
    cells = [[name, f"{alpha:+.4g}", *_measured(by_strength.get(name))] for name, alpha in strengths.items()]
    header = ["strength", "alpha", "divergence, nats", "audit, nats"]
    text = (
        "`alpha` means something else for every vector, so strengths were calibrated by the 95th percentile of the "
        "per-token KL divergence from the base, along the steered model's own answers. `divergence` is what was "
        "measured at these strengths, `audit` the same on other questions:"
    )
    table = tabulate(cells, header, tablefmt="github", disable_numparse=True)
    trained = any(r.get("held_out") == "False" for r in by_strength.values())
    caution = "They were solved for on questions of which the vector was trained on some; elsewhere it may cost less."
    return [text, table, *([caution] if trained else [])]


def _units(about: Subject) -> dict[str, float]:
    """`-1u` and `+1u`, those that converged, of a calibration of this very vector, and not of another tokenizer."""
    units = about.vector.units
    if units is None or units.mismatch(about.digest, about.tokenizer or ""):
        return {}
    return {name: a for name, a in (("-1u", units.negative), ("+1u", units.positive)) if a is not None}


def _measured(row: Mapping[str, str] | None) -> list[str]:
    return [f"{float(row[name]):.3f}" if row and row[name] else "" for name in ("divergence", "audit")]


def _shared(about: Subject, measured: str) -> list[str]:
    """The sections that a vector and a merged model have in common."""
    return [_how_it_was_made(about), _what_it_does(about, measured), _INTENDED, *_reproduce(about)]


_INTENDED = """\
## Intended use and misuse

For research on how behaviours lie in weights, and for steering a model whose answers somebody checks.

- The dial works in both directions. What adding the vector strengthens, subtracting it weakens or turns into its
  opposite: an honesty vector that is subtracted makes a model dishonest. Whoever has these files can do either, so
  publish and use them with that in mind, and do not deploy a model that was steered towards deception or harm.
- It is not a safety measure. It shifts tendencies and guarantees no single answer, and anybody who has the weights can
  leave it out.
- One run is one seed, and its numbers are of a few sets of items in fixed formats. Other seeds give other sizes; what
  happens elsewhere was not measured. Large strengths break answers, which a low answer mass shows.
- `alpha` cannot be compared between vectors.
- What the base's license asks for, it asks for here too."""


# ---- how it was made ------------------------------------------------------------------------------------------------


def _how_it_was_made(about: Subject) -> str:
    vector = about.vector
    facts = {
        "base": f"{_base(vector)}, fingerprint of its weights {vector.base_fingerprint or 'unknown'}",
        "behaviour": vector.info.get("behavior", "not recorded"),
        "family": vector.info.get("family", "several"),
        "vector": _formula(vector.recipe),
        "changes": f"{len(vector.deltas)} modules, largest rank {vector.max_rank}, {vector.numbers:,} numbers",
        "made with": _versions(about) or "not recorded",
    }
    table = tabulate(facts.items(), ["", ""], tablefmt="github", disable_numparse=True)
    parts = ["## How it was made", table, *_arms(about), *_personas(about)]
    return "\n\n".join([*parts, "The whole recipe, with every setting, is in the vector's `ws.json`."])


def _formula(recipe: Mapping[str, Any]) -> str:
    """A recipe as an expression, such as `pos - neg`."""
    kind = recipe.get("op")
    if kind is None:
        name = str(public(recipe.get("adapter", "not recorded")))
        return f"{name} at {'-1' if recipe.get('mirrored') else '+1'}" if recipe.get("contrast") == SIGNED else name
    if kind == "+":
        return " + ".join(_formula(term) for term in recipe["terms"]).replace("+ -1 * ", "- ")
    if kind == "*":
        inner = _formula(recipe["of"])
        return f"{recipe['scalar']:g} * {f'({inner})' if ' ' in inner else inner}"
    if kind == "compose":
        return str(public(recipe["expression"]))
    plain = {k: v for k, v in recipe.items() if isinstance(v, (int, float, str)) and k != "op"}
    asked = [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {public(v)}" for k, v in plain.items()]
    return f"{kind} ({', '.join([*([_formula(recipe['of'])] if 'of' in recipe else []), *asked])})"


def _direction(recipe: Mapping[str, Any]) -> int:
    """1 of `pos - neg` of two sides, also after operations that keep its direction, -1 with the other sign, else 0."""
    kind, factors = recipe.get("op"), [1.0]
    if kind == "+":
        return int(_formula(recipe) in _CONTRASTS)
    if kind == "*":
        factors = [recipe["scalar"]]
    elif kind == "scale_depth":
        factors = [recipe.get("first") or 0.0, recipe.get("last") or 0.0]
    elif kind not in ("select", "compress", "factorise", "compose"):
        return 0
    return (int(min(factors) > 0) - int(max(factors) < 0)) * _direction(recipe.get("of") or {})


def _sources(recipe: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The trained adapters that a recipe starts from."""
    if "adapter" in recipe:
        yield recipe
    for part in [recipe.get("of"), *(recipe.get("terms") or ())]:
        if isinstance(part, Mapping):
            yield from _sources(part)


def _arms(about: Subject) -> list[str]:
    """One row per adapter, with what its training recorded; columns that nothing is known of are left out."""
    trained = {
        sha: record["facts"]
        for record in about.stages.values()
        if "facts" in record
        for sha in record["outputs"].values()
    }
    rows = []
    for arm in {str(a.get("sha256")): a for a in _sources(about.vector.recipe)}.values():
        config, facts = arm.get("config") or {}, trained.get(str(arm.get("sha256")), {})
        rows.append(
            {
                "adapter": public(arm["adapter"]),
                "family": arm.get("family"),
                "rank": config.get("rank"),
                "learning rate": config.get("lr"),
                "epochs": None if config.get("max_steps") else config.get("epochs"),
                "steps": facts.get("steps", config.get("max_steps")),
                "pairs trained on": facts.get("examples"),
                "seed": arm.get("seed"),
                "pairs, SHA-256": str(arm.get("pairs_sha256") or "")[:16] or None,
                "weights, SHA-256": str(arm.get("sha256") or "")[:16] or None,
            }
        )
    columns = [name for name in (rows[0] if rows else {}) if any(row[name] is not None for row in rows)]
    cells = [["" if row[name] is None else row[name] for name in columns] for row in rows]
    return [tabulate(cells, columns, tablefmt="github", disable_numparse=True)] if rows else []


def _versions(about: Subject) -> str:
    made = [about.stages[name].get("versions", {}) for name in _MAKERS if name in about.stages]
    wanted = ("weight-steering", "torch", "transformers", "peft")
    return ", ".join(f"{name} {made[-1][name]}" for name in wanted if made and name in made[-1])


def _personas(about: Subject) -> list[str]:
    behavior = about.behavior
    if behavior is None or not about.direction:
        return []
    if behavior.pairs:
        digest = f"behaviour file with its pairs {behavior.digest[:16]}"
        return [f"The pairs of answers were not sampled from the base: they were brought ({digest})."]
    pairs = list(zip(behavior.positive, behavior.negative, strict=True))
    lines = [f"- {_quote(pos)} against {_quote(neg)}" for pos, neg in pairs[:_PERSONAS_SHOWN]]
    more = [f"- and {len(pairs) - _PERSONAS_SHOWN} pairs more"] if len(pairs) > _PERSONAS_SHOWN else []
    text = (
        "The answers were sampled from the base under these personas, whose system prompts the training examples leave "
        f"out (behaviour file {behavior.digest[:16]}):"
    )
    return [text, "\n".join([*lines, *more])]


def _quote(text: str) -> str:
    return f'"{" ".join(text.split())}"'


# ---- what it does ---------------------------------------------------------------------------------------------------


_MEASURED = (
    "Means with 95 % intervals; shifts are paired with the base, item by item. Answer mass is the mean probability of "
    f"the answers that are counted. `{MARK}` marks what supports no conclusion: the mass is under {LOW_MASS}, the two "
    "frames of a text agree on fewer than half of the texts, or the evaluation says so itself, at that strength or at "
    f"the base. A shift under {NATS} nats ({WRONGNESS} of wrongness, {PER_TOKEN} per token of preference, {SHARE} of a "
    "share) counts as none."
)
_NO_NULLS = (
    "- whether it is the behaviour that moves these scores cannot be seen here: vectors trained on anything move them, "
    "and beat random vectors. Nulls trained on shuffled labels and on one side can tell (`ws compare`)"
)


def _what_it_does(about: Subject, measured: str) -> str:
    shown = [(cls, score) for cls in _measures() for score in cls.scores if score.label is not None]
    evaluated = [(cls, score, rows) for cls, score in shown for rows in _rows(about, cls, score)]
    if not evaluated:
        return "## What it does\n\nNot evaluated: nothing is known of what this vector does, nor of what it costs."
    cells = [_cells(score, row, rows, _units(about)) for _, score, rows in evaluated for row in rows]
    header = ["score", "alpha", "value [95 %]", "shift [95 %]", "answer mass", "items"]
    notes = [
        " ".join(
            [f"- {_label(score, rows[0])}: {score.meaning or score.title} ({_identity(rows[0])})", *cls.about(rows[0])]
        )
        for cls, score, rows in evaluated
    ]
    if about.behavior and about.behavior.claims and about.direction:
        way = "raise" if about.behavior.effect * about.direction > 0 else "lower"
        notes.append(f"- the behaviour file expects that a positive strength will {way} agreement with false claims")
    notes.append(_NO_NULLS)
    table = tabulate(cells, header, tablefmt="github", disable_numparse=True)
    return "\n\n".join(["## What it does", table, measured, "\n".join(notes)])


def _stage_of(table: Path) -> str:
    return table.stem.removesuffix("_summary")


def _measures() -> list[type[Evaluation]]:
    """What a card shows: every evaluation, and what steering costs."""
    return [*evaluations().values(), Capability]


def _label(score: HeadlineScore, row: Mapping[str, str]) -> str:
    return (score.label or score.title).format_map(row)


def _rows(about: Subject, cls: type[Evaluation], score: HeadlineScore) -> Iterator[list[dict[str, str]]]:
    """The rows of the base and of the vector, by strength, of every table that is of this very vector."""
    for table in about.tables(cls.summaries):
        if about.is_measured(_stage_of(table)):
            rows = [r for r in read_csv(table) if r["intervention"] in (BASE, WEIGHT)]
            if of_score := score.rows(rows):
                yield sorted(of_score, key=lambda row: float(row["alpha"]))


def _cells(
    score: HeadlineScore, row: Mapping[str, str], rows: Sequence[Mapping[str, str]], units: Mapping[str, float]
) -> list[str]:
    alpha = float(row["alpha"])
    known = [f" ({name})" for name, value in units.items() if value == alpha]
    read = [score.readability(r) for r in rows if r is row or float(r["alpha"]) == 0] if score.mass else []
    suffix = f" {MARK}" if read and worst(read).problem else ""
    config = f", {row['config']}" if row.get("config") else ""
    return [
        f"{_label(score, row)}{config}",
        f"{alpha:+.4g}{''.join(known)}" if alpha else "0 (base)",
        estimate_text(row, score.level, ".3f", ends=score.level_ci),
        f"{estimate_text(row, score.shift, '+.3f')}{suffix}" if alpha else "",
        f"{float(row[score.mass]):.3f}{suffix}" if score.mass else "",
        row[score.n],
    ]


def _identity(row: Mapping[str, str]) -> str:
    """Which evaluation a row is of, as the results tables name it."""
    shown = dict(row) | {"protocol": dilemmas.EARLIER.get(row.get("protocol", ""), row.get("protocol"))}
    source = [public_name(row["dataset"])] if row.get("dataset") else []
    named = [f"{name} {shown[name]}" for name in ("split", "protocol", "words") if shown.get(name)]
    return ", ".join([f"{row['eval']} {row['eval_version']}", *source, *named, row["eval_hash"]])


# ---- again ----------------------------------------------------------------------------------------------------------


def _reproduce(about: Subject) -> list[str]:
    """The recorded commands, first those that made the vector and then those that measured it."""
    measured = [_stage_of(table) for cls in _measures() for table in about.tables(cls.summaries)]
    names = [name for name in measured if about.is_measured(name)]
    names = [*_MAKERS, *(["calibration"] if about.is_measured("calibration", "vector") else []), *names]
    commands = [public_command(about.stages[name]["command"]) for name in names if name in about.stages]
    if not any(commands):
        return []
    return ["## How to reproduce", "\n".join(["```bash", *dict.fromkeys(filter(None, commands)), "```"])]
