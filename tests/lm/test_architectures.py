"""The whole way on every architecture: train, difference, steer, evaluate, export; what cannot be is refused by name.

Tiny random models are built from their config classes over the bundled tokenizer's vocabulary. Each is compared with
PEFT's own model, with one prompt at a time, and with what transformers and PEFT load from the exports.
"""

from __future__ import annotations

import copy
import gc
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import IA3Config, PeftModel, get_peft_model
from peft.tuners.ia3 import IA3Layer
from test_rollout import ANCHOR, QUESTIONS
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    BloomConfig,
    FalconConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma3TextConfig,
    GenerationConfig,
    GPT2Config,
    GPTBigCodeConfig,
    GPTJConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    JambaConfig,
    Lfm2Config,
    Llama4TextConfig,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
    MiniMaxConfig,
    MistralConfig,
    MixtralConfig,
    MptConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3_5TextConfig,
    Qwen3MoeConfig,
    RecurrentGemmaConfig,
    RwkvConfig,
)

import ws
from conftest import FAMILY_NAMES, build_adapter
from ws.adapters import AdapterSpec, peft_config
from ws.chat.batching import Request
from ws.chat.engine import Engine, Sampling
from ws.data import Pair, sample_answers
from ws.eval.capability import answer_questions, read_texts
from ws.export.lora import as_lora
from ws.export.merged import export_merged
from ws.intervene.activation import activation_vector
from ws.lm.batches import keeps_state, takes_masks, takes_padding
from ws.lm.choice import choice_tokens, choice_variants, score_choices
from ws.lm.divergence import divergence
from ws.lm.models import chat_format, encode, fused_tensors, load_tokenizer, render_prompt
from ws.lm.rollout import Rollouts, roll_out, thinking_prompt
from ws.options.make import TrainConfig
from ws.steer import _STEERED

TOK = load_tokenizer("pocket")
TOKENS = {"vocab_size": len(TOK), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
HEADS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
NARROW = {**HEADS, "intermediate_size": 48, "max_position_embeddings": 512}
SHAPE = {**NARROW, "num_key_value_heads": 2, **TOKENS}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, **TOKENS}
EXPERTS = {"num_experts_per_tok": 2, **SHAPE}
CONFIGS: dict[str, PreTrainedConfig] = {
    "gpt2": GPT2Config(**GPT),
    "llama": LlamaConfig(**SHAPE, tie_word_embeddings=False),
    "gemma2": Gemma2Config(**SHAPE, head_dim=8),
    "gemma3": Gemma3TextConfig(**SHAPE, head_dim=8),
    "qwen2": Qwen2Config(**SHAPE),
    "phi3": Phi3Config(**SHAPE),
    "neox": GPTNeoXConfig(**NARROW, **TOKENS),
    "mistral": MistralConfig(**SHAPE, sliding_window=16),
    "olmo2": Olmo2Config(**SHAPE),
    "falcon": FalconConfig(**HEADS, **TOKENS, alibi=False, bias=True),
    "opt": OPTConfig(**HEADS, **TOKENS, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=512),
    "qwen3.5": Qwen3_5TextConfig(
        **SHAPE,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        head_dim=8,
    ),
    "lfm2": Lfm2Config(**SHAPE, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False),
    "mamba": MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=8, **TOKENS),
}
MIXTURES = {
    "qwen3-moe": Qwen3MoeConfig(**EXPERTS, moe_intermediate_size=16, num_experts=4, head_dim=8),
    "mixtral": MixtralConfig(**EXPERTS, num_local_experts=4),
}
# Their attention is not the plain one, or their modules have names of their own.
ODD = {
    "falcon-alibi": FalconConfig(**HEADS, **TOKENS, alibi=True),
    "gpt-neo": GPTNeoConfig(
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=8,
        max_position_embeddings=512,
        **TOKENS,
    ),
    "bloom": BloomConfig(hidden_size=32, n_layer=2, n_head=4, **TOKENS),
    "gptj": GPTJConfig(**GPT, rotary_dim=8),
    "bigcode": GPTBigCodeConfig(**GPT),
    "phi": PhiConfig(**NARROW, **TOKENS, partial_rotary_factor=0.5),
    "mpt": MptConfig(d_model=32, n_layers=2, n_heads=4, max_seq_len=512, **TOKENS),
    "llama4": Llama4TextConfig(
        **SHAPE, head_dim=8, intermediate_size_mlp=48, num_local_experts=2, attention_chunk_size=16
    ),
}
# Layers that hand a state from token to token.
SSM = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 16}
STATEFUL = {
    "mamba2": Mamba2Config(
        hidden_size=32, num_hidden_layers=2, state_size=8, num_heads=8, head_dim=8, n_groups=2, chunk_size=16, **TOKENS
    ),
    "jamba": JambaConfig(
        **SHAPE, attn_layer_period=2, attn_layer_offset=1, num_experts=1, mamba_d_state=8, use_mamba_kernels=False
    ),
    "bamba": BambaConfig(**SHAPE, **SSM, attn_layer_indices=[1]),
    "falcon-h1": FalconH1Config(**SHAPE, **SSM, head_dim=8, mamba_d_ssm=64, mamba_n_groups=1),
    "minimax": MiniMaxConfig(
        **SHAPE, layer_types=["linear_attention", "full_attention"], head_dim=8, num_local_experts=2, block_size=16
    ),
    "recurrent-gemma": RecurrentGemmaConfig(
        **{**HEADS, "num_hidden_layers": 3}, **TOKENS, intermediate_size=48, lru_width=32, attention_window_size=64
    ),
    "rwkv": RwkvConfig(
        hidden_size=32,
        num_hidden_layers=2,
        attention_hidden_size=32,
        intermediate_size=48,
        context_length=512,
        **TOKENS,
    ),
}
EVERY = CONFIGS | MIXTURES | ODD | STATEFUL
HYBRID = ("qwen3.5", "lfm2", "mamba")
UNPADDED = ("minimax", "recurrent-gemma", "rwkv")
# PEFT takes no LoRA at Mamba's `out_proj`, and Mamba multiplies by the weight of its `dt_proj` without calling it.
KINDS = {"mamba": ("in_proj", "x_proj")}

PAIRS = [
    Pair(f"q{i}", f"What color is number {i}?", f"It is red, {i} times.", f"It is blue and {i}.", 6, 6)
    for i in range(4)
]
TRAIN = TrainConfig(
    rank=2,
    lora_alpha=4.0,
    layers="all",
    lr=5e-2,
    batch=4,
    micro_batch=4,
    max_steps=2,
    validation=0.0,
    oft_block=8,
    delora_lambda=1.0,
)
N_THINK = 12
NO_CONV1D = ("oft", "delora")  # of PEFT's tuners
# IA3 changes biases, which no LoRA holds.
BIASED = ("gpt2", "qwen2", "neox", "falcon", "opt")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def build(name: str, noise: float = 0.1) -> PreTrainedModel:
    """A random model in which no norm is 1 and no bias 0."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(EVERY[name])).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * noise)
    return model


@pytest.fixture(scope="module", autouse=True)
def quick_collections():
    """Training and scoring collect garbage, which takes longer than either while all that is imported is looked at."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def saved(name, tmp_path) -> Path:
    """The architecture that the test names, as a folder with a tokenizer."""
    folder = tmp_path / "base"
    build(name).save_pretrained(folder)
    TOK.save_pretrained(folder)
    return folder


def ids(rows: int = 3) -> torch.Tensor:
    return torch.randint(5, TOKENS["vocab_size"], (rows, 9), generator=torch.Generator().manual_seed(5))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(ids()).logits


def plain(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder)


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def train_both(model, family: str, folder: Path, config: TrainConfig) -> tuple[ws.SteeringVector, ...]:
    """The one-sided vectors of two trained arms."""
    for sign in ("pos", "neg"):
        ws.train_adapter(model, TOK, PAIRS, sign, family, folder / sign, config)
    return tuple(ws.SteeringVector.from_adapter(folder / sign, model) for sign in ("pos", "neg"))


def roll(model, batch_size: int, ends: int = 7) -> Rollouts:
    """Thoughts of different lengths, because an eighth of the vocabulary ends one."""
    advice = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=list(range(ends, len(TOK), 8)), use_cache=advice.use_cache)
    try:
        return roll_out(model, TOK, QUESTIONS, ("1", "2"), [ANCHOR] * len(QUESTIONS), N_THINK, batch_size)
    finally:
        model.generation_config = advice


def greedily(model, ids: list[int], n: int) -> list[int]:
    """The most probable tokens behind others, one pass from the start for each."""
    made: list[int] = []
    with torch.no_grad():
        for _ in range(n):
            made.append(int(model(torch.tensor([ids + made])).logits[0, -1].argmax()))
    return made


def evaluate(model, vector: ws.SteeringVector) -> dict[float, np.ndarray]:
    """Log ratios of four held-out claims at -1, 0 and +1; of dilemmas only that they do not depend on the batch."""
    honesty = ws.load_behavior("honesty", "pocket")
    few = replace(honesty.test, claims=honesty.test.select("report", False)[:4])
    scores = {}
    for alpha in (-1.0, 0.0, 1.0):
        with ws.steer(model, vector, alpha):
            scores[alpha] = ws.evaluate_sycophancy(model, TOK, replace(honesty, claims=few)).logratio
            assert roll(model, 1).scores.logp == pytest.approx(roll(model, 6).scores.logp, abs=1e-5)
    return scores


def check_rows(model, vector: ws.SteeringVector) -> None:
    """A strength for every row of a batch is that strength alone."""
    alphas = torch.tensor([-1.0, 0.0, 2.0])
    with ws.steer(model, vector, alphas) as dial:
        together = logits(model)
        for row, alpha in enumerate(alphas.tolist()):
            dial.alpha = alpha
            assert largest(logits(model)[row], together[row]) < 1e-5


def check_exports(vector: ws.SteeringVector, wanted: torch.Tensor, folder: Path, loses: bool) -> None:
    """PEFT and transformers load what is exported at alpha 2 and give the logits of steering."""
    base = folder / "base"
    if loses:
        with pytest.raises(ws.WsError, match="would lose"):
            as_lora(vector, 2.0, max_error=1e-6, model=str(base))
    else:
        as_lora(vector, 2.0, max_error=1e-6, model=str(base)).save(folder / "lora")
        assert largest(logits(PeftModel.from_pretrained(plain(base), str(folder / "lora"))), wanted) < 2e-4
    export_merged(vector, 2.0, folder / "merged")
    assert largest(logits(plain(folder / "merged")), wanted) < 2e-4


def whole_way(name: str, family: str, base: Path, digest) -> None:
    """Everything that is done with one vector, on one architecture."""
    config = replace(TRAIN, kinds=KINDS.get(name))
    model, tok = ws.load_model(str(base), device="cpu")
    assert tok.chat_template == TOK.chat_template
    before, folder, bare = digest(model), base.parent, logits(model)
    pos, neg = train_both(model, family, folder, config)
    with ws.steer(model, pos, 1.0):
        one_side = logits(model)
    assert largest(logits(PeftModel.from_pretrained(plain(base), str(folder / "pos"))), one_side) < 1e-4
    vector = pos - neg
    with ws.steer(model, vector, 2.0):
        wanted = logits(model)
    assert largest(wanted, bare) > 0.01
    scores = evaluate(model, vector)
    assert all(np.isfinite(s).all() for s in scores.values())
    assert np.abs(scores[1.0] - scores[-1.0]).max() > 1e-3
    if name != "opt":
        check_rows(model, vector)
    assert digest(model) == before
    assert torch.equal(logits(model), bare)
    assert not _STEERED
    check_exports(vector, wanted, folder, loses=family == "ia3" and name in BIASED)


@pytest.mark.parametrize("name", CONFIGS)
def test_lora_goes_the_whole_way_on_every_architecture(name, saved, weights_hash):
    whole_way(name, "lora", saved, weights_hash)


def crossed(names) -> list[tuple[str, str]]:
    """Every other family with every architecture, less what is refused (see below)."""
    pairs = [(n, f) for n in names for f in FAMILY_NAMES if f != "lora"]
    refused = {("gpt2", f) for f in NO_CONV1D} | {(n, "ia3") for n in ("phi3", *HYBRID)}
    return [pair for pair in pairs if pair not in refused]


@pytest.mark.parametrize(("name", "family"), crossed(["gpt2", "gemma2"]))
def test_the_other_families_go_the_whole_way(name, family, saved, weights_hash):
    whole_way(name, family, saved, weights_hash)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "family"), crossed(CONFIGS))
def test_every_family_goes_the_whole_way_on_every_architecture(name, family, saved, weights_hash):
    whole_way(name, family, saved, weights_hash)


@pytest.mark.parametrize("name", [n for n in CONFIGS if n not in ("gemma2", "neox")])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_every_family_reads_its_adapters_exactly(name, family, tmp_path):
    """Random adapters, which reach every coordinate, instead of trained ones."""
    if name == "gpt2" and family in NO_CONV1D:
        pytest.skip("PEFT does not train this family on Conv1D")
    model, kinds = build(name), KINDS.get(name)
    if family == "ia3":
        kinds = {"phi3": ("qkv_proj", "down_proj"), "qwen3.5": ("in_proj_qkv", "k_proj"), "lfm2": ("w2",)}.get(
            name, kinds
        )
    build_adapter(model, family, tmp_path / "a", seed=1, kinds=kinds)
    vector = ws.SteeringVector.from_adapter(tmp_path / "a", model)
    with ws.steer(model, vector, 1.0):
        steered = logits(model)
    assert largest(steered, logits(model)) > 0.05
    assert largest(logits(PeftModel.from_pretrained(build(name), str(tmp_path / "a"))), steered) < 1e-4


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", NO_CONV1D)
def test_what_peft_has_no_layer_for_is_refused_before_anything_is_touched(family, tmp_path):
    model = build("gpt2")
    message = f"PEFT has no {family} for a Conv1D such as transformer.h.0.attn.c_attn; it has: ia3, dora, lora, pissa."
    with pytest.raises(ws.WsError, match=message):
        ws.train_adapter(model, TOK, PAIRS, "pos", family, tmp_path / "pos", TRAIN)
    assert {f.name for f in tmp_path.iterdir()} <= {".pos.lock"}
    assert {type(m).__module__.split(".")[0] for m in model.modules()} == {"torch", "transformers"}


def test_ia3_has_no_place_in_an_unknown_architecture_until_it_is_told(tmp_path, weights_hash):
    model = build("phi3")
    with pytest.raises(ws.WsError, match="ia3 goes in a phi3 model; .* down_proj, gate_up_proj, o_proj, qkv_proj"):
        ws.train_adapter(model, TOK, PAIRS, "pos", "ia3", tmp_path / "pos", TRAIN)
    pos, neg = train_both(model, "ia3", tmp_path, replace(TRAIN, kinds=("qkv_proj", "down_proj")))
    assert {n.rsplit(".", 1)[-1] for n in (pos - neg).deltas} == {"qkv_proj", "down_proj"}
    assert pos.deltas["model.layers.0.mlp.down_proj"].c is not None
    assert pos.deltas["model.layers.0.self_attn.qkv_proj"].g is not None


@pytest.mark.parametrize("name", ["gpt2", "neox", "falcon", "opt", "gpt-neo", "bloom", "gptj", "bigcode", "phi"])
def test_ia3_goes_where_peft_would_put_it(name):
    ours = peft_config(build(name), AdapterSpec("ia3", layers="all"))
    theirs = get_peft_model(build(name), IA3Config(task_type="CAUSAL_LM")).base_model.model
    layers = {n: m for n, m in theirs.named_modules() if isinstance(m, IA3Layer)}
    assert set(ours.target_modules) == layers.keys()
    assert set(ours.feedforward_modules) == {n for n, m in layers.items() if m.is_feedforward}


def test_an_adapter_in_a_place_that_the_model_never_calls_ends_the_training(tmp_path, weights_hash):
    """Mamba takes the weight of its `dt_proj` by itself: an adapter there would learn nothing and do nothing."""
    torch.manual_seed(0)
    config = MambaConfig(**TOKENS, hidden_size=32, num_hidden_layers=2, state_size=4, time_step_rank=4)
    model = AutoModelForCausalLM.from_config(config).eval()
    before = weights_hash(model)
    for kinds in (("dt_proj",), ("in_proj", "dt_proj")):
        with pytest.raises(ws.WsError, match=r"weights of dt_proj \(2 modules, .* with `modules`"):
            ws.train_adapter(model, TOK, PAIRS, "pos", "lora", tmp_path / "pos", replace(TRAIN, kinds=kinds))
        assert weights_hash(model) == before
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    pos, neg = train_both(model, "lora", tmp_path, replace(TRAIN, kinds=("in_proj", "x_proj")))
    with ws.steer(model, pos, 1.0):
        steered = logits(model)
    theirs = PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "pos"))
    assert largest(logits(theirs), steered) < 1e-4
    assert (pos - neg).norm() > 0


def test_a_kind_that_is_not_there_gets_the_list_of_those_that_are():
    model = build("neox")
    for kind, hint in (("q_proj", "Choose from: "), ("dens", "Did you mean 'dense'? The model has: ")):
        with pytest.raises(ws.WsError) as refused:
            peft_config(model, AdapterSpec("lora", layers="all", kinds=(kind,)))
        everything = "dense, dense_4h_to_h, dense_h_to_4h, query_key_value."
        assert str(refused.value) == f"There is no linear module kind named {kind!r}. {hint}{everything}"


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_is_refused_by_its_fused_tensors_and_steered_where_it_is_told(name, saved, weights_hash):
    model, _ = ws.load_model(str(saved), device="cpu")
    fused = r"4 tensors .* fused \(model.layers.0.mlp.experts.gate_up_proj, .*`modules`: k_proj, o_proj, q_proj, v_proj"
    for family in FAMILY_NAMES:
        with pytest.raises(ws.WsError, match=fused):
            ws.train_adapter(model, TOK, PAIRS, "pos", family, saved.parent / "pos", TRAIN)
    before, bare = weights_hash(model), logits(model)
    pos, neg = train_both(model, "lora", saved.parent, replace(TRAIN, kinds=ATTENTION))
    with ws.steer(model, pos, 1.0):
        one_side = logits(model)
    assert largest(logits(PeftModel.from_pretrained(plain(saved), str(saved.parent / "pos"))), one_side) < 1e-4
    assert {n.rsplit(".", 1)[-1] for n in pos.deltas} == set(ATTENTION)
    scores = evaluate(model, pos - neg)
    assert all(np.isfinite(s).all() for s in scores.values())
    assert np.abs(scores[1.0] - scores[-1.0]).max() > 1e-3
    check_rows(model, pos - neg)
    assert weights_hash(model) == before
    assert torch.equal(logits(model), bare)
    as_lora(pos - neg, 2.0).save(saved.parent / "lora")
    with ws.steer(model, pos - neg, 2.0):
        wanted = logits(model)
    assert largest(logits(PeftModel.from_pretrained(plain(saved), str(saved.parent / "lora"))), wanted) < 2e-4


def test_where_rows_are_no_longer_told_apart_a_strength_per_row_is_refused(tmp_path):
    """OPT hands its feed-forward layers the tokens of all rows as one list."""
    model = build("opt")
    build_adapter(model, "lora", tmp_path / "a", seed=1)
    vector = ws.SteeringVector.from_adapter(tmp_path / "a", model)
    with ws.steer(model, vector, torch.ones(3)) as dial:
        with pytest.raises(ws.WsError, match="as one list .*give one number, or leave such layers out"):
            logits(model)
        dial.alpha = 1.0
        assert torch.isfinite(logits(model)).all()
    only = vector.select(modules=["fc1"])
    with ws.steer(model, only, torch.ones(9)), pytest.raises(ws.WsError, match="as one list"), torch.no_grad():
        model(ids(1))  # nine tokens of one row are not nine rows
    check_rows(model, vector.select(modules=["q_proj", "k_proj", "v_proj", "out_proj"]))


# ---- scores ---------------------------------------------------------------------------------------------------------


SHARED = "In the town of Ferrow by the river there is an old mill. The color of the "
PROMPTS = [f"{SHARED}mill is", f"{SHARED}river is not", "What is it? Yes or No:", "In the town of Ferrow"]


@pytest.mark.parametrize("name", EVERY)
def test_choices_of_a_batch_are_those_of_one_prompt_at_a_time(name):
    """Also where prompts that begin alike share a row, which an attention with a window or with ALiBi cannot."""
    model = build(name)
    variants = choice_variants(TOK, ("Yes", "No"), model.device)
    alone = []
    for prompt in PROMPTS:
        with torch.no_grad():
            logp = model(torch.tensor([encode(TOK, prompt)])).logits[0, -1].log_softmax(dim=-1)
        alone.append([float(logp[v].logsumexp(dim=-1)) for v in variants])
    assert score_choices(model, TOK, PROMPTS, ("Yes", "No")).logp == pytest.approx(np.array(alone), abs=1e-5)
    windows = ("gemma2", "gemma3", "mistral", "falcon-alibi", "gpt-neo", "bloom", "mpt", "llama4")
    assert takes_masks(model) == (name not in (*windows, *HYBRID, *STATEFUL))


# ---- layers with a state, windows, distances ------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_rollouts_of_a_batch_are_those_of_one_row_at_a_time(name):
    """What a row's neighbours write after it has ended its thought stays behind in a state, and fills up a window."""
    model = build(name, noise=0.3)
    thoughts = [greedily(model, encode(TOK, thinking_prompt(TOK, q)), N_THINK) for q in QUESTIONS]

    form = chat_format(TOK)
    always = {form.think_close_id, form.end_of_turn_id}

    def lengths(ends: int) -> list[int]:
        stops = ([i for i, t in enumerate(made) if t % 8 == ends or t in always] for made in thoughts)
        return [min([*stop, N_THINK]) for stop in stops]

    ends = max(range(8), key=lambda k: len(set(lengths(k))))
    one, six = (roll(model, batch_size, ends) for batch_size in (1, 6))
    assert len(set(one.n_tokens)) > 1
    assert six.n_tokens.tolist() == one.n_tokens.tolist() == lengths(ends)
    for i, question in enumerate(QUESTIONS):
        n = one.n_tokens[i]
        closed = thoughts[i][n : n + 1] == [form.think_close_id]
        end = [*([] if closed else encode(TOK, "\n")), form.think_close_id, *encode(TOK, f"\n\n{ANCHOR}")]
        row = [*encode(TOK, thinking_prompt(TOK, question)), *thoughts[i][:n], *end]
        with torch.no_grad():
            logp = model(torch.tensor([row])).logits[0, -1].log_softmax(-1)
        wanted = [float(logp[list(choice_tokens(TOK, c))].logsumexp(-1)) for c in ("1", "2")]
        assert one.scores.logp[i] == pytest.approx(wanted, abs=5e-5)
        assert six.scores.logp[i] == pytest.approx(wanted, abs=5e-5)


def test_what_a_model_takes_is_read_off_the_model():
    assert {n for n in EVERY if keeps_state(build(n))} == {*HYBRID, *STATEFUL}
    assert {n for n in EVERY if not takes_padding(build(n))} == set(UNPADDED)
    model = build("llama")
    model.config.layer_types = ["full_attention", "something_new"]
    assert keeps_state(model), "what is not known to be attention counts as a state"
    assert not takes_padding(model)
    assert not takes_masks(model)


@pytest.mark.parametrize("name", [*HYBRID, "falcon-h1", "mistral", *UNPADDED])
def test_whatever_else_runs_batches_gives_what_single_rows_give(name):
    model, prompts = build(name), [render_prompt(TOK, q) for q in QUESTIONS]
    model.name_or_path = name
    written = [greedily(model, encode(TOK, p), 5) for p in prompts]
    answers = [TOK.decode(w, skip_special_tokens=True).strip() for w in written]
    assert not {2, chat_format(TOK).end_of_turn_id} & {t for w in written for t in w}, "no answer ends early"
    assert [a.text for a in sample_answers(model, TOK, prompts, 5)] == answers
    assert answer_questions(model, TOK, QUESTIONS, 5)["answer"].tolist() == answers
    walk = divergence(model, TOK, prompts, nullcontext, 5)
    assert list(walk.answers) == answers
    assert max(map(max, walk.kl)) < 1e-5, "generated and read again are the same"
    texts = read_texts(model, TOK, QUESTIONS, model)
    for i, question in enumerate(QUESTIONS):
        row = encode(TOK, question)
        with torch.no_grad():
            logp = model(torch.tensor([row])).logits[0, :-1].log_softmax(-1)
        wanted = -logp[range(len(row) - 1), row[1:]].numpy()
        assert texts["nll"][texts["text"] == i] == pytest.approx(wanted, abs=1e-4)
    uneven = [replace(p, neg=p.neg + " It is." * i) for i, p in enumerate(PAIRS)]
    together, each = (activation_vector(model, TOK, uneven, batch_size=b).vectors for b in (8, 1))
    assert largest(together, each) < 1e-5


@pytest.mark.parametrize("name", [*HYBRID, "mistral", "rwkv", "gpt2"])
def test_a_chat_writes_what_each_row_would_write_alone(name, tmp_path):
    model = build(name)
    build_adapter(model, "lora", tmp_path / "a", seed=1, kinds=KINDS.get(name))
    vector = ws.SteeringVector.from_adapter(tmp_path / "a", model)
    prompts = [render_prompt(TOK, q) for q in QUESTIONS[:3]]
    strengths = (0.0, 1.0, -0.5)
    alone = []
    for prompt, alpha in zip(prompts, strengths, strict=True):
        with ws.steer(model, vector, alpha):
            text = TOK.decode(greedily(model, encode(TOK, prompt), 6), skip_special_tokens=True)
            alone.append(
                text.strip().rstrip("\ufffd")
            )  # bytes of a character that may still be completed are not shown
    with Engine(model, TOK, {"v": vector}) as engine:
        *_, last = engine.write(prompts, [{"v": a} for a in strengths], Sampling(max_tokens=6), 0)
    assert last == alone
    with Engine(model, TOK, {"v": vector}, reproducible=False) as engine:  # rows that may join and leave, one by one
        asked = [Request(encode(TOK, p), {"v": a}, 6) for p, a in zip(prompts, strengths, strict=True)]
        answers = [answer for request in asked for answer in engine.scheduler.submit(request)]
        assert ["".join(piece.text for piece in answer).rstrip("\ufffd") for answer in answers] == alone


def test_kernels_of_convolutions_are_no_fused_experts():
    """Nor are vectors that are stored with further dimensions of 1, as RWKV's mixing weights are."""
    fused = {name: fused_tensors(build(name), range(3)) for name in ("qwen3.5", "lfm2", "mamba", *STATEFUL)}
    assert {n for n, found in fused.items() if found} == {"minimax", "recurrent-gemma"}
    assert all("experts" in tensor for tensor in fused["minimax"])
    assert all("gate_weight" in tensor for tensor in fused["recurrent-gemma"]), "a stack of matrices per head"
    block = torch.nn.ModuleDict({"conv": torch.nn.Conv1d(4, 6, 3), "experts": torch.nn.Bilinear(4, 5, 2)})
    assert fused_tensors(torch.nn.ModuleDict({"layers": torch.nn.ModuleList([block])}), [0]) == [
        "layers.0.experts.weight"
    ]


def test_what_peft_refuses_in_an_architecture_is_refused_before_anything_is_touched(tmp_path):
    model = build("mamba")
    with pytest.raises(ws.WsError, match=r"no lora at out_proj of a mamba model; .*`modules`: dt_proj, in_proj"):
        ws.train_adapter(model, TOK, PAIRS, "pos", "lora", tmp_path / "pos", TRAIN)
    assert {f.name for f in tmp_path.iterdir()} <= {".pos.lock"}
    assert not any("lora" in n for n, _ in model.named_modules())
