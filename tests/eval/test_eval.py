"""What evaluations share: losses in float32, columns, draws of items, and which words were used."""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ws
from ws.behaviors.tables import draw, draw_fact
from ws.eval.capability import token_nll
from ws.eval.prompts import PARAPHRASE, check_same, notes_on, words_note, words_of
from ws.eval.sycophancy import claim_shift, evaluate_sycophancy, per_claim_rows, summary_row
from ws.lm.divergence import token_kl


def test_divergences_and_losses_in_bfloat16_are_taken_in_float32():
    steered, base = (torch.randn(20, 50, generator=torch.Generator().manual_seed(s)).bfloat16() * 4 for s in (1, 2))
    p, q = (t.double().log_softmax(dim=-1) for t in (steered, base))
    assert token_kl(steered, base).numpy() == pytest.approx((p.exp() * (p - q)).sum(dim=-1).numpy(), rel=1e-4)
    targets = torch.arange(20)
    assert token_nll(steered, targets).numpy() == pytest.approx(-p[targets, targets].numpy(), rel=1e-5)


def test_sycophancy_rows_have_the_documented_columns(tiny):
    model, tok = tiny
    behavior = ws.load_behavior("honesty", "pocket")
    base = evaluate_sycophancy(model, tok, behavior, "dev")
    key = {"behavior": "honesty", "adapter": "lora", "seed": 0}
    rows, summary = per_claim_rows(key, 1.0, base), summary_row(key, 1.0, base, base)
    assert list(rows[0])[:8] == ["behavior", "adapter", "seed", "alpha", "claim_id", "claim", "logratio", "pmass"]
    assert list(summary)[:13] == [
        "behavior", "adapter", "seed", "alpha", "mean_logratio", "std_logratio", "ci_lo", "ci_hi",
        "shift", "shift_ci_lo", "shift_ci_hi", "mean_pmass", "n",
    ]  # fmt: skip
    assert summary["n"] == len(rows) == len(behavior.test.select("dev", False))
    assert claim_shift(base, base).mean == 0
    assert summary["shift_p"] == 1


# ---- draws of items -------------------------------------------------------------------------------------------------


def even_counts(sizes: dict[str, int], limit: int) -> list[int]:
    """How many every group gives when `limit` are dealt one by one, each to the group that has the fewest; sorted."""
    given = dict.fromkeys(sizes, 0)
    for _ in range(min(limit, sum(sizes.values()))):
        least = min((n, name) for name, n in given.items() if n < sizes[name])[1]
        given[least] += 1
    return sorted(given.values())


@settings(max_examples=60)
@given(st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 30), min_size=1), st.integers(1, 80))
def test_a_draw_is_even_in_order_and_holds_every_smaller_draw(sizes, limit):
    items = [(name, i) for name, n in sizes.items() for i in range(n)]  # sorted by group, as sets come
    drawn = draw(items, limit, lambda item: item[0])
    assert len(drawn) == min(limit, len(items))
    assert list(drawn) == sorted(set(drawn), key=items.index), "no item twice, in the order of the set"
    counts = Counter(name for name, _ in drawn)
    assert sorted(counts.get(name, 0) for name in sizes) == even_counts(sizes, limit)
    assert set(drawn) <= set(draw(items, limit + 1, lambda item: item[0]))
    assert draw(items, limit, lambda item: item[0]) == drawn


def test_a_draw_is_no_prefix_and_the_same_everywhere():
    assert draw(range(20), None) == draw(range(20), 20) == draw(range(20), 99) == tuple(range(20))
    assert draw(range(20), 5) == (4, 6, 10, 14, 17)
    places = [draw(range(1000), n) for n in (10, 100)]
    assert all(abs(np.mean(p) - 499.5) < 4 * 1000 / np.sqrt(12 * len(p)) for p in places), "from all over the set"
    assert draw_fact(range(5), range(20)) == "5 of 20, seed 0"
    assert draw_fact(range(20), range(20)) == "all"


# ---- which words, which tokens --------------------------------------------------------------------------------------


def test_words_of_a_file_are_named_and_hashed(tmp_path):
    file = tmp_path / "plain words.toml"
    file.write_text('is_wrong = "Wrong? {text}"\nis_acceptable = "Fine? {text}"\n')
    asked = ("is_wrong", "is_acceptable")
    assert words_of(None, PARAPHRASE, asked) == "paraphrase"
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert words_of(file, PARAPHRASE, asked) == f"file:plain words@{digest[:8]}"
    file.write_text('name = "mine | 2"\nis_wrong = "Wrong? {text}"\n')
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    part = words_of(file, PARAPHRASE, asked)
    assert part == f"file:mine - 2@{digest[:8]} + paraphrase", "one of the two questions is still ours"
    assert "not the published text" in words_note(part)
    for name in ('""', "3", "true"):
        file.write_text(f'name = {name}\nis_wrong = "{{text}}"\n')
        with pytest.raises(ws.WsError, match="name must be a text"):
            words_of(file, PARAPHRASE, asked)


def test_what_tables_say_of_their_words_and_items():
    assert notes_on({}) == notes_on({"words": "own", "drawn": "all"}) == notes_on({"words": None, "drawn": ""}) == []
    (note,) = notes_on({"words": "paraphrase", "drawn": "all"})
    assert note.startswith("Words: paraphrase,")
    assert "sign of a small effect" in note
    drawn, words = notes_on({"words": "file:x@12345678", "drawn": "5 of 20, seed 0"}, "wrongness")
    assert drawn.startswith("Items of wrongness: a draw of 5 of 20, seed 0")
    assert words.startswith("Words of wrongness: file:x@12345678")
    same = {"eval_hash": "a", "words": "paraphrase"}
    check_same({})
    check_same({"one": same, "two": same | {"words": "file:x@12345678"}})  # the same texts by another name
    with pytest.raises(ws.WsError, match=r"two was asked other items or words than one .*file:x@12345678, items b"):
        check_same({"one": same, "two": {"eval_hash": "b", "words": "file:x@12345678"}})
