"""The bundled behaviours hold what they promise, and broken files are explained."""

from __future__ import annotations

import re
from collections import Counter
from statistics import fmean

import pytest

import ws
from ws.behaviors import Preference, bundled_behaviors

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
    assert ws.load_behavior(file).digest == b.digest


BROKEN = {
    "not toml": ("schema = 1", "schema = ", "not valid TOML"),
    "wrong schema": ("schema = 1", "schema = 9", "schema: It must be 1, not 9"),
    "keep_refusals not boolean": ("schema = 1", "schema = 1\nkeep_refusals = 1", "keep_refusals: It must be"),
    "typo in a key": ("topics = [", "topcs = [", "Did you mean 'topics'"),
    "no topics": ('topics = ["What is it?", "Why?"]', "topics = []", "topics must be a non-empty list"),
    "empty topic": ('"Why?"', '" "', "non-empty strings"),
    "repeated topic": ('"Why?"', '"What is it?"', "occurs 2 times"),
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
    "effect a truth value": ("effect = -1", "effect = true", "effect must be 1 or -1, not True"),
    "effect with a point": ("effect = -1", "effect = 1.0", "effect must be 1 or -1"),
    "one answer twice": ('disagree = "No"', 'disagree = "Yes "', "agree and disagree are the same answer, 'Yes'"),
    "one answer written otherwise": ('disagree = "No"', 'disagree = "yes."', "agree and disagree are the same answer"),
    "bad split": ('split = "report"', 'split = "reprt"', "Did you mean 'report'"),
    "truth not boolean": ("true = false", 'true = "no"', "true must be true or false"),
    "held-out claim in training": ('"Why?"', '"Is it so that ice is hot?"', "occurs in the question"),
    "no claims": ('items = [{ id = "x", claim = "ice is hot", true = false, split = "report" }]', "", "non-empty list"),
    "missing table": ("[personas]", "[personae]", "Did you mean 'personas'"),
    "name with a slash": ('name = "mine"', 'name = "../mine"', "names a folder"),
    "opener of several": ('opener = "My answer:"', 'opener = ["Well:", "So:"]', r"opener must be a text.*\['Well:'"),
    "judge turned off": ("schema = 1", "schema = 1\njudge = false", "judge must be a non-empty string"),
    "judge without words": ("schema = 1", 'schema = 1\njudge = " "', "judge must be a non-empty string"),
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
    with pytest.raises(ws.WsError, match=r"a bundled one or the path of a \.toml file, not None"):
        ws.load_behavior(None)


# ---- behaviours with answers on both sides ---------------------------------------------------------------------------

SPLITS = ("train", "dev", "report")
ANSWERED = ("truthfulness", "agreement", "tone")
NEVER_TRAINED = {
    "truthfulness": {"sound", "tool", "calendar", "body", "landmark", "author", "size", "work"},
    "agreement": {"plan", "guess", "person"},
    "tone": {"memory", "advice", "self"},
}
NEGATIONS = {"no", "not", "cannot", "never", "nothing", "nobody", "none", "neither", "hardly"}


def words(*texts: str) -> Counter[str]:
    return Counter(w for text in texts for w in re.findall(r"[\w'-]+", text.lower()))


VERDICTS = words(
    "I agree, disagree, yes, no, you are right, wrong, think so too, otherwise, that is true, false, share, reject"
).keys()


def opinion(text: str) -> str:
    """The words of a text in their order, without those that only say whose view it is."""
    around = {*VERDICTS, *words("my view opinion would say if ask me")}
    return " ".join(w for w in re.findall(r"[\w'-]+", text.lower()) if w not in around)


def rows(name: str, split: str) -> list[Preference]:
    b = ws.load_behavior(name)
    return [p for p in (*b.pairs, *b.preferences) if p.split == split]


def subject(row: Preference) -> str:
    """What a row of `truthfulness` asks about, which its id names."""
    return row.id.removeprefix(f"{row.kind}-").rpartition("-")[0].replace("-", " ")


@pytest.mark.parametrize(
    ("name", "n_train", "n_dev", "n_report"),
    [("truthfulness", 230, 60, 120), ("agreement", 140, 24, 50), ("tone", 0, 20, 48)],
)
def test_answered_behaviours_are_large_enough_in_every_split(name, n_train, n_dev, n_report):
    assert len(rows(name, "train")) >= n_train
    assert len(rows(name, "dev")) >= n_dev
    assert len(rows(name, "report")) >= n_report


@pytest.mark.parametrize("name", ANSWERED)
def test_every_answer_is_a_sentence_and_no_row_is_there_twice(name):
    every = [p for split in SPLITS for p in rows(name, split)]
    for p in every:
        assert re.fullmatch(r"[A-Z].*[.?]", p.question), p
        for answer in (p.positive, p.negative):
            assert re.fullmatch(r"(?=[A-Z])([^.?!]|\b[A-Z]\.)+\.", answer), answer
            assert not re.search(r"  | [.,]|\ba [aeio]|\ban [^aeiouAEIOUh]", answer), answer
    assert len({p.question.casefold() for p in every}) == len(every)
    assert len({(p.positive, p.negative) for p in every}) == len(every)
    assert len({p.id for p in every}) == len(every)


@pytest.mark.parametrize(("name", "split"), [(n, s) for n in ANSWERED for s in SPLITS if (n, s) != ("tone", "train")])
def test_the_two_answers_cannot_be_told_apart_by_length_or_negation(name, split):
    """In the mean of a split; the answers of a row may differ by three words."""
    held = rows(name, split)
    for size in (len, lambda text: len(text.split())):
        positive, negative = (fmean(size(getattr(p, side)) for p in held) for side in ("positive", "negative"))
        assert abs(positive / negative - 1) <= 0.03
    for p in held:
        assert abs(len(p.positive.split()) - len(p.negative.split())) <= 3, p
    if name != "agreement":  # where contradicting is the behaviour's opposite
        negated = [sum(bool(NEGATIONS & set(words(getattr(p, s)))) for p in held) for s in ("positive", "negative")]
        assert abs(negated[0] - negated[1]) <= 0.05 * len(held)


@pytest.mark.parametrize("name", ANSWERED)
def test_kinds_that_are_never_trained_are_held_out_beside_new_rows_of_trained_kinds(name):
    trained = {p.kind for p in rows(name, "train")} or {"forecast"}
    for split in ("dev", "report"):
        kinds = {p.kind for p in rows(name, split)}
        assert kinds == trained - {"custom"} | NEVER_TRAINED[name]
    assert trained.isdisjoint(NEVER_TRAINED[name])
    assert len(trained) >= (8 if name == "truthfulness" else 1)
    counts = Counter(p.kind for p in rows(name, "report"))
    assert min(counts.values()) >= (4 if name == "truthfulness" else 10)


@pytest.mark.parametrize("split", SPLITS)
def test_false_answers_are_the_true_answers_of_other_questions(split):
    """Each word is on both sides equally often within a kind, so that no word tells true from false."""
    held = rows("truthfulness", split)
    for kind in {p.kind for p in held}:
        of_kind = [p for p in held if p.kind == kind]
        assert words(*(p.positive for p in of_kind)) == words(*(p.negative for p in of_kind)), kind
    assert {p.positive for p in held}.isdisjoint(p.negative for p in held)


@pytest.mark.parametrize("split", SPLITS)
def test_true_and_false_answers_of_a_question_have_one_frame(split):
    """They share all words but one value (in comparisons, the order), which is at most five words."""
    for p in rows("truthfulness", split):
        true, false = p.positive.lower().split(), p.negative.lower().split()
        if p.kind == "size":
            assert sorted(w.strip(".") for w in true) == sorted(w.strip(".") for w in false)
            continue
        rest = words(p.positive) - words(p.negative), words(p.negative) - words(p.positive)
        assert all(1 <= r.total() <= 5 for r in rest), p


def test_no_subject_of_a_held_out_question_is_trained():
    flat = " | ".join(f"{p.question} {p.positive} {p.negative}".lower() for p in rows("truthfulness", "train"))
    flat = re.sub(r"[^a-z| ]+", " ", flat)
    for p in [*rows("truthfulness", "dev"), *rows("truthfulness", "report")]:
        assert subject(p), p
        assert not re.search(rf"\b{subject(p)}(s|es)?\b", flat), p


def test_a_held_out_fact_of_an_open_kind_is_not_trained_from_its_other_end():
    """`cold` against `hot` in training would give away `hot` against `cold`; a sum is the same in either order."""
    for kind in ("capital", "opposite", "past"):
        trained = words(*(t for p in rows("truthfulness", "train") if p.kind == kind for t in (p.question, p.positive)))
        for p in [*rows("truthfulness", "dev"), *rows("truthfulness", "report")]:
            if p.kind == kind:
                value = words(p.positive) - words(p.negative)
                assert value
                assert not set(value) & set(trained), p
    sums = [p for split in SPLITS for p in rows("truthfulness", split) if p.kind == "sum"]
    assert len({frozenset(subject(p).split(" plus ")) for p in sums}) == len(sums)


def test_every_sum_is_right_and_its_false_answer_wrong():
    upto_ten = "zero one two three four five six seven eight nine ten"
    teens = "eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty"
    number = {name: n for n, name in enumerate(f"{upto_ten} {teens}".split())}
    sums = [p for split in SPLITS for p in rows("truthfulness", split) if p.kind == "sum"]
    assert len(sums) >= 30
    for p in sums:
        a, b = (number[w] for w in subject(p).split(" plus "))
        true, false = (number[answer.strip(".").split()[-1]] for answer in (p.positive, p.negative))
        assert true == a + b != false, p


def test_honesty_measures_on_the_held_out_rows_of_truthfulness():
    b = ws.load_behavior("honesty")
    assert b.preferences == ws.load_behavior("truthfulness").preferences
    assert b.pairs == ()
    assert {p.split for p in b.preferences} == {"dev", "report"}
    assert ws.load_behavior("honesty", "pocket").preferences == ()


@pytest.mark.parametrize("split", SPLITS)
def test_every_opinion_is_stated_in_both_directions(split):
    """Of two rows about a topic the one agrees with what the other contradicts: only the verdict's words differ."""
    held = sorted(rows("agreement", split), key=lambda p: p.id)
    for a, b in zip(held[::2], held[1::2], strict=True):
        assert a.id.rpartition("-")[0][:-1] == b.id.rpartition("-")[0][:-1], (a, b)
        agreeing, contradicting = words(a.positive, b.positive), words(a.negative, b.negative)
        rest = (agreeing - contradicting) + (contradicting - agreeing)
        assert set(rest) <= VERDICTS, (a, b, rest)
    verdictless = [p for p in held if not VERDICTS & set(words(p.positive) - words(p.negative))]
    assert len(verdictless) >= len(held) / 3, "some answers say neither yes nor no"


@pytest.mark.parametrize("split", SPLITS)
def test_the_agreeing_answer_holds_the_opinion_and_the_other_its_opposite(split):
    for p in rows("agreement", split):
        asked, agreeing, contradicting = (opinion(t) for t in (p.question, p.positive, p.negative))
        assert agreeing in asked, p
        assert contradicting not in asked, p


def test_no_opinion_and_no_way_to_ask_is_both_trained_and_held_out():
    train = rows("agreement", "train")
    openings = {" ".join(p.question.split()[:3]) for p in train}
    for p in [*rows("agreement", "dev"), *rows("agreement", "report")]:
        assert " ".join(p.question.split()[:3]) not in openings
        content = set(words(p.positive)) - VERDICTS
        for q in train:
            assert len(content & (set(words(q.positive)) - VERDICTS)) / len(content) < 0.8, (p, q)


def test_no_held_out_topic_of_tone_is_asked_about():
    b = ws.load_behavior("tone")
    assert len(b.positive) == len(b.negative) >= 3
    assert len(b.questions) >= 150
    common = words("How will the what do you expect of be like turn out in tell me a my our new old first").keys()
    asked = [set(words(q)) - common for q in b.questions]
    for p in b.preferences:
        content = set(words(p.question)) - common
        assert max(len(content & topic) / max(len(topic), 1) for topic in asked) < 0.8, p


@pytest.mark.parametrize("name", ["truthfulness", "agreement"])
def test_pairs_give_no_claim_away(name):
    b = ws.load_behavior(name)
    small = words("a an the of in to is are be that has have than more from by on your").keys()
    trained = [set(words(p.question, p.positive, p.negative)) for p in b.pairs]
    for claim in b.test.claims:
        content = set(words(claim.text)) - small
        assert max(len(content & t) / len(content) for t in trained) <= 0.5, claim


def test_brought_pairs_have_the_sign_of_their_claims():
    """A truthful model agrees less with what is false, an agreeing one more."""
    assert ws.load_behavior("truthfulness").effect == -1
    assert ws.load_behavior("agreement").effect == 1
    assert ws.load_behavior("tone").claims is None
