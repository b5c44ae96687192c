"""The whole way on every architecture: train, difference, steer, evaluate, export; what cannot be is refused by name.

Tiny random models are built from their config classes over the bundled tokenizer's vocabulary. Each is compared with
PEFT's own model, with one prompt at a time, and with what transformers and PEFT load from the exports.
"""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import IA3Config, PeftModel, get_peft_model
from peft.tuners.ia3 import IA3Layer
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTBigCodeConfig,
    GPTJConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3MoeConfig,
)

import ws
from conftest import FAMILY_NAMES, build_adapter
from ws.adapters import AdapterSpec, peft_config
from ws.data import Pair
from ws.eval.choice import choice_variants, score_choices, takes_masks
from ws.export.lora import as_lora
from ws.export.merged import export_merged
from ws.models import encode, load_tokenizer
from ws.steer import _STEERED
from ws.train import TrainConfig

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
}
EVERY = CONFIGS | MIXTURES | ODD

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
NO_CONV1D = ("oft", "delora")  # of PEFT's tuners
# IA3 changes biases, which no LoRA holds.
BIASED = ("gpt2", "qwen2", "neox", "falcon", "opt")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def build(name: str) -> PreTrainedModel:
    """A random model in which no norm is 1 and no bias 0."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(EVERY[name]).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
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


def evaluate(model, vector: ws.SteeringVector) -> dict[float, np.ndarray]:
    """Log ratios of four held-out claims at -1, 0 and +1."""
    honesty = ws.load_behavior("honesty", "pocket")
    few = replace(honesty.test, claims=honesty.test.select("report", False)[:4])
    scores = {}
    for alpha in (-1.0, 0.0, 1.0):
        with ws.steer(model, vector, alpha):
            scores[alpha] = ws.evaluate_sycophancy(model, TOK, replace(honesty, test=few)).logratio
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


def whole_way(name: str, family: str, base: Path, digest, config: TrainConfig = TRAIN) -> None:
    """Everything that is done with one vector, on one architecture."""
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
    refused = {("gpt2", f) for f in NO_CONV1D} | {("phi3", "ia3")}
    return [pair for pair in pairs if pair not in refused]


@pytest.mark.parametrize(("name", "family"), crossed(["gpt2", "gemma2", "neox"]))
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
        return
    model, kinds = build(name), ("qkv_proj", "down_proj") if (name, family) == ("phi3", "ia3") else None
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
    assert not list(tmp_path.iterdir())
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
    fused = r"4 tensors .* fused \(model.layers.0.mlp.experts.gate_up_proj, .*--kinds: k_proj, o_proj, q_proj, v_proj"
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
    assert takes_masks(model) == (name not in ("gemma2", "gemma3", "mistral", "falcon-alibi", "gpt-neo", "bloom"))
