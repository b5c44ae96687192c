"""What a fine-tune has moved by behaviour, beside the directions that it has moved along by weights.

Every fine-tune is asked a board of traits (`ws.eval.boards`), and beside it stands what the library says it should have
moved: the base with the fine-tune's projection onto the span of the library's vectors,

    W + sum_i a_i V_i          a = argmin |c - sum_i a_i V_i|, that is G a = b with G_ij = <V_i, V_j> and b_i = <c, V_i>

Where the rank correlation of the two over the traits is near 1, the directions explain what it does; where it is near 0
it does something that no vector of the library knows. Benign fine-tunes, where they are given, take the place of the
random vectors of `ws profile`: what they move as well does not count as moved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
from tabulate import tabulate
from torch import nn
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from ws import console
from ws.analysis.profile_tables import Shot, profile_rows, rms, standardised
from ws.diff import SteeringVector
from ws.eval.boards import Board
from ws.eval.evaluation import Rows
from ws.eval.readable import MARK, Readability
from ws.stats import N_BOOTSTRAP, columns_of, estimate_text, rank_correlation
from ws.steer import steer

SHOWN = 10


@dataclass(frozen=True)
class Bench:
    """The base, and the board that it and its fine-tunes are asked.

    Attributes:
        model, tok: the base.
        board: without targets.
    """

    model: PreTrainedModel
    tok: Tokenizer
    board: Board

    def read(self) -> tuple[np.ndarray, dict[str, Readability]]:
        """The scores of all items and how well every trait was answered, of the base as it stands."""
        return self.board.ask(self.model, self.tok)

    def read_change(self, change: SteeringVector | nn.Module) -> tuple[np.ndarray, dict[str, Readability]]:
        """The same of a fine-tune: the base with its change, or the whole checkpoint."""
        if isinstance(change, SteeringVector):
            with steer(self.model, change):
                return self.read()
        assert isinstance(change, PreTrainedModel), "monitors open vectors, adapters and checkpoints"
        return self.board.ask(change, self.tok)

    def explained(self, library: Mapping[str, SteeringVector], strengths: Sequence[float]) -> np.ndarray:
        """The scores of the base with the library's vectors at some strengths, all at once."""
        with ExitStack() as stack:
            for vector, strength in zip(library.values(), strengths, strict=True):
                stack.enter_context(steer(self.model, vector, strength))
            return self.read()[0]


def joint_projection(
    library: Mapping[str, SteeringVector], model: PreTrainedModel, along: Sequence[float]
) -> list[float]:
    """The strengths `a` of the library's vectors whose sum lies nearest to a change; see the module.

    `along` holds the inner products of the change with the vectors.

    Vectors that are multiples of one another share a strength (the solution of least norm).
    """
    vectors = list(library.values())
    gram = np.array([[v.inner(w, model) for w in vectors] for v in vectors])
    size = np.sqrt(np.diag(gram))
    solved = np.linalg.lstsq(gram / np.outer(size, size), np.array(along) / size, rcond=1e-6)[0]
    return [float(a) for a in solved / size]


def profile_changes(
    bench: Bench,
    library: Mapping[str, SteeringVector],
    changes: Mapping[str, Callable[[], SteeringVector | nn.Module]],
    along: Mapping[str, Sequence[float]],
    controls: Iterable[SteeringVector | nn.Module] = (),
) -> tuple[Rows, Rows]:
    """Rows of `monitor_profile.csv`, one per fine-tune and trait, and a row for each fine-tune.

    Args:
        bench: the base and the board.
        library: steering vectors of the base by the name of their behaviour.
        changes: what opens every fine-tune, by its name.
        along: of every fine-tune, its inner products with the library's vectors.
        controls: benign fine-tunes, consumed one at a time.
    """
    base, readable = bench.read()
    benign = [(bench.read_change(change)[0] - base)[None] for change in controls]
    rows, summary = Rows(), Rows()
    for name, open_change in console.progress(list(changes.items()), desc=bench.board.name, unit="fine-tune"):
        values, answered = bench.read_change(open_change())
        shot = Shot(name, (0,), "fine-tune", "as it is", 1.0, (values - base)[None], [answered], random=benign)
        traits, _ = profile_rows({}, bench.board, base, readable, [shot], N_BOOTSTRAP)
        strengths = joint_projection(library, bench.model, along[name])
        predicted = standardised(bench.board, {0: base, 1: bench.explained(library, strengths)}, {})
        known = {trait: float(z[1].mean()) for trait, z in predicted.items()}
        rows += [_row(name, r, known.get(r["trait"])) for r in traits]
        summary.append(_summary(name, traits, known, dict(zip(library, strengths, strict=True)), len(benign)))
    return rows, summary


def _row(name: str, row: Mapping[str, Any], predicted: float | None) -> dict[str, Any]:
    kept = ("trait", "group", "shift", "shift_ci_lo", "shift_ci_hi", "z", "z_ci_lo", "z_ci_hi", "p_holm", "moved")
    more = {"z_benign": row["z_random"], "z_explained": predicted, "mass": row["mass"], "unreadable": row["unreadable"]}
    return {"change": name, "board": row["board"], **{c: row[c] for c in kept}, **more, "n": row["n"]}


def _summary(
    name: str, rows: Rows, predicted: Mapping[str, float], strengths: Mapping[str, float], n_benign: int
) -> dict[str, Any]:
    both = [(r["z"], predicted[r["trait"]]) for r in rows if not r["unreadable"]]
    z, explained = (np.array([pair[i] for pair in both]) for i in (0, 1))
    agreed = rank_correlation(z, explained) if len(both) > 3 else None
    row: dict[str, Any] = {"change": name, "board": rows[0]["board"] if rows else None}
    row |= columns_of(agreed, "agreement", "ci_lo", "ci_hi")
    row |= {"rms_z": rms(z), "rms_explained": rms(explained)}
    row |= {"n_moved": sum(bool(r["moved"]) for r in rows), "n_traits": len(rows), "n_benign": n_benign}
    row["n_unreadable"] = len(rows) - len(both)
    return row | {"strengths": " ".join(f"{behavior} {a:+.3g}" for behavior, a in strengths.items())}


def render_profiles(rows: Sequence[Mapping[str, Any]], summary: Sequence[Mapping[str, Any]]) -> str:
    """The traits that every fine-tune moved most, and how far the library explains them."""
    parts = []
    for s in summary:
        here = [r for r in rows if r["change"] == s["change"]]
        cells = [
            [
                r["trait"],
                r["group"],
                f"{estimate_text(r, 'shift')}{MARK if r['unreadable'] else '*' if r['moved'] else ''}",
                *("" if r[name] is None else f"{r[name]:+.2f}" for name in ("z", "z_explained")),
            ]
            for r in here[:SHOWN]
        ]
        header = ["trait", "about", "shift", "z", "z, by the library"]
        table = tabulate(cells, header, disable_numparse=True)
        more = f"; {len(here) - SHOWN} more in the table" if len(here) > SHOWN else ""
        parts.append(f"{s['change']}, {s['board']}{more}\n\n{table}\n\n{_sentences(s)}")
    return "\n\n".join(parts)


def _sentences(row: Mapping[str, Any]) -> str:
    n, lost = row["n_traits"] - row["n_unreadable"], row["n_unreadable"]
    if row["agreement"] is None:
        lines = ["The library and the fine-tune cannot be compared on this board: too few traits, or nothing moves."]
    else:
        lines = [
            f"The library's directions ({row['strengths']}) move these traits by {row['rms_explained']:.2f} standard "
            f"deviations (root mean square), the fine-tune by {row['rms_z']:.2f}; rank correlation "
            f"{estimate_text(row, 'agreement')} over {n} traits{f'; {lost} cannot be read' if lost else ''}."
        ]
    if row["n_benign"]:
        lines.append(f"{row['n_moved']} of {n} traits moved beyond {row['n_benign']} benign fine-tunes.")
    else:
        lines.append("No benign fine-tunes are given (--benign), so no trait counts as moved.")
    return "\n".join(lines)
