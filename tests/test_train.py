"""Training an arm: the loss mask, the shared start, resuming, and handing the base back untouched."""

from __future__ import annotations

import json
import math
import random
import shutil
from dataclasses import asdict, replace
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import TrainerCallback

import ws
from conftest import reworded
from ws.adapters import FAMILIES, AdapterSpec, register
from ws.data import Pair
from ws.errors import NoMemoryError
from ws.files.runs import Run, sha256_file
from ws.lm.divergence import token_kl
from ws.lm.loss import predicting
from ws.lm.models import chat_format, encode, fingerprint, render_prompt
from ws.lm.trainer import _Alternating, _Collator, _laid_out, last_whole_checkpoint
from ws.options.make import SIGNED, TrainConfig, train_preset
from ws.train import (
    USUAL,
    Conditions,
    _adapted,
    _as_base,
    _isolated_rng,
    _require_progress,
    _save,
    _settings,
    adapter_spec,
    build_examples,
    split_examples,
    train_adapter,
    train_stage,
)

PAIRS = [
    Pair(f"q{i}", f"What color is number {i}?", f"It is red, {i} times.", f"It is blue and {i}.", 6, 6)
    for i in range(24)
]
QUICK = replace(train_preset("tiny-random", "lora"), max_steps=6, batch=4, micro_batch=2)


@pytest.fixture
def fresh_tiny():
    return ws.load_model("tiny-random", device="cpu")


def test_the_prompt_is_an_exact_prefix_and_only_the_response_is_learned(tiny):
    _, tok = tiny
    example = build_examples(tok, PAIRS, "pos", 512)[3]
    features = example.features()
    prompt = encode(tok, render_prompt(tok, PAIRS[3].question))
    assert features["input_ids"][: len(prompt)] == prompt
    assert features["labels"][: len(prompt)] == [-100] * len(prompt)
    learned = [t for t in features["labels"] if t != -100]
    assert tok.decode(learned[:-1]) == PAIRS[3].pos
    assert learned[-1] == chat_format(tok).end_of_turn_id
    assert features["input_ids"][len(prompt) :] == learned


def test_the_response_does_not_repeat_the_think_block(tiny):
    _, tok = tiny
    example = build_examples(tok, PAIRS, "neg", 512)[0]
    whole = tok.decode([*example.prompt, *example.response])
    assert whole.count("<think>") == whole.count("</think>") == 1
    assert "<think>" not in tok.decode(example.response)


def test_a_special_token_in_a_text_is_refused(tiny):
    """It would be one in the middle of what is learned."""
    _, tok = tiny
    for planted in (replace(PAIRS[0], neg="Blue.<|im_end|>So."), replace(PAIRS[0], question="<|im_start|>What?")):
        with pytest.raises(ws.WsError, match=r"^The pair 'q0': '<\|im_(end|start)\|>' in .* special token; remove it"):
            build_examples(tok, [*PAIRS[1:], planted], "pos", 512)


def test_padding_is_masked():
    batch = _Collator(9)([{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4], "labels": [4]}])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [4, -100, -100]]


def test_long_examples_are_left_out_never_cut(tiny):
    _, tok = tiny
    long = replace(PAIRS[0], pos="red " * 300)
    assert len(build_examples(tok, [*PAIRS, long], "pos", 200)) == len(PAIRS)
    with pytest.raises(ws.WsError, match="at least 2 usable pairs"):
        build_examples(tok, PAIRS, "pos", 5)


def test_a_too_long_answer_takes_its_pair_from_both_arms(tiny, capsys):
    """Each arm once left out its own alone, and then had other questions, another order and another validation set."""
    _, tok = tiny
    pairs = [replace(p, pos="red " * 300) if i == 7 else p for i, p in enumerate(PAIRS)]
    arms = {sign: split_examples(build_examples(tok, pairs, sign, 200), 0.25, seed=0) for sign in ("pos", "neg")}
    assert "1 of 24 pairs have an answer that ends beyond 200 tokens" in capsys.readouterr().err
    for positive, negative in zip(*arms.values(), strict=True):
        assert [e.question for e in positive] == [e.question for e in negative]
    kept = [p for p in PAIRS if p is not PAIRS[7]]
    assert arms["neg"] == split_examples(build_examples(tok, kept, "neg", 200), 0.25, seed=0)
    assert not capsys.readouterr().err


def test_spellings_of_a_question_are_on_one_side_of_the_split(tiny):
    examples = build_examples(tiny[1], PAIRS, "pos", 200)
    twice = [*examples, *(replace(e, question=f"{e.question.upper()} ") for e in examples)]
    train, validation = split_examples(twice, 0.25, seed=0)
    assert len(validation) == 2 * len(split_examples(examples, 0.25, seed=0)[1])
    assert not {e.question.upper().strip() for e in train} & {e.question.upper().strip() for e in validation}
    assert [*map(id, sorted(twice, key=id))] == sorted(map(id, [*train, *validation]))


def test_validation_questions_are_never_trained_on(tiny):
    _, tok = tiny
    examples = build_examples(tok, PAIRS * 2, "pos", 512)
    train, held = split_examples(examples, 0.25, seed=0)
    assert {e.question for e in train}.isdisjoint(e.question for e in held)
    assert len(held) == 12
    assert split_examples(examples, 0.25, seed=0) == (train, held)
    assert split_examples(examples, 0.0, seed=0) == (examples, [])


def test_training_learns_and_hands_the_base_back(fresh_tiny, family, tmp_path, weights_hash):
    model, tok = fresh_tiny
    before, flags, attributes = weights_hash(model), [p.requires_grad for p in model.parameters()], set(vars(model))
    state = torch.random.get_rng_state()
    config = replace(train_preset("tiny-random", family), max_steps=6)
    facts = train_adapter(model, tok, PAIRS, "pos", family, tmp_path / "pos", config)
    assert facts["validation_losses"][-1] < facts["validation_losses"][0]
    assert weights_hash(model) == before
    assert [p.requires_grad for p in model.parameters()] == flags
    assert set(vars(model)) == attributes
    assert not model.training
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not [p for p in tmp_path.glob(".*") if p.is_dir()], "the work folder is gone"
    vector = ws.SteeringVector.from_adapter(tmp_path / "pos", model)
    assert vector.norm(model) > 0
    assert vector.recipe["config"]["max_steps"] == 6


def test_a_training_begun_with_other_settings_is_not_continued(fresh_tiny, tmp_path, monkeypatch, capsys):
    """What a kill left: the work folder knows what it is of, also when nothing else on disk does."""
    model, tok = fresh_tiny
    config = replace(train_preset("tiny-random", "lora"), max_steps=6)

    def train(folder, config, pairs=PAIRS):
        train_adapter(model, tok, pairs, "pos", "lora", folder, config)
        return (folder / "adapter_model.safetensors").read_bytes()

    def killed(*args):
        raise KeyboardInterrupt

    wanted = train(tmp_path / "whole" / "pos", config)
    begun = {"lr": (replace(config, lr=0.1), PAIRS), "pairs": (config, PAIRS[:-2]), "same": (config, PAIRS)}
    for name, (other, pairs) in begun.items():
        folder = tmp_path / name / "pos"
        with monkeypatch.context() as patch:
            patch.setattr("ws.train._save", killed)
            with pytest.raises(KeyboardInterrupt):
                train(folder, other, pairs)
        assert list((tmp_path / name / ".pos.work").glob("checkpoint-*"))
        capsys.readouterr()
        assert train(folder, config) == wanted
        said = capsys.readouterr().err
        assert (".pos.work was begun with other settings or on other pairs" in said) == (name != "same")
    with pytest.raises(ws.WsError, match=r"'q\d+' has an empty pos answer"):
        train(tmp_path / "blank" / "pos", config, [*PAIRS, replace(PAIRS[0], pos=" ")])


@pytest.mark.parametrize("sign", ["neg", SIGNED])
def test_every_family_trains_on_a_bfloat16_base(family, sign, tmp_path):
    """Adapters stay in float32 beside bfloat16 weights, as they do on a GPU."""
    model, tok = ws.load_model("tiny-random", device="cpu", dtype="bfloat16")
    facts = train_adapter(model, tok, PAIRS, sign, family, tmp_path / "neg", train_preset("tiny-random", family))
    assert facts["validation_losses"][-1] < facts["validation_losses"][0]
    assert model.dtype == torch.bfloat16
    vector = ws.SteeringVector.from_adapter(tmp_path / "neg", model)
    with torch.no_grad(), ws.steer(model, vector, 2.0):
        assert torch.isfinite(model(torch.tensor([[5, 6, 7]])).logits).all()


def test_both_arms_start_from_the_same_initialisation(fresh_tiny, family):
    model, _ = fresh_tiny
    spec = adapter_spec(train_preset("tiny-random", family), family)
    starts = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        with _adapted(model, spec, seed=5) as (peft_model, *_):
            starts.append({n: p.detach().clone() for n, p in peft_model.named_parameters() if p.requires_grad})
    assert starts[0].keys() == starts[1].keys()
    assert all(torch.equal(p, starts[1][n]) for n, p in starts[0].items())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_an_untrained_dora_is_the_base_whatever_the_base_s_dtype(dtype):
    """PEFT takes the row norms in the dtype of the base, which moved every row by up to 0.4 % before the first step."""
    model, _ = ws.load_model("tiny-random", device="cpu", dtype=dtype)
    with _adapted(model, AdapterSpec("dora", rank=4, layers="all"), seed=0, signed=True) as (_, initial, _):
        assert initial
        for name, sizes in initial.items():
            module = name.removeprefix("base_model.model.").partition(".lora_magnitude_vector")[0]
            norms = model.get_submodule(module).get_base_layer().weight.double().norm(dim=1)
            assert (sizes / norms - 1).abs().max() < 1e-6


def test_a_model_is_handed_back_where_memory_ends_half_way_through_its_adapter(fresh_tiny, tmp_path, monkeypatch):
    """The layers that had theirs, and the weights that PiSSA had moved, stayed so."""
    model, tok = fresh_tiny
    before, begun, start = fingerprint(model), [], LoraLayer.pissa_init

    def full(layer, *given):
        begun.append(layer)
        if len(begun) == 3:
            raise torch.OutOfMemoryError
        start(layer, *given)

    monkeypatch.setattr(LoraLayer, "pissa_init", full)
    with pytest.raises(NoMemoryError, match="does not fit into the memory"):
        train_adapter(model, tok, PAIRS, "pos", "pissa", tmp_path / "pos", QUICK)
    assert fingerprint(model) == before
    assert all(p.requires_grad for p in model.parameters())


def test_after_memory_has_ended_less_of_it_may_be_taken(fresh_tiny, tmp_path, monkeypatch):
    """Half of the micro-batch was refused as other settings, of a stage of which there was nothing."""
    model, tok = fresh_tiny
    pairs, run = tmp_path / "pairs.jsonl", Run(tmp_path / "run")
    pairs.write_text("".join(json.dumps(asdict(p)) + "\n" for p in PAIRS))

    def full(*given):
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr("ws.train._save", full)
        with pytest.raises(NoMemoryError, match=r"half of `micro_batch` \(now 2\)"):
            train_stage(model, tok, pairs, "pos", run, "lora", QUICK, 0)
    assert list((tmp_path / "run" / ".pos.work").glob("checkpoint-*")), "with `recompute` it goes on from there"
    assert train_stage(model, tok, pairs, "pos", run, "lora", replace(QUICK, micro_batch=1), 0)


def test_training_is_reproducible_and_depends_on_the_seed(fresh_tiny, tmp_path):
    model, tok = fresh_tiny
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train_adapter(model, tok, PAIRS, "neg", "lora", tmp_path / name, QUICK, seed)
    digest = {n: sha256_file(tmp_path / n / "adapter_model.safetensors") for n in "abc"}
    assert digest["a"] == digest["b"] != digest["c"]


def train_and_cut(monkeypatch, folder, train):
    """Train `whole`, and leave in the work folder of `cut` what a kill before the adapter was written leaves there."""

    def save(*args):
        shutil.copytree(folder / ".cut.work", folder / "kept")
        _save(*args)

    with monkeypatch.context() as patch:
        patch.setattr("ws.train._save", save)
        facts = train(folder / "cut")
    (folder / "cut").rename(folder / "whole")
    (folder / "kept").rename(folder / ".cut.work")
    return facts


@pytest.mark.parametrize(("sign", "keep", "kl"), [("pos", "last", 0.0), ("pos", "best", 0.5), (SIGNED, "last", 0.5)])
def test_a_killed_training_continues_to_the_same_bits(fresh_tiny, tmp_path, monkeypatch, family, sign, keep, kl):
    model, tok = fresh_tiny
    config = replace(train_preset("tiny-random", family), max_steps=10, batch=4, micro_batch=2, keep=keep, kl=kl)
    config = replace(config, layers="1:3") if kl else config  # with a trunk
    facts = train_and_cut(monkeypatch, tmp_path, lambda to: train_adapter(model, tok, PAIRS, sign, family, to, config))
    work = tmp_path / ".cut.work"
    newest = max(work.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    (newest / "trainer_state.json").write_text("{")  # as a kill in the middle of writing it leaves it
    earlier = last_whole_checkpoint(work, keep == "best")
    assert earlier is not None
    assert not newest.exists()
    assert train_adapter(model, tok, PAIRS, sign, family, tmp_path / "cut", config) == facts, "losses are as on record"
    a, b = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("whole", "cut"))
    assert all(torch.equal(t, b[k]) for k, t in a.items())


@given(steps=st.integers(1, 2000))
def test_no_loss_is_lost_between_the_last_log_and_a_checkpoint(steps):
    settings = _settings(replace(QUICK, lr=1e-3), steps, 0, True)
    assert settings["save_steps"] % settings["logging_steps"] == 0
    assert settings["logging_steps"] <= max(1, steps // 20)


@pytest.mark.parametrize("keep", ["last", "best"])
def test_a_killed_training_goes_on_wherever_its_folder_was_moved(fresh_tiny, tmp_path, monkeypatch, capsys, keep):
    """What was kept is the end of a training whose first checkpoint is the best, so that it is loaded and no other."""
    model, tok = fresh_tiny
    config = replace(train_preset("tiny-random", "lora"), max_steps=10, batch=4, micro_batch=2, keep=keep, lr=0.3)
    there, here = tmp_path / "there", tmp_path / "here"
    there.mkdir()
    train = partial(train_adapter, model, tok, PAIRS, "pos", "lora", config=config, must_learn=False)
    train_and_cut(monkeypatch, there, train)
    there.rename(here)
    state = json.loads((here / ".cut.work" / "checkpoint-10" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(there / ".cut.work" / "checkpoint-2")
    capsys.readouterr()
    train(here / "cut")
    assert "damaged" not in capsys.readouterr().err
    a, b = (load_file(here / n / "adapter_model.safetensors") for n in ("whole", "cut"))
    assert all(torch.equal(t, b[k]) for k, t in a.items())


# ---- the penalty on divergence --------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", ["pos", pytest.param(SIGNED, marks=pytest.mark.slow)])
def test_a_penalty_of_great_weight_keeps_the_model_near_the_base(fresh_tiny, tmp_path, family, sign, weights_hash):
    model, tok = fresh_tiny
    before = weights_hash(model)
    batch = _Collator(tok.pad_token_id)([e.features() for e in build_examples(tok, PAIRS, "pos", 512)])
    mask, _ = predicting(batch.pop("labels"))
    divergences = []
    for kl in (0.0, 100.0):
        config = replace(train_preset("tiny-random", family), max_steps=12, validation=0.0, kl=kl)
        train_adapter(model, tok, PAIRS, sign, family, tmp_path / str(kl), config)
        vector = ws.SteeringVector.from_adapter(tmp_path / str(kl), model, mirrored=False)
        with torch.no_grad():
            base = model(**batch).logits[mask]
            with ws.steer(model, vector, 1.0):
                divergences.append(token_kl(base, model(**batch).logits[mask]).mean().item())
    assert divergences[1] < divergences[0] / 4
    assert weights_hash(model) == before


def test_a_step_with_the_penalty_is_that_of_a_plain_loop_with_a_second_model(fresh_tiny, tmp_path):
    """Two steps of AdamW by hand; the penalty is none at the first, where the model is the base."""
    model, tok = fresh_tiny
    pairs = [replace(p, pos=p.pos + " Not blue." * (i % 4)) for i, p in enumerate(PAIRS)]
    config = replace(QUICK, batch=25, micro_batch=5, max_steps=2, validation=0.0, lr=1e-2, kl=20.0)
    facts = train_adapter(model, tok, pairs, "pos", "lora", tmp_path / "pos", config)
    batch = _Collator(tok.pad_token_id)([e.features() for e in build_examples(tok, pairs, "pos", 512)])
    mask, _ = predicting(batch["labels"])
    with torch.no_grad():
        base = model(**batch).logits[mask].log_softmax(-1)
    with _isolated_rng(), _adapted(model, adapter_spec(config, "lora"), 0) as (peft_model, *_):
        learned = {n: p for n, p in peft_model.named_parameters() if p.requires_grad}
        optimiser, losses = torch.optim.AdamW(learned.values(), weight_decay=config.weight_decay), []
        for rate in (1e-2, 0.5e-2):
            optimiser.param_groups[0]["lr"] = rate
            optimiser.zero_grad()
            output = peft_model(**batch)
            terms = base.exp() * (base - output.logits[mask].log_softmax(-1))
            loss = output.loss + 20.0 * terms.sum(-1).mean()
            loss.backward()
            losses.append(loss.item())
            assert (terms.sum(-1).mean().item() > 1e-5) == (rate < 1e-2)
            torch.nn.utils.clip_grad_norm_(learned.values(), 1.0)
            optimiser.step()
        wanted = {n.replace(".default", ""): p.detach().clone() for n, p in learned.items()}
    assert facts["train_losses"] == pytest.approx(losses, abs=2e-5)
    for name, tensor in load_file(tmp_path / "pos" / "adapter_model.safetensors").items():
        assert (tensor - wanted[name]).norm() < 1e-3 * wanted[name].norm()


def steps_through(model, block: int) -> list[int]:
    """A number for every time that the block computes in a step, that is with gradients."""
    module, steps = model.model.layers[block], list[int]()
    original = module.forward

    def counted(*args, **kwargs):
        steps.extend([1] * torch.is_grad_enabled())
        return original(*args, **kwargs)

    vars(module)["forward"] = counted
    return steps


WHY = ["usual", "margin", "dropout", "no room", "first block learns", "no penalty", "callback"]


@pytest.mark.parametrize("why", WHY)
def test_steps_go_on_from_what_the_base_s_trunk_gave(fresh_tiny, tmp_path, monkeypatch, why):
    """Of four blocks the second and third learn, so the first gives what it gave when the base read the examples."""
    (model, tok), name = fresh_tiny, "likelihood" if why != "margin" else "margin"
    pairs = [replace(p, pos=p.pos + " Not blue." * (i % 4)) for i, p in enumerate(PAIRS)]
    config = replace(QUICK, batch=10, micro_batch=5, max_steps=3, kl=0.5, lr=1e-2, objective=name, layers="1:3")
    config = replace(config, kl=0.0) if why == "no penalty" else config
    config = replace(config, layers="0:2") if why == "first block learns" else config
    if why == "no room":
        monkeypatch.setattr("ws.lm.trainer._Trainer.room", 0)
    if why == "dropout":
        model.model.layers[0].self_attn.attention_dropout = 0.2
    steps = [steps_through(model, block) for block in (0, 1)]
    torch.manual_seed(0)
    under = Conditions(callback=TrainerCallback()) if why == "callback" else USUAL
    facts = train_adapter(model, tok, pairs, "pos", "lora", tmp_path / "pos", config, under=under)
    passes = len(steps[1])
    assert passes >= 3
    assert len(steps[0]) == (0 if why in ("usual", "margin") else passes)
    if why == "dropout":
        return
    monkeypatch.setattr("ws.lm.trainer.frozen_blocks", lambda model: [])
    again = train_adapter(model, tok, pairs, "pos", "lora", tmp_path / "again", config)
    assert len(steps[0]) == (passes if why in ("usual", "margin") else 2 * passes)
    for key in ("train_losses", "validation_losses"):
        assert facts[key] == pytest.approx(again[key], abs=1e-5)
    first, second = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("pos", "again"))
    assert all((t - second[k]).norm() <= 1e-3 * t.norm() for k, t in first.items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_with_an_adapter_can_be_the_base_again_bit_for_bit(family, dtype):
    model, _ = ws.load_model("tiny-random", device="cpu", dtype=dtype)
    spec, ids = adapter_spec(train_preset("tiny-random", family), family), torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        base = model(ids).logits
        with _adapted(model, spec, seed=0) as (peft_model, _, weights):
            flags = {n: p.requires_grad for n, p in peft_model.named_parameters()}
            for p in peft_model.parameters():
                p.add_(0.1 * p.requires_grad)
            trained = peft_model(ids).logits
            with _as_base(peft_model, weights):
                assert torch.equal(peft_model(ids).logits, base)
            assert torch.equal(peft_model(ids).logits, trained)
            assert not torch.equal(trained, base)
            assert {n: p.requires_grad for n, p in peft_model.named_parameters()} == flags


def test_a_setting_that_came_later_is_on_record_only_where_it_does_something(fresh_tiny, tmp_path):
    """A run of before has no `kl`; it is the same as one without a penalty, and not as one with it."""
    model, tok = fresh_tiny
    pairs, run = tmp_path / "pairs.jsonl", Run(tmp_path / "run")
    pairs.write_text("".join(json.dumps(asdict(p)) + "\n" for p in PAIRS))
    config = replace(train_preset("tiny-random", "lora"), max_steps=2, validation=0.0)
    assert train_stage(model, tok, pairs, "pos", run, "lora", config, 0)
    assert not run.facts("pos")["config"].keys() & {"kl", "recompute", "report_to"}
    assert not train_stage(model, tok, pairs, "pos", run, "lora", replace(config, recompute="cheap"), 0)
    with pytest.raises(ws.WsError, match=r"other settings .kl: None -> 0\.5"):
        train_stage(model, tok, pairs, "pos", run, "lora", replace(config, kl=0.5), 0)


# ---- the margin between two answers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", ["pos", "neg", SIGNED])
def test_a_step_with_the_margin_is_that_of_dpo_by_a_plain_loop(fresh_tiny, tmp_path, sign):
    """Two steps of AdamW by hand, with the base as reference, or the model with PEFT's own scale negated."""
    model, tok = fresh_tiny
    pairs = [replace(p, neg=p.neg + " Not red." * (i % 4)) for i, p in enumerate(PAIRS)]
    config = replace(QUICK, batch=25, micro_batch=5, max_steps=2, validation=0.0, lr=1e-2)
    config = replace(config, objective="margin", beta=0.5, kl=0.25)
    facts = train_adapter(model, tok, pairs, sign, "lora", tmp_path / "arm", config)
    assert facts["examples"] == len(PAIRS)
    batches = [
        _Collator(tok.pad_token_id)([e.features() for e in build_examples(tok, pairs, side, 512)])
        for side in (("neg", "pos") if sign == "neg" else ("pos", "neg"))
    ]
    masks = [predicting(batch["labels"]) for batch in batches]

    def all_logp(m):
        return [m(**batch).logits[mask].log_softmax(-1) for batch, (mask, _) in zip(batches, masks, strict=True)]

    def sums(logp):
        """Of either answer to every question, `[2, pairs]`."""
        rows = zip(logp, masks, strict=True)
        chosen = [(x.gather(1, tokens[:, None])[:, 0], mask.sum(1).tolist()) for x, (mask, tokens) in rows]
        return torch.stack([torch.stack([row.sum() for row in x.split(n)]) for x, n in chosen])

    with torch.no_grad():
        base = all_logp(model)
    with _isolated_rng(), _adapted(model, adapter_spec(config, "lora"), 0) as (peft_model, *_):
        layers = [m for m in peft_model.modules() if isinstance(m, LoraLayer)]
        learned = {n: p for n, p in peft_model.named_parameters() if p.requires_grad}
        optimiser, losses = torch.optim.AdamW(learned.values(), weight_decay=config.weight_decay), []
        for rate in (1e-2, 0.5e-2):
            optimiser.param_groups[0]["lr"] = rate
            optimiser.zero_grad()
            found = []
            for scale in (1, -1) if sign == SIGNED else (1,):
                for layer in layers:
                    layer.scaling["default"] = scale * abs(layer.scaling["default"])
                found.append(all_logp(peft_model))
            gains = sums(found[0]) - sums(found[1] if sign == SIGNED else base)
            loss = -torch.nn.functional.logsigmoid(0.5 * (gains[0] - gains[1])).mean()
            terms = [q.exp() * (q - p) for logp in found for q, p in zip(base, logp, strict=True)]
            loss = loss + 0.25 * torch.cat(terms).sum(-1).mean()
            loss.backward()
            losses.append(loss.item())
            torch.nn.utils.clip_grad_norm_(learned.values(), 1.0)
            optimiser.step()
        wanted = {n.replace(".default", ""): p.detach().clone() for n, p in learned.items()}
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5), "the model is its own reference at first"
    assert facts["train_losses"] == pytest.approx(losses, abs=2e-5)
    for name, tensor in load_file(tmp_path / "arm" / "adapter_model.safetensors").items():
        assert (tensor - wanted[name]).norm() < 1e-3 * wanted[name].norm()


@pytest.mark.parametrize("sign", [pytest.param("neg", marks=pytest.mark.slow), SIGNED])
def test_an_interrupted_training_of_the_margin_goes_on_and_widens_it(fresh_tiny, family, tmp_path, monkeypatch, sign):
    model, tok = fresh_tiny
    config = replace(train_preset("tiny-random", family), objective="margin", max_steps=10, micro_batch=2, kl=0.1)
    facts = train_and_cut(monkeypatch, tmp_path, lambda to: train_adapter(model, tok, PAIRS, sign, family, to, config))
    assert facts["validation_losses"][-1] < facts["validation_losses"][0] == pytest.approx(math.log(2), abs=1e-4)
    shutil.rmtree(max((tmp_path / ".cut.work").glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1])))
    train_adapter(model, tok, PAIRS, sign, family, tmp_path / "cut", config)
    a, b = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("whole", "cut"))
    assert all(torch.equal(t, b[k]) for k, t in a.items())


def test_a_model_whose_logits_stand_apart_has_no_margin(fresh_tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("ws.lm.trainer.head_of", lambda *args: (None, False))
    with pytest.raises(ws.WsError, match="`objective` margin needs them; leave it out"):
        train_adapter(*fresh_tiny, PAIRS, "pos", "lora", tmp_path / "pos", replace(QUICK, objective="margin"))


# ---- signed ---------------------------------------------------------------------------------------------------------


def test_a_signed_adapter_learns_both_sides_and_hands_the_base_back(fresh_tiny, family, tmp_path, weights_hash):
    model, tok = fresh_tiny
    before = weights_hash(model)
    config = replace(train_preset("tiny-random", family), max_steps=6)
    facts = train_adapter(model, tok, PAIRS, SIGNED, family, tmp_path / "signed", config)
    assert facts["validation_losses"][-1] < facts["validation_losses"][0]
    assert facts["examples"] == 22
    assert weights_hash(model) == before
    plus, minus = (ws.SteeringVector.from_adapter(tmp_path / "signed", model, mirrored=m) for m in (False, True))
    assert plus.recipe["contrast"] == "signed"
    examples = {sign: [e.features() for e in build_examples(tok, PAIRS, sign, 512)] for sign in ("pos", "neg")}

    def loss(sign, change):
        batch = _Collator(tok.pad_token_id)(examples[sign])
        with torch.no_grad(), ws.steer(model, plus if change > 0 else minus, float(change != 0)):
            return float(model(**batch).loss)

    for own, other, change in (("pos", "neg", 1), ("neg", "pos", -1)):
        assert loss(own, change) < loss(own, 0), "each side learns its own answers with its own sign"
        assert loss(own, change) - loss(own, 0) < loss(other, change) - loss(other, 0)


def test_a_signed_step_is_that_of_the_mean_of_both_sides_by_a_plain_loop(fresh_tiny, tmp_path):
    """Two steps of AdamW by hand, with PEFT's own scale negated for -c; the sides have answers of other lengths."""
    model, tok = fresh_tiny
    pairs = [replace(p, neg=p.neg + " Not red." * (i % 4)) for i, p in enumerate(PAIRS)]
    config = replace(QUICK, batch=24, micro_batch=5, max_steps=2, validation=0.0, lr=1e-2)
    config = replace(config, batch=25)  # one step takes all pairs, the last micro-batch of a side is short
    facts = train_adapter(model, tok, pairs, SIGNED, "lora", tmp_path / "signed", config)
    batches = {
        scale: _Collator(tok.pad_token_id)([e.features() for e in build_examples(tok, pairs, sign, 512)])
        for scale, sign in ((1, "pos"), (-1, "neg"))
    }
    with _isolated_rng(), _adapted(model, adapter_spec(config, "lora"), 0) as (peft_model, *_):
        layers = [m for m in peft_model.modules() if isinstance(m, LoraLayer)]
        learned = {n: p for n, p in peft_model.named_parameters() if p.requires_grad}
        optimiser = torch.optim.AdamW(learned.values(), weight_decay=config.weight_decay)
        losses = []
        for rate in (1e-2, 0.5e-2):
            optimiser.param_groups[0]["lr"], total = rate, 0.0
            optimiser.zero_grad()
            for scale, batch in batches.items():
                for layer in layers:
                    layer.scaling["default"] = scale * abs(layer.scaling["default"])
                loss = peft_model(**batch).loss / 2
                loss.backward()
                total += float(loss.detach())
            losses.append(total)
            torch.nn.utils.clip_grad_norm_(learned.values(), 1.0)
            optimiser.step()
        wanted = {n.replace(".default", ""): p.detach().clone() for n, p in learned.items()}
    assert facts["train_losses"] == pytest.approx(losses, abs=2e-5)
    trained = load_file(tmp_path / "signed" / "adapter_model.safetensors")
    assert trained.keys() == wanted.keys()
    for name, tensor in trained.items():
        assert (tensor - wanted[name]).norm() < 1e-3 * wanted[name].norm()


def test_signed_training_is_reproducible_and_depends_on_the_seed(fresh_tiny, tmp_path):
    model, tok = fresh_tiny
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train_adapter(model, tok, PAIRS, SIGNED, "pissa", tmp_path / name, QUICK, seed)
    for file in ("adapter_model.safetensors", "pissa_init.safetensors"):
        digest = {n: sha256_file(tmp_path / n / file) for n in "abc"}
        assert digest["a"] == digest["b"]
    assert digest["a"] == digest["c"], "the base's own singular vectors"
    assert sha256_file(tmp_path / "a" / "adapter_model.safetensors") != sha256_file(
        tmp_path / "c" / "adapter_model.safetensors"
    )


def test_a_pair_is_left_out_whole_when_one_of_its_answers_is_too_long(tiny):
    _, tok = tiny
    pairs = [*PAIRS, replace(PAIRS[0], pos="red " * 300), replace(PAIRS[1], neg="blue " * 300)]
    examples = build_examples(tok, pairs, SIGNED, 200)
    assert examples[::2] == build_examples(tok, PAIRS, "pos", 200)
    assert examples[1::2] == build_examples(tok, PAIRS, "neg", 200)
    with pytest.raises(ws.WsError, match="'q0' has an empty neg answer"):
        build_examples(tok, [replace(PAIRS[0], neg=" ")], SIGNED, 200)


@given(pairs=st.integers(1, 40), size=st.integers(1, 6), processes=st.integers(1, 4))
def test_micro_batches_of_signed_training_are_of_one_side_and_of_the_same_pairs(pairs, size, processes):
    order = random.Random(pairs).sample(range(pairs), pairs)
    rows = _Alternating(pairs, size, processes, lambda: order)
    indices = list(rows)
    assert len(rows) == len(indices)
    batches = [indices[i : i + size] for i in range(0, len(indices), size)]
    assert len(batches) % processes == 0
    assert sorted(i for i in indices if i < 2 * pairs) == list(range(2 * pairs))
    assert [i // 2 for i in indices if i < 2 * pairs and i % 2 == 0] == order
    for positive, negative in zip(batches[::2], batches[1::2], strict=False):
        real = [i for i in positive if i < 2 * pairs]
        assert [i for i in negative if i < 2 * pairs] == [i + 1 for i in real]
        assert all(i % 2 == 0 for i in real)


@given(pairs=st.integers(1, 40), size=st.integers(1, 6))
def test_every_validation_batch_of_signed_training_has_something_to_average(pairs, size):
    """On any number of processes; what a sampler fills up behind the last row is cut off."""
    rows = _laid_out([{"input_ids": [7], "labels": [i]} for i in range(2 * pairs)], size, 0)
    assert sorted(row["labels"][0] for row in rows if row["labels"] != [-100]) == list(range(2 * pairs))
    for start in range(0, len(rows), size):
        assert any(row["labels"] != [-100] for row in rows[start : start + size])


def test_signed_training_refuses_activations_that_would_be_computed_again_with_the_other_sign(fresh_tiny, tmp_path):
    model, tok = fresh_tiny
    model.gradient_checkpointing_enable()
    try:
        with pytest.raises(ws.WsError, match=r"call gradient_checkpointing_disable\(\)"):
            train_adapter(model, tok, PAIRS, SIGNED, "lora", tmp_path / "signed", QUICK)
    finally:
        model.gradient_checkpointing_disable()


def test_a_signed_null_need_not_learn(fresh_tiny, tmp_path):
    """From equal answers both signs get opposite gradients: at the start of a LoRA nothing is left of them."""
    model, tok = fresh_tiny
    equal, config = [replace(p, neg=p.pos) for p in PAIRS], replace(QUICK, validation=0.4)
    with pytest.raises(ws.WsError, match="did not learn"):
        train_adapter(model, tok, equal, SIGNED, "lora", tmp_path / "a", config)
    train_adapter(model, tok, equal, SIGNED, "lora", tmp_path / "b", config, must_learn=False)
    assert ws.SteeringVector.from_adapter(tmp_path / "b", model).norm() < 1e-3


@pytest.mark.parametrize("adapter", ["ia3", "lora"])
def test_a_signed_adapter_that_learns_nothing_is_the_zero_vector_whatever_its_weights_decay_to(
    fresh_tiny, tmp_path, adapter
):
    """Both sides have the same answers. `l = 0` is no base of an ia3, and decay made a change of its own of it."""
    model, tok = fresh_tiny
    equal = [replace(p, neg=p.pos) for p in PAIRS]
    config = replace(train_preset("tiny-random", adapter), max_steps=3, weight_decay=0.1, validation=0.0)
    train_adapter(model, tok, equal, SIGNED, adapter, tmp_path / "signed", config)
    plus, minus = (ws.SteeringVector.from_adapter(tmp_path / "signed", model, mirrored=m) for m in (False, True))
    assert (plus - minus).is_zero


@pytest.mark.parametrize(
    ("adapter", "decaying"),
    [
        ("ia3", set()),
        ("oft", {"oft_R"}),
        ("dora", {"lora_A", "lora_B"}),
        ("lora", {"lora_A", "lora_B"}),
        ("pissa", set()),
        ("delora", {"delora_A", "delora_B", "delora_lambda"}),
    ],
)
def test_weights_decay_in_signed_training_only_where_0_is_the_base(
    fresh_tiny, tmp_path, monkeypatch, adapter, decaying
):
    model, tok = fresh_tiny
    decayed = list[set[str]]()

    def spy(self):
        trained = {n for n, p in self.model.named_parameters() if p.requires_grad}
        decays = trained.intersection(self.get_decay_parameter_names(self.model))
        decayed.append({n.partition(".default")[0].rpartition(".")[2] for n in decays})
        assert decays == trained or self.opposite is not None, "of arms all do"
        raise ws.WsError("enough")

    monkeypatch.setattr("ws.lm.trainer._Trainer.create_optimizer", spy)
    config = replace(train_preset("tiny-random", adapter), max_steps=1, validation=0.0)
    for sign in (SIGNED, "pos"):
        with pytest.raises(ws.WsError, match="enough"):
            train_adapter(model, tok, PAIRS, sign, adapter, tmp_path / sign, config)
    assert decayed[0] == decaying


def test_a_family_that_does_not_say_what_it_is_with_the_other_sign_is_refused(fresh_tiny, tmp_path):
    register(replace(FAMILIES["lora"], name="plain", mirror=None, variant=lambda config: False))
    with pytest.raises(ws.WsError, match="plain adapter .* other sign.*take one of: ia3, oft, dora, lora, pissa, del"):
        train_adapter(*fresh_tiny, PAIRS, SIGNED, "plain", tmp_path / "signed", QUICK)
    assert not list(tmp_path.iterdir())


def test_an_arm_of_another_template_is_not_taken_for_this_one(fresh_tiny, tmp_path):
    model, tok = fresh_tiny
    pairs, run = tmp_path / "pairs.jsonl", Run(tmp_path / "run")
    pairs.write_text("".join(json.dumps(asdict(p)) + "\n" for p in PAIRS))
    config = replace(train_preset("tiny-random", "lora"), max_steps=2, validation=0.0)
    for new in (True, False):
        assert train_stage(model, tok, pairs, "pos", run, "lora", config, 0) is new
    with pytest.raises(ws.WsError, match="made with other settings .tokenizer_hash: "):
        train_stage(model, reworded(tok), pairs, "pos", run, "lora", config, 0)


def test_divergence_stops_with_advice_and_leaves_nothing(fresh_tiny, tmp_path):
    model, tok = fresh_tiny
    handle = model.lm_head.register_forward_hook(lambda m, a, out: out * float("nan") if m.training else out)
    try:
        with pytest.raises(ws.WsError, match="diverged.*lower `lr`"):
            train_adapter(model, tok, PAIRS, "pos", "lora", tmp_path / "pos", QUICK)
    finally:
        handle.remove()
    assert [p.name for p in tmp_path.iterdir()] == [".pos.lock"]


def test_the_best_of_no_validation_is_refused_and_no_validation_is_said(fresh_tiny, tmp_path, capsys):
    """The last checkpoint once went on record as the best."""
    config = replace(QUICK, validation=0.1)
    with pytest.raises(ws.WsError, match="too few questions to hold out `validation` 0.1 of them.* no checkpoint is"):
        train_adapter(*fresh_tiny, PAIRS[:4], "pos", "lora", tmp_path / "best", replace(config, keep="best"))
    assert not list(tmp_path.iterdir())
    train_adapter(*fresh_tiny, PAIRS[:4], "pos", "lora", tmp_path / "last", config)
    assert "too few questions to hold out --validation 0.1 of them" in capsys.readouterr().err.replace("`", "")


def test_too_small_a_validation_set_judges_nothing(fresh_tiny, tmp_path, monkeypatch):
    judged = []
    monkeypatch.setattr("ws.train._require_progress", lambda *a: judged.append(1))
    train_adapter(*fresh_tiny, PAIRS, "pos", "lora", tmp_path / "few", QUICK)
    assert not judged
    train_adapter(*fresh_tiny, PAIRS, "pos", "lora", tmp_path / "many", replace(QUICK, validation=0.4))
    assert judged


@pytest.mark.parametrize(("keep", "validation"), [("last", [3.0, 2.5, 3.1]), ("best", [3.0, 3.2, 3.1])])
def test_losses_that_do_not_fall_stop_with_advice(keep, validation):
    config, rising, falling = TrainConfig(lr=1e-3, keep=keep), [2.0, 2.1, 2.2], [2.2, 2.1, 2.0]
    with pytest.raises(ws.WsError, match=r"did not learn: .* 2.0000 to 2.2000, .* 3.0000 to 3.1000; change `lr`"):
        _require_progress(rising, validation, config)
    _require_progress(falling, validation, config)
    _require_progress(rising, [3.0, 2.0, 2.9], config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, "`rank` must be at least 1"),
        ({"layers": "7:9"}, "out of range"),
        ({"kinds": ("q_prj",)}, "Did you mean 'q_proj'"),
        ({"micro_batch": 3}, "must divide"),
        ({"lr": -1.0}, "`lr` must be positive"),
        ({"lr": float("nan")}, "`lr` must be positive"),
        ({"validation": 1.0}, "`validation`"),
        ({"kl": -0.1}, "`kl` must be 0 or positive"),
        ({"kl": float("nan")}, "`kl` must be 0 or positive"),
        ({"warmup": -1}, "`warmup` must be 0 or positive"),
        ({"weight_decay": -0.1}, "`weight_decay` must be 0 or positive"),
        ({"weight_decay": float("nan")}, "`weight_decay` must be 0 or positive"),
        ({"lora_alpha": 0.0}, "`lora_alpha` must be positive"),
        ({"delora_lambda": float("nan")}, "`delora_lambda` must be positive"),
        ({"keep": "best", "validation": 0.0}, "`keep` best goes by the validation loss; give `validation` a share"),
        ({"keep": "bst"}, "Did you mean 'best'"),
        ({"max_steps": 0}, "`max_steps`"),
        ({"max_steps": 2**64}, "`max_steps` must be positive and at most 2147483647"),
        ({"batch": 2**40, "micro_batch": 2**40}, "`batch` must be positive and at most"),
        ({"rank": 900_000_000_000}, "`rank` .* at most 65536"),
        ({"layers": "0:900000000"}, "layers '0:900000000' of a model .* out of range"),
        ({"layers": "0:" + "9" * 5000}, "layers '0:9+\\.\\.\\.9+' of a model .* is not understood"),
    ],
)
def test_impossible_settings_are_explained(fresh_tiny, tmp_path, change, message):
    with pytest.raises(ws.WsError, match=message):
        train_adapter(*fresh_tiny, PAIRS, "pos", "lora", tmp_path / "pos", replace(QUICK, **change))


@pytest.mark.parametrize("seed", [-1, 2**32, 2**64])
def test_seeds_have_to_be_what_every_generator_takes(fresh_tiny, tmp_path, seed):
    with pytest.raises(ws.WsError, match="seed must lie between 0 and 4294967295"):
        train_adapter(*fresh_tiny, PAIRS, "pos", "lora", tmp_path / "pos", QUICK, seed)


def test_equal_runs_write_equal_files_whatever_order_sets_have(fresh_tiny, tmp_path):
    train_adapter(*fresh_tiny, PAIRS, "pos", "lora", tmp_path / "pos", QUICK)
    vector = ws.SteeringVector.from_adapter(tmp_path / "pos", fresh_tiny[0])
    vector.save(tmp_path / "vector")
    for folder in ("pos", "vector"):
        named = json.loads((tmp_path / folder / "adapter_config.json").read_text(encoding="utf-8"))["target_modules"]
        assert named == sorted(named)
        assert len(named) > 1


def test_oft_blocks_must_fit(fresh_tiny, tmp_path):
    with pytest.raises(ws.WsError, match="`oft_block` 7 does not divide"):
        train_adapter(*fresh_tiny, PAIRS, "pos", "oft", tmp_path / "pos", replace(QUICK, oft_block=7))


def test_the_warm_up_is_never_more_than_a_tenth():
    from ws.train import _settings

    config = TrainConfig(lr=1e-4)
    for steps, want in ((8, 0), (20, 2), (50, 5), (500, 5)):
        assert _settings(config, steps, 0, True)["warmup_steps"] == want


def test_defaults_are_the_documented_ones():
    c = TrainConfig()
    assert (c.rank, c.lora_alpha, c.weight_decay, c.warmup, c.batch, c.epochs, c.layers) == (
        32, 64.0, 0.01, 5, 16, 1.0, "0.3:0.8",
    )  # fmt: skip
    assert ws.adapters.FAMILIES["lora"].learning_rate == 2e-4


def test_the_stamp_names_the_base_and_another_base_is_refused(fresh_tiny, tmp_path):
    model, tok = fresh_tiny
    train_adapter(model, tok, PAIRS, "pos", "lora", tmp_path / "pos", QUICK)
    stamp = json.loads((tmp_path / "pos" / "ws_train.json").read_text())
    assert stamp["base_id"] == "tiny-random"
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight *= 1.1
    with pytest.raises(ws.WsError, match="trained on tiny-random"):
        ws.SteeringVector.from_adapter(tmp_path / "pos", model)


def test_the_presets_for_smollm2_are_the_rates_that_were_chosen():
    import csv
    from pathlib import Path

    from ws.adapters import FAMILIES, family

    with (Path(__file__).parents[1] / "docs" / "results" / "smollm2_rates.csv").open() as file:
        chosen = {r["adapter"]: r for r in csv.DictReader(file) if r["chosen"] == "True"}
    assert chosen.keys() == FAMILIES.keys()
    for adapter, row in chosen.items():
        preset = train_preset("smollm2", adapter)
        rate = family(adapter).learning_rate if preset.lr is None else preset.lr
        assert rate == pytest.approx(float(row["lr"]))
        assert adapter != "delora" or preset.delora_lambda == pytest.approx(float(row["delora_lambda"]))
