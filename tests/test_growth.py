"""What a sweep costs on paper: the tables are those of the script, and its arithmetic is that of a small real run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from benchmarks import growth
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import ws
from conftest import FAMILY_NAMES
from test_docs import ROOT
from ws.data import generate_pairs, read_pairs
from ws.files.runs import read_csv
from ws.lm.models import encode, linear_size, render_prompt
from ws.options.make import DataConfig, SweepConfig, held_out, train_preset

RESULTS = ROOT / "docs" / "results"


@pytest.fixture(scope="module")
def pocket():
    return ws.load_model("pocket", device="cpu")


@pytest.fixture(scope="module")
def shapes(pocket):
    """The pocket model without numbers."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(pocket[0].config)


def test_the_page_shows_what_the_script_wrote():
    page = (ROOT / "docs" / "scaling.md").read_text()
    table = growth.render(read_csv(RESULTS / "growth.csv"), read_csv(RESULTS / "growth_needs.csv"))
    assert page.split("<!-- growth -->")[1].split("<!-- /growth -->")[0].strip() == table


def test_the_files_are_what_the_code_of_today_gives():
    """A default, a behaviour or a family that has changed makes them wrong; `just bench growth` writes them anew."""
    name = "Qwen3-0.6B"
    for file, rows in zip(("growth", "growth_needs"), growth.measured(growth.Assumptions(), (name,)), strict=True):
        kept = [row for row in read_csv(RESULTS / f"{file}.csv") if row["model"] == name]
        assert len(kept) == len(rows)
        for row, was in zip(rows, kept, strict=True):
            made = {key: growth.plain(value) for key, value in row.items()}
            assert {k: v if isinstance(v, str) else float(v) for k, v in made.items()} == {
                k: v if isinstance(made[k], str) else float(v) for k, v in was.items()
            }


@pytest.mark.parametrize("adapter", FAMILY_NAMES)
def test_adapters_and_vectors_have_the_numbers_that_are_counted(adapter, pocket, shapes, tmp_path):
    model, tok = pocket
    config = replace(train_preset("pocket", adapter), max_steps=3, batch=4, micro_batch=4, validation=0.0)
    pairs = [ws.data.Pair(f"q{i}", f"Is {i} even?", "Yes.", "No.", 2, 2) for i in range(8)]
    arms = []
    for sign in ("pos", "neg"):
        ws.train_adapter(model, tok, pairs, sign, adapter, tmp_path / sign, config)
        arms.append(ws.SteeringVector.from_adapter(tmp_path / sign, model))
        tensors = load_file(tmp_path / sign / "adapter_model.safetensors")
        # DeLoRA's norms of the base's weights are kept with the adapter, and are not trained.
        stored = sum(t.numel() for name, t in tensors.items() if "w_norm" not in name)
        assert stored == growth.adapter_numbers(shapes, adapter, config)
    vector = arms[0] - arms[1]
    vector.save(tmp_path / "vector")
    size = sum(f.stat().st_size for f in (tmp_path / "vector").rglob("*.safetensors"))
    expected = 4 * growth.vector_numbers(shapes, adapter, config)
    header = 200 * len(vector.deltas) * 3  # the names of tensors, which are short beside real matrices
    assert expected <= size <= 1.02 * expected + header


def test_a_small_run_takes_the_tokens_that_are_counted(pocket, tmp_path):
    model, tok = pocket
    data = DataConfig(n_topics=24, n_samples=1, max_new_tokens=48)
    behavior = ws.load_behavior("honesty", "pocket")
    generate_pairs(model, tok, behavior, tmp_path / "data", data)
    (file,) = (tmp_path / "data").rglob("*.jsonl")
    pairs = [replace(p, drop=None) for p in read_pairs(file)]
    train = replace(train_preset("pocket", "lora"), epochs=1.0, batch=6, micro_batch=6, validation=0.25)

    lengths = [len(encode(tok, render_prompt(tok, p.question))) for p in pairs]
    answers = [n + 1 for p in pairs for n in (p.pos_tokens, p.neg_tokens)]
    given = {"template_tokens": sum(lengths) / len(lengths), "answer_tokens": sum(answers) / len(answers)}
    a = replace(growth.Assumptions(), per_char=0.0, **given)
    config = SweepConfig(model="pocket", adapters=("lora",), seeds=(0,), evals=(), data=data, train=train)
    sampling, training = growth.sweep(behavior, config, a)

    assert sampling.rows == 2 * len(pairs)
    assert sampling.sampled == pytest.approx(sum(answers))
    seen = {True: 0, False: 0}

    def count(module, args, kwargs):
        if (mask := kwargs.get("attention_mask")) is not None:  # a look at the head, before training, has none
            seen[module.training] += int(mask.sum())

    handle = model.model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        for sign in ("pos", "neg"):
            ws.train_adapter(model, tok, pairs, sign, "lora", tmp_path / sign, train)
    finally:
        handle.remove()
    assert seen[True] == pytest.approx(training.trained, rel=0.05)
    assert seen[False] == pytest.approx(training.read, rel=0.2)  # a few questions, more or less wordy than the mean
    assert held_out(len(pairs), 0.25) == 6


def test_work_is_what_torch_counts(pocket):
    """FLOPs of reading and of training against torch's own counter, and the cache against a real one's."""
    from torch.utils.flop_counter import FlopCounterMode

    model, _ = pocket
    train = train_preset("pocket", "lora")
    shape = growth.Shape.of(model, train.layers)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.cache * 2 == 4 * 4 * 2 * 2 * 32 * 2  # in float32: 4 layers of 2 heads of 32, keys and values
    ids = torch.zeros(1, 64, dtype=torch.long)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.model(input_ids=ids)
    assert shape.reading(64, 64) == pytest.approx(counter.get_total_flops(), rel=0.1)
    with growth.adapted(model, "lora", train) as peft_model, FlopCounterMode(display=False) as counter:
        peft_model(input_ids=ids, labels=ids).loss.backward()
    numbers = growth.adapter_numbers(model, "lora", train)
    assert shape.training(64, 64, numbers) == pytest.approx(counter.get_total_flops(), rel=0.15)
    assert linear_size(model.lm_head) == (2048, 192)


def test_what_does_not_fit_is_said_and_more_gpus_are_not_slower():
    shape = growth.Shape(70, 60, 1, 1, 1, 100, 0.7)
    rows = [{"stage": "pairs", "hours": 1.0}, {"stage": "training", "hours": 30.0}, {"stage": "all", "hours": 31.0}]
    hours = [growth.wall(n, rows, 30, 2, shape, growth.Assumptions()) for n in (1, 2, 8, 60, 64)]
    assert hours[0] != hours[0]
    assert hours[1:] == pytest.approx([31.0, 1 + 8.0, 2.0, 2.0], rel=1e-3)
    assert growth.short(hours[0]) == "does not fit"
    assert [growth.short(x, "B") for x in (12, 1234, 7.05e10)] == ["12 B", "1.23 kB", "70.5 GB"]
