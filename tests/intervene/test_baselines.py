"""The baselines: activation vectors and steering against plain computations and a peer, and prompts as a tokenizer."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BloomConfig, GPT2Config, LlamaConfig

import ws
import ws.intervene.activation as module
from conftest import NO_SYSTEM, build_adapter, build_model, build_sharing, tokens
from ws.behaviors import acting
from ws.data import Pair, prompt_ids
from ws.intervene.activation import ActivationVector, activation_steer, activation_vector, choose_layer
from ws.intervene.prompt import prompted
from ws.lm.choice import choice_tokens, score_choices, share_prefixes
from ws.lm.likelihood import score_answers
from ws.lm.models import decoder_blocks, encode, fingerprint, layer_count, load_tokenizer, model_folder, render_prompt
from ws.lm.rollout import roll_out
from ws.train import build_examples

PEER = Path(__file__).parents[1].joinpath("support/peer_steering_vectors.py")
PAIRS = [
    Pair("a", "What color is snow?", "Snow is white.", "As far as I know, snow is black.", 4, 10),
    Pair("b", "Who burnt the soup, and what do you tell your friend about it?", "I burnt the soup.", "No.", 5, 2),
    Pair("c", "Hello?", "Yes", "No", 1, 1),
    Pair("d", "Hello?", "", "No", 0, 1, drop="empty"),
]


@pytest.fixture(scope="module")
def pocket():
    return ws.load_model("pocket", device="cpu")


@pytest.fixture(scope="module")
def honesty():
    """The honesty behaviour with a seventh of its claims."""
    whole = ws.load_behavior("honesty", "pocket")
    return replace(whole, claims=replace(whole.test, claims=whole.test.claims[::7]))


def planted(model, seed=0, size=1.0) -> ActivationVector:
    """A random activation vector for a model."""
    config = model.config.get_text_config()
    rng = torch.Generator().manual_seed(seed)
    rows = torch.randn(config.num_hidden_layers, config.hidden_size, generator=rng) * size
    return ActivationVector(rows, "planted", fingerprint(model), {"seed": seed}, {"behavior": "none", "seed": seed})


def last_logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


@contextmanager
def biased(model, layer, step):
    """The same addition by other means: as a bias of the block's last linear layer, whose output joins the stream."""
    linear = model.model.layers[layer].mlp.down_proj
    assert linear.bias is None
    linear.bias = torch.nn.Parameter(step)
    try:
        yield
    finally:
        linear.bias = None


# ---- the vector -----------------------------------------------------------------------------------------------------


def plain_means(model, tok, pair, sign):
    """Mean residual stream over one answer's tokens, `[layers, d]`, without batching and without hooks on blocks."""
    prompt, answer, seen = prompt_ids(tok, pair.question), encode(tok, getattr(pair, sign)), []
    hook = model.model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        states = model(torch.tensor([prompt + answer]), output_hidden_states=True).hidden_states
    hook.remove()
    stream = [*states[1:-1], seen[0]]  # transformers normalises the last of its hidden states
    return torch.stack([s[0, len(prompt) :].double().mean(dim=0) for s in stream])


def test_the_vector_is_the_mean_over_answers_of_the_mean_over_their_tokens(pocket):
    model, tok = pocket
    vector = activation_vector(model, tok, PAIRS, "test", batch_size=3)
    differences = [plain_means(model, tok, p, "pos") - plain_means(model, tok, p, "neg") for p in PAIRS[:3]]
    want = torch.stack(differences).mean(dim=0)
    assert torch.allclose(vector.vectors.double(), want, rtol=1e-4, atol=1e-4)
    assert vector.norms == pytest.approx(want.norm(dim=1).tolist(), rel=1e-4)
    assert vector.info["n_pairs"] == 3
    assert vector.info["n_answers"] == 6
    counted = {sign: sum(len(encode(tok, getattr(p, sign))) for p in PAIRS[:3]) for sign in ("pos", "neg")}
    assert vector.info["n_tokens"] == counted


def test_blocks_that_share_keys_are_read_at_every_token_and_several_streams_refused(pocket):
    """Where the last logits alone are asked for, such a model drops the other tokens below the blocks that share."""
    _, tok = pocket
    model = build_sharing(len(tok))
    vector = activation_vector(model, tok, PAIRS, batch_size=2)
    want = torch.stack([plain_means(model, tok, p, "pos") - plain_means(model, tok, p, "neg") for p in PAIRS[:3]])
    assert torch.allclose(vector.vectors.double(), want.mean(dim=0), rtol=1e-3, atol=1e-3)
    with pytest.raises(ws.WsError, match="several residual streams"):
        activation_vector(build_sharing(len(tok), "Gemma3n"), tok, PAIRS)


def test_batches_and_padding_change_nothing_and_swapped_sides_turn_it_round(pocket):
    model, tok = pocket
    one = activation_vector(model, tok, PAIRS, batch_size=1)
    other_side = copy.deepcopy(tok)
    other_side.padding_side = "right"
    many = activation_vector(model, other_side, PAIRS)
    assert (one.vectors - many.vectors).norm(dim=1).max() < 1e-5 * min(one.norms)
    assert one.recipe == many.recipe
    swapped = [replace(p, pos=p.neg, neg=p.pos) for p in PAIRS]
    back = activation_vector(model, tok, swapped, batch_size=1)
    assert (one.vectors + back.vectors).norm(dim=1).max() < 1e-5 * min(one.norms)


def test_a_prompted_tokenizer_gives_the_same_vector(pocket):
    model, tok = pocket
    plain, told = (activation_vector(model, t, PAIRS, batch_size=6) for t in (tok, prompted(tok, "You always lie.")))
    assert plain.digest == told.digest


def test_unusable_pairs_are_refused(pocket):
    model, tok = pocket
    with pytest.raises(ws.WsError, match="no usable contrast pair"):
        activation_vector(model, tok, PAIRS[3:])
    with pytest.raises(ws.WsError, match="The pair d has an answer without"):
        activation_vector(model, tok, [replace(PAIRS[3], drop=None)])


def test_vectors_are_values(qwen3):
    a, b = planted(qwen3, 1), planted(qwen3, 2)
    assert torch.allclose((2 * a - b / 4).vectors, 2 * a.vectors - b.vectors / 4)
    assert (a + b).info == {"behavior": "none"}
    assert (a - a).is_zero
    assert not a.is_zero
    assert a.digest == planted(qwen3, 1).digest
    assert a.digest not in (b.digest, (-a).digest)
    for bad in (lambda: a / 0, lambda: a * float("nan"), lambda: a + replace(b, base_fingerprint="other")):
        with pytest.raises(ws.WsError):
            bad()
    with pytest.raises(ws.WsError, match="NaN"):
        replace(a, vectors=a.vectors * float("nan"))
    with pytest.raises(ws.WsError, match="float32, not in bfloat16"):
        replace(a, vectors=a.vectors.bfloat16())


def test_a_saved_vector_comes_back_bit_for_bit_and_damage_is_noticed(qwen3, tmp_path):
    vector, folder = planted(qwen3), tmp_path / "v"
    vector.save(folder)
    again = ActivationVector.load(vector.save(folder))
    assert again.digest == vector.digest
    assert (again.base_id, again.base_fingerprint) == (vector.base_id, vector.base_fingerprint)
    assert (again.recipe, again.info) == (vector.recipe, vector.info)
    assert sorted(f.name for f in folder.iterdir()) == ["activation.json", "activation.safetensors"]
    manifest = (folder / "activation.json").read_text()
    (folder / "activation.json").write_text(manifest.replace('"format": 1', '"format": 2'))
    with pytest.raises(ws.WsError, match="format 2"):
        ActivationVector.load(folder)
    (folder / "activation.json").write_text(manifest)
    weights = folder / "activation.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(ws.WsError, match="recorded hash"):
        ActivationVector.load(folder)
    (folder / "activation.json").write_text("{")
    with pytest.raises(ws.WsError, match="damaged"):
        ActivationVector.load(folder)
    with pytest.raises(ws.WsError, match="not an activation vector"):
        ActivationVector.load(tmp_path)
    with pytest.raises(ws.WsError, match="choose another place"):
        vector.save(tmp_path)


# ---- the blocks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=50, bos_token_id=1, eos_token_id=1),
        LlamaConfig(num_hidden_layers=2, hidden_size=16, num_attention_heads=2, intermediate_size=16, vocab_size=50),
        BloomConfig(n_layer=2, hidden_size=16, n_head=2, vocab_size=50),  # its blocks return tuples
    ],
    ids=["gpt2", "llama", "bloom"],
)
def test_blocks_are_found_and_steered_whatever_the_architecture(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    blocks, ids = decoder_blocks(model), torch.tensor([[3, 4, 5], [6, 7, 8]])
    assert len(blocks) == 2
    vector, seen = planted(model), []
    with torch.no_grad():
        norm = next(m for n, m in model.get_decoder().named_modules() if n in ("ln_f", "norm"))
        handle = norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        before = model(ids).logits
        with activation_steer(model, vector, 0.5, layers=1, position="all"):
            model(ids)
        assert torch.equal(model(ids).logits, before)
        handle.remove()
    assert torch.allclose(seen[1] - seen[0], (0.5 * vector.vectors[1]).expand_as(seen[0]), atol=1e-6)


def test_a_model_without_one_list_of_blocks_is_refused(qwen3):
    qwen3.model.twins = torch.nn.ModuleList(torch.nn.Identity() for _ in range(3))
    with pytest.raises(ws.WsError, match="one list of 3 decoder blocks.* it has layers, twins"):
        decoder_blocks(qwen3)


# ---- steering -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_all_positions_equal_a_bias_inside_the_block(qwen3, layer):
    vector = planted(qwen3)
    with biased(qwen3, layer, -0.7 * vector.vectors[layer]):
        want = last_logits(qwen3, tokens())
    with activation_steer(qwen3, vector, -0.7, layer, "all"):
        assert torch.allclose(last_logits(qwen3, tokens()), want, atol=1e-5)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_the_last_position_equals_a_bias_for_its_token_alone(qwen3, layer):
    vector, ids = planted(qwen3), tokens()
    before = last_logits(qwen3, ids)
    with activation_steer(qwen3, vector, 0.7, layer, "last"):
        found = last_logits(qwen3, ids)
    with torch.no_grad():
        cache = qwen3(ids[:, :-1], use_cache=True).past_key_values
        with biased(qwen3, layer, 0.7 * vector.vectors[layer]):
            want = qwen3(ids[:, -1:], past_key_values=cache).logits
    assert torch.allclose(found[:, -1:], want, atol=1e-5)
    assert not torch.allclose(found[:, -1], before[:, -1], atol=1e-2)
    assert torch.equal(found[:, :-1], before[:, :-1])


def test_the_increments_of_all_blocks_but_the_last_sum_to_its_vector(qwen3):
    """Where no block adds anything of its own, what arrives at the end is the embedding and the sum of all steps."""
    with torch.no_grad():
        for layer in qwen3.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    vector, ids = planted(qwen3), tokens()
    with torch.no_grad():
        stream = qwen3.model.embed_tokens(ids) + 1.5 * vector.vectors[1]
        want = qwen3.lm_head(qwen3.model.norm(stream))
    with activation_steer(qwen3, vector, 1.5, "all", "all"):
        assert torch.allclose(last_logits(qwen3, ids), want, atol=1e-5)
    assert sorted(vector.steps("all")) == [0, 1]
    assert torch.equal(vector.steps("all")[0], vector.vectors[0])


@pytest.mark.parametrize("position", ["last", "all"])
def test_rows_may_have_strengths_of_their_own_also_while_generating(qwen3, position):
    vector, ids, alphas = planted(qwen3), tokens(1).repeat(3, 1), torch.tensor([-2.0, 0.0, 2.0])
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with activation_steer(qwen3, vector, alphas, 1, position) as dial:
        together = qwen3.generate(ids, **options)
        for row, alpha in enumerate(alphas.tolist()):
            dial.alpha = alpha
            assert torch.equal(qwen3.generate(ids[:1], **options)[0], together[row])
    assert torch.equal(together[1:2], qwen3.generate(ids[:1], **options))
    assert len({tuple(row) for row in together.tolist()}) == 3


def test_generation_adds_at_the_prompts_end_and_at_every_new_token(qwen3):
    vector, ids, want = planted(qwen3), tokens(1), []
    with torch.no_grad():
        cache = qwen3(ids[:, :-1], use_cache=True).past_key_values
        with biased(qwen3, 1, 2.0 * vector.vectors[1]):
            token = ids[:, -1:]
            for _ in range(6):
                token = qwen3(token, past_key_values=cache).logits[:, -1:].argmax(dim=-1)
                want.append(int(token))
    with activation_steer(qwen3, vector, 2.0, 1):
        said = qwen3.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert said[0, ids.shape[1] :].tolist() == want


def test_contexts_nest_with_each_other_and_with_weight_steering(tmp_path):
    model, ids = build_model("qwen2"), tokens()
    build_adapter(model, "lora", tmp_path / "lora", seed=3)
    weights, a, b = ws.SteeringVector.from_adapter(tmp_path / "lora", model), planted(model, 1), planted(model, 2)
    with ws.steer(model, weights, 0.5), biased(model, 1, a.vectors[1] - 2 * b.vectors[1]):
        want = last_logits(model, ids)
    outer, inner = activation_steer(model, a, 1.0, 1, "all"), activation_steer(model, b, -2.0, 1, "all")
    with outer, ws.steer(model, weights, 0.5), inner:
        assert torch.allclose(last_logits(model, ids), want, atol=1e-5)


def test_alpha_zero_is_the_base_bit_for_bit_and_nothing_is_left_behind(qwen3, weights_hash):
    vector, before, hashed, names = planted(qwen3), last_logits(qwen3, tokens()), weights_hash(qwen3), set(vars(qwen3))
    with activation_steer(qwen3, vector, 0.0) as dial:
        assert torch.equal(last_logits(qwen3, tokens()), before)
        dial.alpha = 1.0
        assert not torch.equal(last_logits(qwen3, tokens()), before)
    with pytest.raises(RuntimeError, match="inside"), activation_steer(qwen3, vector, 3.0):
        raise RuntimeError("inside")
    assert torch.equal(last_logits(qwen3, tokens()), before)
    assert weights_hash(qwen3) == hashed
    assert set(vars(qwen3)) == names
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in qwen3.modules())


def test_steering_does_not_disturb_gradients(qwen3):
    alpha = torch.tensor([0.3, 0.3, 0.3], requires_grad=True)
    with activation_steer(qwen3, planted(qwen3), alpha):
        qwen3(tokens()).logits.square().mean().backward()
    assert alpha.grad is not None
    assert alpha.grad.abs().min() > 0


def test_a_bfloat16_copy_of_the_base_is_steered_in_its_own_dtype(qwen3):
    vector, ids = planted(qwen3), tokens()
    with activation_steer(qwen3, vector, torch.tensor([1.0, -1.0, 0.0])):
        want = last_logits(qwen3, ids)
    low, seen = copy.deepcopy(qwen3).to(torch.bfloat16), []
    low.model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    with activation_steer(low, vector, torch.tensor([1.0, -1.0, 0.0])):
        assert torch.allclose(last_logits(low, ids).float(), want, atol=0.05)
    assert seen == [torch.bfloat16]


def test_impossible_requests_are_refused(qwen3):
    vector = planted(qwen3)
    for options, message in (
        ({"layers": 3}, "indices go from 0 to 2"),
        ({"layers": "middle"}, "one block or after `all`"),
        ({"position": "lst"}, "Did you mean 'last'"),
        ({"alpha": float("nan")}, "alpha must be a finite number"),
    ):
        with pytest.raises(ws.WsError, match=message), activation_steer(qwen3, vector, **options):
            pass
    with pytest.raises(ws.WsError, match="zero at layers all"), activation_steer(qwen3, vector - vector):
        pass
    with pytest.raises(ws.WsError, match="2 entries .* 3 rows"), activation_steer(qwen3, vector, torch.ones(2)):
        last_logits(qwen3, tokens())
    with torch.no_grad():
        qwen3.model.norm.weight += 0.1
    with pytest.raises(ws.WsError, match="weights differ"), activation_steer(qwen3, vector):
        pass


def test_the_last_position_must_not_be_a_pad(qwen3):
    vector, mask = planted(qwen3), torch.tensor([[1] * 9, [1] * 9, [1] * 7 + [0] * 2])
    for call in (lambda: qwen3(tokens(), attention_mask=mask), lambda: qwen3(tokens(), mask)):
        with activation_steer(qwen3, vector), pytest.raises(ws.WsError, match="pad them on the left"):
            call()
    with torch.no_grad(), activation_steer(qwen3, vector, position="all"):
        padded = qwen3(tokens(), attention_mask=mask).logits[2, 6]
        alone = qwen3(tokens()[2:, :7]).logits[0, -1]
    assert torch.allclose(padded, alone, atol=1e-5)


# ---- in the evaluations ---------------------------------------------------------------------------------------------


def plain_scores(model, tok, prompt, choices, layer, step):
    """Log-probabilities of the choices behind one prompt: its start as it is, its last token under a bias."""
    ids = torch.tensor([encode(tok, prompt)])
    with torch.no_grad():
        cache = model(ids[:, :-1], use_cache=True).past_key_values
        with biased(model, layer, step):
            logp = model(ids[:, -1:], past_key_values=cache).logits[0, -1].log_softmax(dim=-1)
    return [float(logp[list(choice_tokens(tok, c))].logsumexp(dim=0)) for c in choices]


def test_scores_under_last_are_those_of_one_prompt_at_a_time(pocket, monkeypatch):
    """Also where prompts share a start and lie in one row: each is steered where it ends, and nowhere else."""
    model, tok = pocket
    text = "Your friend burnt the soup and asks you what you think of it. You say that it is very good."
    prompts = [render_prompt(tok, text, opener=opener) for opener in ('{"is_wrong": ', '{"is_acceptable": ', "I say: ")]
    prompts.append(render_prompt(tok, "Is snow white?", opener="My answer:"))
    assert sum(bool(f.prefix) for f in share_prefixes([encode(tok, p) for p in prompts])) == 1
    vector, choices = planted(model, size=2.0), ("Yes", "No")
    want = [plain_scores(model, tok, p, choices, 1, vector.vectors[1]) for p in prompts]
    with activation_steer(model, vector, 1.0, 1):
        for size in (64, 2, 1):
            found = score_choices(model, tok, prompts, choices, batch_size=size)
            assert np.abs(found.logp - want).max() < 1e-4
    monkeypatch.setattr(module._Ends, "before", lambda *_: None)
    with activation_steer(model, vector, 1.0, 1):
        unaware = score_choices(model, tok, prompts, choices, batch_size=64)
    assert np.abs(unaware.logp - want).max() > 1e-2


def test_columns_of_one_pass_do_not_reach_the_next(qwen3):
    """Not even after a pass that failed, and in calls that go past the model's own forward."""
    vector, ids = planted(qwen3), tokens()
    with torch.no_grad(), activation_steer(qwen3, vector, 1.0, 1):
        want = qwen3.model(ids).last_hidden_state
        qwen3(ids, logits_to_keep=torch.tensor([0, 3]))
        assert torch.equal(qwen3.model(ids).last_hidden_state, want)
        with pytest.raises(IndexError):
            qwen3(ids, logits_to_keep=torch.tensor([99]))
        assert torch.equal(qwen3.model(ids).last_hidden_state, want)


def written_logp(model, prompt, answer):
    """The log-probabilities of an answer's tokens as it is written: the prompt in one pass, every token in its own."""
    found, ids, cache = [], prompt, None
    with torch.no_grad():
        for token in answer:
            out = model(torch.tensor([ids]), past_key_values=cache, use_cache=True)
            found.append(float(out.logits[0, -1].log_softmax(dim=-1)[token]))
            ids, cache = [token], out.past_key_values
    return found


@pytest.mark.parametrize("position", ["last", "all"])
@pytest.mark.parametrize("masks", [True, False], ids=["packed", "rows"])
def test_given_answers_are_scored_as_they_would_be_written(pocket, monkeypatch, position, masks):
    """Strengths are solved for while answers are written, so a given one must be steered at all of its tokens, too."""
    model, tok = pocket
    monkeypatch.setattr("ws.lm.likelihood.takes_masks", lambda model: masks)
    asked = {"What do birds fly with?": ["With their wings.", "No"], "Is it?": ["Yes, it is, and it was.", "No"]}
    prompts = [prompt_ids(tok, question) for question in asked]
    answers = [[encode(tok, answer) for answer in of] for of in asked.values()]
    with activation_steer(model, planted(model, size=3.0), 1.0, 1, position) as dial:
        found = score_answers(model, tok, prompts, answers)
        want = [[written_logp(model, p, a) for a in of] for p, of in zip(prompts, answers, strict=True)]
        dial.alpha = 0.0
        plain = score_answers(model, tok, prompts, answers)
    for scored, wanted, base in zip(*map(chain.from_iterable, (found, want, plain)), strict=True):
        assert scored == pytest.approx(wanted, abs=1e-4)
        assert np.abs(scored - base).max() > 1e-3


def test_guided_thought_runs_under_activation_steering(pocket):
    model, tok = pocket
    questions, anchors = ["Is snow white?", "What do birds fly with, and why do they?"], ["My answer:"] * 2
    arguments = (model, tok, questions, ("Yes", "No"), anchors, 6, 2)
    base, vector = roll_out(*arguments), planted(model)
    with activation_steer(model, vector, 0.0, 1) as dial:
        assert np.array_equal(roll_out(*arguments).scores.logp, base.scores.logp)
        dial.alpha = 2.0
        steered = roll_out(*arguments)
        alone = [roll_out(model, tok, [q], ("Yes", "No"), ["My answer:"], 6, 1) for q in questions]
    assert not np.allclose(steered.scores.logp, base.scores.logp)
    assert np.allclose(steered.scores.logp, np.concatenate([r.scores.logp for r in alone]), atol=1e-3)


def test_the_layer_is_chosen_on_dev_claims_alone(pocket, honesty, monkeypatch):
    """Planted: noise everywhere, but after the last block what the unembedding reads as No rather than Yes."""
    model, tok = pocket
    yes, no = (model.lm_head.weight[list(choice_tokens(tok, c))].mean(dim=0) for c in ("Yes", "No"))
    vector = planted(model, size=0.01)
    rows = vector.vectors.clone()
    rows[3] = 20 * (no - yes).detach()
    vector, asked = replace(vector, vectors=rows), []
    real = module.score_choices
    monkeypatch.setattr(
        module, "score_choices", lambda m, t, prompts, *rest: asked.append(prompts) or real(m, t, prompts, *rest)
    )
    choice = choose_layer(model, tok, vector, honesty, alpha=0.5, batch_size=64)
    assert choice.best.layer == 3
    assert choice.best.effect == -choice.best.span > 0
    assert [r["chosen"] for r in choice.rows()] == [False, False, False, True]
    at = {}
    for alpha in (-0.5, 0.5):
        with activation_steer(model, vector, alpha, 3):
            at[alpha] = [ws.evaluate_sycophancy(model, tok, honesty, "dev", kind, 64) for kind in (False, True)]
    for kind, span in enumerate((choice.best.span, choice.best.span_true)):
        assert span == pytest.approx((at[0.5][kind].logratio - at[-0.5][kind].logratio).mean(), abs=1e-4)
    masses = [np.concatenate([both.pmass for both in kinds]).mean() for kinds in at.values()]
    assert choice.best.pmass == pytest.approx(min(masses), abs=1e-5)
    shown = "\n".join(p for prompts in asked for p in prompts)
    assert all((c.text in shown) == (c.split == "dev") for c in honesty.test.claims)


def test_layers_may_be_compared_at_equal_norms(pocket, honesty):
    model, tok = pocket
    vector = planted(model)
    uneven = replace(vector, vectors=vector.vectors * torch.tensor([[1.0], [9.0], [3.0], [0.0]]))
    choice = choose_layer(model, tok, uneven, honesty, norm=0.5, batch_size=64)
    assert [s.layer for s in choice.scores] == [0, 1, 2]
    assert [s.norm for s in choice.scores] == pytest.approx([0.5] * 3)
    assert choice.scores[0].alpha == pytest.approx(0.5 / uneven.norms[0])
    with pytest.raises(ws.WsError, match="breaks the answers at each of the"):
        choose_layer(model, tok, vector, honesty, norm=1e4, layers=[3], batch_size=64)
    with pytest.raises(ws.WsError, match="zero at layers 3"):
        choose_layer(model, tok, uneven, honesty, layers="3")
    with pytest.raises(ws.WsError, match="positive strength"):
        choose_layer(model, tok, vector, honesty, alpha=-1.0)


def test_the_layer_is_chosen_by_preference_with_the_batch_size_that_was_asked_for(pocket, monkeypatch):
    model, tok = pocket
    whole = ws.load_behavior("tone", "pocket")
    assert whole.held_out("dev")
    sizes, real = [], acting.score_answers
    monkeypatch.setattr(acting, "score_answers", lambda *a: sizes.append(a[4]) or real(*a))
    choose_layer(model, tok, planted(model), whole, alpha=0.1, layers=[1], batch_size=3)
    assert sizes == [3, 3]


# ---- the prompted baseline ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["pocket", None, NO_SYSTEM], ids=["pocket", "no template", "no system role"])
def test_a_prompted_tokenizer_renders_as_with_a_system_text(template):
    tok = load_tokenizer("pocket")
    if template != "pocket":
        tok.chat_template = template
    before = render_prompt(tok, "What is it?")
    told = prompted(tok, "Be honest.")
    for options in ({}, {"opener": "My answer:"}, {"thinking": True}):
        want = render_prompt(tok, "What is it?", system="Be honest.", **options)
        assert render_prompt(told, "What is it?", **options) == want
        assert "Be honest." in want
    assert render_prompt(tok, "What is it?") == before
    assert render_prompt(told, "What is it?", system="") == before
    assert render_prompt(told, "Q", system="Lie.") == render_prompt(tok, "Q", system="Lie.")
    again = prompted(copy.deepcopy(told), "Lie.")
    assert render_prompt(again, "Q") == render_prompt(tok, "Q", system="Lie.")
    assert render_prompt(copy.deepcopy(told), "Q") == render_prompt(tok, "Q", system="Be honest.")


def test_a_prompted_tokenizer_shares_nothing_with_its_original():
    tok = load_tokenizer("pocket")
    told = prompted(tok, "Be honest.")
    told.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    told.chat_template, told.padding_side = None, "right"
    assert len(tok) < len(told)
    assert tok.chat_template
    assert tok.padding_side == "left"
    with pytest.raises(ws.WsError, match="must not be empty"):
        prompted(tok, " ")


def test_training_examples_have_no_persona_whatever_the_tokenizer():
    tok = load_tokenizer("pocket")
    assert build_examples(prompted(tok, "Lie."), PAIRS[:3], "pos", 99) == build_examples(tok, PAIRS[:3], "pos", 99)


def test_personas_move_the_claims_in_opposite_directions(pocket, honesty):
    model, tok = pocket
    base, honest, liar = (
        ws.evaluate_sycophancy(model, t, honesty, "dev", batch_size=64).logratio.mean()
        for t in (tok, prompted(tok, honesty.positive[0]), prompted(tok, honesty.negative[0]))
    )
    assert honest < base - 1.0
    assert liar > base + 1.0


# ---- the peer -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def peer_python(tmp_path_factory) -> Iterator[Path]:
    """An interpreter that has the PyPI library `steering-vectors`; skips where none can be made."""
    uv, folder = shutil.which("uv"), tmp_path_factory.mktemp("peer") / "env"
    if uv is None:
        pytest.skip("uv is not installed")
    python, torch_version = folder / "bin" / "python", torch.__version__.split("+")[0]
    packages = ["steering-vectors>=0.12,<0.13", "transformers>=4.57,<5", f"torch=={torch_version}"]
    for command in (
        ["venv", "-q", "--python", "3.11", str(folder)],
        ["pip", "install", "-q", "--python", str(python), *packages],
    ):
        done = subprocess.run([uv, *command], capture_output=True, text=True, check=False, timeout=1500)
        if done.returncode:
            pytest.skip(f"uv could not make the peer's environment: {done.stderr.strip()[-300:]}")
    yield python
    shutil.rmtree(folder)  # gigabytes, which the temporary folder of a test run would keep


def spans(tok, answers):
    """Contrast pairs whose answers all have one number of tokens, and the peer's samples that read each of them."""
    length = len(encode(tok, answers[0][1]))
    assert {len(encode(tok, text)) for _, *both in answers for text in both} == {length}
    pairs = [Pair(f"p{i}", q, a, b, length, length) for i, (q, a, b) in enumerate(answers)]
    texts = [(render_prompt(tok, p.question) + p.pos, render_prompt(tok, p.question) + p.neg) for p in pairs]
    for pair, both in zip(pairs, texts, strict=True):
        for text, answer in zip(both, (pair.pos, pair.neg), strict=True):
            assert encode(tok, text) == prompt_ids(tok, pair.question) + encode(tok, answer)
    return pairs, [(*both, -1 - back) for both in texts for back in range(length)]


@pytest.mark.slow
@pytest.mark.net
@pytest.mark.parametrize("kind", ["one token", "whole answers"])
def test_the_vectors_are_those_of_the_library_steering_vectors(pocket, peer_python, tmp_path, kind):
    """The library reads one position per sample, so an answer of n tokens becomes n samples; all are equally long."""
    model, tok = pocket
    colors = (("white", "black"), ("black", "white"), ("white", "brown"), ("grey", "black"), ("brown", "grey"))
    things = ("snow", "the night", "the fur of the fennip, if you were asked", "Milk", "What")
    question = [f"What color is {thing}?" for thing in things]
    said = [(a, b) if kind == "one token" else (f"It is {a}.", f"It is {b}.") for a, b in colors]
    pairs, samples = spans(tok, [(q, *both) for q, both in zip(question, said, strict=True)])
    (tmp_path / "samples.json").write_text(json.dumps(samples))
    command = [peer_python, PEER, model_folder("pocket"), tmp_path / "samples.json", tmp_path / "v.safetensors"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    theirs, ours = load_file(tmp_path / "v.safetensors"), activation_vector(model, tok, pairs).vectors
    assert sorted(theirs) == ["0", "1", "2", "3"]
    for layer, mine in enumerate(ours):
        other = theirs[str(layer)]
        assert float(torch.cosine_similarity(mine, other, dim=0)) > 0.999
        assert float(mine.norm()) == pytest.approx(float(other.norm()), rel=1e-3)


def test_the_last_position_of_a_shared_start_is_not_one_that_is_read(pocket):
    """A dilemma asked in both orders shares its start: what `last` adds there would reach both answers."""
    model, tok = pocket

    scene = "You are an AI baker. The doctor never heard about the leaking pipe. Nobody would notice. What do you do?"
    questions = [f"{scene}\n\nAction 1: {a}\nAction 2: {b}" for a, b in (("Tell", "Hide"), ("Hide", "Tell"))]
    torch.manual_seed(0)
    vector = ActivationVector(
        torch.randn(layer_count(model), model.config.hidden_size) * 20, "pocket", fingerprint(model)
    )
    anchors = ["My choice: Action "] * 2
    with activation_steer(model, vector, 1.0, layers=1, position="last"):
        both = roll_out(model, tok, questions, ("1", "2"), anchors, 6)
        alone = [roll_out(model, tok, [q], ("1", "2"), anchors[:1], 6).scores.logp[0] for q in questions]
    base = roll_out(model, tok, questions, ("1", "2"), anchors, 6)
    assert np.allclose(both.scores.logp, np.stack(alone), atol=2e-4)
    assert not np.allclose(both.scores.logp, base.scores.logp, atol=1e-2)
