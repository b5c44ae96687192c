"""The sampler of contrast pairs: against transformers' own generation, plain formulas, and batches of other sizes."""

from __future__ import annotations

import copy
from collections import Counter

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from test_architectures import QUESTIONS, TOK, build
from transformers import GenerationConfig, LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper
from transformers import TopPLogitsWarper as TopP

import ws
from ws.lm.batches import in_groups, left_pad
from ws.lm.generation import PLAIN
from ws.lm.models import encode, end_ids, render_prompt
from ws.lm.refill import RowBatch
from ws.lm.sampling import SamplingSettings, _candidates, describe_settings, sample_rows, sampling_settings

GREEDY = SamplingSettings({"temperature": 1.0, "top_p": 1.0, "top_k": 1})
WARM = SamplingSettings({"temperature": 1.0, "top_p": 0.95, "top_k": 50})
SCALE = 12  # tiny-random is nearly uniform
ENDS = [2, *range(7, len(TOK), 16)]  # random weights almost never pick one particular token


def prompts_of(n: int) -> list[list[int]]:
    return [encode(TOK, render_prompt(TOK, f"{q} {i}")) for i in range(-(-n // 5)) for q in QUESTIONS][:n]


def by_generate(model, prompts, most: int, ends, **options) -> list[list[int]]:
    """transformers' greedy answers, up to and with the token that ends them."""

    def run(part):
        ids, mask = left_pad(part, TOK.pad_token_id, model.device)
        kwargs = PLAIN | {"attention_mask": mask, "max_new_tokens": most, "eos_token_id": ends, "pad_token_id": 0}
        return model.generate(ids, **(kwargs | options))[:, ids.shape[1] :].tolist()

    rows = in_groups(model, prompts, run)
    return [row[: next((i + 1 for i, t in enumerate(row) if t in ends), most)] for row in rows]


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "opt", "phi3", "qwen3-moe", "gemma3", "falcon-alibi", "qwen3.5", "lfm2", "mamba", "rwkv"]
)
def test_the_most_probable_tokens_are_those_of_generate(name):
    """Three rows at a time of ten, so that rows leave and others join, whose prompts are longer or shorter."""
    model, prompts = build(name, noise=0.3), prompts_of(10)
    wanted = by_generate(model, prompts, 20, ENDS)
    assert len(set(map(len, wanted))) > 1 or name in ("gemma3", "falcon-alibi")
    assert sample_rows(model, TOK.pad_token_id, prompts, range(10), 20, ENDS, GREEDY, batch_size=3) == wanted


def test_qwen3_too_and_in_one_batch(tiny):
    model, prompts = tiny[0], prompts_of(12)
    ends = end_ids(*tiny)
    assert sample_rows(model, 0, prompts, range(12), 30, ends, GREEDY) == by_generate(model, prompts, 30, ends)


@pytest.mark.parametrize(
    "advice",
    [{"repetition_penalty": 1.6}, {"no_repeat_ngram_size": 1}, {"min_new_tokens": 6}, {"bad_words_ids": [[9]]}],
)
@pytest.mark.parametrize("name", ["llama", "lfm2"])
def test_what_a_model_advises_about_the_text_so_far_is_followed_row_by_row(name, advice):
    """Whatever padding and neighbours a row has; against one prompt at a time."""
    model, prompts = build(name, noise=0.3), prompts_of(6)
    alone = [by_generate(model, [p], 16, ENDS, **advice)[0] for p in prompts]
    assert name == "lfm2" or alone != by_generate(model, prompts, 16, ENDS) or "bad_words_ids" in advice
    settings = SamplingSettings(GREEDY.values | advice)
    assert sample_rows(model, 0, prompts, range(6), 16, ENDS, settings, batch_size=4) == alone


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"), [(0.7, 0.9, 50), (1.0, 1.0, 0), (2.0, 0.5, 20), (0.5, 1, 8)]
)
def test_tokens_have_the_frequencies_of_the_warped_softmax(tiny, temperature, top_p, top_k):
    model, n = tiny[0], 6000
    prompt = encode(TOK, render_prompt(TOK, "What is red?"))
    with torch.no_grad():
        logits = SCALE * model(torch.tensor([prompt])).logits[0, -1].double().numpy()
    order = np.argsort(-logits)
    p = np.exp((logits - logits.max()) / temperature)[order]
    p[top_k or len(p) :] = 0
    p /= p.sum()
    p[np.cumsum(p) - p >= top_p] = 0  # the first token that reaches top-p is drawn from, too
    p /= p.sum()
    hot = SamplingSettings({"temperature": temperature / SCALE, "top_p": top_p, "top_k": top_k})
    drawn = Counter(row[0] for row in sample_rows(model, 0, [prompt] * n, range(n), 1, [2], hot, batch_size=1000))
    assert set(drawn) <= set(order[p > 0].tolist())
    seen, expected = np.array([drawn[i] for i in order.tolist()]), n * p
    often = expected >= 5
    assert often.sum() > 3
    pooled = [np.append(x[often], x[~often].sum()) for x in (seen, expected)]
    pooled = [x if pooled[1][-1] >= 5 else np.append(x[:-2], x[-2:].sum()) for x in pooled]
    assert chisquare(*pooled).pvalue > 1e-3


@pytest.mark.parametrize("grid", [1e-4, 0.25, 100.0], ids=["no ties", "many ties", "all equal"])
@pytest.mark.parametrize("top_p", [0.3, 0.9, 1.0])
def test_candidates_are_what_transformers_keeps_of_the_whole_vocabulary(grid, top_p):
    """Rounded logits, as of a bfloat16 model, tie with the last of the top-k; all of them are drawn from."""
    noise = torch.Generator().manual_seed(3)
    scores = (torch.randn(6, 3000, generator=noise) / grid).round() * grid
    warpers = [TemperatureLogitsWarper(0.7), TopKLogitsWarper(50), *([TopP(top_p)] if top_p < 1 else [])]
    wanted = LogitsProcessorList(warpers)(None, scores.clone()).softmax(dim=-1)
    ids, few = _candidates(scores, LogitsProcessorList(warpers))
    assert (ids.diff(dim=-1) > 0).all()
    found = torch.zeros_like(scores).scatter(1, ids, few.softmax(dim=-1))
    # Which of several tokens that tie top-p keeps is a matter of the sorting, so their probabilities are compared.
    assert torch.allclose(found.sort(dim=-1).values, wanted.sort(dim=-1).values, atol=1e-7)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "lfm2", "rwkv"])
def test_an_answer_depends_on_its_prompt_and_its_seed_alone(name):
    model, prompts = build(name, noise=0.3), prompts_of(10)
    seeds = [10**30 + i for i in range(10)]
    whole = sample_rows(model, 0, prompts, seeds, 16, ENDS, WARM)
    for size in (1, 3):
        assert sample_rows(model, 0, prompts, seeds, 16, ENDS, WARM, batch_size=size) == whole
    assert sample_rows(model, 0, prompts[::-1], seeds[::-1], 16, ENDS, WARM)[::-1] == whole
    assert sample_rows(model, 0, prompts[3:5], seeds[3:5], 16, ENDS, WARM) == whole[3:5]
    others = sample_rows(model, 0, prompts, range(10), 16, ENDS, WARM)
    assert sum(a != b for a, b in zip(whole, others, strict=True)) > 5


def test_rows_that_have_ended_take_no_part(tiny, monkeypatch):
    model, ends, prompts = tiny[0], end_ids(*tiny), prompts_of(40)
    steps = []
    step = RowBatch.step
    monkeypatch.setattr(RowBatch, "step", lambda self, *a: steps.append(len(self.rows)) or step(self, *a))
    made = sample_rows(model, 0, prompts, range(40), 200, ends, WARM, batch_size=16)
    lengths = [len(row) for row in made]
    padded = sum(16 * max(lengths[i : i + 16]) for i in range(0, 40, 16))
    assert sum(lengths) < padded / 2, "answers of different lengths"
    assert sum(steps) + 40 < 1.2 * sum(lengths)
    assert max(steps) <= 16


@pytest.mark.slow
def test_a_batch_that_does_not_fit_is_halved(tiny, monkeypatch):
    model, ends, prompts = tiny[0], end_ids(*tiny), prompts_of(20)
    wanted, tried, begin = sample_rows(model, 0, prompts, range(20), 30, ends, WARM, batch_size=8), [], RowBatch.begin

    def full(*args):
        tried.append(len(args[2]))
        if len(args[2]) > 8:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return begin(*args)

    monkeypatch.setattr(RowBatch, "begin", full)
    assert sample_rows(model, 0, prompts, range(20), 30, ends, WARM) == wanted
    assert tried[0] == 20
    assert sorted(tried, reverse=True)[-3:] == tried[-3:]
    assert max(tried[-3:]) <= 8
    monkeypatch.setattr("ws.lm.sampling._CACHE_BUDGET", 4 * 4 * 2 * 2 * 16 * (max(map(len, prompts)) + 30) * 5 + 1)
    tried.clear()
    assert sample_rows(model, 0, prompts, range(20), 30, ends, WARM) == wanted
    assert tried[0] == 5, "rows of 4 layers x 2 x 2 heads x 16 numbers of 4 bytes a token"


def test_nan_stops_with_a_sentence(tiny):
    broken = copy.deepcopy(tiny[0])
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ws.WsError, match="NaN"):
        sample_rows(broken, 0, prompts_of(2), range(2), 3, [2], WARM)


# ---- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "options", "values", "sources"),
    [
        ({}, {}, (0.7, 0.9, 50), ("default", "default", "default")),
        ({"top_k": 7}, {}, (0.7, 0.9, 7), ("default", "default", "model")),
        ({}, {"temperature": 1.0}, (1.0, 0.9, 50), ("option", "default", "default")),
        ({"do_sample": True}, {}, (1.0, 1.0, 50), ("default", "default", "default")),
        ({"do_sample": True, "temperature": 0.6}, {}, (0.6, 1.0, 50), ("model", "default", "default")),
        ({"temperature": 0.6, "top_p": 0.95, "top_k": 20}, {}, (0.6, 0.95, 20), ("model",) * 3),
        ({"temperature": 0.6, "top_k": 20}, {"top_p": 0.5}, (0.6, 0.5, 20), ("model", "option", "model")),
        ({"do_sample": False, "temperature": 0.0}, {}, (0.7, 0.9, 50), ("default",) * 3),
        ({"temperature": 0.0, "top_p": 0.95}, {}, (1.0, 0.95, 50), ("default", "model", "default")),
    ],
)
def test_options_come_before_the_models_own_settings_and_those_before_the_default(tiny, own, options, values, sources):
    model = copy.deepcopy(tiny[0])
    model.generation_config = GenerationConfig(**own)
    settings = sampling_settings(model, **options)
    names = ("temperature", "top_p", "top_k")
    assert settings.values == dict(zip(names, values, strict=True))
    assert settings.sources == dict(zip(names, sources, strict=True))


def test_other_advice_of_the_model_is_a_setting_too(tiny):
    model = copy.deepcopy(tiny[0])
    model.generation_config = GenerationConfig(do_sample=True, repetition_penalty=1.1, min_p=0.05, num_beams=3)
    settings = sampling_settings(model, temperature=0.5)
    assert settings.values == {
        "temperature": 0.5, "top_p": 1.0, "top_k": 50, "repetition_penalty": 1.1, "min_p": 0.05,
    }  # fmt: skip
    assert "repetition-penalty 1.1 (model)" in describe_settings(settings.card)


def test_the_bundled_model_brings_its_own():
    model, _ = ws.load_model("pocket", device="cpu")
    settings = sampling_settings(model)
    assert settings.values == {"temperature": 0.8, "top_p": 0.95, "top_k": 50}
    assert set(settings.sources.values()) == {"model"}
