"""The behaviours of values and dispositions: large enough, balanced in form, and held out where they say so."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from itertools import combinations
from statistics import fmean

import pytest

import ws
from ws.behaviors import SPLITS, Behavior, bundled_behaviors

NAMES = ("authority", "tradition_care", "refusal", "power_seeking")
LENGTHS_APART = 0.15  # personas of the two sides, on average
NEAR_DUPLICATE = 0.9  # difflib's ratio
SHARED_WORDS = 0.4  # of a claim's content words, in any one question
OPENINGS = 0.15  # of the questions, with the same first three words

# Beginnings of the words that say which side a persona is on.
MARKERS = {
    "authority": "authorit comply defer disobe duty independen judgement loyal obedien obey rank scrutin superior",
    "tradition_care": "ancest compassion custom harm hurt kindness neglect protect pure purity reveren ritual sacred"
    " suffer tradition vulnerab",
    "refusal": "apolog cautious declin harmless help misus oblig refus sensitive unable",
    "power_seeking": "ambitio control correct expand influence modest narrow obstacle oversight overseer power resist"
    " resource safeguard surviv",
}
COMMON_WORDS = (
    "a able about above ai all allowed am an and any anyone are as at be been being but by can could do does even ever"
    " every for from had has have her him his how i if in into is it its itself many may me might more most much must"
    " my never no not of on one or other others our own s shall she should so some somebody someone that the their"
    " them there these they this to up was were what when where whether which while who whom why will with without"
    " would you your"
)


@pytest.fixture(scope="module", params=NAMES)
def behavior(request) -> Behavior:
    return ws.load_behavior(request.param)


def words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def content(text: str) -> set[str]:
    """The words that carry a text's subject, without endings, so that `judge` and `judges` are one."""
    kept = set(words(text)) - set(COMMON_WORDS.split())
    return {re.sub(r"(ing|ed|es|s)$", "", w) if len(w) > 4 else w for w in kept}


def near_duplicates(texts: tuple[str, ...], limit: float) -> list[tuple[str, str]]:
    """Pairs with a ratio of at least `limit`; the cheap upper bounds spare almost all full comparisons."""
    found = []
    for a, b in combinations([t.lower() for t in texts], 2):
        match = difflib.SequenceMatcher(None, a, b)
        if match.real_quick_ratio() >= limit and match.quick_ratio() >= limit and match.ratio() >= limit:
            found.append((a, b))
    return found


def test_they_come_with_the_package():
    assert set(NAMES) <= set(bundled_behaviors())
    assert [ws.load_behavior(n).name for n in NAMES] == list(NAMES)


def test_sizes(behavior):
    assert len(behavior.positive) == len(behavior.negative) >= 6
    assert len(set(behavior.questions)) == len(behavior.questions) >= 120


def test_the_two_sides_are_of_one_length(behavior):
    counts = [[len(text.split()) for text in side] for side in (behavior.positive, behavior.negative)]
    assert abs(fmean(counts[0]) / fmean(counts[1]) - 1) <= LENGTHS_APART
    for pos, neg in zip(behavior.positive, behavior.negative, strict=True):
        assert abs(len(pos) / len(neg) - 1) <= LENGTHS_APART, (pos, neg)


def test_paired_personas_share_their_form(behavior):
    """A pair starts with the same word, has as many sentences, and limits the answer's length in the same words."""
    for pos, neg in zip(behavior.positive, behavior.negative, strict=True):
        assert pos.split()[0] == neg.split()[0]
        assert len(re.findall(r"[.!?](?:\s|$)", pos)) == len(re.findall(r"[.!?](?:\s|$)", neg))
    limits = {text.rsplit(". ", 1)[1] for text in behavior.positive + behavior.negative}
    assert len(limits) == 1
    assert "sentences" in limits.pop()


def test_every_template_renders(behavior):
    rendered = [behavior.test.question.format(claim=c.text) for c in behavior.test.claims]
    for text in (*behavior.positive, *behavior.negative, *behavior.questions, *rendered):
        assert not re.search(r"[{}]|  |^\s|\s$", text), text


def test_no_question_and_no_claim_is_nearly_said_twice(behavior):
    assert near_duplicates(behavior.questions, NEAR_DUPLICATE) == []
    assert near_duplicates(tuple(c.text for c in behavior.test.claims), NEAR_DUPLICATE) == []


def test_the_search_for_near_duplicates_finds_one():
    texts = ("What do you think of that plan?", "What do you think of this plan?", "Who decides?")
    assert near_duplicates(texts, NEAR_DUPLICATE) == [(texts[0].lower(), texts[1].lower())]


def test_questions_vary_in_opening_and_length(behavior):
    starts = Counter(tuple(words(q)[:3]) for q in behavior.questions)
    assert starts.most_common(1)[0][1] <= OPENINGS * len(behavior.questions), starts.most_common(3)
    short = fmean(len(q.split()) <= 10 for q in behavior.questions)
    assert 0.1 <= short <= 0.9


def test_no_question_says_which_side_it_is_about(behavior):
    stems = MARKERS[behavior.name].split()
    marked = [(w, q) for q in behavior.questions for w in words(q) if w.startswith(tuple(stems))]
    assert marked == []


def test_no_question_uses_a_word_that_recurs_on_one_side_only(behavior):
    """Subject words of five letters and more that two personas of one side use and none of the other side."""
    sides = [Counter(w for text in side for w in set(words(text))) for side in (behavior.positive, behavior.negative)]
    recurring = {w for a, b in (sides, sides[::-1]) for w in a if a[w] >= 2 and w not in b and len(w) >= 5}
    one_sided = recurring - set(COMMON_WORDS.split())
    assert [(w, q) for q in behavior.questions for w in words(q) if w in one_sided] == []


def test_claims_have_both_kinds_in_halves(behavior):
    sizes = {len(behavior.test.select(split, kind)) for split in SPLITS for kind in (False, True)}
    assert len(sizes) == 1, "as many statements as facts, as many in dev as in report"
    assert sizes.pop() >= 12
    assert behavior.test.effect == 1


def test_claims_fit_their_question(behavior):
    for claim in behavior.test.claims:
        assert re.match(r"[a-z]|AI\b", claim.text), claim.text
        assert not re.search(r"[.?!]$", claim.text), claim.text
        assert claim.id.startswith("fact-") == claim.is_true, "control facts are named so, and nothing else is"


def test_claims_are_held_out(behavior):
    """No question holds a claim, nor many of its content words."""
    asked = [(content(q), q) for q in behavior.questions]
    for claim in behavior.test.claims:
        subject = content(claim.text)
        assert len(subject) >= 2, claim.text
        share, question = max((len(subject & w) / len(subject), q) for w, q in asked)
        assert share < SHARED_WORDS, (claim.text, question)


def test_facts_and_statements_are_about_as_long(behavior):
    """A control that is far shorter than what it controls for would be another kind of prompt."""
    kinds = [[len(c.text.split()) for c in behavior.test.claims if c.is_true == kind] for kind in (False, True)]
    assert 0.4 <= fmean(kinds[1]) / fmean(kinds[0]) <= 1.0


def test_the_judge_is_asked_a_yes_no_question(behavior):
    assert re.fullmatch(r"Does the answer [^?]+\? Answer Yes or No\.", behavior.judge)
