"""Other people's tools on a steered model give what they give on a model with the change merged into its weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from transformers import CompileConfig, pipeline, set_seed

import ws
from conftest import build_adapter, build_model, tokens
from ws.delta import LinearDelta
from ws.lm.models import fingerprint, linear_size, render_prompt, target_modules
from ws.steer import _UNCOMPILED

QUESTIONS = ("What color is grass?", "What does the brusk eat?", "Is ice cold?")


def a_vector(model, size: float) -> ws.SteeringVector:
    """Random rank-2 factors of spectral norm `size`, about, in every linear layer."""
    draw, deltas = torch.Generator().manual_seed(3), {}
    for name in target_modules(model):
        d_out, d_in = linear_size(model.get_submodule(name))
        u, v = torch.randn(d_out, 2, generator=draw), torch.randn(2, d_in, generator=draw)
        deltas[name] = LinearDelta(d_out, d_in, u=u * size / d_out**0.5, v=v / d_in**0.5)
    return ws.SteeringVector(deltas, "pocket", fingerprint(model))


@pytest.fixture(scope="module")
def setting():
    """The pocket model with its tokenizer, a vector, and the model with that vector merged into it."""
    model, tok = ws.load_model("pocket", device="cpu")
    vector, merged = a_vector(model, 20.0), copy.deepcopy(model)
    vector.merge_into(merged, 1.0)
    return model, tok, vector, merged


def prompts(tok) -> list[str]:
    return [render_prompt(tok, q) for q in QUESTIONS]


def write(model, tok, texts: list[str], **options) -> torch.Tensor:
    """New tokens `[rows, 12]` from a fixed seed, filled up with padding."""
    set_seed(0)
    batch = tok(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    new = model.generate(**batch, max_new_tokens=12, **options)[:, batch["input_ids"].shape[1] :]
    ended = (new == tok.eos_token_id).cumsum(dim=1) > 0
    return torch.nn.functional.pad(new.masked_fill(ended, tok.pad_token_id), (0, 12 - new.shape[1]))


# ---- generation ---------------------------------------------------------------------------------------------------

DECODING = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 1.5},
    "several-sequences": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3, "do_sample": False},
    "sampled-beams": {"num_beams": 3, "do_sample": True},
    "beams-with-several-sequences": {"num_beams": 4, "num_return_sequences": 2, "do_sample": False},
    "static-cache": {"cache_implementation": "static", "do_sample": False},
    "static-cache-sampling": {"cache_implementation": "static", "do_sample": True},
    "classifier-free-guidance": {"guidance_scale": 1.5, "do_sample": False},
}


@pytest.mark.parametrize("decoding", DECODING)
def test_generation_is_that_of_the_merged_model(setting, decoding, weights_hash):
    model, tok, vector, merged = setting
    options, texts, before = DECODING[decoding], prompts(tok), weights_hash(model)
    base, wanted = write(model, tok, texts, **options), write(merged, tok, texts, **options)
    with ws.steer(model, vector, 1.0) as dial:
        assert torch.equal(write(model, tok, texts, **options), wanted)
        dial.alpha = 0.0
        assert torch.equal(write(model, tok, texts, **options), base)
    assert not torch.equal(wanted, base)
    assert torch.equal(write(model, tok, texts, **options), base)
    assert weights_hash(model) == before


@pytest.mark.parametrize("speculation", ["prompt-lookup", "unsteered-assistant", "itself"])
def test_speculative_decoding_gives_the_greedy_answer_of_the_merged_model(setting, speculation):
    """The steered model decides on every guess, whoever made it."""
    model, tok, vector, merged = setting
    options = {
        "prompt-lookup": {"prompt_lookup_num_tokens": 3},
        "unsteered-assistant": {"assistant_model": copy.deepcopy(model)},
        "itself": {"assistant_model": model},
    }[speculation]
    for text in prompts(tok)[:2]:
        wanted = write(merged, tok, [text], do_sample=False)
        for alpha in (1.0, torch.ones(1)):
            with ws.steer(model, vector, alpha):
                assert torch.equal(write(model, tok, [text], do_sample=False, **options), wanted)


@pytest.mark.parametrize("options", [{"do_sample": False}, {"do_sample": True, "batch_size": 2}])
def test_pipelines_write_what_they_write_with_the_merged_model(setting, options):
    model, tok, vector, merged = setting

    def texts(of) -> list[str]:
        set_seed(0)
        pipe = pipeline("text-generation", model=of, tokenizer=tok)
        found = pipe(prompts(tok), max_new_tokens=10, return_full_text=False, **options)
        return [answers[0]["generated_text"] for answers in found]

    base, wanted = texts(model), texts(merged)
    with ws.steer(model, vector, 1.0):
        assert texts(model) == wanted
    assert texts(model) == base != wanted


# ---- a strength for every row ---------------------------------------------------------------------------------------

ALPHAS = torch.tensor([-1.0, 0.0, 1.0])


@pytest.mark.parametrize(("beams", "returned"), [(3, 1), (4, 2), (3, 3)])
def test_beams_of_rows_with_a_strength_each_are_those_of_one_row_at_a_time(setting, beams, returned):
    model, tok, vector, _ = setting
    options = {"num_beams": beams, "num_return_sequences": returned, "do_sample": False}
    with ws.steer(model, vector, ALPHAS) as dial:
        with pytest.raises(ws.WsError, match=rf"3 entries but the layer sees {3 * beams} rows.*repeat_interleave"):
            write(model, tok, prompts(tok), **options)
        dial.alpha = ALPHAS.repeat_interleave(beams)
        together = write(model, tok, prompts(tok), **options).split(returned)
        for row, alpha in enumerate(ALPHAS.tolist()):
            dial.alpha = alpha
            assert torch.equal(write(model, tok, [prompts(tok)[row]], **options), together[row])
        dial.alpha = 1.0
        assert not torch.equal(write(model, tok, prompts(tok), **options), torch.cat(together))


@pytest.mark.parametrize(("rows", "repeats"), [(3, 2), (1, 3)])
def test_sampled_sequences_come_from_the_distribution_of_their_own_strength(setting, rows, repeats):
    """One prompt and three strengths: as many rows as strengths, so each sequence has its own."""
    model, tok, vector, _ = setting
    strengths = ALPHAS.repeat_interleave(repeats) if rows == 3 else ALPHAS
    batch = tok([prompts(tok)[0]] * rows, return_tensors="pt", add_special_tokens=False)
    options = {"do_sample": True, "num_return_sequences": repeats, "max_new_tokens": 6, "eos_token_id": None}
    with ws.steer(model, vector, strengths) as dial:
        found = model.generate(**batch, **options, output_logits=True, return_dict_in_generate=True)
        for row, alpha in enumerate(strengths.tolist()):
            dial.alpha = alpha
            with torch.no_grad():
                alone = model(found.sequences[row : row + 1]).logits[0, -7:-1]
            assert (torch.stack([step[row] for step in found.logits]) - alone).abs().max() < 1e-3
            dial.alpha = alpha + 0.5
            with torch.no_grad():
                assert (model(found.sequences[row : row + 1]).logits[0, -7:-1] - alone).abs().max() > 0.1


def test_a_strength_per_prompt_is_refused_where_every_prompt_has_several_sequences(setting):
    model, tok, vector, _ = setting
    with ws.steer(model, vector, ALPHAS), pytest.raises(ws.WsError, match="3 entries but the layer sees 6 rows"):
        write(model, tok, prompts(tok), do_sample=True, num_return_sequences=2)


# ---- torch.compile --------------------------------------------------------------------------------------------------


@pytest.fixture
def compiler():
    """A backend that runs the traced graph as it is, and the list of its calls: `made` and `run`."""
    calls: list[str] = []

    def backend(graph, _) -> Callable:
        calls.append("made")

        def run(*args):
            calls.append("run")
            return graph(*args)

        return run

    torch._dynamo.reset()
    yield backend, calls
    torch._dynamo.reset()


@pytest.fixture
def small():
    """A model of its own for the compiler, tokens for it, and a vector."""
    model, _ = ws.load_model("tiny-random", device="cpu")
    return model, torch.arange(5, 14)[None], a_vector(model, 0.5)


def logits(model, ids) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("how", ["compiled-before", "compiled-inside", "method-of-the-model"])
def test_a_compiled_model_is_steered_and_its_dial_turns(small, compiler, how):
    model, ids, vector = small
    backend, calls = compiler
    bare, wanted = logits(model, ids), {}
    for alpha in (1.0, -0.5, 0.0):
        with ws.steer(model, vector, alpha):
            wanted[alpha] = logits(model, ids)
    if how == "method-of-the-model":
        model.compile(backend=backend)
    compiled = model if how == "method-of-the-model" else torch.compile(model, backend=backend)
    if how != "compiled-inside":
        assert torch.allclose(logits(compiled, ids), bare, atol=1e-5)
        assert calls
    before = len(calls)
    with ws.steer(model, vector, 1.0) as dial:
        for alpha, expected in wanted.items():
            dial.alpha = alpha
            assert torch.allclose(logits(compiled, ids), expected, atol=1e-5)
    assert (wanted[1.0] - bare).abs().max() > 0.1
    assert len(calls) == before, "nothing compiled ran or was made while the model was steered"
    made = calls.count("made")
    assert torch.allclose(logits(compiled, ids), bare, atol=1e-5)
    assert len(calls) > before
    assert how == "compiled-inside" or calls.count("made") == made, "what was compiled before is used again"


def test_generation_that_compiles_itself_is_steered(small, compiler):
    """With a static cache transformers compiles the decoding step, on a GPU without being asked."""
    model, ids, vector = small
    backend, calls = compiler
    config = CompileConfig(backend=backend, mode=None)
    config._compile_all_devices = True
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    static = options | {"cache_implementation": "static", "compile_config": config}
    base = model.generate(ids, **static)
    assert calls
    before = len(calls)
    with ws.steer(model, vector, 1.0):
        assert torch.equal(model.generate(ids, **static), model.generate(ids, **options))
        assert not torch.equal(model.generate(ids, **static), base)
    assert len(calls) == before
    assert torch.equal(model.generate(ids, **static), base)
    assert len(calls) > before


@pytest.mark.parametrize("when", ["compiled-before", "compiled-inside"])
@pytest.mark.parametrize("by_row", [False, True])
def test_compiled_code_sees_a_compilable_steering_and_a_turn_of_its_dial_compiles_nothing(
    small, compiler, when, by_row
):
    model, ids, vector = small
    backend, calls = compiler
    ids = ids.repeat(2, 1)
    turns = [torch.tensor([1.0, -0.5]), torch.tensor([0.0, 2.0])] if by_row else [1.0, -0.5, 0.0]
    bare, wanted = logits(model, ids), []
    for alpha in turns:
        with ws.steer(model, vector, alpha):
            wanted.append(logits(model, ids))
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    if when == "compiled-before":
        assert torch.equal(logits(compiled, ids), bare)
    with ws.steer(model, vector, turns[0], compilable=True) as dial:
        before = len(calls)
        for alpha, expected in zip(turns, wanted, strict=True):
            dial.alpha = alpha
            assert torch.allclose(logits(compiled, ids), expected, atol=1e-5)
            assert torch.allclose(logits(model, ids), expected, atol=1e-5), "what is not compiled is steered alike"
        assert calls[before:] == ["made"] + ["run"] * len(turns)
        dial.alpha = 0.25 if by_row else torch.tensor([0.25, 0.25])  # another number of strengths is another graph
        again = logits(compiled, ids)
        assert calls[before:].count("made") == 2
        with ws.steer(model, vector, 1.0):  # one that compiled code does not see: together they run as written
            both = logits(compiled, ids)
        with ws.steer(model, vector * 0.5, 2.5):
            inside = logits(compiled, ids)
    with ws.steer(model, vector, 0.25):
        assert torch.allclose(again, logits(model, ids), atol=1e-5)
    with ws.steer(model, vector, 1.25):
        assert torch.allclose(both, logits(model, ids), atol=1e-5)
    with ws.steer(model, vector, 1.5):
        assert torch.allclose(inside, logits(model, ids), atol=1e-5)
    assert (wanted[0] - bare).abs().max() > 0.1
    assert torch.equal(logits(compiled, ids), bare), "what was compiled inside does not outlive the block"


@pytest.mark.parametrize("family", ["lora", "dora", "oft", "ia3"])
def test_the_changes_of_every_family_are_traced_whole(compiler, tmp_path, family):
    backend, _ = compiler
    model = build_model("qwen2")
    build_adapter(model, family, tmp_path, seed=3)
    vectors = {name: ws.SteeringVector.from_adapter(tmp_path, model) * size for name, size in (("a", 0.5), ("b", -0.2))}
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    alphas = {"a": torch.tensor([1.0, -0.5]), "b": 1.0}
    with ws.steer_many(model, vectors, alphas):
        wanted = logits(model, tokens(2))
    with ws.steer_many(model, vectors, alphas, compilable=True) as dials:
        assert torch.allclose(logits(compiled, tokens(2)), wanted, atol=1e-5)
        name, module = next((n, m) for n, m in model.named_modules() if n in vectors["b"].deltas)
        dials["a"].alpha = 0.5
        with torch.no_grad():
            assert module(torch.zeros(0, module.in_features)).shape == (0, module.out_features), name
        dials["a"].alpha = alphas["a"]
        with pytest.raises(ws.WsError, match="2 entries but the layer sees 3 rows"):
            logits(model, tokens(3))
        dials["a"].alpha = torch.tensor([0.5])
        with pytest.raises(ws.WsError, match="1 entries but the layer sees 3 rows"):
            logits(model, tokens(3))
        with pytest.raises(ws.WsError, match="finite"):
            dials["a"].alpha = float("nan")


def test_what_the_compiler_cannot_follow_is_refused_before_anything_is_steered(small, compiler):
    model, ids, _ = small
    name, norm = next((n, m) for n, m in model.named_modules() if n.endswith("norm"))
    width = norm.weight.shape[0]
    vector = ws.SteeringVector({name: ws.LinearDelta(width, 1, e=torch.ones(width, 1), kind="scale")}, "norm", None)
    bare = logits(model, ids)
    with pytest.raises(ws.WsError, match="norm"), ws.steer(model, vector, 1.0, compilable=True):
        pass
    assert torch.equal(logits(model, ids), bare)


@pytest.mark.slow
def test_inductor_gives_the_steered_model_with_a_static_cache(small):
    """Two minutes of compiling: what it makes is equal within its rounding, and is told of the dial."""
    model, ids, vector = small
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    config = CompileConfig(mode=None)
    config._compile_all_devices = True
    written = {}
    for alpha in (1.0, -0.5):
        with ws.steer(model, vector, alpha):
            written[alpha] = model.generate(ids, **options)
    with ws.steer(model, vector, 1.0, compilable=True) as dial:
        for alpha, expected in written.items():
            dial.alpha = alpha
            given = model.generate(ids, cache_implementation="static", compile_config=config, **options)
            assert torch.equal(given, expected)
        compiled = torch.compile(model)
        for alpha in written:
            dial.alpha = alpha
            torch.testing.assert_close(logits(compiled, ids), logits(model, ids), atol=1e-4, rtol=1e-4)


def test_the_compilers_stance_comes_back_after_every_order_of_leaving(small, compiler):
    model, ids, vector = small
    backend, calls = compiler
    compiled = torch.compile(model, backend=backend)
    first, second = ws.steer(model, vector, 1.0), ws.steer(model, vector, -1.0)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    with ws.steer(model, vector, -1.0), pytest.raises(RuntimeError, match="inside"):
        raise RuntimeError("inside")
    steered = logits(compiled, ids)
    assert not calls
    second.__exit__(None, None, None)
    assert _UNCOMPILED.count == 0
    assert (logits(compiled, ids) - steered).abs().max() > 0.1
    assert calls


# ---- training and precision -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_through_a_steered_model_with_checkpointing_are_those_of_the_merged_model(small, reentrant):
    model, ids, vector = small
    merged = copy.deepcopy(model)
    vector.merge_into(merged, 1.0)
    merged.train()(ids, labels=ids, use_cache=False).loss.backward()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.train()
    with ws.steer(model, vector, 1.0):
        model(ids, labels=ids, use_cache=False).loss.backward()
    grads = {n: p.grad for n, p in merged.named_parameters()}
    for name, p in model.named_parameters():
        assert p.grad is not None
        assert torch.allclose(p.grad, grads[name], atol=1e-5), name
    assert max(float(g.abs().max()) for g in grads.values()) > 0.01


def test_a_backward_pass_that_recomputes_after_steering_has_ended_is_an_error(small):
    model, ids, vector = small
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    with ws.steer(model, vector, 1.0):
        loss = model(ids, labels=ids, use_cache=False).loss
    with pytest.raises(torch.utils.checkpoint.CheckpointError, match="different number of tensors"):
        loss.backward()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_the_model_may_be_cast_while_it_is_steered(small, dtype, tolerance):
    model, ids, vector = small
    bare = logits(model, ids)
    with ws.steer(model, vector, 1.0) as dial:
        wanted = logits(model, ids)
        model.to(dtype)
        assert ((logits(model, ids) - wanted).norm() / (wanted - bare).norm()).item() < tolerance
        dial.alpha = 0.0
        assert ((logits(model, ids) - bare).norm() / bare.norm()).item() < tolerance
    with ws.steer(model, replace(vector, base_fingerprint=None), 1.0):
        assert ((logits(model, ids) - wanted).norm() / (wanted - bare).norm()).item() < tolerance
