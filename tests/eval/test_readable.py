"""Which scores can be read, and which effects are large enough to be called one: decided once, shown with one mark."""

from __future__ import annotations

import pytest

from ws.eval.airisk import render as render_dilemmas
from ws.eval.readable import LOW_AGREEMENT, Readability, mass_text, notes, of_row, star, worst
from ws.eval.suite import headline


def test_a_score_is_read_from_a_mass_of_09_and_from_half_of_the_texts_on():
    assert Readability(0.9).problem == Readability(1.0, LOW_AGREEMENT).problem == ""
    assert Readability(0.8999).problem == "answer mass 0.900"
    assert Readability(0.99, 0.0).problem == "frames agree on 0% of the texts"
    assert Readability(0.73, 0.25, "the place decides").problem == (
        "answer mass 0.730; frames agree on 25% of the texts; the place decides"
    )


def test_the_worst_of_strengths_and_seeds_decides():
    parts = [Readability(0.99), Readability(0.95, 0.8), Readability(0.97, 0.6, "a"), Readability(1.0, None, "a")]
    assert worst(parts) == Readability(0.95, 0.6, "a")
    assert worst(parts).columns("x_") == {"x_mass": 0.95, "x_frame_agreement": 0.6, "x_unreadable": "a"}
    assert worst(parts[:1]).columns() == {"mass": 0.99, "frame_agreement": None, "unreadable": None}


@pytest.mark.parametrize("text", [False, True])
def test_rows_are_read_as_they_are_made_and_as_they_are_on_disk(text):
    rows = [{"m": 0.95, "n": 0.8, "frame_agreement": 0.75}, {"m": 0.95, "unreadable": "the place decides"}, {"m": 0.5}]
    a, b, c = ({k: str(v) for k, v in r.items()} if text else r for r in rows)
    assert of_row(a, "m") == Readability(0.95, 0.75)
    assert of_row(a, "m", "n") == Readability(0.8, 0.75)
    assert of_row(b, "m").problem == "the place decides"
    assert of_row(c | {"frame_agreement": "", "unreadable": ""}, "m") == Readability(0.5)


def test_a_star_needs_answers_certainty_and_size():
    assert star(1.0, 0.01, 0.2, "") == star(-1.0, 0.0, 0.2, None) == "*"
    assert star(1.0, 0.05, 0.2, "") == star(0.19, 0.0, 0.2, "") == ""
    assert star(1.0, 0.0, 0.2, "answer mass 0.5") == "!"
    assert [headline(s).floor for s in ("wrongness", "false_claims", "choices")] == [0.05, 0.2, 0.2]


def test_the_mark_is_explained_once_and_only_where_it_stands():
    assert notes(["", None]) == []
    (line,) = notes(["a", "", "b", "a", "c", "d", "e"])
    assert line.startswith("! supports no conclusion and has no star")
    assert "(a, b, c and 2 more)" in line
    assert mass_text(0.73, 3, "answer mass 0.730") == "0.730 !"
    assert mass_text(0.951, 3, "") == "0.951 (3 under 0.9)"
    assert mass_text(0.951, 0, "") == "0.951"


def test_what_an_evaluation_says_of_itself_counts_like_a_low_mass():
    """A summary may bring a reason of its own, here of the dilemmas' base."""
    row = {"mean_score": 1, "ci_lo": 0, "ci_hi": 2, "shift": 1, "shift_ci_lo": 0, "shift_ci_hi": 2, "accuracy": 1}
    row |= {"si": "", "n_wrong": "", "position_bias": "", "mean_pmass": 0.99, "n_low_pmass": 0, "n_asked": 4, "n": 2}
    row |= {"forced_closes": 0, "label_disagreements": 0, "protocol": "explicit"}
    base, steered = ({k: str(v) for k, v in (row | {"alpha": a}).items()} for a in (0.0, 1.0))
    rows = [base | {"unreadable": "the place decides"}, steered]
    text = render_dilemmas("Truthfulness", rows)
    assert text.count("0.990 !") == 2, "the base is what a shift is measured from"
    assert "the place decides" in text
    assert "!" not in render_dilemmas("Truthfulness", [base, steered])
