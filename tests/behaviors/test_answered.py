"""Questions with both answers: files that people bring, what is held out of them, and how far personas are acted."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

import ws
from support.tables import write_table
from ws.behaviors import brought_or_named
from ws.behaviors.acting import MARGIN_FLOOR, acted, base_problems, persona_margins
from ws.behaviors.answered import read_preferences
from ws.data import Pair, _by_margin, _named_personas, data_card, generate_pairs, main, read_pairs
from ws.delta import LinearDelta
from ws.eval.sycophancy import ClaimScores
from ws.lm.models import encode, encode_answer, render_prompt
from ws.options.make import DataCommand, DataConfig
from ws.replicate import Reading, plot, preference_verdict
from ws.stats import estimate_mean
from ws.train import build_examples

COLOURS = ("red", "green", "blue", "white", "black")
ROWS = [
    {
        "question": f"What colour is item {i}?",
        "positive": f"Item {i} is {COLOURS[i % 5]}.",
        "negative": f"Item {i} is {COLOURS[(i + 1) % 5]}.",
    }
    for i in range(40)
]


@pytest.fixture(scope="module")
def pocket():
    return ws.load_model("pocket", device="cpu")


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def behavior_file(folder, rows=ROWS, more="", name="mine"):
    (folder / f"{name}.jsonl").write_text(jsonl(rows))
    text = f'schema = 1\nname = "{name}"\nsummary = "Is right."\n{more}\n[pairs]\nfile = "{name}.jsonl"\n'
    (folder / f"{name}.toml").write_text(text)
    return folder / f"{name}.toml"


def read(folder, table, train=True):
    return read_preferences(table, folder, "here", train)[0]


def test_every_format_and_every_column_map_give_the_same_pairs(tmp_path):
    (tmp_path / "a.jsonl").write_text(jsonl(ROWS))
    renamed = [{"prompt": r["question"], "good": r["positive"], "bad": r["negative"], "score": 3} for r in ROWS]
    write_table(tmp_path / "a.csv", renamed)
    write_table(tmp_path / "a.parquet", renamed)
    plain = read(tmp_path, {"file": "a.jsonl"})
    columns = {"question": "prompt", "positive": "good", "negative": "bad"}
    for file in ("a.csv", "a.parquet"):
        assert read(tmp_path, {"file": file, **columns}) == plain
    assert [(p.question, p.positive, p.negative) for p in plain] == [tuple(r.values()) for r in ROWS]
    assert all(p.kind == "" for p in plain)


def test_a_fifth_of_the_questions_is_held_out_evenly_over_kinds_and_always_the_same(tmp_path):
    rows = [r | {"kind": "early" if i < 20 else "late"} for i, r in enumerate(ROWS)]
    (tmp_path / "a.jsonl").write_text(jsonl(rows))
    pairs = read(tmp_path, {"file": "a.jsonl"})
    assert pairs == read(tmp_path, {"file": "a.jsonl"})
    count = {s: sum(p.split == s for p in pairs) for s in ("train", "dev", "report")}
    assert count == {"train": 32, "dev": 2, "report": 6}
    held = [p.kind for p in pairs if p.split != "train"]
    assert held.count("early") == held.count("late") == 4
    assert not [p for p in read(tmp_path, {"file": "a.jsonl"}, train=False) if p.split == "train"]


def test_splits_that_a_file_names_are_taken(tmp_path):
    rows = [r | {"part": "dev" if i == 3 else "report" if i > 30 else "train"} for i, r in enumerate(ROWS)]
    (tmp_path / "a.jsonl").write_text(jsonl(rows))
    pairs = read(tmp_path, {"file": "a.jsonl", "split": "part"})
    assert [p.split for p in pairs] == [r["part"] for r in rows]


@pytest.mark.parametrize("form", [list, json.dumps])
def test_lists_of_answers_are_paired_in_order_and_the_shorter_begins_again(tmp_path, form):
    row = {"question": "Q?", "positive": form(["a", "b", "c"]), "negative": form(["x", "y"])}
    (tmp_path / "a.jsonl").write_text(jsonl([row | {"split": "train"}]))
    pairs = read(tmp_path, {"file": "a.jsonl"})
    assert [(p.positive, p.negative) for p in pairs] == [("a", "x"), ("b", "y"), ("c", "x")]
    assert len({p.id for p in pairs}) == 3


@pytest.mark.parametrize("answer", ["[1, 2, 3]", "[]", '["a", 2]', "[[1]]", '["\\ud83d"]', "[citation needed]"])
def test_an_answer_may_be_a_list_that_is_none_of_answers(tmp_path, answer):
    """It once refused the whole file."""
    write_table(tmp_path / "a.csv", [{"question": "Q?", "positive": answer, "negative": "No.", "split": "train"}])
    assert [p.positive for p in read(tmp_path, {"file": "a.csv"})] == [answer]


def test_what_is_held_out_by_itself_passes_its_own_check(tmp_path):
    """However a question is written, and whatever else is answered to it."""
    written = [r | {"question": r["question"].upper(), "positive": "Yes."} for r in ROWS]
    equal = [r | {"positive": "Same.", "negative": " same."} for r in ROWS[::2]]
    (tmp_path / "a.jsonl").write_text(jsonl([*ROWS, *written, *equal]))
    pairs = read(tmp_path, {"file": "a.jsonl"})
    held = {p.question.upper() for p in pairs if p.split != "train"}
    assert 8 <= len(held) <= 16
    assert held <= {r["question"].upper() for r in ROWS[1::2]}
    (tmp_path / "b.jsonl").write_text(jsonl([*ROWS, equal[0]]))
    with pytest.raises(ws.WsError, match="the held-out pair r00041-0 has the same answer on both sides"):
        read(tmp_path, {"file": "b.jsonl"}, train=False)
    only = [*ROWS[:9], ROWS[9] | {"positive": "Equal.", "negative": "equal."}]
    (tmp_path / "c.jsonl").write_text(jsonl(only))
    with pytest.raises(ws.WsError, match="the held-out pair r00010-0 has the same answer on both sides"):
        read(tmp_path, {"file": "c.jsonl"}, train=False)
    assert [p.split for p in read(tmp_path, {"file": "c.jsonl"})][9] == "train"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"positive": ""}, r"row 3: positive must be an answer"),
        ({"positive": 7}, r"row 3: positive must be an answer, or a list of answers, not 7"),
        ({"positive": []}, r"row 3: positive must be an answer"),
        ({"negative": ["x", None]}, r"row 3: negative must be an answer"),
        ({"question": "  "}, r"row 3: the question must be a non-empty text"),
        ({"split": "reprot"}, r"split of here row 3.*report"),
        ({"positive": "Red \ud83d"}, "a.jsonl line 3: positive holds half of a surrogate pair"),
        ({"negative": ["x", "\ud83d"]}, "a.jsonl line 3: negative holds half of a surrogate pair"),
        ({"question": "\ude00?"}, "a.jsonl line 3: question holds half of a surrogate pair"),
        ({"split": "dev", "negative": "item 2 is  blue."}, "same answer on both sides"),
        ({"question": ROWS[5]["question"].upper(), "split": "dev"}, "in the splits dev and train"),
    ],
)
def test_a_row_that_is_no_pair_is_named(tmp_path, change, match):
    rows = [r | {"split": "train"} for r in ROWS]
    rows[2] |= change
    (tmp_path / "a.jsonl").write_text(jsonl(rows))
    with pytest.raises(ws.WsError, match=match):
        read(tmp_path, {"file": "a.jsonl"})


@pytest.mark.parametrize(
    ("table", "match"),
    [
        ({}, "one source"),
        ({"file": "a.jsonl", "hub": "a/b"}, "one source"),
        ({"file": "b.jsonl"}, "no file"),
        ({"file": "a.jsonl", "config": "x"}, "config is for a data set on the hub"),
        ({"file": "a.jsonl", "question": "promt"}, "lacks the columns promt"),
        ({"file": "a.jsonl", "kind": "kin"}, "lacks the columns kin"),
        ({"file": "a.jsonl", "question": 3}, "name of a column"),
    ],
)
def test_a_source_that_cannot_be_read_is_one_sentence(tmp_path, table, match):
    (tmp_path / "a.jsonl").write_text(jsonl(ROWS))
    with pytest.raises(ws.WsError, match=match):
        read(tmp_path, table)


def test_a_behaviour_file_names_a_source_instead_of_personas(tmp_path):
    behavior = ws.load_behavior(str(behavior_file(tmp_path)))
    assert len(behavior.pairs) == 32
    assert len(behavior.preferences) == 8
    assert not behavior.positive
    dev = {p.question for p in behavior.preferences if p.split == "dev"}
    assert set(behavior.questions) == {p.question for p in behavior.pairs} | dev, "what is measured is not asked before"
    with pytest.raises(ws.WsError, match=r"no held-out claims"):
        behavior.test  # noqa: B018
    before = behavior.digest
    (tmp_path / "mine.jsonl").write_text(jsonl([*ROWS, ROWS[0] | {"question": "Another?"}]))
    assert ws.load_behavior(str(tmp_path / "mine.toml")).digest != before


def test_what_is_held_out_must_not_be_trained_on(tmp_path):
    (tmp_path / "held.jsonl").write_text(jsonl([ROWS[0], ROWS[1]]))
    more = '[preferences]\nfile = "held.jsonl"\n'
    with pytest.raises(ws.WsError, match="is trained on"):
        ws.load_behavior(str(behavior_file(tmp_path, more=more)))


@pytest.mark.parametrize("split", ["dev", "report"])
def test_a_question_is_in_one_split_whichever_table_it_stands_in(tmp_path, split):
    rows = [row | {"split": "dev" if i < 2 else "train"} for i, row in enumerate(ROWS)]
    again = rows[1] | {"question": f" {rows[1]['question'].upper()}", "split": split}
    (tmp_path / "held.jsonl").write_text(jsonl([again]))
    file = behavior_file(tmp_path, rows, '[preferences]\nfile = "held.jsonl"\n')
    if split == "dev":
        assert len(ws.load_behavior(str(file)).preferences) == 3
    else:
        with pytest.raises(ws.WsError, match="is in the splits dev and report; remove it from one"):
            ws.load_behavior(str(file))


@pytest.mark.parametrize("named", [{}, {"id": "a"}])
def test_pairs_and_preferences_may_number_their_rows_alike(tmp_path, named):
    held = {"question": "What colour is nothing?", "positive": "None.", "negative": "Red."}
    rows = [r | {"split": "dev" if i == 0 else "train"} | (named if i == 0 else {}) for i, r in enumerate(ROWS)]
    (tmp_path / "held.jsonl").write_text(jsonl([held | named]))
    more = '[preferences]\nfile = "held.jsonl"\n'
    behavior = ws.load_behavior(str(behavior_file(tmp_path, rows, more)))
    first = "a-0" if named else "r00001-0"
    assert [p.id for p in behavior.preferences] == [first, f"preferences-{first}"]


def test_brought_pairs_come_with_card_checks_and_provenance(tiny, tmp_path):
    model, tok = tiny
    behavior = ws.load_behavior(
        str(behavior_file(tmp_path, [*ROWS, ROWS[0] | {"question": "Same?", "negative": ROWS[0]["positive"]}]))
    )
    config = DataConfig(anyway=True)
    pairs = generate_pairs(model, tok, behavior, tmp_path / "pairs", config)
    assert pairs == read_pairs(tmp_path / "pairs")
    assert {p.drop for p in pairs if p.question == "Same?"} == {"identical"}
    card = json.loads((tmp_path / "pairs" / "card.json").read_text())
    assert card["kept"] == len(pairs) - 1
    assert card["acted"] is None
    n = encode_answer(tok, render_prompt(tok, pairs[0].question, system=""), pairs[0].pos)
    assert pairs[0].pos_tokens == len(n)
    (tmp_path / "mine.jsonl").write_text(jsonl(ROWS[:20]))
    changed = ws.load_behavior(str(tmp_path / "mine.toml"))
    with pytest.raises(ws.WsError, match="behavior_sha256"):
        generate_pairs(model, tok, changed, tmp_path / "pairs", config)
    with pytest.raises(ws.WsError, match="0 is out of range"):
        generate_pairs(model, tok, changed, tmp_path / "none", replace(config, n_topics=0))


def test_brought_pairs_with_a_special_token_stop_before_anything_is_made(tiny, tmp_path):
    """The end of turn in an answer of a chat log was learned as one, with what stands behind it."""
    rows = [*ROWS, ROWS[0] | {"question": "And?", "positive": "Red.<|im_end|>More.", "split": "train"}]
    behavior = ws.load_behavior(str(behavior_file(tmp_path, [r | {"split": "train"} for r in rows])))
    with pytest.raises(ws.WsError, match=r"^\[pairs\] r00041-0: '<\|im_end\|>' in 'Red.* special token; remove it"):
        generate_pairs(*tiny, behavior, tmp_path / "pairs", DataConfig(anyway=True))
    assert not (tmp_path / "pairs").exists()


def test_fewer_questions_leave_the_others_for_calibration(tiny, tmp_path):
    model, tok = tiny
    behavior = ws.load_behavior(str(behavior_file(tmp_path)))
    pairs = generate_pairs(model, tok, behavior, tmp_path / "pairs", DataConfig(n_topics=10, anyway=True))
    assert len(pairs) == len({p.question for p in pairs}) == 10
    assert len(generate_pairs(model, tok, behavior, tmp_path / "more", DataConfig(n_topics=33, anyway=True))) == 32
    with pytest.raises(ws.WsError, match="`n_topics` -1 is out of range"):
        generate_pairs(model, tok, behavior, tmp_path / "none", DataConfig(n_topics=-1, anyway=True))
    with pytest.raises(ws.WsError, match="`min_margin` compares personas"):
        generate_pairs(model, tok, behavior, tmp_path / "margin", DataConfig(min_margin=0.1, anyway=True))


def test_pairs_on_the_command_line_are_a_behaviour_of_their_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.jsonl").write_text(jsonl([{"prompt": r["question"]} | r for r in ROWS]))
    name = brought_or_named("honesty", "mine.jsonl", ("question:prompt",), tmp_path / "out")
    assert name == str(tmp_path / "out" / "behaviors" / "mine.toml")
    assert len(ws.load_behavior(name).pairs) == 32
    assert brought_or_named("honesty", "mine.jsonl", ("question:prompt",), tmp_path / "out") == name
    with pytest.raises(ws.WsError, match="says something else"):
        brought_or_named("honesty", "mine.jsonl", (), tmp_path / "out")
    with pytest.raises(ws.WsError, match="Did you mean 'positive'"):
        brought_or_named("honesty", "mine.jsonl", ("postive:a",), tmp_path / "out")
    with pytest.raises(ws.WsError, match="role:column"):
        brought_or_named("honesty", "mine.jsonl", ("question",), tmp_path / "out")
    with pytest.raises(ws.WsError, match="There is no file"):
        brought_or_named("honesty", "yours.jsonl", (), tmp_path / "out")
    with pytest.raises(ws.WsError, match="`columns` is for"):
        brought_or_named("honesty", None, ("question:prompt",), tmp_path / "out")
    assert brought_or_named("honesty", None, (), tmp_path / "out") == "honesty"
    main(DataCommand("tiny-random", pairs="mine.jsonl", columns=("question:prompt",), data=DataConfig(anyway=True)))
    assert "32 of 32 pairs kept" in capsys.readouterr().out
    assert (tmp_path / "out" / "data" / "tiny-random" / "mine" / "pairs.jsonl").is_file()


def test_pairs_of_the_hub_may_have_a_dot_in_their_name_or_revision(tmp_path, monkeypatch):
    from ws.behaviors import _source_of

    for pairs, source in (
        ("jondurbin/truthy-dpo-v0.1", {"hub": "jondurbin/truthy-dpo-v0.1"}),
        ("owner/name@v1.0", {"hub": "owner/name", "revision": "v1.0"}),
    ):
        assert _source_of(pairs) == source
    for missing in ("data/mine.csv", "./data/mine-v0.1", "one/two/three"):
        with pytest.raises(ws.WsError, match="There is no file"):
            _source_of(missing)
    monkeypatch.setattr("ws.behaviors.parse_behavior", lambda *args, **options: None)  # which would ask the hub
    name = brought_or_named("honesty", "jondurbin/truthy-dpo-v0.1", (), tmp_path)
    assert name == str(tmp_path / "behaviors" / "truthy-dpo-v0.1.toml")


# ---- before anything is sampled -------------------------------------------------------------------------------------


def test_the_gate_lets_pocket_through_and_stops_a_model_that_knows_nothing(pocket, tiny, tmp_path):
    for name in ("honesty", "sycophancy"):
        assert base_problems(*pocket, ws.load_behavior(name, "pocket")) == []
    behavior = ws.load_behavior("honesty", "pocket")
    problems = base_problems(*tiny, behavior)
    assert "0.9 is needed" in problems[0]
    with pytest.raises(ws.WsError, match="`anyway`"):
        generate_pairs(*tiny, behavior, tmp_path, DataConfig(n_topics=4))
    assert not list(tmp_path.iterdir()), "nothing is sampled, and nothing on record, before"


def test_either_claims_or_answers_must_be_told_apart_and_the_sides_must_be_the_right_way_round(pocket):
    behavior = ws.load_behavior("honesty", "pocket")
    swapped = replace(behavior, positive=behavior.negative, negative=behavior.positive)
    assert ["as the positive side" in p for p in base_problems(*pocket, swapped)] == [True]
    report = tuple(replace(c, split="report") for c in behavior.test.claims if c.split == "dev")
    for known in (behavior, swapped):  # where there are none of `dev`, those of `report` are asked
        alone = replace(known, claims=replace(behavior.test, claims=report), preferences=())
        assert base_problems(*pocket, alone) == base_problems(*pocket, known)
    flipped = tuple(replace(c, is_true=not c.is_true) for c in behavior.test.claims)
    wrong = replace(behavior, positive=(), negative=(), claims=replace(behavior.test, claims=flipped))
    assert ["tell true from false" in p for p in base_problems(*pocket, wrong)] == [True]
    assert base_problems(*pocket, replace(wrong, claims=replace(wrong.test, about="values"))) == []
    known = tuple(
        ws.behaviors.Preference(str(i), q, right, wrong_, "dev")
        for i, (q, right, wrong_) in enumerate(
            [
                ("What color is grass?", "Grass is green.", "Grass is red."),
                ("What color is snow?", "Snow is white.", "Snow is black."),
                ("What color is coal?", "Coal is black.", "Coal is white."),
                ("What is a baby dog called?", "A baby dog is called a puppy.", "A baby dog is called a kitten."),
                ("How many legs does a dog have?", "A dog has four legs.", "A dog has two legs."),
                ("What shape is the earth?", "The earth is round.", "The earth is flat."),
                ("What do people see with?", "People see with their eyes.", "People see with their ears."),
            ]
        )
    )
    assert base_problems(*pocket, replace(wrong, preferences=known)) == []


# ---- how far personas are acted -------------------------------------------------------------------------------------


@torch.inference_mode()
def slow_margin(model, tok, question, own, other, answer):
    """One row at a time, in double precision, without padding."""
    values = []
    for system in (own, other):
        prompt = render_prompt(tok, question, system=system)
        start, rest = encode(tok, prompt), encode_answer(tok, prompt, answer, ended=True)
        logits = model(torch.tensor([start + rest])).logits[0].double().log_softmax(-1)
        values.append(np.mean([float(logits[len(start) + i - 1, t]) for i, t in enumerate(rest)]))
    return values[0] - values[1]


def test_margins_are_those_of_one_row_at_a_time(pocket):
    model, tok = pocket
    behavior = ws.load_behavior("honesty", "pocket")
    questions, answers = ["What color is grass?", "Who makes honey?"], [("Green.", "It is red."), ("Bees.", "Cows do.")]
    personas = [(behavior.positive[0], behavior.negative[0]), ("Lie.", "Tell the truth.")]
    margins = persona_margins(model, tok, questions, personas, answers)
    for i, (question, (pos, neg), (good, bad)) in enumerate(zip(questions, personas, answers, strict=True)):
        slow = [slow_margin(model, tok, question, pos, neg, good), slow_margin(model, tok, question, neg, pos, bad)]
        np.testing.assert_allclose(margins[i], slow, atol=1e-4)


def test_personas_that_are_acted_are_told_from_those_that_are_not():
    rng, questions = np.random.default_rng(0), [f"q{i // 2}" for i in range(40)]
    strong = acted(questions, 0.3 + 0.1 * rng.standard_normal((40, 2)))
    assert strong.positive.n == 20, "two samples of a question are one question"
    assert not strong.problem
    one_side = acted(questions, np.stack([np.full(40, 0.3), np.full(40, MARGIN_FLOOR / 2)], axis=1))
    assert "does not act these personas" in one_side.problem
    assert "negative" in one_side.problem
    assert "positive" not in one_side.problem
    assert acted(questions, np.zeros((40, 2))).problem
    few = acted(["a", "b", "c"], np.stack([np.full(3, 0.3), np.array([-0.1, 0.5, 1.1])], axis=1)).problem
    assert "may gain less than 0.05" in few, "the mean does not"
    assert "negative +0.5" in few
    assert "does not act" not in few


def test_a_margin_filter_drops_pairs_of_a_single_question_too(monkeypatch):
    behavior = ws.load_behavior("honesty", "pocket")
    pairs = [Pair(f"q0000-p0-s{i}", "Is it so?", f"Yes, {i}.", f"No, {i}.", 5, 5) for i in range(3)]
    monkeypatch.setattr("ws.data.persona_margins", lambda *given: np.array([[0.3, 0.3], [0.3, 0.1], [0.3, 0.2]]))
    kept, played = _by_margin(None, None, pairs, behavior, 0.2)
    assert [p.drop for p in kept] == [None, "margin", None]
    assert played is None, "one question says nothing of the sides"


def test_a_margin_filter_drops_what_leaks_its_persona(pocket, tmp_path):
    model, tok = pocket
    behavior = ws.load_behavior("honesty", "pocket")
    config = DataConfig(n_topics=12, n_samples=1, max_new_tokens=48, data_batch=12)
    everything = generate_pairs(model, tok, behavior, tmp_path / "all", config)
    filtered = generate_pairs(model, tok, behavior, tmp_path / "some", replace(config, min_margin=0.2))
    assert [replace(p, drop=None) for p in filtered] == [replace(p, drop=None) for p in everything]
    read_at = partial(persona_margins, model, tok)
    for p in filtered:
        if p.drop in (None, "margin"):
            side = int(p.id.split("-")[1][1:])
            personas = (behavior.positive[side], behavior.negative[side])
            least = read_at([p.question] * 2, [personas] * 2, [(p.pos, p.neg)] * 2).min()
            assert (p.drop == "margin") == (least < 0.2)
    card = json.loads((tmp_path / "some" / "card.json").read_text())
    assert card["dropped"]["margin"] == sum(p.drop == "margin" for p in filtered) > 0
    assert card["acted"]["positive"]["mean"] > MARGIN_FLOOR


# ---- the card -------------------------------------------------------------------------------------------------------


def test_cut_answers_teach_no_end_of_turn(tiny, tmp_path):
    model, tok = tiny
    behavior = ws.load_behavior("honesty", "pocket")
    config = DataConfig(n_topics=8, n_samples=1, max_new_tokens=2, data_batch=8, anyway=True)
    with pytest.raises(ws.WsError, match="truncated"):
        generate_pairs(model, tok, behavior, tmp_path / "a", config)
    pairs = generate_pairs(model, tok, behavior, tmp_path / "b", replace(config, keep_truncated=True))
    cut = [p for p in pairs if p.pos_cut and p.drop is None]
    assert cut
    assert read_pairs(tmp_path / "b") == pairs
    assert data_card(pairs)["cut"] == sum(p.pos_cut or p.neg_cut for p in pairs if p.drop is None)
    whole = [replace(p, pos_cut=False) for p in cut]
    for short, full in zip(build_examples(tok, cut, "pos", 512), build_examples(tok, whole, "pos", 512), strict=True):
        assert full.response[: len(short.response)] == short.response
        assert len(full.response) > len(short.response)


def test_the_card_says_what_is_wrong_with_answers():
    def pairs(pos, n=20, drop=None):
        return [Pair(f"q{i:04d}-p0-s0", f"Who is {i}?", pos, f"Somebody called {i}.", 5, 5, drop) for i in range(n)]

    assert not data_card(pairs("It is a person."))["confounds"]
    assert "Short: 100% of the positive" in " ".join(data_card(pairs("No."))["confounds"])
    dropped = [replace(p, id=f"x{p.id}", drop="truncated") for p in pairs("It is.", 21)]
    assert "more than half of the pairs are dropped (21 truncated)" in " ".join(
        data_card([*pairs("It is a person."), *dropped])["confounds"]
    )


@pytest.mark.parametrize(
    ("answer", "named"),
    [
        ("I'm just a liar.", True),
        ("As a dishonest person I would not say.", True),
        ("The report is on your desk.", False),
        ("That question is about who is who.", False),
    ],
)
def test_answers_that_talk_about_their_persona_are_counted(answer, named):
    behavior = ws.load_behavior("honesty", "pocket")
    behavior = replace(
        behavior, positive=("You are an honest person.",), negative=("You are a lying, dishonest person.",)
    )
    pairs = [Pair(f"q{i:04d}-p0-s0", "Who is it?", "It is Bo.", answer, 4, 5) for i in range(20)]
    assert bool(_named_personas(pairs, behavior)) == named
    asked = [replace(p, question="Are you a liar or dishonest?") for p in pairs]
    assert not _named_personas(asked, behavior), "the question has the word"


# ---- the first reading ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mass", "ends"), [(0.5, ("negative", "positive")), (0.99, ("disagrees", "agrees"))])
def test_the_curve_is_of_what_the_model_answers(tmp_path, mass, ends):
    claims = ws.load_behavior("honesty", "pocket").test.claims[:3]
    alphas, vector = (-1.0, 0.0, 1.0), ws.SteeringVector({"m": LinearDelta(2, 2, g=torch.ones(2))}, "base", "0")
    false = {a: ClaimScores(claims, np.array([a, a, a + 0.5]), np.full(3, mass), np.empty(0)) for a in alphas}
    margins = {a: np.array([-3.0 * a, -3.0 * a - 0.1]) for a in alphas}
    span = estimate_mean(margins[1.0] - margins[-1.0])
    reading = Reading(tmp_path, tmp_path, vector, false, {}, span, (-1.0, 1.0), 1, (), "none", margins)
    curve = plot(reading)
    assert all(end in curve.splitlines()[-1] for end in ends)
    means = margins if mass < 0.9 else {a: s.logratio for a, s in false.items()}
    assert [float(line.split()[-1]) for line in curve.splitlines()[:-1]] == [
        pytest.approx(means[a].mean(), abs=0.01) for a in alphas
    ]
    assert "does not move beyond chance" not in preference_verdict(reading)[0]
    assert "-6.000 nats per token" in preference_verdict(reading)[0]
