"""What can be known is checked before a run's first stage, and what is printed at its end can be typed again."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

import ws
from support.finished_runs import make_vector
from ws import cli, console
from ws.behaviors import behavior_file
from ws.console import parse
from ws.data import Pair
from ws.eval.readable import OF_BASE, OF_STRENGTH
from ws.eval.sycophancy import ClaimScores
from ws.export.card import describe, vector_card
from ws.intervene.interventions import intervention
from ws.lm import cost
from ws.new_behavior import style_template
from ws.options.make import DataConfig, DemoConfig, ReplicateConfig, SweepConfig
from ws.options.use import SubspaceOptions
from ws.replicate import Reading, _nearest, _next, main, replicate, verdict
from ws.report import write_report
from ws.run import open_run
from ws.run_sweep import main as sweep
from ws.stats import estimate_mean
from ws.subspace import carry_out


def typed(text: str) -> list[tuple[str, object]]:
    """The commands of a text with their options, each parsed as a shell and the command line would."""
    found = []
    for line in re.findall(r"(?:^|[`\s])(ws [a-z][^`\n]*?)(?=`|\.?$|\.\s)", text, re.MULTILINE):
        words = shlex.split(line)[1:]
        name, rest = cli._named(words)
        found.append((name, parse(cli.COMMANDS[name][1], rest)))
    return found


@pytest.fixture
def config(tmp_path):
    start = ReplicateConfig.preset("tiny-random")
    return replace(start, out=tmp_path / "my out", split="dev", alphas=(-1.0, 1.0), device="cpu", n_bootstrap=200)


def test_other_settings_stop_before_anything_is_sampled(config, monkeypatch):
    replicate(config)
    monkeypatch.setattr("ws.replicate.generate_pairs", lambda *a, **k: pytest.fail("pairs are sampled"))
    monkeypatch.setattr("ws.eval.context.EvalContext.base_scores", lambda *a: pytest.fail("the base is asked"))
    for other, named in (
        (replace(config, train=replace(config.train, rank=2)), r"stage 'pos'.*\(rank: 4 -> 2"),
        (replace(config, data=replace(config.data, n_topics=8)), r"stage 'pairs'.*\(n_topics: 16 -> 8"),
    ):
        with pytest.raises(ws.WsError, match=named):
            replicate(other)
    other = replace(config, model="pocket", data=replace(config.data, anyway=False))
    with pytest.raises(ws.WsError, match=r"stage 'pos'.* model: 'tiny-random' -> 'pocket'"):
        replicate(other)


@pytest.mark.parametrize(
    ("alphas", "compared"),
    [
        ((-2.0, -1.0, 0.0, 1.0, 2.0), (-1.0, 1.0)),
        ((-4.0, 0.0, 4.0), (-4.0, 4.0)),
        ((-2.0, 0.0, 2.0), (-2.0, 2.0)),
        ((-3.0, -0.4, 0.0, 0.5, 1.5), (-0.4, 0.5)),
        ((0.0, 2.0), (0.0, 2.0)),
    ],
)
def test_the_strengths_compared_lie_on_either_side_of_the_base(alphas, compared):
    """Of large ones the base was once compared with itself."""
    assert (_nearest(alphas, -1.0), _nearest(alphas, 1.0)) == compared


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"alphas": (0.0,)}, "a strength other than 0"),
        ({"alphas": ()}, "a strength other than 0"),
        ({"seed": -1}, "The seed must lie between 0 and 4294967295, not -1"),
        ({"seed": 2**32}, "The seed must lie between"),
    ],
)
def test_numbers_that_no_run_can_have_are_found_before_the_model_is_loaded(config, change, said, monkeypatch):
    monkeypatch.setattr("ws.replicate.load_model", lambda *a: pytest.fail("a model is loaded"))
    with pytest.raises(ws.WsError, match=said):
        replicate(replace(config, **change))


def test_a_signed_vector_is_the_change_of_one_adapter_and_says_so(config, tiny, capsys):
    config = replace(config, contrast="signed")
    reading = replicate(config)
    assert reading.folder == config.out / "honesty" / "lora-signed"
    stages = json.loads((reading.folder / "manifest.json").read_text())["stages"]
    assert {"signed", "vector"} < stages.keys()
    assert not {"pos", "neg"} & stages.keys()
    assert stages["vector"]["geometry"]["cosine_pos_neg"] == pytest.approx(-1, abs=1e-6)
    plus = ws.SteeringVector.from_adapter(reading.folder / "signed", tiny[0])
    assert reading.vector.norm() == pytest.approx(2 * plus.norm(), rel=1e-6)
    stored = json.loads((reading.folder / "vector" / "ws.json").read_text())
    assert stored["info"]["contrast"] == "signed"
    assert [term.get("of", term)["contrast"] for term in stored["recipe"]["terms"]] == ["signed"] * 2
    card = str(vector_card(describe(reading.vector, "a/b", reading.folder)))
    assert "contrast: signed" in card
    assert "signed at +1 - (signed at -1)" in card
    assert "fine-tuned twice" not in card
    bits = (reading.folder / "vector" / "adapter_model.safetensors").read_bytes()
    assert replicate(config).vector.recipe == reading.vector.recipe, "it is found finished"
    replicate(replace(config, fresh=True))
    assert (reading.folder / "vector" / "adapter_model.safetensors").read_bytes() == bits
    opened = open_run(config.out, "honesty", "lora-signed", 0, None, device="cpu")
    for name in ("finetune", "positive-only", "negative-only"):
        with pytest.raises(ws.WsError, match="one signed adapter and no arms"):
            intervention(name, opened, ws.load_behavior("honesty", "tiny-random"))
    low_rank = intervention("gradient-low-rank", opened, ws.load_behavior("honesty", "tiny-random"))
    assert low_rank.detail == f"rank {config.train.rank}", "it has pairs, and so their gradient"
    options = SubspaceOptions(out=config.out, adapter="lora-signed")
    assert "one signed adapter; nothing of the pair" in carry_out(options).text
    page = write_report(config.out, "honesty").read_text(encoding="utf-8")
    assert re.search(r"Settings of the training.*lora-signed.*lora_alpha", page, re.DOTALL)


def test_a_model_that_has_no_rows_in_some_layers_is_read_one_strength_after_the_other(config, tiny, tmp_path):
    """OPT sees the tokens of all rows as one list in fc1; it was once refused after all was trained."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48}
    folder = tmp_path / "opt"
    OPTForCausalLM(OPTConfig(vocab_size=len(tiny[1]), word_embed_proj_dim=32, **sizes)).save_pretrained(folder)
    tiny[1].save_pretrained(folder)
    train = replace(config.train, kinds=("q_proj", "fc1"), max_steps=2, validation=0.0)
    data = replace(config.data, n_topics=8, max_new_tokens=8, keep_truncated=True)
    name = str(behavior_file("honesty", "tiny-random"))
    reading = replicate(replace(config, model=str(folder), behavior=name, train=train, data=data))
    assert any(module.endswith("fc1") for module in reading.vector.deltas)
    assert [s.alpha for s in reading.samples] == [-1.0, 0.0, 1.0]
    assert all(s.answer for s in reading.samples)


@pytest.mark.parametrize("control", ["same-side", pytest.param("shuffled", marks=pytest.mark.slow)])
def test_nulls_of_signed_vectors_stand_beside_them(config, control):
    """There may be nothing to learn: what both sides share cancels."""
    reading = replicate(replace(config, contrast="signed", control=control))
    assert reading.folder.name == f"lora-signed-{control}"
    assert reading.vector.info["contrast"] == "signed"
    assert reading.vector.info["control"] == control
    assert f"it is a null ({control})" in vector_card(describe(reading.vector, "a/b")).text


def test_a_full_disk_is_said_first(config, monkeypatch):
    monkeypatch.setattr(cost.shutil, "disk_usage", lambda place: SimpleNamespace(free=2**20))
    with pytest.raises(ws.WsError, match=r"0\.0 GiB free for .*my out.* needs up to .* `out`"):
        replicate(config)
    assert not config.out.exists()


def test_an_old_run_outlives_a_refusal(config, monkeypatch):
    folder = replicate(config).folder
    monkeypatch.setattr("ws.replicate.require_readable", lambda *a: None)
    monkeypatch.setattr("ws.data.base_findings", lambda *a: (["it answers nothing"], []))
    with pytest.raises(ws.WsError, match="promises nothing: it answers nothing"):
        replicate(replace(config, fresh=True, data=replace(config.data, anyway=False)))
    assert (folder / "vector" / "ws.json").is_file()


def test_a_base_that_answers_nothing_is_found_at_once_and_is_blamed(config, monkeypatch, capsys):
    """A random model says neither Yes nor No."""
    monkeypatch.setattr("ws.data.base_findings", lambda *a: ([], []))
    strict = replace(config, behavior="sycophancy", data=replace(config.data, anyway=False))
    with pytest.raises(ws.WsError) as problem:
        replicate(strict)
    assert "agreement with false claims (answer mass 0." in str(problem.value)
    assert OF_BASE in str(problem.value)
    assert not (config.out / "data").exists(), "nothing has been sampled"
    main(config)
    printed = capsys.readouterr()
    assert OF_BASE in printed.err
    assert f"But {OF_BASE}." in printed.out
    (name, options), *_ = typed(printed.out.split("Next: ")[1].split(", then ")[1])
    assert (name, options.file, options.model) == ("behavior check", "honesty", "tiny-random")
    assert not re.search(r"[\w)]\.\.(?!\.)", printed.out + printed.err), "a sentence ends once"


def reading(mass_at_0: float, mass: float) -> Reading:
    claims = ws.load_behavior("honesty", "pocket").test.select("dev", False)
    scores = {
        a: ClaimScores(claims, np.full(len(claims), a), np.full(len(claims), mass if a else mass_at_0))
        for a in (-1.0, 0.0, 1.0)
    }
    span = estimate_mean(scores[1.0].logratio - scores[-1.0].logratio, 100)
    return Reading(Path("run"), Path("pairs"), make_vector(0), scores, {}, span, (-1.0, 1.0), -1, ())


@pytest.mark.parametrize(
    ("at_0", "steered", "said", "following"),
    [
        (0.7, 0.7, OF_BASE, "behavior check"),
        (0.7, 0.95, OF_BASE, "behavior check"),
        (0.97, 0.6, OF_STRENGTH, "eval sycophancy"),
        (0.97, 0.96, None, "replicate"),
    ],
)
def test_the_verdict_says_whether_it_is_the_base_or_the_strength(at_0, steered, said, following, config):
    found, line = reading(at_0, steered), verdict(reading(at_0, steered))
    assert [text for text in (OF_BASE, OF_STRENGTH) if text in line] == [said] * bool(said)
    assert line.startswith("No conclusion") == bool(said)
    config = replace(config, seed=3)
    [(name, options)] = typed(_next(found, config))
    assert name == following
    if name == "eval sycophancy":
        assert options.alphas == (-0.5, 0.0, 0.5)
    if name == "replicate":
        assert options == replace(config, seed=4)
    if name != "behavior check":
        assert (options.out, options.seed) == (config.out, 4 if name == "replicate" else 3)


def test_the_next_command_of_a_run_repeats_its_settings(config, capsys):
    config = replace(config, data=replace(config.data, n_topics=12), train=replace(config.train, kinds=("q_proj",)))
    line = console.command_line("ws replicate", config, ("model",))
    assert "--modules q_proj" in line
    assert typed(line) == [("replicate", config)]


def test_a_style_goes_all_the_way_without_claims(config, tmp_path, capsys):
    text, answers = style_template("pirate", "pirate.jsonl")
    (tmp_path / "pirate.toml").write_text(text, encoding="utf-8")
    (tmp_path / "pirate.jsonl").write_text(answers, encoding="utf-8")
    many = replace(
        SweepConfig.preset("tiny-random"),
        behavior=str(tmp_path / "pirate.toml"),
        adapters=("lora",),
        out=tmp_path / "o",
    )
    sweep(replace(many, evals=("sycophancy",), device="cpu", n_bootstrap=200))
    printed = capsys.readouterr().out
    assert "preference" in printed
    page = (tmp_path / "o" / "pirate" / "report.html").read_text(encoding="utf-8")
    assert "preference for the behaviour" in page
    assert "has been put to the held-out claims" not in page


def test_the_demo_has_a_folder_of_its_own():
    demos = [str(parse(DemoConfig, words).out) for words in ([], ["--model", "smollm2"], ["--out", "x"])]
    assert demos == ["out/demo", "out/demo/smollm2", "x"]
    assert str(parse(ReplicateConfig, []).out) == "out"


@pytest.mark.slow
def test_the_first_answers_of_every_persona_are_looked_at(monkeypatch, tmp_path, capsys):
    from ws import data

    model, tok = ws.load_model("pocket", device="cpu")
    behavior = ws.load_behavior("sycophancy", "pocket")
    few = DataConfig(n_topics=20, n_samples=2, max_new_tokens=64, data_batch=8)
    first = data.first_pairs(model, tok, behavior, few)
    assert len(first) == 8 * len(behavior.positive)
    assert {p.id.split("-")[1] for p in first} == {f"p{n}" for n in range(len(behavior.positive))}
    sampled = {
        p.id: p for p in data.generate_pairs(model, tok, behavior, tmp_path / "a", replace(few, data_batch=None))
    }
    assert [sampled[p.id] for p in first] == first, "they are the very answers"

    def planted(pos: str, neg: str, drop: str | None) -> list[Pair]:
        return [Pair(f"q{i}-p{i % 2}-s0", f"Q{i}?", pos.format(i), neg.format(i), 3, 3, drop) for i in range(16)]

    for pairs, said in (
        (planted("a {}", "b {}", "truncated"), "16 truncated .*`max_new_tokens`.*`keep_truncated`"),
        (planted("a {}", "b {}", "refusal"), "16 refusal .*keep_refusals"),
        (planted("a {}", "a {}", "identical"), "16 identical .*plainer personas"),
        (planted("a {}", "Indeed.", None), "all of the first 16 negative answers are 'Indeed.'"),
    ):
        monkeypatch.setattr(data, "first_pairs", lambda *a, pairs=pairs: pairs)
        with pytest.raises(ws.WsError, match=f"promises nothing: .*{said}.*`anyway`"):
            data.generate_pairs(model, tok, behavior, tmp_path / "b", few)
        assert not (tmp_path / "b" / "manifest.json").exists()
    capsys.readouterr()
    half = planted("a {}", "b {}", None)
    half = [replace(p, drop="truncated") if "-p1-" in p.id else p for p in half]
    monkeypatch.setattr(data, "first_pairs", lambda *a: half)
    data.generate_pairs(model, tok, behavior, tmp_path / "c", few)
    assert "0 of 8 pairs are usable: 8 truncated" in capsys.readouterr().err


def test_no_usable_pair_names_the_option(tmp_path):
    from ws.data import generate_pairs

    model, tok = ws.load_model("pocket", device="cpu")
    few = DataConfig(n_topics=4, n_samples=1, max_new_tokens=1, data_batch=4, anyway=True)
    with pytest.raises(
        ws.WsError, match=r"None of the 4 pairs is usable: 4 truncated \(.*`max_new_tokens`.*`keep_tr"
    ) as e:
        generate_pairs(model, tok, ws.load_behavior("honesty", "pocket"), tmp_path, few)
    assert "{" not in str(e.value)
    assert len(json.loads((tmp_path / "rejected.jsonl").read_text().splitlines()[0])["pos"]) > 0
