"""What `just bench all` keeps and shows, and what `just bench compare` says of two runs."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from dataclasses import replace

import pytest
from benchmarks import all as bench_all
from benchmarks import compare, exponents, harness
from benchmarks.all import PARTS, Lift, Part
from benchmarks.compare import Entry, Measured, Metric, changes, pair, pick, report, verdict
from hypothesis import given
from hypothesis import strategies as st

from test_docs import ROOT
from ws.errors import WsError


def metric(low=0.9, value=1.0, high=1.1, *, unit="time", rounds=5, better="lower", against="theirs", name="ours"):
    return Metric(name, unit, value, low, high, rounds, better, against)


def entry(*metrics, date="2026-01-01", commit="aaaaaaa", cpu="one", quick=False, command="just bench x", **parts):
    parts = parts or ({"x": metrics} if metrics else {})
    measured = {name: Measured(command, 1.0, 0.0, list(found)) for name, found in parts.items()}
    return Entry(date, commit, quick, {"cpu": cpu, "gpu": None}, {"torch": "1"}, measured)


# ---- verdicts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (metric(1.3, 1.4, 1.5), "worse"),
        (metric(0.5, 0.6, 0.7), "better"),
        (metric(1.05, 1.4, 1.5), "same"),  # the spreads overlap
        (metric(1.1, 1.4, 1.5), "same"),  # they touch
        (metric(1.3, 1.4, 1.5, rounds=2), "too few rounds"),
        (metric(1.3, 1.4, 1.5, against="others"), "another comparison"),
        (metric(1.3, 1.4, 1.5, better="higher"), "another comparison"),
    ],
)
def test_a_ratio_is_judged_by_its_spread(now, said):
    assert verdict(now, metric()) == said


def test_where_more_is_better_less_is_worse():
    rate = {"unit": "tokens per second", "better": "higher"}
    assert verdict(metric(0.5, 0.6, 0.7, **rate), metric(**rate)) == "worse"
    assert verdict(metric(1.3, 1.4, 1.5, **rate), metric(**rate)) == "better"


def test_what_is_apart_but_small_is_noise():
    now, before = metric(1.06, 1.07, 1.08), metric(0.99, 1.0, 1.01)
    assert verdict(now, before) == "same"
    assert verdict(now, before, share=0.05) == "worse"


def test_exponents_differ_by_their_difference():
    """Twice an exponent near nothing is nothing."""
    one, two, large = (metric(x - 0.001, x, x + 0.001, unit="exponent") for x in (-0.02, 0.04, 1.2))
    assert verdict(two, one) == "same"
    assert verdict(large, two) == "worse"
    assert verdict(two, large) == "better"


def test_sizes_need_no_rounds():
    assert verdict(metric(2, 2, 2, unit="size", rounds=1), metric(1, 1, 1, unit="size", rounds=1)) == "worse"
    assert (
        verdict(metric(2, 2, 2, unit="memory", rounds=1), metric(1, 1, 1, unit="memory", rounds=1)) == "too few rounds"
    )


numbers = st.lists(st.floats(1e-3, 1e3), min_size=3, max_size=6)


def measured_metric(values, better):
    seen = harness.Spread.of(values)
    return metric(seen.lowest, seen.median, seen.highest, rounds=seen.rounds, better=better)


@given(now=numbers, before=numbers, share=st.floats(0, 1))
def test_a_verdict_is_its_mirror_image_and_has_no_scale(now, before, share):
    lower, higher = ([measured_metric(v, b) for v in (now, before)] for b in ("lower", "higher"))
    mirror = {"worse": "better", "better": "worse"}
    said = verdict(*lower, share)
    assert verdict(*lower[::-1], share) == mirror.get(said, said)
    assert verdict(*higher, share) == mirror.get(said, said)
    if said == "worse":
        assert min(now) > max(before)
        assert lower[0].value > lower[1].value * (1 + share) * (1 - 1e-9)
    if min(now) <= max(before) and min(before) <= max(now):
        assert said == "same"
    wide = [measured_metric([2.0 * v for v in values], "lower") for values in (now, before)]  # exact in binary
    assert verdict(*wide, share) == said


@pytest.mark.parametrize(
    "numbers", [(1.0, 0.9, 1.1), (0.0, 1.0, 1.1), (0.9, float("nan"), 1.1), (0.9, 1.0, float("inf"))]
)
def test_what_is_no_ratio_is_refused(numbers):
    with pytest.raises(ValueError, match="no ratio"):
        metric(*numbers)


# ---- two runs -------------------------------------------------------------------------------------------------------


def test_a_run_is_compared_with_the_one_before_it_of_the_same_machine():
    first, other, quick, last = (
        entry(date="2026-01-01"),
        entry(date="2026-01-02", cpu="two"),
        entry(date="2026-01-03", quick=True),
        entry(date="2026-01-04", commit="bbbbbbb"),
    )
    history = [first, other, quick, last]
    assert pair(history) == (last, first)
    assert pair([entry(commit="0000000"), *history])[1] is first  # the nearest of two
    with pytest.raises(WsError, match="none of its machine"):
        pair(history, to="2026-01-02")
    with pytest.raises(WsError, match="different machines"):
        pair(history, against="1")
    assert pair([*history, entry(commit="c")], against="bbbb")[1] is last


def test_runs_are_named_by_number_date_and_commit():
    history = [entry(date="2026-01-01"), entry(date="2026-01-01", commit="bbbbbbb+1234567"), entry(date="2026-01-02")]
    assert pick(history, "0") is history[0]
    assert pick(history, "-1") is history[2]
    assert pick(history, "2026-01-01") is history[1]
    assert pick(history, "bbbbb") is history[1]
    with pytest.raises(WsError, match="2026-01-02"):
        pick(history, "2026-02-01")
    with pytest.raises(WsError, match="none"):
        pick([], "-1")


def test_what_is_new_gone_or_not_run_is_neither_worse_nor_better():
    before = entry(x=[metric(name="a"), metric(name="b")], y=[metric(name="c")])
    now = entry(x=[metric(name="a"), metric(name="d")], z=[metric(name="e")])
    said = {(c.part, c.name): c.verdict for c in changes(now, before)}
    assert said == {
        ("x", "a"): "same",
        ("x", "b"): "gone",
        ("x", "d"): "new",
        ("y", "c"): "not run",
        ("z", "e"): "not run before",
    }
    text, is_worse = report(now, before, 0.1)
    assert not is_worse
    assert "1 same" in text
    assert "gone" in text


def test_other_settings_are_not_compared():
    said = changes(entry(metric(3, 4, 5), command="just bench x --rounds 9"), entry(metric()))
    assert [c.verdict for c in said] == ["other settings"]


def test_what_became_worse_is_shown_with_both_numbers_and_what_disturbed_it():
    now, before = entry(metric(1.3, 1.4, 1.5), date="2026-01-02"), entry(metric())
    now.parts["x"].others = 1.5
    now.failed["y"] = "it ended with code 1"
    text, is_worse = report(now, before, 0.1)
    assert is_worse
    for words in ("x: ours", "1.4 [1.3, 1.5]", "1 [0.9, 1.1]", "Other work disturbed x", "y failed"):
        assert words in text


@pytest.mark.parametrize(("worse", "code"), [(True, 1), (False, 0)])
def test_the_exit_code_says_whether_something_became_worse(worse, code, tmp_path, monkeypatch, capsys):
    history = tmp_path / "history.jsonl"
    compare.write_history(history, [entry(metric()), entry(metric(1.3, 1.4, 1.5) if worse else metric())])
    monkeypatch.setattr(compare, "HISTORY", history)
    monkeypatch.setattr(sys, "argv", ["compare"])
    with pytest.raises(SystemExit) as ended:
        compare.main()
    assert ended.value.code == code
    monkeypatch.setattr(sys, "argv", ["compare", "--to", "nowhere"])
    with pytest.raises(SystemExit) as ended:
        compare.main()
    assert ended.value.code == 2
    assert "nowhere" in capsys.readouterr().err


def test_a_history_comes_back_and_a_damaged_one_is_named(tmp_path):
    file, written = tmp_path / "history.jsonl", [entry(metric()), entry(metric(name="b"), quick=True)]
    compare.write_history(file, written)
    assert compare.read_history(file) == written
    assert len(file.read_text().splitlines()) == 2
    assert compare.read_history(tmp_path / "none") == []
    file.write_text(file.read_text().replace('"lowest":0.9', '"lowest":9.9'))
    with pytest.raises(WsError, match="history"):
        compare.read_history(file)


# ---- what is lifted out of records ----------------------------------------------------------------------------------


def test_ratios_are_lifted_from_spreads_lists_and_numbers():
    records = {
        "serve": {"models": {"a b": {"engine": [4.0, 2.0, 3.0]}}},
        "vector": {"theirs_over_ours": {"median": 4.0, "lowest": 2.0, "highest": 5.0, "rounds": 3}, "size": 0.25},
    }
    (rate,) = Lift("{0}", "theirs", "rate", "serve/models/*/engine", better="higher").metrics(records)
    assert rate == Metric("a b", "rate", 3.0, 2.0, 4.0, 3, "higher", "theirs")
    (cost,) = Lift("ours", "{0}", "time", "vector/*_over_ours", inverse=True).metrics(records)
    assert cost == Metric("ours", "time", 0.25, 0.2, 0.5, 3, "lower", "theirs")
    (size,) = Lift("ours", "theirs", "size", "vector/size").metrics(records)
    assert (size.lowest, size.value, size.highest, size.rounds) == (0.25, 0.25, 0.25, 1)
    with pytest.raises(LookupError, match="vector/nothing"):
        Lift("ours", "theirs", "time", "vector/nothing").metrics(records)


def test_every_part_is_a_benchmark_and_takes_its_settings():
    for part in PARTS:
        source = (ROOT / "benchmarks" / f"{part.name}.py").read_text()
        for words in (part.settings, part.quick):
            assert all(f'"{word}"' in source for word in shlex.split(words) if word.startswith("--")), part.name


FAKE = """
import json, os, pathlib, sys
seen = pathlib.Path(__file__).with_name("seen")
seen.write_text((seen.read_text() if seen.is_file() else "") + " ".join(sys.argv[1:]) + ";")
ratio = {"median": 0.5, "lowest": 0.4, "highest": 0.6, "rounds": 3}
where = pathlib.Path(os.environ["WS_BENCHMARKS"])
(where / "sound.json").write_text(json.dumps({"results": {"ratio": ratio}}))
"""


@pytest.fixture
def two_parts(tmp_path, monkeypatch):
    """A benchmark that works and one that does not, as parts of `all`, whose files are in a folder of their own."""
    for name, text in {"sound": FAKE, "broken": "raise SystemExit(3)"}.items():
        (tmp_path / "fakes").mkdir(exist_ok=True)
        (tmp_path / "fakes" / f"{name}.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    ratio = Lift("ours", "theirs", "time", "sound/ratio")
    parts = [Part(name, name, 1, "--rounds 3", "--rounds 1", (ratio,), package="fakes") for name in ("broken", "sound")]
    monkeypatch.setattr(bench_all, "PARTS", tuple(parts))
    monkeypatch.setattr(bench_all, "OUT", tmp_path / "out")
    monkeypatch.setattr(bench_all, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(compare, "HISTORY", tmp_path / "history.jsonl")
    monkeypatch.setattr(harness, "commit", lambda: "abcdefg")
    return tmp_path


def test_a_record_tells_every_state_of_the_code_from_its_commit(tmp_path, monkeypatch):
    def git(*words):
        who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True)

    monkeypatch.setattr(harness, "ROOT", tmp_path)
    for name in ("src", "benchmarks/results"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "src" / "a.py").write_text("1")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    (tmp_path / "benchmarks" / "results" / "x.json").write_text("{}")
    states = [harness.commit()]
    assert "+" not in states[0], "results are no code"
    for name, text in (("a.py", "2"), ("new.py", "1"), ("new.py", "2"), ("newer.py", "2")):
        (tmp_path / "src" / name).write_text(text)
        states.append(harness.commit())
    assert len(set(states)) == len(states), states


def run(monkeypatch, *words):
    """The exit code of `all`."""
    monkeypatch.setattr(sys, "argv", ["all", *words])
    try:
        bench_all.main()
    except SystemExit as ended:
        return ended.code
    return 0


def test_a_part_that_fails_does_not_stop_the_others_and_nothing_is_measured_twice(two_parts, monkeypatch):
    assert run(monkeypatch) == 1
    (kept,) = compare.read_history(compare.HISTORY)
    assert list(kept.parts) == ["sound"]
    assert "code 3" in kept.failed["broken"]
    assert kept.parts["sound"].metrics == [Metric("ours", "time", 0.5, 0.4, 0.6, 3, "lower", "theirs")]
    page = bench_all.PAGE.read_text()
    assert "Not measured: it ended with code 3" in page
    assert "0.5 [0.4, 0.6]" in page

    assert run(monkeypatch, "--only", "sound") == 0  # kept, in the same entry
    assert len(compare.read_history(compare.HISTORY)) == 1
    assert run(monkeypatch, "--only", "sound", "--fresh") == 0
    assert len(compare.read_history(compare.HISTORY)) == 2
    monkeypatch.setattr(harness, "commit", lambda: "another")
    assert run(monkeypatch, "--only", "sound", "--quick") == 0
    assert [e.quick for e in compare.read_history(compare.HISTORY)] == [False, False, True]
    assert (two_parts / "fakes" / "seen").read_text() == "--rounds 3;--rounds 3;--rounds 1;"
    assert run(monkeypatch, "--tables") == 0
    assert "single rounds" in bench_all.PAGE.read_text()


def test_a_record_without_what_is_lifted_is_a_failure(two_parts, monkeypatch):
    part = bench_all.PARTS[1]
    monkeypatch.setattr(bench_all, "PARTS", (replace(part, lifts=(Lift("ours", "theirs", "time", "sound/gone"),)),))
    assert run(monkeypatch) == 1
    assert "sound/gone" in compare.read_history(compare.HISTORY)[0].failed["sound"]
    monkeypatch.setattr(bench_all, "PARTS", (replace(part, lifts=part.lifts * 2),))  # one would hide the other
    assert run(monkeypatch) == 1
    assert "one name" in compare.read_history(compare.HISTORY)[0].failed["sound"]


def test_without_a_history_there_is_no_page(two_parts, monkeypatch):
    assert run(monkeypatch, "--tables") == 2


# ---- the page -------------------------------------------------------------------------------------------------------


def test_the_page_is_its_history():
    assert (ROOT / "docs" / "benchmarks.md").read_text() == bench_all.render(compare.read_history(compare.HISTORY))


def test_the_page_takes_the_last_time_of_every_part_on_one_machine(monkeypatch):
    old = entry(a=[metric(name="old a")], b=[metric(name="old b")])
    other = entry(a=[metric(name="other's a")], cpu="two")
    new = entry(a=[metric(4, 4, 4, name="new a", unit="exponent")], date="2026-01-03")
    for e in (old, other, new):
        e.machine |= {"cores": 2, "threads": 1}
    parts = tuple(Part(name, f"Part {name}", 1, "", "", ()) for name in "abc")
    monkeypatch.setattr(bench_all, "PARTS", parts)
    page = bench_all.render([old, other, new])
    assert "new a" in page
    assert "old b" in page
    assert "old a" not in page
    assert "other's a" not in page
    assert "superlinear**" in page.split("## Part a")[1]
    assert "Not measured: not asked for" in page.split("## Part c")[1]


# ---- growth ---------------------------------------------------------------------------------------------------------


def test_the_exponent_of_a_power_is_found():
    x = [8.0, 64.0, 512.0]
    assert exponents.exponent(x, [3 * v**1.5 for v in x]) == pytest.approx(1.5)
    assert exponents.exponent(x, [7.0] * 3) == pytest.approx(0, abs=1e-9)


def test_growth_is_read_round_by_round():
    """The second round is three times slower throughout, which changes no ratio and no exponent."""
    found = exponents.growth([1, 4, 16], [[1, 4, 16], [3, 12, 48], [1, 8, 64]], [1, 4, 16])
    assert found["over_smallest"][4] == harness.Spread(4, 4, 8, 3)
    assert found["over_smallest"][16] == harness.Spread(16, 16, 64, 3)
    assert (found["exponent"].lowest, found["exponent"].highest) == pytest.approx((1, 1.5))


def test_sizes_of_a_series_rise():
    assert all(list(s.sizes) == sorted(set(s.sizes)) for s in exponents.SERIES.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clients", "items"])
def test_a_size_is_measured(name):
    done = harness.fresh_process(["-m", "benchmarks.exponents", "--series", name, "--part", "memory", "--size", "8"])
    assert done.output["x"] == 8
    assert done.output["mib"] > 1


# ---- the harness ----------------------------------------------------------------------------------------------------


def test_a_spread_is_of_rounds():
    ratio = harness.Spread.ratio([2, 9, 4], [1, 3, 4])
    assert ratio == harness.Spread(2, 1, 3, 3)
    with pytest.raises(ValueError, match="shorter|longer"):
        harness.Spread.ratio([1, 2], [1])


def test_who_goes_first_changes(monkeypatch):
    seen = list[str]()
    monkeypatch.setattr(harness, "fresh_process", lambda words: seen.append(words[0]) or words[0])
    done = harness.in_turns({"a": ["a"], "b": ["b"]}, 3)
    assert "".join(seen) == "abbaab"
    assert done == {"a": ["a"] * 3, "b": ["b"] * 3}


def test_a_record_has_what_it_depends_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["x", "--rounds", "3"])
    harness.record("x", {"deep": {"ratio": harness.Spread(1, 1, 1, 1)}})
    kept = json.loads((tmp_path / "x.json").read_text())
    assert kept["results"]["deep"]["ratio"] == {"median": 1, "lowest": 1, "highest": 1, "rounds": 1}
    assert kept["command"] == "uv run python -m benchmarks.x --rounds 3"
    assert {"commit", "date", "machine", "versions"} <= kept.keys()
