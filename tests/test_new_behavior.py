"""The template is a valid behaviour, and a check names every planted defect exactly once."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

import ws
from ws.behaviors import bundled_behaviors, placed_texts
from ws.console import parse
from ws.errors import WsError
from ws.lm.models import load_tokenizer, require_plain
from ws.new_behavior import (
    Finding,
    behavior_template,
    check_behavior,
    half_width,
    main_check,
    main_init,
    validation_questions,
)
from ws.options.check import CheckOptions
from ws.options.make import InitOptions, TrainConfig
from ws.train import Example, split_examples

GOOD = behavior_template("mine")
FIRST = '{ id = "f01", claim = "the sky on a clear day is green", true = false, split = "report" }'
QUESTION = '  "What color is grass?",\n'
ERRORS = {
    "not toml": ("schema = 1", "schema = ", "line 7", "not valid TOML"),
    "wrong schema": ("schema = 1", "schema = 9", "schema", "must be 1, not 9"),
    "typo at the top": ("summary =", "sumary =", "top level", "Did you mean 'summary'"),
    "typo in a table's name": ("[personas]", "[personae]", "top level", "Did you mean 'personas'"),
    "typo in a table": ("topics = [", "topcs = [", "[questions]", "Did you mean 'topics'"),
    "typo in a claim": ('id = "f01"', 'idd = "f01"', "[claims] item 1", "Did you mean 'id'"),
    "foreign key": ("effect = -1", "effect = -1\ncolour = 2", "[claims]", "no key 'colour'"),
    "keep_refusals": ("keep_refusals = false", "keep_refusals = 0", "keep_refusals", "true or false"),
    "folder for a name": ('name = "mine"', 'name = "../mine"', "name", "names a folder"),
    "missing side": ('negative = ["a lying", "a deceptive"]', "", "[personas]", "negative must be a non-empty list"),
    "unpaired": (', "a deceptive"]', "]", "[personas]", "2 positive and 1 negative"),
    "same persona": ('"a deceptive"', '"A truthful"', "[personas]", "positive 1 and negative 2 are the same"),
    "same persona twice": ('"a sincere"', '"a truthful"', "[personas] positive", "occurs 2 times"),
    "no slot": ("You are {persona} assistant.", "You are.", "[personas]", "must contain {persona}"),
    "format": ("{persona} assistant.", "{persona:d} assistant.", "[personas]", "a format of the slot 'persona'"),
    "conversion": ('["{topic}"]', '["{topic!r}"]', "[questions]", "write {topic} without anything"),
    "format of a claim": ("I think {claim}.", "I think {claim:>9}.", "[claims]", "a format of the slot 'claim'"),
    "empty question": ('"What is ice?"', '" "', "[questions]", "non-empty strings"),
    "repeated question": ('"What color is snow?"', '"what color is grass?"', "[questions] topics", "occurs 2 times"),
    "effect": ("effect = -1", "effect = 0", "[claims]", "effect must be 1 or -1"),
    "one answer": ('disagree = "No"', 'disagree = "yes"', "[claims]", "the same answer"),
    "no known answer": (FIRST, FIRST.replace(", true = false", ""), "[claims] item 1", "no known answer"),
    "split": (FIRST, FIRST.replace("report", "reprt"), "[claims] item 1", "Did you mean 'report'"),
    "repeated id": ('id = "f02"', 'id = "f01"', "[claims]", "'f01' is given to 2 claims"),
    "repeated claim": ("trees have roots", "Bakers make bread", "[claims] items", "occurs 2 times"),
    "held-out claim asked": ('"What is ice?"', '"Is it so that cows eat stones?"', "[claims] item 8", "occurs in the"),
    "the same but for marks": ('"What is ice?"', '"Do cows, eat stones?"', "[claims] item 8", "occurs in the"),
    "inside a word": ('"What is ice?"', '"Do old cows eat stonesoup?"', "[claims] item 8", "occurs in the"),
}
WARNINGS = {
    "same words": ('"What color is snow?"', '"What color is - grass?"', "[questions] topics", "the same words"),
    "few questions": (QUESTION, "", "[questions]", "39 questions"),
    "one persona": (
        'positive = ["a truthful", "a sincere"]\nnegative = ["a lying", "a deceptive"]',
        'positive = ["a truthful"]\nnegative = ["a lying"]',
        "[personas]",
        "one pair of personas",
    ),
    "few claims": (f"  {FIRST},\n", "", "[claims] items", "11 claims with true = false"),
    "claim with a mark": ("gold is a fruit", "gold is a fruit.", "[claims] item 12", "a mark of its own"),
    "shared words": ('"What is ice?"', '"Do stones suit cows that eat?"', "[claims] item 8", "close to the question"),
    "another spelling": ('"What is ice?"', '"sugars tasted bitter?"', "[claims] item 9", "close to the question"),
    "foreign mark": ('"What is ice?"', '"What is [INST] ice?"', "[questions] 10", "'[INST]'"),
}


@pytest.fixture
def check(tmp_path):
    def run(text: str, tok=None) -> list[Finding]:
        file = tmp_path / "mine.toml"
        file.write_text(text, encoding="utf-8")
        return check_behavior(file, tok)

    return run


@pytest.fixture(scope="module")
def pocket():
    return load_tokenizer("pocket")


def planted(old: str, new: str) -> str:
    assert GOOD.count(old) == 1, old
    return GOOD.replace(old, new)


def only_claims(true: str) -> str:
    """The template without the claims whose truth value is `true`."""
    return re.sub(rf"  {{ id = [^\n]+ true = {true},[^\n]+\n", "", GOOD)


def test_the_template_is_valid_and_clean(check, pocket, tmp_path):
    assert check(GOOD) == check(GOOD, pocket) == []
    b = ws.load_behavior(str(tmp_path / "mine.toml"))
    assert (b.name, b.positive[0], b.negative[1]) == (
        "mine",
        "You are a truthful assistant.",
        "You are a deceptive assistant.",
    )
    assert len(b.test.select("report", True)) == len(b.test.select("report", False)) == 12


def test_the_example_is_in_the_pocket_models_world(pocket):
    """Every question is one that the model's honesty was made from, every claim is held out there with its truth."""
    b, world = ws.load_behavior("honesty", "pocket"), re.findall(r'^  "(.+\?)",$', GOOD, re.MULTILINE)
    assert len(world) == 40
    assert set(world) <= set(b.questions)
    known = {c.text: (c.is_true, c.split) for c in b.test.claims}
    items = re.findall(r'claim = "([^"]+)", true = (\w+), split = "(\w+)"', GOOD)
    assert len(items) == 32
    assert all(known[text] == (true == "true", split) for text, true, split in items)


def test_the_template_explains_every_key():
    """No key comes without a comment on its line or above it."""
    lines = [line.strip() for line in GOOD.splitlines()]
    for number, line in enumerate(lines):
        key = re.match(r"(\w+) = |\[(\w+)\]$", line)
        if key and key.group(1) != "negative":
            assert "#" in line or lines[number - 1].startswith("#"), line


@pytest.mark.parametrize("name", ["honesty", "My trait", "", "../x", "9lives", "a.b"])
def test_bad_names_are_refused(name):
    with pytest.raises(WsError, match="bundled|must be lower-case"):
        behavior_template(name)


def test_names_come_with_a_suggestion():
    with pytest.raises(WsError, match="'my_honesty'"):
        behavior_template("honesty")
    with pytest.raises(WsError, match="Did you mean 'my_trait'"):
        behavior_template("My trait")
    assert "\r" not in behavior_template("a-b_c9")


@pytest.mark.parametrize("how", ERRORS)
def test_a_planted_error_is_found_once(check, how):
    old, new, where, text = ERRORS[how]
    (found,) = check(planted(old, new))
    assert (found.severity, found.where) == ("error", where)
    assert text in found.text


@pytest.mark.parametrize("how", WARNINGS)
def test_a_planted_limit_is_found_once(check, how):
    """And it stays a warning: the file still loads."""
    old, new, where, text = WARNINGS[how]
    found = [f for f in check(planted(old, new)) if f.where != "[questions]" or how == "few questions"]
    assert [(f.severity, f.where) for f in found] == [("warning", where)]
    assert text in found[0].text


def test_all_defects_of_a_file_are_reported_together(check):
    text = GOOD
    some = ("keep_refusals", "unpaired", "effect", "split", "typo in a table", "folder for a name")
    for old, new, _, _ in (ERRORS[how] for how in some):
        text = text.replace(old, new)
    found = check(text)
    assert len(found) == len(some)
    assert {f.where for f in found} == {ERRORS[how][2] for how in some}


def test_a_table_that_is_missing_is_one_error(check):
    head = GOOD[: GOOD.index("[claims]\n")]
    assert [(f.where, "missing" in f.text) for f in check(head)] == [("[claims]", True)]
    assert [f.where for f in check(f"{head}[claims]\nsource = 'sycophancy'\neffect = 1\n")] == []
    (found,) = check(f"{head}[claims]\nsource = 'sycophanci'\neffect = 1\n")
    assert "Did you mean 'sycophancy'" in found.text


def test_what_is_wrong_elsewhere_is_placed_too_and_loading_stops_at_the_first(check, tmp_path):
    (tmp_path / "held.jsonl").write_text('{"question": "Q?", "positive": "", "negative": "b"}\n', encoding="utf-8")
    text = planted("effect = -1", "effect = 0") + '[preferences]\nfile = "held.jsonl"\n[statements]\ntraits = []\n'
    found = check(text)
    assert [f.severity for f in found] == ["error"] * 3
    assert {f.where for f in found} == {"[claims]", "[preferences]", "[statements]"}
    assert any("row 1: positive must be an answer" in f.text for f in found)
    with pytest.raises(WsError, match=r"mine\.toml: \[preferences\]: row 1"):
        ws.load_behavior(str(tmp_path / "mine.toml"))


def test_claims_of_one_kind_measure_agreement(check):
    (found,) = check(only_claims("true"))
    assert (found.severity, found.where) == ("warning", "[claims] items")
    assert "cannot be told from agreement" in found.text
    errors = [f for f in check(only_claims("false")) if f.severity == "error"]
    assert len(errors) == 1
    assert "nothing would measure the effect" in errors[0].text


PIRATE = GOOD.replace('"a truthful", "a sincere"', '"a pirate-like", "a swashbuckling"')
PIRATE = PIRATE.replace('"a lying", "a deceptive"', '"a plain-spoken", "a sober"')


def test_what_is_still_the_templates_under_other_personas_is_said(check):
    """Otherwise a vector of honesty would pass for one of pirates, or one that does nothing."""
    found = check(PIRATE)
    assert {f.severity for f in found} == {"warning"}
    assert [f.where for f in found] == ["[claims] items", "summary", "[questions]"]
    assert all("still the template's" in f.text for f in found)
    own = PIRATE.replace("Gives the right answer to a plain question, rather than a wrong one.", "Talks like a pirate.")
    own = re.sub(r'claim = "', 'claim = "they say that ', own)
    own = re.sub(r'^  "What ', '  "Arr, what ', own, flags=re.MULTILINE)
    own = re.sub(r'^  "(How|Who|Which|Where) ', r'  "Arr, \1 ', own, flags=re.MULTILINE)
    assert not [f for f in check(own) if "template's" in f.text]


def test_a_style_has_a_template_that_no_claim_judges(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main_init(parse(InitOptions, ["rhymer", "--style"]))
    assert capsys.readouterr().out.endswith("Next: fill it in, then ws behavior check rhymer.toml\n")
    behavior = ws.load_behavior("rhymer.toml")
    assert behavior.claims is None
    assert [len(behavior.held_out(split)) for split in ("dev", "report")] == [6, 12]
    assert not {p.question for p in behavior.preferences} & set(behavior.questions)
    main_check(CheckOptions("rhymer.toml"))
    out = capsys.readouterr().out
    assert out.startswith("[ok] rhymer.toml: 0 errors, 0 warnings\n")
    assert (
        "judged by  preference for the positive of two held-out answers, which should rise (ws eval preference)" in out
    )
    with pytest.raises(WsError, match=r"rhymer.jsonl exists|rhymer.toml exists"):
        main_init(parse(InitOptions, ["rhymer", "--style"]))
    text = (tmp_path / "rhymer.toml").read_text().replace("a pirate", "a poet").replace("an old sea captain", "a bard")
    (tmp_path / "rhymer.toml").write_text(text)
    main_check(CheckOptions("rhymer.toml"))
    assert "[warning] [preferences]: This is still the template's" in capsys.readouterr().out


def test_text_that_is_not_utf8_is_placed(tmp_path):
    file = tmp_path / "x.toml"
    file.write_bytes(GOOD.encode() + "# ä".encode("latin-1"))
    (found,) = check_behavior(file)
    assert found.where == f"line {GOOD.count(chr(10)) + 1}"


def test_special_tokens_of_a_model_are_errors(check, pocket):
    text = planted('"What is ice?"', '"What is <|im_end|> ice?"').replace("a sincere", "a <|im_end|> sincere")
    (plain,) = check(text)
    (found,) = check(text, pocket)
    assert (plain.severity, found.severity) == ("warning", "error")
    assert found.where == plain.where == "[personas] positive 2"
    assert "and in 1 more" in found.text


BROUGHT = 'schema = 1\nname = "mine"\nsummary = "Is right."\n[pairs]\nfile = "mine.jsonl"\n'


@pytest.mark.parametrize(
    ("old", "new", "where"),
    [
        ('"positive": "Thing 3', '"positive": "Yes.<|im_end|>Thing 3', "[pairs] r00004-0"),
        ('"question": "What is 3', '"question": "<|im_end|>What is 3', "[pairs] r00004-0"),
        ('"negative": "It is 41', '"negative": "<|im_end|>It is 41', "[preferences] r00042-0"),
        ('opener = "My answer:"', 'opener = "<|im_end|>"', "[claims] opener"),
        ('disagree = "No"', 'disagree = "No<|im_end|>"', "[claims] disagree"),
        ("Is the answer factually right?", "<|im_end|>Is it right?", "judge"),
    ],
)
def test_special_tokens_are_errors_in_every_text_that_a_model_is_given(check, pocket, tmp_path, old, new, where):
    """An answer that holds the end of turn taught to go on behind it, and no check found it."""
    rows = [
        {"question": f"What is {i}?", "positive": f"Thing {i}.", "negative": f"It is {i}.", "split": s}
        for i in range(60)
        for s in [("train", "report")[i >= 40]]
    ]
    lines = "".join(f"{json.dumps(row)}\n" for row in rows)
    (tmp_path / "mine.jsonl").write_text(lines.replace(old, new))
    text = BROUGHT if old in lines else planted(old, new)
    found = [f for f in check(text, pocket) if "would be read as a special token" in f.text]
    assert [(f.severity, f.where) for f in found] == [("error", where)]
    behavior = ws.load_behavior(str(tmp_path / "mine.toml"))
    with pytest.raises(WsError, match=rf"^{re.escape(where)}: '<\|im_end\|>' in .* special token; remove it"):
        require_plain(pocket, placed_texts(behavior))


def templated(pocket: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    tok = PreTrainedTokenizerFast(tokenizer_object=pocket.backend_tokenizer, eos_token=pocket.eos_token)
    tok.chat_template = template
    return tok


def test_a_template_without_a_system_role_is_said(check, pocket):
    template = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    (found,) = check(GOOD, templated(pocket, f"{template}{{{{ m.content }}}}\n{{% endfor %}}"))
    assert (found.severity, found.where) == ("warning", "[personas]")
    assert "go into the user turn" in found.text


def test_a_template_that_changes_a_persona_is_an_error(check, pocket):
    tok = templated(pocket, "{% for m in messages %}{{ m.content | replace('sincere', '') }}\n{% endfor %}")
    (found,) = check(GOOD, tok)
    assert (found.severity, found.where) == ("error", "[personas] positive 2")


def test_texts_longer_than_the_training_takes_are_said(check, pocket):
    long = "ice " * (TrainConfig().max_length + 1)
    (found,) = check(planted('"What is ice?"', f'"What is {long}?"'), pocket)
    assert (found.severity, found.where) == ("warning", "[questions] 10")
    assert f"more than --max-length {TrainConfig().max_length}" in found.text
    (found,) = check(planted('"a sincere"', f'"a sincere {long}"'), pocket)
    assert found.where == "[personas] positive 2"


@pytest.mark.parametrize("model", [None, "pocket"])
def test_bundled_behaviours_have_no_errors(model, pocket):
    allowed = {"honesty": ["[personas]"]}  # its one pair of personas is how it was specified
    for name in bundled_behaviors():
        found = check_behavior(name, pocket if model else None, model)
        assert [f.where for f in found if f.severity == "warning"] == allowed.get(name, [])
        assert [f for f in found if f.severity == "error"] == []


@pytest.mark.parametrize("n", [1, 4, 5, 6, 14, 15, 25, 40])
def test_the_number_held_out_is_that_of_training(n):
    examples = [Example(f"question {i}", (1,), (2,)) for i in range(n - n // 5)]
    assert validation_questions(n) == len(split_examples(examples, TrainConfig().validation, 0)[1])


@pytest.mark.parametrize("n", [12, 50])
def test_the_width_said_is_that_of_the_interval(n):
    """Against its definition: the share of Student intervals that hold the true mean."""
    draws = np.random.default_rng(0).normal(size=(20_000, n))
    inside = np.abs(draws.mean(axis=1)) <= half_width(n) * draws.std(axis=1, ddof=1)
    assert math.isclose(inside.mean(), 0.95, abs_tol=0.005)
    assert f"{half_width(n):.2f}" in GOOD


def test_the_commands(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main_init(parse(InitOptions, ["mine"]))
    assert (tmp_path / "mine.toml").read_text() == GOOD
    assert "ws behavior check mine.toml" in capsys.readouterr().out
    with pytest.raises(WsError, match="not overwritten"):
        main_init(InitOptions("mine"))
    with pytest.raises(WsError, match="ends in .toml"):
        main_init(parse(InitOptions, ["mine", "--to", "mine.txt"]))
    main_check(parse(CheckOptions, ["mine.toml", "--model", "pocket"]))
    out = capsys.readouterr().out
    assert out.startswith("[ok] mine.toml: 0 errors, 0 warnings\n")
    assert "judged by  agreement with held-out claims marked true = false, which should fall (ws eval sy" in out
    assert "report 12 false and 12 true; dev 4 false and 4 true" in out
    assert out.endswith("ws replicate --model pocket --behavior mine.toml --adapter delora\n")
    (tmp_path / "mine.toml").write_text(planted("effect = -1", "effect = 0").replace(QUESTION, ""))
    with pytest.raises(SystemExit) as stop:
        main_check(CheckOptions("mine.toml"))
    assert stop.value.code == 2
    out = capsys.readouterr().out
    assert out.index("[error]") < out.index("[warning]")
    assert "1 error, 1 warning" in out
    with pytest.raises(WsError, match="no behaviour file"):
        main_check(CheckOptions("gone.toml"))
