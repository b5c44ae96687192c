"""Choice scores against the plain computation, one prompt at a time."""

from __future__ import annotations

import copy
from functools import wraps

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ws
from conftest import build_model
from support.choices import reference
from ws.lm.choice import (
    START_BATCH,
    ChoiceScores,
    Family,
    _batches,
    _families,
    _family,
    _score_batch,
    by_token,
    choice_logp,
    choice_tokens,
    choice_variants,
    score_choices,
    score_rows,
    share_prefixes,
    with_each_token,
)
from ws.lm.models import encode, render_prompt

PROMPTS = ["Q", "What is the color of the sky?", "A much longer question about nothing at all, twice over.", "Why?"]


def test_choice_tokens_take_case_and_leading_space_but_no_punctuation(tiny):
    _, tok = tiny
    texts = {tok.decode([i]) for i in choice_tokens(tok, "Yes")}
    assert {"Yes", " Yes"} <= texts
    assert all(t.strip().lower() == "yes" and t == t.rstrip() for t in texts)
    with pytest.raises(ws.WsError, match="No single token"):
        choice_tokens(tok, "Yes, of course")


def test_scores_equal_the_plain_computation(tiny):
    model, tok = tiny
    prompts = [render_prompt(tok, p, opener="My answer:") for p in PROMPTS]
    scores = score_choices(model, tok, prompts, ("Yes", "No"))
    for i, prompt in enumerate(prompts):
        yes, no = reference(model, tok, prompt, ("Yes", "No"))
        assert scores.logratio[i] == pytest.approx(np.log(yes / no), abs=1e-4)
        assert scores.mass[i] == pytest.approx(yes + no, rel=1e-4)


def test_a_prompt_of_one_token_has_a_score_of_its_own(tiny):
    prompts = ["A", "A b"]
    assert len(encode(tiny[1], prompts[0])) == 1
    both = score_choices(*tiny, prompts, ("Yes", "No")).logratio
    alone = [score_choices(*tiny, [p], ("Yes", "No")).logratio[0] for p in prompts]
    assert both == pytest.approx(alone, abs=1e-5)
    assert abs(both[0] - both[1]) > 1e-3


def test_batch_size_and_row_order_do_not_matter(tiny):
    model, tok = tiny
    prompts = [render_prompt(tok, p) for p in PROMPTS]
    all_at_once = score_choices(model, tok, prompts, ("Yes", "No"))
    for other in (
        score_choices(model, tok, prompts, ("Yes", "No"), batch_size=1),
        score_choices(model, tok, prompts, ("Yes", "No"), batch_size=3),
    ):
        assert np.allclose(other.logp, all_at_once.logp, atol=1e-4)
    back = score_choices(model, tok, prompts[::-1], ("Yes", "No"))
    assert np.allclose(back.logp[::-1], all_at_once.logp, atol=1e-4)


SHARED = [
    *(
        f"A long story about {x} that is told twice. Is it {q}"
        for x in ("a dog", "the doctor")
        for q in ("wrong?", "ok?")
    ),
    "Alone.",
    "A long story about a dog that is told twice.",
    "A long story about a dog that is told twice.",
]


@pytest.mark.parametrize("batch_size", [1, 2, 3, None])
def test_a_shared_start_is_run_once_and_changes_nothing(tiny, batch_size, monkeypatch):
    model, tok = tiny
    prompts = [render_prompt(tok, p) for p in SHARED]
    families = share_prefixes([encode(tok, p) for p in prompts])
    assert sorted(i for f in families for i in f.rows) == list(range(len(prompts)))
    assert {f.rows for f in families if 4 in f.rows} == {(4,)}, "a prompt on its own shares nothing"
    assert max(len(f.rows) for f in families) >= 4
    for family in families:
        for suffix, row in zip(family.suffixes, family.rows, strict=True):
            assert suffix
            assert [*family.prefix, *suffix] == encode(tok, prompts[row])
    seen = []
    monkeypatch.setattr(model, "forward", _counting(model.forward, seen))
    scores = score_choices(model, tok, prompts, ("Yes", "No"), batch_size)
    if batch_size is None:
        assert sum(seen) < sum(len(encode(tok, p)) for p in prompts)
    for i, prompt in enumerate(prompts):
        yes, no = reference(model, tok, prompt, ("Yes", "No"))
        assert scores.logratio[i] == pytest.approx(np.log(yes / no), abs=1e-4)


def _counting(forward, seen):
    @wraps(forward)
    def counted(*args, **kwargs):
        seen.append(kwargs["input_ids"].numel() if "input_ids" in kwargs else 0)
        return forward(*args, **kwargs)

    return counted


@pytest.mark.parametrize("architecture", ["qwen3", "qwen2"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_equal_single_ones_in_other_models(architecture, attention):
    """Half of a shared start, unequal rests, in both attention implementations, with biases and without."""
    model = build_model(architecture)
    model.set_attn_implementation(attention)
    prompts = [[5, 6, 7, 8, 9, 1], [5, 6, 7, 8, 2, 3, 4], [5, 6, 7, 8], [40, 41, 42], [40, 41, 43], [90]]
    variants = [torch.tensor([1, 2, 3]), torch.tensor([50])]
    families = _families(model, prompts)
    assert max(len(f.rows) for f in families) == 3
    for family in families:
        packed = _score_batch(model, 0, [family], variants)
        for row, found in zip(family.rows, packed, strict=True):
            with torch.no_grad():
                logp = model(torch.tensor([prompts[row]])).logits[0, -1].log_softmax(-1)
            assert torch.allclose(found, torch.stack([logp[v].logsumexp(-1) for v in variants]), atol=1e-5)
    model.config.sliding_window = 4
    assert {len(f.rows) for f in _families(model, prompts)} == {1}, "a window needs a mask of its own"


@settings(max_examples=60)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=7), min_size=1, max_size=9))
def test_families_hold_every_prompt_whole(prompts):
    families = share_prefixes(prompts)
    found = {row: [*f.prefix, *s] for f in families for s, row in zip(f.suffixes, f.rows, strict=True)}
    assert [found[i] for i in range(len(prompts))] == prompts
    assert all(s for f in families for s in f.suffixes)
    assert all(f.prefix or len(f.rows) == 1 for f in families)
    pieces = [p for f in families for p in f.pieces(2)]
    assert sorted(i for p in pieces for i in p.rows) == list(range(len(prompts)))


def test_logits_in_bfloat16_are_scored_in_float32(tiny):
    """A log-softmax in bfloat16 would put a log-probability of -9 on a grid of 0.06."""
    model, tok = copy.deepcopy(tiny[0]).to(torch.bfloat16), tiny[1]
    ids = torch.tensor([encode(tok, "Is ice cold? Answer:")])
    with torch.no_grad():
        logits = model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            position_ids=torch.arange(ids.shape[1])[None],
            logits_to_keep=torch.tensor([ids.shape[1] - 1]),
        ).logits[0, -1]
    assert logits.dtype == torch.bfloat16
    logp = logits.double().log_softmax(dim=-1)
    wanted = [float(logp[list(choice_tokens(tok, c))].logsumexp(dim=-1)) for c in ("Yes", "No")]
    assert score_choices(model, tok, ["Is ice cold? Answer:"], ("Yes", "No")).logp[0] == pytest.approx(wanted, abs=1e-5)


def test_broken_models_and_empty_input_stop(tiny):
    model, tok = tiny
    with pytest.raises(ws.WsError, match="no prompts"):
        score_choices(model, tok, [], ("Yes", "No"))
    with pytest.raises(ws.WsError, match="'Yes' and 'yes' are read as the same tokens"):
        score_choices(model, tok, PROMPTS, ("Yes", "yes"))
    handle = model.lm_head.register_forward_hook(lambda m, a, out: out * float("nan"))
    try:
        with pytest.raises(ws.WsError, match="NaN"):
            score_choices(model, tok, PROMPTS, ("Yes", "No"))
    finally:
        handle.remove()


def test_the_tokens_that_carry_a_choice_are_shown(tiny):
    """`true` and `1` are one choice; which of the two has the probability is seen token by token."""
    model, tok = tiny
    prompt, choices = render_prompt(tok, "Is it?", opener="It is "), (("true", "1"), ("false", "0"))
    scores = score_choices(model, tok, [prompt], choices)
    with torch.no_grad():
        p = model(torch.tensor([encode(tok, prompt)])).logits[0, -1].double().softmax(-1)
    ids = [i for choice in choices for word in choice for i in choice_tokens(tok, word)]
    assert scores.variants[0] == pytest.approx(p[ids].numpy(), rel=1e-4)
    assert scores.variants[0].sum() == pytest.approx(scores.mass[0], rel=1e-5)
    known = sorted(ids, key=lambda i: -float(p[i]))[:4]
    wanted = ", ".join(f"{tok.decode([i])!r} {float(p[i]):.3f}" for i in known)
    assert by_token(tok, choices, {"variants": scores.variants[0]}) == f" (by token: {wanted})"
    assert by_token(tok, choices, {"logratio": np.zeros(1)}) == "", "scores that were kept before"


# ---- in numbers -----------------------------------------------------------------------------------------------------


class Words:
    """A tokenizer of whole pieces of text."""

    def __init__(self, *pieces: str, special: tuple[int, ...] = ()) -> None:
        self.pieces, self.all_special_ids = pieces, list(special)

    def __len__(self) -> int:
        return len(self.pieces)

    def batch_decode(self, rows, clean_up_tokenization_spaces=True):
        texts = ["".join(self.pieces[i] for i in row) for row in rows]
        return [text.replace(" ", "") for text in texts] if clean_up_tokenization_spaces else texts

    def decode(self, row):
        return "".join(self.pieces[i] for i in row)


WORDS = Words(
    *("Yes", " yes", "\n\tYES", "yes ", "yes.", "No", " NO", "yes", "maybe", "1", "yesX", "Xyes", "\nno", "\ryes"),
    special=(7,),
)


def test_a_word_is_every_ordinary_token_that_reads_as_it():
    assert choice_tokens(WORDS, "yes") == choice_tokens(WORDS, "YES") == (0, 1, 2)
    assert choice_tokens(WORDS, "no") == (5, 6, 12)
    with pytest.raises(ws.WsError, match=r"^No single token .*'perhaps'"):
        choice_tokens(WORDS, "perhaps")
    variants = choice_variants(WORDS, ["yes", ("no", "1")], torch.device("cpu"))
    assert [v.tolist() for v in variants] == [[0, 1, 2], [5, 6, 12, 9]]
    assert [v.tolist() for v in with_each_token(variants)] == [
        [0, 1, 2], [5, 6, 12, 9], [0], [1], [2], [5], [6], [12], [9],
    ]  # fmt: skip


def test_a_token_counts_once_and_for_one_choice():
    choices, device = (("yes", "YES"), "no"), torch.device("cpu")
    assert [v.tolist() for v in choice_variants(WORDS, choices, device)] == [[0, 1, 2], [5, 6, 12]]
    p = np.array([0.1, 0.2, 0.05, 0.3, 0.01, 0.02])
    assert by_token(WORDS, choices, {"variants": p}, 2) == " (by token: 'No' 0.300, ' yes' 0.200)"
    for shared in (("no", "No"), (("yes", "1"), "no", ("maybe", "1"))):
        with pytest.raises(ws.WsError, match="are read as the same tokens"):
            choice_variants(WORDS, shared, device)


def test_scores_have_the_choices_first_and_their_tokens_behind():
    logp = torch.tensor([[-1.0, -2.0, -3.0, -4.0, -5.0], [-0.1, -0.2, -9.0, -8.0, -7.0]])
    scores = ChoiceScores.checked([("true", "1"), "false"], logp)
    assert scores.choices == ("true", "false")
    assert scores.logp.tolist() == logp[:, :2].double().tolist()
    assert scores.variants == pytest.approx(np.exp(logp[:, 2:].double().numpy()))
    assert scores.logratio == pytest.approx(logp[:, 0].double() - logp[:, 1].double())
    assert scores.mass == pytest.approx([np.exp(-1) + np.exp(-2), 1.0]), "rounding makes no more than 1 of it"
    for place in ((0, 0), (1, 4)):
        broken = logp.clone()
        broken[place] = float("nan")
        with pytest.raises(ws.WsError, match="^The model gave NaN"):
            ChoiceScores.checked([("true", "1"), "false"], broken)


def test_the_tokens_with_the_most_probability_are_told_first():
    p = np.array([0.1, 0.5, 0.05, 0.1, 0.2, 0.049])
    assert by_token(WORDS, ["yes", "no"], {"variants": p}) == (
        " (by token: ' yes' 0.500, ' NO' 0.200, 'Yes' 0.100, 'No' 0.100)"
    )
    assert by_token(WORDS, ["yes", "no"], {"variants": p}, 1) == " (by token: ' yes' 0.500)"
    assert by_token(WORDS, ["yes", "no"], {"variants": np.array([])}) == ""


def families_of(prompts, *want) -> None:
    """Each of `want` is a start, and the places of the prompts that share it."""
    made = share_prefixes(prompts)
    assert [(f.prefix, f.rows) for f in made] == [(tuple(start), rows) for start, rows in want]
    for family in made:
        assert [family.prefix + s for s in family.suffixes] == [tuple(prompts[i]) for i in family.rows]


def test_prompts_that_share_half_of_themselves_are_a_family():
    families_of([[1, 2, 3]], ([], (0,)))
    families_of([[1, 2, 3, 4], [1, 2, 5, 6]], ([1, 2], (0, 1)))
    families_of([[1, 2, 3, 4, 5], [1, 2, 6, 7]], ([], (0,)), ([], (1,)))
    families_of([[1, 2, 6, 7], [1, 2, 3, 4, 5]], ([], (1,)), ([], (0,)))
    families_of([[1, 2, 3, 4, 5], [1, 2]], ([], (1,)), ([], (0,)))
    families_of([[1, 2], [1, 2]], ([1], (0, 1)))
    families_of([[1, 2, 3], [1, 2]], ([1], (1, 0)))
    families_of([[1], [1], [2]], ([], (0,)), ([], (1,)), ([], (2,)))
    families_of([[5, 6], [5], [5, 7]], ([], (1,)), ([5], (0, 2)))
    families_of([[5, 5, 1], [1, 2, 3], [5, 5, 2], [1, 2, 4], [9]], ([1, 2], (1, 3)), ([5, 5], (0, 2)), ([], (4,)))
    # What the third shares with the first is less than what the first two share.
    families_of([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 7], [1, 2, 3, 9]], ([1, 2, 3], (0, 1, 2)))
    families_of([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 7], [1, 2, 9]], ([1, 2, 3, 4, 5], (0, 1)), ([], (2,)))
    # Nor does what the third shares with the first count beyond what all share.
    families_of([[1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 4]], ([1, 2], (0, 1, 2)))
    families_of([[1, 1, 1, 5], [1, 1, 2, 2], [1, 1, 1, 6]], ([1, 1], (0, 2, 1)))


def test_families_come_in_parts_and_in_batches_of_one_size():
    family = Family((1, 2), tuple((i,) for i in range(5)), (9, 8, 7, 6, 5))
    assert family.longest() == 3
    assert Family((1,), ((2, 3), (4,), (5, 6, 7)), (0, 1, 2)).longest() == 4
    parts = family.pieces(2)
    assert [(p.prefix, p.suffixes, p.rows) for p in parts] == [
        ((1, 2), ((0,), (1,)), (9, 8)), ((1, 2), ((2,), (3,)), (7, 6)), ((), ((1, 2, 4),), (5,)),
    ]  # fmt: skip
    assert family.pieces(5) == [family]
    singles = [Family((), ((i,),), (i,)) for i in range(5)]
    pairs = [Family((1,), ((i,), (i,)), (10 + i, 20 + i)) for i in range(3)]
    triple = Family((1,), ((1,), (2,), (3,)), (30, 31, 32))
    batches = list(_batches([triple, *pairs, *singles], 4))
    assert [[f.rows for f in batch] for batch in batches] == [
        [(0,), (1,), (2,), (3,)], [(4,)], [(10, 20), (11, 21)], [(12, 22)], [(30, 31, 32)],
    ]  # fmt: skip
    assert [len(b) for b in _batches(singles, 1)] == [1] * 5
    assert [[len(f.rows) for f in batch] for batch in _batches([triple], 2)] == [[1], [2]]
    assert [len(b) for b in _batches([triple, triple], 3)] == [1, 1]


def test_every_word_of_a_choice_counts_and_progress_reaches_its_end(tiny, monkeypatch):
    model, tok = tiny
    prompts = [render_prompt(tok, p) for p in SHARED]
    seen = []

    class Bar:
        def __init__(self, total, desc, unit):
            seen.append((total, desc, unit))

        def __enter__(self):
            return self

        def __exit__(self, *problem):
            seen.append("end")

        def update(self, n):
            seen.append(n)

    monkeypatch.setattr("ws.lm.choice.progress", Bar)
    scores = score_choices(model, tok, prompts, (("Yes", "1"), "No"), batch_size=2)
    assert seen[0] == (len(prompts), "answers", "prompt")
    assert (seen[-1], sum(seen[1:-1]), max(seen[1:-1])) == ("end", len(prompts), 2)
    assert scores.choices == ("Yes", "No")
    for i, prompt in enumerate(prompts):
        wanted = reference(model, tok, prompt, ("Yes", "1", "No"))
        assert np.exp(scores.logp[i]) == pytest.approx([wanted[0] + wanted[1], wanted[2]], rel=1e-4)
        n = [len(choice_tokens(tok, w)) for w in ("Yes", "1", "No")]
        assert scores.variants.shape == (len(prompts), sum(n))
        assert scores.variants[i, : n[0]].sum() == pytest.approx(wanted[0], rel=1e-4)
        assert scores.variants[i, n[0] : n[0] + n[1]].sum() == pytest.approx(wanted[1], rel=1e-4)
    assert not torch.is_inference_mode_enabled()
    assert START_BATCH == 64
    with pytest.raises(ws.WsError, match=r"^There are no prompts to score\.$"):
        score_choices(model, tok, [], ("Yes", "No"))


def test_what_does_not_fit_into_memory_is_scored_in_smaller_batches(tiny, monkeypatch):
    model, tok = tiny
    prompts = [render_prompt(tok, f"Number {'x' * i}") for i in range(9)]
    asked = []

    def tight(rows_model, pad_id, families, variants):
        asked.append(len(families))
        if len(families) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return _score_batch(rows_model, pad_id, families, variants)

    whole = score_choices(model, tok, prompts, ("Yes", "No"))
    monkeypatch.setattr("ws.lm.choice.share_prefixes", lambda p: [_family(p, [i], 0) for i in range(len(p))])
    monkeypatch.setattr("ws.lm.choice._score_batch", tight)
    assert np.allclose(score_choices(model, tok, prompts, ("Yes", "No")).logp, whole.logp, atol=1e-4)
    assert asked[0] == 9
    assert asked[-1] <= 2
    asked.clear()
    score_choices(model, tok, prompts, ("Yes", "No"), 2)
    assert asked == [2, 2, 2, 2, 1]


def test_a_choice_is_a_sum_over_its_tokens_in_single_precision():
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(1)).bfloat16()
    variants = [torch.tensor([1, 5, 7]), torch.tensor([2])]
    p = logits.double().softmax(dim=-1)
    made = choice_logp(logits, variants)
    assert made.dtype == torch.float32
    assert made.exp().double().numpy() == pytest.approx(
        torch.stack([p[:, [1, 5, 7]].sum(dim=1), p[:, 2]], dim=1).numpy(), rel=1e-5
    )


@pytest.mark.parametrize("architecture", ["qwen3", "qwen2"])
def test_rows_of_unequal_length_are_scored_as_each_alone(architecture):
    model = build_model(architecture)
    rows, variants = [[5, 6, 7], [8], [1, 2, 3, 4, 5, 9]], [torch.tensor([1, 2, 3]), torch.tensor([50])]
    with torch.no_grad():
        made = score_rows(model, 0, rows, variants)
        families = [Family((), (tuple(r),), (i,)) for i, r in enumerate(rows)]
        assert torch.allclose(_score_batch(model, 0, families, variants), made, atol=1e-5)
        for row, found in zip(rows, made, strict=True):
            logp = model(torch.tensor([row])).logits[0, -1].log_softmax(-1)
            assert torch.allclose(found, torch.stack([logp[v].logsumexp(-1) for v in variants]), atol=1e-5)
        packed = [Family((5, 6, 7), ((1,), (2, 3)), (0, 1)), Family((5, 8), ((4, 4), (9,)), (2, 3))]
        whole = [[5, 6, 7, 1], [5, 6, 7, 2, 3], [5, 8, 4, 4], [5, 8, 9]]
        found = _score_batch(model, 0, packed, variants)
        assert torch.allclose(found, score_rows(model, 0, whole, variants), atol=1e-5), "family after family"
