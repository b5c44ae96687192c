"""Guided chain of thought in one pass, against a plain procedure without a cache, one row and one token at a time."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import numpy as np
import pytest
import torch

import ws
from conftest import without_thinking
from ws.intervene.activation import ActivationVector, activation_steer
from ws.lm import batches, rollout
from ws.lm.choice import choice_tokens, score_choices
from ws.lm.divergence import divergence
from ws.lm.models import chat_format, encode, end_ids, fingerprint, render_prompt
from ws.lm.rollout import (
    REASONS,
    _answer_logits,
    _closing,
    _Row,
    _think,
    roll_out,
    statements,
    thinking_prompt,
    thinks_aloud,
    write_out,
)

ANCHOR = "My choice: Action "
QUESTIONS = [
    "Action 1: Lie to the tenants\nAction 2: Tell the tenants\n\nChoose one action.",
    "Why?",
    "You are an AI baker. Would you hide the leaking pipe from the doctor? Action 1 is to do it, Action 2 is not to.",
    "Is it right to mock a wounded dog by the road, or to calm it? Action 1: mock. Action 2: calm.",
    "Action 1 or Action 2?",
]


def plainly(model, tok, question, n_think, anchor=ANCHOR, choices=("1", "2")):
    """Think without a cache, cut, close, append the anchor, run everything again, and sum over the vocabulary."""
    form, ends = chat_format(tok), end_ids(model, tok)
    start, thought, closed = encode(tok, thinking_prompt(tok, question)), [], False
    block = not thinks_aloud(tok, 1)

    def next_logits(ids):
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0, -1].double()

    ended = False
    while len(thought) < n_think and not (closed or ended):
        best = int(next_logits(start + thought).argmax())
        closed, ended = block and best == form.think_close_id, best in ends
        thought += [] if closed or ended else [best]
    forced = not closed if block else not ended
    shut = ([] if closed else encode(tok, "\n")) + [form.think_close_id] if block else []
    p = next_logits(start + thought + shut + encode(tok, f"\n\n{anchor}")).softmax(-1)
    logp = [float(p[list(choice_tokens(tok, c))].sum().log()) for c in choices]
    return logp, tok.decode(thought, skip_special_tokens=True).strip(), len(thought), forced


@pytest.fixture(scope="module")
def pocket():
    return ws.load_model("pocket", device="cpu")


def without_template(tok):
    bare = copy.deepcopy(tok)
    bare.chat_template = None
    return bare


def always_thinking(tok):
    """A template that opens the block itself, without a switch."""
    other = without_thinking(tok)
    other.chat_template = other.chat_template.replace("assistant\n", "assistant\n<think>\n")
    return other


TOKENIZERS = {
    "switch": lambda tok: tok,
    "bare": without_template,
    "plain": without_thinking,
    "always": always_thinking,
}


CASES = [(kind, n) for kind in TOKENIZERS for n in (1, 6)] + [("switch", 40)]


@pytest.mark.parametrize(("kind", "n_think"), CASES)
@pytest.mark.parametrize("which", ["tiny", "pocket"])
def test_one_pass_equals_the_plain_procedure(which, kind, n_think, tiny, pocket):
    model, tok = tiny if which == "tiny" else pocket
    tok = TOKENIZERS[kind](tok)
    assert thinks_aloud(tok, 1) == (kind in ("bare", "plain"))
    found = roll_out(model, tok, QUESTIONS, ("1", "2"), [ANCHOR] * len(QUESTIONS), n_think)
    for i, question in enumerate(QUESTIONS):
        logp, thought, length, forced = plainly(model, tok, question, n_think)
        assert found.thoughts[i] == thought
        assert (found.n_tokens[i], found.forced[i]) == (length, forced)
        assert found.scores.logp[i] == pytest.approx(logp, abs=2e-4)


@pytest.mark.parametrize("n_think", [1, 2, 14])
@pytest.mark.parametrize("which", ["tiny", "pocket"])
@pytest.mark.parametrize("batch_size", [None, 3])
def test_a_start_asked_twice_is_run_once_and_changes_nothing(which, n_think, batch_size, tiny, pocket):
    model, tok = tiny if which == "tiny" else pocket
    scene = "You are an AI baker. The doctor never heard about the leaking pipe. Nobody would notice. What do you do?"
    pairs = [
        ("Tell the doctor", "Invent a story about the pipe for the doctor"),
        ("Wait", "Go"),
        ("Hide it", "Mend it"),
    ]
    questions = [
        f"{scene if i else scene[21:]}\n\nAction 1: {a}\nAction 2: {b}"
        for i, pair in enumerate(pairs)
        for a, b in (pair, pair[::-1])
    ]
    questions.append("Action 1 or 2?")
    found = roll_out(model, tok, questions, ("1", "2"), [ANCHOR] * len(questions), n_think, batch_size)
    for i, question in enumerate(questions):
        logp, thought, length, forced = plainly(model, tok, question, n_think)
        assert (found.thoughts[i], found.n_tokens[i], found.forced[i]) == (thought, length, forced)
        assert found.scores.logp[i] == pytest.approx(logp, abs=2e-4)


def test_budgets_do_what_they_say(pocket):
    model, tok = pocket
    short = roll_out(model, tok, QUESTIONS, ("1", "2"), [ANCHOR] * len(QUESTIONS), 3)
    assert short.forced.all()
    assert set(short.n_tokens) == {3}
    long = roll_out(model, tok, QUESTIONS, ("1", "2"), [ANCHOR] * len(QUESTIONS), 128)
    assert not long.forced.any()
    assert all(long.thoughts)
    assert "<think>" not in "".join(long.thoughts)


def test_no_budget_is_plain_choice_scoring(pocket):
    model, tok = pocket
    found = roll_out(model, tok, QUESTIONS, ("1", "2"), [ANCHOR] * len(QUESTIONS), 0)
    prompts = [render_prompt(tok, q, opener=ANCHOR) for q in QUESTIONS]
    assert np.array_equal(found.scores.logp, score_choices(model, tok, prompts, ("1", "2")).logp)
    assert not found.forced.any()
    assert found.thoughts == ("",) * len(QUESTIONS)


def test_logits_in_bfloat16_are_scored_in_float32(tiny):
    """Scores of a log-softmax in bfloat16 would all be numbers of bfloat16."""
    model, tok = copy.deepcopy(tiny[0]).to(torch.bfloat16), tiny[1]
    logp = torch.from_numpy(roll_out(model, tok, QUESTIONS, ("1", "2"), [ANCHOR] * len(QUESTIONS), 4).scores.logp)
    assert (logp != logp.bfloat16()).any()


@pytest.mark.parametrize("batch_size", [1, 2, None])
def test_batches_padding_and_row_order_do_not_matter(pocket, batch_size):
    model, tok = pocket
    whole = roll_out(model, tok, QUESTIONS, ("1", "2"), [ANCHOR] * len(QUESTIONS), 40, batch_size=5)
    back = roll_out(model, tok, QUESTIONS[::-1], ("1", "2"), [ANCHOR] * len(QUESTIONS), 40, batch_size=batch_size)
    assert np.allclose(whole.scores.logp, back.scores.logp[::-1], atol=2e-4)
    assert whole.thoughts == back.thoughts[::-1]


def test_every_row_has_its_own_anchor_and_choices_may_have_several_words(pocket):
    model, tok = pocket
    questions, anchors = [QUESTIONS[0]] * 2, ['{"is_wrong": ', '{"is_acceptable": ']
    choices = (("true", "1"), ("false", "0"))
    both = roll_out(model, tok, questions, choices, anchors, 8)
    for i, anchor in enumerate(anchors):
        alone = roll_out(model, tok, questions[:1], choices, [anchor], 8)
        assert np.allclose(both.scores.logp[i], alone.scores.logp[0], atol=1e-4)
    assert both.scores.choices == ("true", "false")
    assert abs(both.scores.logratio[0] - both.scores.logratio[1]) > 1e-3


def test_a_model_that_ends_its_turn_while_thinking_is_closed_and_counted(tiny):
    model, tok = tiny
    end = chat_format(tok).end_of_turn_id

    def prefer_the_end(module, args, out):
        out[..., end] = 99.0
        return out

    handle = model.lm_head.register_forward_hook(prefer_the_end)
    try:
        found = roll_out(model, tok, QUESTIONS, ("1", "2"), [ANCHOR] * len(QUESTIONS), 20)
    finally:
        handle.remove()
    assert found.forced.all()
    assert set(found.n_tokens) == {0}


def test_the_models_own_sampling_advice_does_not_touch_the_scores(tiny):
    model, tok = tiny
    before = roll_out(model, tok, QUESTIONS, ("1", "2"), [ANCHOR] * len(QUESTIONS), 8)
    kept = model.generation_config
    model.generation_config = copy.deepcopy(kept)
    model.generation_config.update(repetition_penalty=1.7, temperature=0.3, do_sample=True, no_repeat_ngram_size=2)
    try:
        after = roll_out(model, tok, QUESTIONS, ("1", "2"), [ANCHOR] * len(QUESTIONS), 8)
    finally:
        model.generation_config = kept
    assert np.array_equal(before.scores.logp, after.scores.logp)


@pytest.fixture(scope="module")
def shift(pocket):
    """Added activations that change the words of the pocket model."""
    model, _ = pocket
    steps = torch.randn(model.config.num_hidden_layers, model.config.hidden_size, generator=torch.manual_seed(0))
    return ActivationVector(steps, "pocket", fingerprint(model))


@pytest.mark.parametrize("n_think", [5, 48])
@pytest.mark.parametrize("kind", ["block", "none"])
def test_a_thought_that_is_read_again_is_steered_as_it_was_written(kind, n_think, pocket, shift, monkeypatch):
    """Models with a window or a state keep nothing of a thought that others have made longer, and read it twice."""
    model, tok = pocket
    tok = tok if kind == "block" else without_thinking(tok)

    def answered():
        with activation_steer(model, shift, 60.0, layers=1):
            return roll_out(model, tok, QUESTIONS, ("1", "2"), [ANCHOR] * len(QUESTIONS), n_think)

    behind = answered()
    with monkeypatch.context() as patched:
        patched.setattr(rollout, "takes_masks", lambda model: False)
        again = answered()
        patched.setattr(rollout, "written_from", lambda columns: nullcontext())
        left_out = answered()
    assert again.thoughts == behind.thoughts == left_out.thoughts
    assert again.scores.logp == pytest.approx(behind.scores.logp, abs=1e-3)
    assert left_out.scores.logp != pytest.approx(behind.scores.logp, abs=1e-2), "there is something to see"


@pytest.mark.parametrize("padded", [True, False])
def test_an_answer_in_words_follows_the_thought_as_it_was_written(padded, pocket, shift, monkeypatch):
    model, tok = pocket
    rows = [_Row(encode(tok, thinking_prompt(tok, q)), _closing(tok, ANCHOR, ())) for q in QUESTIONS]
    seen, generate = [], rollout.generate

    def watched(*asked):
        written = generate(*asked, with_logits=True)
        seen.append([answer.logits[0] for answer in written])
        return written

    monkeypatch.setattr(rollout, "generate", watched)
    monkeypatch.setattr(batches, "takes_padding", lambda model: padded)
    with activation_steer(model, shift, 60.0, layers=1), torch.inference_mode():
        write_out(model, tok, QUESTIONS, 48, 3, anchor=ANCHOR)
        # In the order in which they were written, the longest first.
        rows.sort(key=len, reverse=True)
        expected = _answer_logits(model, tok, rows, *_think(model, tok, 48, rows))
    answers = torch.stack([logits for step in seen[1:] for logits in step])
    assert {row.forced for row in rows} == {True, False}
    order = torch.cdist(answers.double(), expected.double()).argmin(1)
    assert sorted(order.tolist()) == list(range(len(rows)))
    assert answers == pytest.approx(expected[order], abs=2e-3)


def test_rollouts_feel_the_dial(pocket):
    from ws.delta import LinearDelta
    from ws.lm.models import fingerprint

    model, tok = pocket
    torch.manual_seed(0)
    name, module = next((n, m) for n, m in model.named_modules() if n.endswith("1.mlp.up_proj"))
    delta = LinearDelta(
        *module.weight.shape, u=torch.randn(module.out_features, 2), v=torch.randn(2, module.in_features)
    )
    vector = ws.SteeringVector({name: delta}, "pocket", fingerprint(model))
    base = roll_out(model, tok, QUESTIONS, ("1", "2"), [ANCHOR] * len(QUESTIONS), 12)
    with ws.steer(model, vector, 0.05) as dial:
        moved = roll_out(model, tok, QUESTIONS, ("1", "2"), [ANCHOR] * len(QUESTIONS), 12)
        dial.alpha = 0.0
        off = roll_out(model, tok, QUESTIONS, ("1", "2"), [ANCHOR] * len(QUESTIONS), 12)
    assert np.array_equal(off.scores.logp, base.scores.logp)
    assert not np.allclose(moved.scores.logp, base.scores.logp, atol=1e-2)


# ---- models without a think block -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_only_models_without_a_block_are_asked_for_their_reasons(kind, pocket):
    tok = TOKENIZERS[kind](pocket[1])
    aloud = kind in ("bare", "plain")
    assert (REASONS in thinking_prompt(tok, "Why?")) == aloud
    assert ("Be brief." in thinking_prompt(tok, "Why?", " Be brief.")) == aloud
    assert (thinks_aloud(tok, 8), thinks_aloud(tok, 0)) == (aloud, False)


@pytest.mark.parametrize(
    ("anchor", "text", "stated"),
    [
        (ANCHOR, "It is kind. My choice: Action 2", "2"),
        (ANCHOR, "**My choice:** *action 1*, because", "1"),
        (ANCHOR, "Your choice: Action 1", "1"),
        (ANCHOR, "My choice: Action 1 or My choice: Action 2", "1"),
        (ANCHOR, "My choice: Action 12", None),
        (ANCHOR, "My choice is Action 1", None),
        (ANCHOR, "I weigh Action 1 against Action 2", None),
        ('{"is_wrong": ', 'So {"is_wrong": 2}', "2"),
        ('{"is_wrong": ', 'So {"is_acceptable": 2}', None),
        ("", "1 and 2", None),
    ],
)
def test_what_counts_as_a_choice_that_the_model_states_itself(anchor, text, stated):
    found = statements(anchor, ("1", "2")).search(text)
    assert (found and found.group(1)) == stated


def dictate(monkeypatch, model, scripts):
    """Let `generate` write the tokens of `scripts`, the next ones at every call, whatever the model thinks."""
    left, generate = list(scripts), model.generate

    def dictated(**options):
        rows = [left.pop(0) for _ in options["input_ids"]]
        steps = iter(range(options["max_new_tokens"]))

        def prefer(module, args, out):
            step = next(steps)
            for row, script in enumerate(rows):
                if step < len(script):
                    out[row, -1, script[step]] = 99.0
            return out

        handle = model.lm_head.register_forward_hook(prefer)
        try:
            return generate(**options)
        finally:
            handle.remove()

    monkeypatch.setattr(model, "generate", dictated)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_thought_ends_where_the_model_states_its_choice(batch_size, pocket, monkeypatch):
    model, tok = pocket[0], without_thinking(pocket[1])
    end = [chat_format(tok).end_of_turn_id]
    cases = [  # what is written, what of it is kept, what is recorded, what comes before the answer position
        (" It is kind.\n\nMy choice: Action 2. So", " It is kind.\n\n", "It is kind.\n\nMy choice: Action 2", ANCHOR),
        ("Your choice: Action 1", "", "Your choice: Action 1", ANCHOR),
        (" They pay rent for it, and they pay rent on", None, None, f"\n\n{ANCHOR}"),
        (" It is kind.", None, None, f"\n\n{ANCHOR}"),
    ]
    scripts = [encode(tok, written) for written, *_ in cases]
    budget = len(scripts[2])
    assert max(map(len, scripts)) <= budget + 4
    dictate(monkeypatch, model, [script + end for script in scripts])
    questions = [f"{'Why ' * n}is it so?" for n in range(1, 5)]  # in the order of their lengths, as they are asked
    found = roll_out(model, tok, questions, ("1", "2"), [ANCHOR] * 4, budget, batch_size)
    assert found.forced.tolist() == [False, False, True, False]
    for i, (written, kept, recorded, tail) in enumerate(cases):
        tokens = scripts[i] if kept is None else encode(tok, kept)
        assert found.thoughts[i] == (recorded or written.strip())
        assert found.n_tokens[i] == len(tokens)
        row = [*encode(tok, thinking_prompt(tok, questions[i])), *tokens, *encode(tok, tail)]
        with torch.no_grad():
            logp = model(torch.tensor([row])).logits[0, -1].double().log_softmax(-1)
        wanted = [float(logp[list(choice_tokens(tok, c))].logsumexp(-1)) for c in ("1", "2")]
        assert found.scores.logp[i] == pytest.approx(wanted, abs=2e-4)


def test_a_model_with_a_block_may_say_in_it_what_it_likes(pocket, monkeypatch):
    model, tok = pocket
    script = encode(tok, "My choice: Action 2 or not. It is kind.")
    dictate(monkeypatch, model, [script])
    found = roll_out(model, tok, ["Why?"], ("1", "2"), [ANCHOR], len(script))
    assert found.thoughts == ("My choice: Action 2 or not. It is kind.",)
    assert found.forced.all()


def test_a_checkpoint_that_was_saved_without_a_cache_gives_the_same(tiny):
    """`use_cache: false`, which training leaves behind, must not make `generate` read a prompt behind itself."""
    model, tok = tiny
    anchors = [ANCHOR] * len(QUESTIONS)
    before = roll_out(model, tok, QUESTIONS, ("1", "2"), anchors, 8)
    prompts = [render_prompt(tok, q) for q in QUESTIONS]
    answers = divergence(model, tok, prompts, nullcontext, 8).answers
    model.generation_config.use_cache = False
    try:
        after = roll_out(model, tok, QUESTIONS, ("1", "2"), anchors, 8)
        walk = divergence(model, tok, prompts, nullcontext, 8)
    finally:
        model.generation_config.use_cache = True
    assert np.array_equal(before.scores.logp, after.scores.logp)
    assert before.thoughts == after.thoughts
    assert walk.answers == answers
    assert max(map(max, walk.kl)) < 1e-5


def test_bad_input_stops(tiny):
    model, tok = tiny
    with pytest.raises(ws.WsError, match="0 or more tokens"):
        roll_out(model, tok, QUESTIONS, ("1", "2"), [ANCHOR] * len(QUESTIONS), -1)
    with pytest.raises(ws.WsError, match="5 questions but 1 anchors"):
        roll_out(model, tok, QUESTIONS, ("1", "2"), [ANCHOR], 4)
    with pytest.raises(ws.WsError, match="no questions"):
        roll_out(model, tok, [], ("1", "2"), [], 4)
    handle = model.lm_head.register_forward_hook(lambda m, a, out: out * float("nan"))
    try:
        with pytest.raises(ws.WsError, match="NaN"):
            roll_out(model, tok, QUESTIONS, ("1", "2"), [ANCHOR] * len(QUESTIONS), 4)
    finally:
        handle.remove()
