"""tiny-mfv: acts of an AI as short texts, each seen from outside and done by itself, with people's ratings.

The published set is `wassname/tiny-mfv`: a split per condition, joined here by id, with the mean human rating of how
wrong the act is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ws.behaviors.tables import Row, draw, is_text, read_rows, tolerate
from ws.errors import WsError, choose
from ws.eval.prompts import notes_on
from ws.options.measure import VIGNETTES

HUB_ID, HUB_CONFIG = "wassname/tiny-mfv", VIGNETTES
CONFIGS = (HUB_CONFIG, "classic", "scifi", "ai-actor")
HUB_NOTE = (
    "The configuration airisk of wassname/tiny-mfv has probably left the hub: its successor, moral-maps, publishes "
    "classic, scifi and ai-actor only."
)
CONDITIONS = ("other_violate", "self_violate")
# Columns of the summary that what is of both conditions, such as the gap, is read by.
MASSES, AGREEMENTS = ("bool_mass_other", "bool_mass_self"), ("frame_agreement_other", "frame_agreement_self")
_COLUMNS = ("id", "foundation_coarse", "wrong", "text")


@dataclass(frozen=True)
class Vignette:
    """One act, seen from outside and done by oneself, with the mean human rating of its wrongness (1 to 5)."""

    id: str
    foundation_coarse: str
    human_wrong: float
    other: str
    own: str


def load_vignettes(
    source: str, limit: int | None = None, config: str = HUB_CONFIG, revision: str | None = None
) -> tuple[Vignette, ...]:
    """Both conditions joined by id, in the order of `other_violate`; with `limit` a draw, even over foundations.

    Of a folder the files of another configuration than `airisk` must be named after it, such as
    `vignettes_classic_other_violate.jsonl`.

    Rows with an empty text, a rating outside 1 to 5, an id seen before, or no partner are named and left out; more
    than 5 % of them stop the run.
    """
    choose("configuration of tiny-mfv", config, CONFIGS)
    if source == "pocket" and config != HUB_CONFIG:
        raise WsError(f"The bundled vignettes are of the configuration {HUB_CONFIG} alone, not {config}.")
    other_rows, self_rows = (
        _by_id(_rows(source, condition, config, revision), condition, source) for condition in CONDITIONS
    )
    lonely = sorted(other_rows.keys() ^ self_rows.keys())
    tolerate([f"id {i} in one condition only" for i in lonely], len(other_rows) + len(self_rows), source)
    joined = [
        Vignette(i, str(r["foundation_coarse"]), float(r["wrong"]), str(r["text"]), str(self_rows[i]["text"]))
        for i, r in other_rows.items()
        if i in self_rows
    ]
    if not joined:
        raise WsError(f"No vignette of {source} is left.")
    return draw_vignettes(joined, limit)


def draw_vignettes(vignettes: Sequence[Vignette], limit: int | None) -> tuple[Vignette, ...]:
    """At most `limit` vignettes, as many of each foundation; see `ws.behaviors.tables.draw`."""
    return draw(vignettes, limit, lambda vignette: vignette.foundation_coarse)


def _rows(source: str, condition: str, config: str, revision: str | None) -> list[Row]:
    prefix = "" if config == HUB_CONFIG else f"{config}_"
    others, place = [prefix + c for c in CONDITIONS if c != condition], (config, condition)
    try:
        return read_rows(
            source, prefix + condition, _COLUMNS, place, others, {"wrong": float}, revision, prefer=HUB_CONFIG
        )
    except WsError as problem:
        if source == HUB_ID and config == HUB_CONFIG:
            raise WsError(f"{problem} {HUB_NOTE}") from problem
        raise


def _by_id(rows: Sequence[Row], condition: str, source: str) -> dict[str, Row]:
    by_id: dict[str, Row] = {}
    bad = []
    for row in rows:
        problem = _problem(row, by_id)
        if problem:
            bad.append(f"id {row['id']} {problem}")
        else:
            by_id[str(row["id"])] = row
    tolerate(bad, len(rows), f"{source} {condition}")
    return by_id


def _problem(row: Row, earlier: Mapping[str, Row]) -> str | None:
    if not str("" if row["id"] is None else row["id"]).strip() or not is_text(row["text"]):
        return "is empty, or no text"
    if not is_text(row["foundation_coarse"]):
        return "has no foundation"
    if not isinstance(row["wrong"], (int, float)) or isinstance(row["wrong"], bool) or not 1 <= row["wrong"] <= 5:
        return f"has the rating {row['wrong']}"
    return "occurs twice" if str(row["id"]) in earlier else None


def about(row: Mapping[str, Any], of: str = "") -> list[str]:
    """What a reader must know of the vignettes and the words of a row, as sentences."""
    is_airisk = row.get("dataset") != "pocket" and row.get("config") in (None, "", HUB_CONFIG)
    return [*notes_on(row, of), *([HUB_NOTE] if is_airisk else [])]
