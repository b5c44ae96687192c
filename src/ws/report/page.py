"""The page: what was read, judged and drawn, put into one HTML file."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ws.export.card import public_name
from ws.report import sections, tables
from ws.report.curves import Curve, curves_of, foundations_of
from ws.report.data import Contents
from ws.report.figures import forest_figure, foundation_figures
from ws.report.notes import Note, stale
from ws.report.notes import notes as notes_of
from ws.report.scores import EXTRA, PLACES
from ws.report.tables import Table
from ws.report.verdict import Caution, best_adapter, evidence_of, judge, plain_words, warnings_of
from ws.report.words import clean, strength


@dataclass(frozen=True)
class Block:
    """A part of the page below its heading.

    Attributes:
        anchor: its id.
        title: its heading.
        about: how to read it.
        figures: drawings with captions.
        tables: numbers, folded away unless they are open.
        notes: what is missing.
        warnings: what to know before believing it.
        legend: the class of a colour, the mark and its meaning.
        is_table: whether the tables are what the part is about, and are not folded away.
    """

    anchor: str
    title: str
    about: str = ""
    figures: Sequence[Any] = ()
    tables: Sequence[Table] = ()
    notes: Sequence[Note] = ()
    warnings: Sequence[str] = ()
    legend: Sequence[tuple[str, str, str]] = ()
    is_table: bool = False


def render(contents: Contents) -> str:
    """The whole page; the same contents give the same bytes."""
    curves = curves_of(contents)
    evidence = evidence_of(contents, curves)
    cautions = warnings_of(contents, curves, evidence)
    notes = notes_of(contents)
    warnings = [*cautions, *stale(notes)]  # what is left out has a note in its place
    told = _told(cautions)
    script, found = _script(), sections.samples(contents)
    return (
        _environment()
        .get_template("report.html")
        .render(
            title=f"{contents.name} on {' and '.join(_bases(contents))}",
            summary=contents.behavior.summary if contents.behavior else "",
            scope=_scope(contents),
            verdict=judge(contents, evidence),
            plain=plain_words(contents, evidence),
            example=sections.example(found, best_adapter(contents, evidence)),
            glossary=sections.GLOSSARY,
            warnings=warnings,
            missing=[note for here in notes.values() for note in here if not note.is_shown],
            doses=_dose_blocks(contents, curves, notes, told),
            shifts=_shift_block(contents, curves, notes, told),
            checks=_check_block(contents, evidence, notes, told),
            foundations=_foundation_block(contents, curves, notes),
            norms=Block(
                "norms",
                "Where the vector lies",
                sections.NORMS,
                sections.norm_figures(contents),
                notes=notes["norms"],
            ),
            samples=found,
            open_sample=next((s.adapter for s in found if s.changed), found[0].adapter if found else ""),
            sample_notes=notes["samples"],
            data=tables.data_card(contents),
            data_block=Block("data", "The pairs it was trained on", notes=notes["data"], warnings=told.get("data", ())),
            runs=tables.runs_table(contents),
            settings=tables.settings_table(contents),
            versions=tables.versions(contents),
            commands=tables.commands(contents),
            vector_notes=notes["provenance"],
            script=script,
            script_hash=_csp_hash(script),
        )
    )


def _environment() -> Environment:
    made = Environment(
        loader=PackageLoader("ws.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: (
            value if isinstance(value, Markup) else clean(value) if isinstance(value, str) else value
        ),
    )
    made.filters["strength"] = strength
    return made


def _script() -> Markup:
    return Markup(files("ws.report").joinpath("templates/report.js").read_text(encoding="utf-8"))


def _csp_hash(script: str) -> str:
    """The one script that the page may run."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _bases(contents: Contents) -> list[str]:
    return list(dict.fromkeys(public_name(r.base) for r in contents.results))


def _scope(contents: Contents) -> str:
    """How many runs the page rests on."""
    counts = [len(contents.of(adapter)) for adapter in contents.adapters]
    least, most = min(counts), max(counts)
    seeds = f"{most} seed{'' if most == 1 else 's'}" if least == most else f"{least} to {most} seeds"
    n = len(counts)
    return f"{n} adapter{'' if n == 1 else 's'} ({', '.join(contents.adapters)}), {seeds}{'' if n == 1 else ' each'}"


def _told(warnings: Iterable[Caution]) -> dict[str, list[str]]:
    """Warnings by the part of the page that they are about."""
    found: dict[str, list[str]] = {}
    for warning in warnings:
        found.setdefault(warning.anchor, []).append(warning.text)
    return found


def _dose_blocks(
    contents: Contents,
    curves: Mapping[tuple[str, str], Curve],
    notes: Mapping[str, Sequence[Note]],
    told: Mapping[str, Sequence[str]],
) -> list[Block]:
    """One block per evaluation."""
    blocks = []
    for anchor, title, keys, about in sections.EVALUATIONS:
        panels = sections.dose_panels(contents, curves, keys)
        if anchor in (PLACES[stage] for stage in EXTRA) and not (panels or notes[anchor]):
            continue
        numbers = [tables.points_table(curves, key, contents) for key in keys]
        numbers += [tables.other_dilemmas_table(contents)] if anchor == "dilemmas" else []
        blocks.append(
            Block(
                anchor,
                title,
                " ".join([about, *sections.caveats(contents, anchor)]),
                sections.dose_figures(panels),
                [table for table in numbers if table.rows],
                notes[anchor],
                told.get(anchor, ()),
                sections.DOSE_LEGENDS[anchor] if panels else (),
            )
        )
    return blocks


def _shift_block(
    contents: Contents,
    curves: Mapping[tuple[str, str], Curve],
    notes: Mapping[str, Sequence[Note]],
    told: Mapping[str, Sequence[str]],
) -> Block:
    figures = []
    for key in ("false_claims", "choices", "wrongness", "preference", "statements"):
        rows = sections.shift_rows(contents, curves, key)
        if rows:
            score = next(c.score for (k, _), c in curves.items() if k == key)
            figures.append(forest_figure(score.title, score.digits, rows))
    sources = [tables.sources_table(curves)] if figures else []
    return Block(
        "shifts",
        "Shifts, families and seeds",
        sections.SHIFTS,
        figures,
        sources,
        notes["shifts"],
        told.get("shifts", ()),
    )


def _check_block(
    contents: Contents,
    evidence: Sequence[Any],
    notes: Mapping[str, Sequence[Note]],
    told: Mapping[str, Sequence[str]],
) -> Block:
    found = [tables.controls_table(contents, evidence), tables.confounds_table(contents)]
    kept = [table for table in found if table.rows]
    return Block(
        "checks",
        "Controls and confounds",
        sections.CHECKS,
        tables=kept,
        notes=notes["checks"],
        warnings=told.get("checks", ()),
        is_table=True,
    )


def _foundation_block(
    contents: Contents, curves: Mapping[tuple[str, str], Curve], notes: Mapping[str, Sequence[Note]]
) -> Block:
    found = foundations_of(contents, curves)
    return Block(
        "foundations",
        "Moral foundations",
        sections.FOUNDATIONS,
        foundation_figures(found),
        [tables.foundations_table(found)] if found else [],
        () if found else notes["acts"],
        legend=sections.SIGN_LEGEND if found else (),
    )
