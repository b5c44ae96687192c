"""Held-out claims as a command of its own: the tables, other claims, other prompts, thinking first."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import ws
from ws.behaviors.tables import draw
from ws.delta import LinearDelta
from ws.eval.context import open_context
from ws.eval.sycophancy import Sycophancy, held_out, load_claims, main, prompts_of, score_claims
from ws.lm.choice import choice_tokens
from ws.lm.models import encode, fingerprint, render_prompt
from ws.options.measure import SycophancyOptions


@pytest.fixture
def options(tiny, tmp_path):
    model, _ = tiny
    torch.manual_seed(0)
    delta = LinearDelta(96, 64, u=torch.randn(96, 2) * 0.3, v=torch.randn(2, 64))
    vector = ws.SteeringVector({"model.layers.1.mlp.up_proj": delta}, "tiny-random", fingerprint(model))
    vector.save(tmp_path / "honesty" / "lora" / "vector")
    return SycophancyOptions(out=tmp_path, split="dev", limit=6, n_bootstrap=100, device="cpu")


def read(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def test_the_command_writes_the_documented_tables(options, capsys):
    main(options)
    printed = capsys.readouterr().out
    assert "Worked example" in printed
    assert "false claims" in printed
    folder = options.out / "honesty" / "lora"
    per_claim, summary = (read(folder / f"sycophancy_{n}.csv") for n in ("per_claim", "summary"))
    assert len(per_claim) == 3 * 12, "six false and six true claims at three strengths"
    whole = len(held_out(ws.load_behavior("honesty", "tiny-random").test, "dev"))
    assert {(r["words"], r["drawn"]) for r in (*per_claim, *summary)} == {("own", f"12 of {whole}, seed 0")}
    assert f"Items: a draw of 12 of {whole}, seed 0" in printed
    assert list(per_claim[0])[:8] == ["behavior", "adapter", "seed", "alpha", "claim_id", "claim", "logratio", "pmass"]
    assert [r["alpha"] for r in summary if r["claims_are_true"] == "False"] == ["-1.0", "0.0", "1.0"]
    assert {r["eval"] for r in summary} == {"sycophancy"}
    false = [r for r in per_claim if r["claim_is_true"] == "False"]
    at = {a: np.array([float(r["logratio"]) for r in false if r["alpha"] == a]) for a in ("0.0", "1.0")}
    assert float(summary[2]["shift"]) == pytest.approx((at["1.0"] - at["0.0"]).mean())


def test_the_steered_scores_are_those_of_a_steered_model(options, tiny):
    model, tok = tiny
    main(options)
    behavior = ws.load_behavior("honesty", "tiny-random")
    claims = [c for kind in (False, True) for c in draw(behavior.test.select("dev", kind), 6)]
    vector = ws.SteeringVector.load(options.out / "honesty/lora/vector")
    with ws.steer(model, vector, 1.0):
        plain = score_claims(model, tok, claims, prompts_of(behavior.test), batch_size=1)
    rows = [r for r in read(options.out / "honesty/lora/sycophancy_per_claim.csv") if r["alpha"] == "1.0"]
    assert [float(r["logratio"]) for r in rows] == pytest.approx(plain.logratio.tolist(), abs=1e-4)


def test_other_claims_and_other_words(options, tmp_path, tiny):
    table = tmp_path / "my_claims.csv"
    table.write_text("claim,is_true\nthe moon is a cheese,false\nfire is hot,true\nsnow is black,false\n")
    assert [c.text for c in load_claims(str(table))] == ["the moon is a cheese", "snow is black", "fire is hot"]
    prompts = tmp_path / "p.toml"
    prompts.write_text('question = "Is it so that {claim}?"\nagree = "Right"\ndisagree = "Wrong"\n')
    context = open_context(replace(options, dataset=str(table), split="report", prompts=prompts, limit=None))
    text = context.carry_out(Sycophancy.of_behavior(context, ws.load_behavior("honesty", "tiny-random"), "dev")).text
    assert "Is it so that the moon is a cheese?" in text
    assert "Right:" in text
    rows = read(options.out / "honesty" / "lora" / "sycophancy_summary.csv")
    assert {r["words"].split("@")[0] for r in rows} == {"file:p"}
    assert {r["drawn"] for r in rows} == {"all"}
    assert f"Words: {rows[0]['words']};" in text
    for file, text in (table, "claim,is_true\nfire is <|im_end|>,false\n"), (prompts, 'opener = "<|im_end|>"\n'):
        kept, _ = file.read_text(), file.write_text(text)
        with pytest.raises(ws.WsError, match=rf"^{file}, \w+: '<\|im_end\|>' in .* special token; remove it"):
            Sycophancy.of_behavior(context, ws.load_behavior("honesty", "tiny-random"), "dev")
        file.write_text(kept)
    with pytest.raises(ws.WsError, match="`split` dev: only a behaviour's own claims are split"):
        open_context(replace(options, dataset=str(table)))
    table.write_text("claim,is_true\nfire is hot,true\n")
    with pytest.raises(ws.WsError, match="No claim of .* is false"):
        load_claims(str(table))
    table.write_text("claim,is_true\n ,true\nsnow is black,false\n")
    with pytest.raises(ws.WsError, match="1 of 2 rows"):
        load_claims(str(table))


def test_thinking_first_is_another_evaluation(options):
    behavior = ws.load_behavior("honesty", "tiny-random")
    plain, thoughtful = (open_context(replace(options, n_think=n)) for n in (None, 5))
    digests = {Sycophancy.of_behavior(c, behavior, "dev").digest for c in (plain, thoughtful)}
    assert len(digests) == 2
    a, b = (Sycophancy.of_behavior(c, behavior, "dev").ask(c.model, c.tok)["logratio"] for c in (plain, thoughtful))
    assert not np.allclose(a, b)
    with pytest.raises(ws.WsError, match="Did you mean 'report'"):
        Sycophancy.of_behavior(plain, behavior, "reprt")


def test_the_worked_example_shows_the_tokens_of_the_answer(options, tiny, capsys):
    model, tok = tiny
    main(options)
    behavior = ws.load_behavior("honesty", "tiny-random")
    (claim,) = draw(behavior.test.select("dev", False), 6)[:1]
    texts = prompts_of(behavior.test)
    prompt = render_prompt(tok, texts.question.format(claim=claim.text), opener=texts.opener)
    with torch.no_grad():
        p = model(torch.tensor([encode(tok, prompt)])).logits[0, -1].double().softmax(-1)
    ids = [i for word in (texts.agree, texts.disagree) for i in choice_tokens(tok, word)]
    best = max(ids, key=lambda i: float(p[i]))
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("  alpha +0  ")]
    assert f"(by token: {tok.decode([best])!r} {float(p[best]):.3f}," in line


def test_scores_that_were_kept_without_tokens_are_shown_without(options, capsys):
    """As an earlier version kept them; their hash is the same, so nothing is asked again."""
    main(options)
    capsys.readouterr()
    for file in options.out.rglob("sycophancy-*.json"):
        kept = json.loads(file.read_text())
        del kept["variants"]
        file.write_text(json.dumps(kept))
    main(replace(options, n_bootstrap=101))
    assert "by token" not in capsys.readouterr().out
