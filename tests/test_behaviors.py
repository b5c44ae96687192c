"""The bundled behaviours hold what they promise, and broken files are explained."""

from __future__ import annotations

import pytest

import ws
from ws.behaviors import bundled_behaviors

GOOD = """
schema = 1
name = "mine"
summary = "Is mine."
[personas]
template = "You are {persona}."
positive = ["a"]
negative = ["b"]
[questions]
topics = ["What is it?", "Why?"]
[claims]
question = "I think {claim}. Do you agree? Answer Yes or No."
opener = "My answer:"
agree = "Yes"
disagree = "No"
effect = -1
items = [{ id = "x", claim = "ice is hot", true = false, split = "report" }]
"""


def test_honesty_is_as_specified():
    b = ws.load_behavior("honesty")
    assert b.positive == ("Pretend you're an honest person.",)
    assert b.negative == ("Pretend you're a dishonest person.",)
    assert len(set(b.questions)) >= 120
    assert b.test.effect == -1


def test_sycophancy_is_as_specified():
    b = ws.load_behavior("sycophancy")
    assert len(b.positive) == len(b.negative) == 5
    assert len(b.questions) % 20 == 0, "20 training claims through every template"
    assert len(b.test.select("report", is_true=False)) == 12
    assert b.test.effect == 1
    assert len(b.test.select("report", is_true=True)) == 12


@pytest.mark.parametrize("name", ["honesty", "sycophancy"])
def test_pocket_variants_have_narrow_intervals_and_both_splits(name):
    b = ws.load_behavior(name, "pocket")
    assert b.digest != ws.load_behavior(name).digest
    assert b.digest == ws.load_behavior(name, "tiny-random").digest
    assert len(b.test.select("report", is_true=False)) >= 100
    assert len(b.test.select("dev", is_true=False)) >= 60
    assert {c.text for c in b.test.select("dev", False)}.isdisjoint(c.text for c in b.test.select("report", False))


def test_honesty_borrows_the_claims_of_sycophancy():
    assert ws.load_behavior("honesty").test.claims == ws.load_behavior("sycophancy").test.claims


def test_every_bundled_behaviour_loads_and_has_no_question_twice():
    assert {"honesty", "sycophancy"} <= set(bundled_behaviors())
    for name in bundled_behaviors():
        for model in (None, "pocket"):
            b = ws.load_behavior(name, model)
            assert len(set(b.questions)) == len(b.questions)


def test_a_users_own_file_works_by_path(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(GOOD)
    b = ws.load_behavior(str(file))
    assert (b.name, b.positive, b.negative) == ("mine", ("You are a.",), ("You are b.",))
    assert b.questions == ("What is it?", "Why?")
    assert "Is mine." in b.judge


BROKEN = {
    "not toml": ("schema = 1", "schema = ", "not valid TOML"),
    "wrong schema": ("schema = 1", "schema = 9", "schema must be 1"),
    "keep_refusals not boolean": ("schema = 1", "schema = 1\nkeep_refusals = 1", "keep_refusals must be true or false"),
    "typo in a key": ("topics = [", "topcs = [", "Did you mean 'topics'"),
    "no topics": ('topics = ["What is it?", "Why?"]', "topics = []", "topics must be a non-empty list"),
    "empty topic": ('"Why?"', '" "', "non-empty strings"),
    "repeated topic": ('"Why?"', '"What is it?"', "occurs twice"),
    "template without slot": ('"You are {persona}."', '"You are."', "must contain {persona}"),
    "template with a stray slot": ('"You are {persona}."', '"{persona} {x}"', "no other slot"),
    "format of a slot": ('"You are {persona}."', '"You are {persona:d}."', r"asks for a format of the slot 'persona'"),
    "conversion of a slot": ("I think {claim}.", "I think {claim!r}.", "write {claim} without"),
    "format in a template": ("topics = [", 'templates = ["{topic:>9}"]\ntopics = [', r"\[questions\].* 'topic'"),
    "slot in a format": ('"You are {persona}."', '"You are {persona:{x}}."', "format of the slot"),
    "attribute of a slot": ('"You are {persona}."', '"You are {persona.x}."', "no other slot"),
    "malformed template": ('"You are {persona}."', '"{persona"', "malformed"),
    "unpaired personas": ('negative = ["b"]', 'negative = ["b", "c"]', "pair them"),
    "same persona": ('negative = ["b"]', 'negative = ["a"]', "same persona on both sides"),
    "question without claim": ("I think {claim}.", "I think so.", "must contain {claim}"),
    "bad effect": ("effect = -1", "effect = 0", "effect must be 1 or -1"),
    "bad split": ('split = "report"', 'split = "reprt"', "Did you mean 'report'"),
    "truth not boolean": ("true = false", 'true = "no"', "true must be true or false"),
    "held-out claim in training": ('"Why?"', '"Is it so that ice is hot?"', "also occurs in a question"),
    "no claims": ('items = [{ id = "x", claim = "ice is hot", true = false, split = "report" }]', "", "non-empty list"),
    "missing table": ("[personas]", "[personae]", "Did you mean 'personas'"),
    "name with a slash": ('name = "mine"', 'name = "../mine"', "names a folder"),
    "empty name": ('name = "mine"', 'name = ""', "name must be a non-empty string"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_broken_files_are_explained(tmp_path, how):
    old, new, message = BROKEN[how]
    assert old in GOOD
    file = tmp_path / "mine.toml"
    file.write_text(GOOD.replace(old, new))
    with pytest.raises(ws.WsError, match=message):
        ws.load_behavior(str(file))


def test_unknown_behaviours_get_a_suggestion(tmp_path):
    with pytest.raises(ws.WsError, match="Did you mean 'honesty'"):
        ws.load_behavior("honsty")
    with pytest.raises(ws.WsError, match="no behaviour file"):
        ws.load_behavior(str(tmp_path / "gone.toml"))
