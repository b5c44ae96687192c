"""The page: what was read, judged and drawn, put into one HTML file."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ws.eval.suite import evaluations, headline
from ws.files.public import public_name
from ws.report import sections, tables
from ws.report.curves import Curve, curves_of, foundations_of
from ws.report.data import Contents
from ws.report.figures import Figure, dose_figures, forest_figure, foundation_figures
from ws.report.notes import notes
from ws.report.scores import of, shown_scores
from ws.report.tables import Table
from ws.report.verdict import Evidence, judge, judged_by, warnings_of
from ws.report.words import clean, counted, strength

_MARKS = {"good": "\N{CHECK MARK}", "caution": "!", "against it": "\N{MULTIPLICATION X}", "missing": "?"}


@dataclass(frozen=True)
class Block:
    """A part of the page below its heading.

    Attributes:
        anchor: its id.
        title: its heading.
        about: how to read it.
        figures: drawings with captions.
        tables: numbers, folded away unless they are open.
        legend: the class of a colour, the mark and its meaning.
        is_table: whether the tables are what the part is about, and are not folded away.
    """

    anchor: str
    title: str
    about: str = ""
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    legend: Sequence[tuple[str, str, str]] = ()
    is_table: bool = False


def render(contents: Contents) -> str:
    """The whole page; the same contents give the same bytes."""
    curves = curves_of(contents)
    verdict, bases = judge(contents, curves), dict.fromkeys(public_name(r.base) for r in contents.results)
    doses = _dose_blocks(contents, curves, verdict.shown)
    blocks = [*doses[1:], *_other_blocks(contents, curves, verdict.claims.all)]
    script = Markup(files("ws.report").joinpath("templates/report.js").read_text(encoding="utf-8"))
    free = sections.samples(contents)
    return (
        _environment()
        .get_template("report.html")
        .render(
            title=f"{contents.name} on {' and '.join(bases)}",
            summary=contents.behavior.summary if contents.behavior else "",
            scope=_scope(contents),
            verdict=verdict,
            lead=doses[:1],
            blocks=[block for block in blocks if block.figures or block.tables],
            example=sections.example(contents, curves, verdict.shown),
            glossary=sections.GLOSSARY,
            warnings=warnings_of(contents, curves, verdict.claims.all),
            notes=notes(contents),
            samples=free,
            open_sample=next((s.adapter for s in free if s.changed), free[0].adapter if free else ""),
            data=tables.data_card(contents),
            runs=tables.runs_table(contents),
            settings=tables.settings_table(contents),
            versions=tables.versions(contents),
            commands=tables.commands(contents),
            marks=_MARKS,
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


def _csp_hash(script: str) -> str:
    """The one script that the page may run."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _scope(contents: Contents) -> str:
    """How many runs the page rests on."""
    counts = [len(contents.of(adapter)) for adapter in contents.adapters]
    least, most = min(counts), max(counts)
    seeds = counted(most, "seed") if least == most else f"{least} to {most} seeds"
    each = "" if len(counts) == 1 else " each"
    return f"{counted(len(counts), 'adapter')} ({', '.join(contents.adapters)}), {seeds}{each}"


def _dose_blocks(contents: Contents, curves: Mapping[tuple[str, str], Curve], e: Evidence | None) -> list[Block]:
    """One block per evaluation that was made; first that of the shift at the top, with its adapter drawn broad."""
    blocks, lead = [], e.score if e else next((curve.score for curve in curves.values()), None)
    for cls in evaluations().values():
        anchor, keys, (title, about) = cls.place, [score.key for score in cls.scores], sections.words_of(cls)
        panels = sections.dose_panels(contents, curves, keys)
        is_lead = lead is not None and of(lead).place == anchor
        panels.sort(key=lambda panel: e is not None and is_lead and panel.adapter != e.adapter)
        numbers = [tables.points_table(curves, key, contents) for key in keys]
        numbers += [tables.other_dilemmas_table(contents)] if anchor == "dilemmas" else []
        blocks.append(
            Block(
                anchor,
                title,
                " ".join([about, *sections.caveats(contents, cls), *([sections.DOSES] if is_lead else [])]),
                dose_figures(panels, is_lead),
                [table for table in numbers if table.rows],
                sections.LEGENDS.get(anchor, ()),
            )
        )
    blocks.sort(key=lambda block: lead is None or block.anchor != of(lead).place)
    return [block for block in blocks if block.figures or block.tables]


def _other_blocks(
    contents: Contents, curves: Mapping[tuple[str, str], Curve], evidence: Sequence[Evidence]
) -> list[Block]:
    """What all evaluations share, what is known against it, and where the vector lies."""
    rows = {s: sections.shift_rows(contents, curves, s.key) for s in shown_scores() if s.key != "true_claims"}
    shifts = [forest_figure(s, known) for s, known in rows.items() if known]
    checks = [tables.controls_table(contents, evidence), tables.confounds_table(contents)]
    score, acts = headline(judged_by(contents)), foundations_of(contents, curves)
    about_checks = sections.CHECKS.format(score=score.title, unit=score.unit)
    norms = sections.norm_figures(contents)
    return [
        Block("shifts", "Shifts", sections.SHIFTS, shifts, [tables.sources_table(curves)] if shifts else []),
        Block("checks", "Controls", about_checks, (), [table for table in checks if table.rows], is_table=True),
        Block(
            "foundations",
            "Foundations",
            sections.FOUNDATIONS,
            foundation_figures(acts),
            [tables.foundations_table(acts)] if acts else [],
            sections.LEGENDS["foundations"],
        ),
        Block(
            "profile",
            "What else moved",
            sections.PROFILE,
            sections.profile_figures(contents),
            [tables.profile_table(contents)] if contents.profiles else [],
            sections.LEGENDS["profile"],
        ),
        Block("norms", "Where it lies", sections.NORMS, [f for f, _ in norms], [table for _, table in norms]),
    ]
