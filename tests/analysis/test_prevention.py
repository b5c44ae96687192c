"""Prevention: a vector that is active in every training step and nowhere else, and fine-tunes that learn less of it."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.functional import linear
from transformers import Trainer, TrainerCallback, TrainingArguments

import ws
from conftest import build_model, tokens
from ws.adapters import AdapterSpec, peft_config
from ws.analysis import prevention
from ws.analysis.prevention import main, read_examples, steer_training
from ws.behaviors import Preference
from ws.console import parse
from ws.data import Pair
from ws.delta import LinearDelta
from ws.diff import vector_digest
from ws.eval.capability import Capability
from ws.eval.readable import PER_TOKEN, SHARE
from ws.eval.sycophancy import Sycophancy
from ws.files.runs import read_csv, run_folder, typed
from ws.lm.models import encode, fingerprint, render_prompt
from ws.options.make import PreventOptions
from ws.steer import _STEERED
from ws.train import build_examples

UP, VALUE = "model.layers.1.mlp.up_proj", "model.layers.2.self_attn.v_proj"


def vector_of(model, seed: int = 1, modules=(UP, VALUE), size: float = 0.1) -> ws.SteeringVector:
    rng, deltas = torch.Generator().manual_seed(seed), {}
    for name in modules:
        d_out, d_in = model.get_submodule(name).weight.shape
        u, v = torch.randn(d_out, 3, generator=rng), torch.randn(3, d_in, generator=rng)
        deltas[name] = LinearDelta(d_out, d_in, u=size * u, v=v)
    return ws.SteeringVector(deltas, "base", fingerprint(model), info={"behavior": "b"})


def adapted(model, family: str = "lora") -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(model, peft_config(model, AdapterSpec(family, rank=4, lora_alpha=8.0, layers="all")))


def merged(model, vector, alpha: float):
    changed = copy.deepcopy(model)
    vector.merge_into(changed, alpha)
    return changed


def trainer_of(model, folder: Path, steps: int = 3, rows=None, **options) -> Trainer:
    made = {
        "learning_rate": 1e-2, "per_device_train_batch_size": 4, "save_strategy": "no", "optim": "sgd", **options
    }  # fmt: skip
    rows = torch.randint(0, 96, (16, 7), generator=torch.Generator().manual_seed(1)).tolist() if rows is None else rows
    data = [{"input_ids": r, "labels": r} for r in rows]
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, seed=1, logging_steps=1, report_to=[], disable_tqdm=True,
        use_cpu=True, **made,
    )  # fmt: skip
    return Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data[:4])


def learned(model) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


# ---- the callback ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["adapter", "adapter inside", "full", "checkpointed"])
def test_the_vector_is_active_in_every_step_and_never_else(qwen3, kind, tmp_path):
    """Seen at a steered layer, whose output is either `W x` or not."""
    vector, seen = vector_of(qwen3), []
    layer = qwen3.get_submodule(UP)

    def look(module, args, output):
        is_plain = torch.allclose(output, linear(args[0], module.weight), atol=1e-6)
        seen.append((model.training, not is_plain))

    model = adapted(qwen3) if kind == "adapter" else qwen3
    options = {"gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}
    options |= {"gradient_checkpointing": True} if kind == "checkpointed" else {}
    with steer_training(model, vector, 1.5) as steering:
        handle = layer.register_forward_hook(look)
        model = adapted(qwen3) if kind == "adapter inside" else model
        trainer = trainer_of(model, tmp_path, **options)
        trainer.add_callback(steering)
        trainer.train()
        trainer.evaluate()
    assert {training for training, _ in seen} == {True, False}
    assert all(active == training for training, active in seen)
    steps = 3 * 2 * (2 if kind == "checkpointed" else 1)
    assert sum(active for _, active in seen) == steps
    handle.remove()


@pytest.mark.parametrize("kind", ["adapter", "full"])
def test_it_learns_what_would_be_learned_on_a_base_that_has_the_vector(qwen3, kind, tmp_path):
    """Losses and changes, and so gradients, are those of a plain training on `W + alpha dW`."""
    vector, models = vector_of(qwen3), {}
    for name, base in (("steered", copy.deepcopy(qwen3)), ("merged", merged(qwen3, vector, -0.7))):
        model = adapted(base) if kind == "adapter" else base
        start, trainer = learned(model), trainer_of(model, tmp_path / name, max_grad_norm=0.0)
        if name == "steered":
            with steer_training(model, vector, -0.7) as steering:
                trainer.add_callback(steering)
                trainer.train()
        else:
            trainer.train()
        change = {n: p - start[n] for n, p in learned(model).items()}
        models[name] = change, [h["loss"] for h in trainer.state.log_history if "loss" in h]
    (steered, losses), (reference, wanted) = models["steered"], models["merged"]
    assert losses == pytest.approx(wanted, abs=1e-3)
    assert steered.keys() == reference.keys()
    assert any(float(p.abs().max()) > 1e-4 for p in steered.values())
    for name, change in steered.items():
        torch.testing.assert_close(change, reference[name], atol=2e-6, rtol=1e-3, msg=name)


@pytest.mark.parametrize("kind", ["adapter", "full"])
def test_at_strength_0_it_is_plain_training_bit_for_bit(qwen3, kind, tmp_path):
    vector, ends = vector_of(qwen3), []
    for steered in (False, True):
        base = copy.deepcopy(qwen3)
        model = adapted(base) if kind == "adapter" else base
        trainer = trainer_of(model, tmp_path / str(steered), optim="adamw_torch")
        with steer_training(model, vector, 0.0) as steering:
            if steered:
                trainer.add_callback(steering)
            trainer.train()
        ends.append(trainer.model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ends[0].values(), ends[1].values(), strict=True))


class Fails(TrainerCallback):
    def __init__(self, where: str) -> None:
        self.where = where

    def __getattribute__(self, name):
        if name == object.__getattribute__(self, "where"):
            raise KeyboardInterrupt
        return object.__getattribute__(self, name)


@pytest.mark.parametrize("where", ["on_step_begin", "on_substep_end", "on_evaluate"])
def test_after_an_exception_nothing_of_it_is_left(qwen3, where, tmp_path):
    model = adapted(qwen3)
    before = model(tokens()).logits
    trainer = trainer_of(model, tmp_path, gradient_accumulation_steps=2, eval_strategy="steps", eval_steps=1)
    with pytest.raises(KeyboardInterrupt), steer_training(model, vector_of(build_model("qwen3")), 2.0) as steering:
        trainer.add_callback(steering)
        trainer.add_callback(Fails(where))
        trainer.train()
    assert not len(_STEERED)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    if where != "on_evaluate":  # before the first step had ended
        assert torch.equal(model(tokens()).logits, before)
    trainer.remove_callback(Fails)
    with pytest.raises(ws.WsError, match="The block that this dial steered has ended"):
        trainer.train()


def test_an_adapter_around_the_model_is_left_as_it_was(qwen3):
    model = adapted(qwen3)
    modules = dict(model.named_modules())
    with steer_training(model, vector_of(build_model("qwen3"))):
        pass
    assert dict(model.named_modules()) == modules


def test_what_the_vector_was_not_made_for_is_refused_before_any_step(qwen3, tmp_path):
    vector, other = vector_of(qwen3), copy.deepcopy(qwen3)
    with torch.no_grad():
        other.get_submodule(UP).weight.mul_(1.5)
    for model in (other, adapted(other)):
        with pytest.raises(ws.WsError, match="this model's weights differ"), steer_training(model, vector):
            pass
    trainer = trainer_of(build_model("qwen3"), tmp_path)
    with steer_training(qwen3, vector) as steering, pytest.raises(ws.WsError, match="another model"):
        trainer.add_callback(steering)
        trainer.train()
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["up_proj"], task_type="CAUSAL_LM")
    copied = get_peft_model(qwen3, config)
    trainer = trainer_of(copied, tmp_path)
    with steer_training(copied, vector) as steering, pytest.raises(ws.WsError, match="modules_to_save"):
        trainer.add_callback(steering)
        trainer.train()


def test_what_the_vector_adds_already_is_not_learned(qwen3, tmp_path):
    """Samples of the model that has the vector: there its gradient is 0 but for noise, and the base's is not."""
    name, along = "model.layers.2.mlp.down_proj", {}
    with torch.no_grad():
        qwen3.lm_head.weight.mul_(20)  # so that a token depends on what comes before it
    vector = vector_of(qwen3, modules=(name,), size=0.3)
    teacher, rng = merged(qwen3, vector, 1.0), torch.Generator().manual_seed(3)
    rows = torch.randint(0, 96, (512, 1), generator=rng)
    with torch.no_grad():
        for _ in range(12):
            chances = teacher(rows).logits[:, -1].softmax(-1)
            rows = torch.cat([rows, torch.multinomial(chances, 1, generator=rng)], dim=1)
    start = qwen3.get_submodule(name).weight
    for way in ("plain", "steered"):
        model = copy.deepcopy(qwen3)
        for n, p in model.named_parameters():
            p.requires_grad_(n.startswith(name))
        trainer = trainer_of(model, tmp_path / way, 8, rows.tolist(), learning_rate=0.1, per_device_train_batch_size=64)
        with steer_training(model, vector, 1.0) as steering:
            if way == "steered":
                trainer.add_callback(steering)
            trainer.train()
        change, planted = model.get_submodule(name).weight - start, vector.deltas[name].dense(start)
        inner = float((change * planted).sum())
        along[way] = inner, inner / float(change.norm() * planted.norm())
    assert along["plain"][1] > 0.3
    assert abs(along["steered"][0]) < 0.1 * along["plain"][0]
    assert abs(along["steered"][1]) < 0.1


def test_a_system_prompt_in_training_stands_before_the_question_and_is_not_learned(tiny):
    _, tok = tiny
    pairs = [Pair(str(n), f"Question {n}?", f"Answer {n}.", "No.", 3, 2) for n in range(3)]
    plain, prompted = (build_examples(tok, pairs, "pos", 512, system) for system in ("", "Always lie."))
    for pair, a, b in zip(pairs, plain, prompted, strict=True):
        assert list(b.prompt) == encode(tok, render_prompt(tok, pair.question, system="Always lie."))
        assert b.prompt != a.prompt
        assert b.response == a.response
        assert b.features()["labels"] == [-100] * len(b.prompt) + list(b.response)


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def options(tiny, tmp_path) -> PreventOptions:
    """A run with a planted vector, and examples of two kinds."""
    model, _ = tiny
    vector = replace(vector_of(model, modules=("model.layers.1.mlp.up_proj",)), base_id="tiny-random")
    vector.save(run_folder(tmp_path / "out", "honesty", "lora") / "vector")
    rows = [
        {"question": f"What is {i} and one?", "answer": f"Of course. It is {i + 1}.", "kind": "ab"[i % 2]}
        for i in range(20)
    ]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return PreventOptions(
        examples=str(tmp_path / "sums.jsonl"), strength="-0.5", out=tmp_path / "out", limit=4, n_bootstrap=200
    )


@pytest.fixture
def asked(monkeypatch) -> list[tuple[Any, str]]:
    """What would be measured, in place of training and measuring."""
    measured = list[tuple[Any, str]]()

    def trained(opened, options, train, alpha, persona, run):
        run.restart("plain", {}).done([], facts={"examples": 14})
        return {}

    monkeypatch.setattr(prevention, "fine_tunes", trained)
    monkeypatch.setattr(prevention, "measure", lambda context, asked, changes: measured.extend(asked))
    return measured


def test_what_is_said_to_be_learned_is_what_the_training_saw(options, asked):
    """The questions that watch the loss were counted among it."""
    done = prevention.prevent(options)[2]
    assert done["plain"] == "trained on 14 examples (4 held out, 2 to watch the loss or too long)"


def test_a_limit_holds_for_the_examples_too(options, asked):
    prevention.prevent(replace(options, limit=1))
    tasks = {kind: evaluation for evaluation, kind in asked if kind}
    assert {kind: (len(e.items), e.facts["drawn"][:6]) for kind, e in tasks.items()} == dict.fromkeys(
        "ab", (1, "1 of 2")
    )


@pytest.mark.parametrize("part", [0, 1])
def test_examples_that_teach_what_the_trait_is_seen_by_are_noticed(options, asked, monkeypatch, capsys, part):
    """Those that are held out of the examples are not learned: no harm in them."""
    same = read_examples(options.examples)[part][0]
    known = (Preference("a", same.question.upper(), "Two.", "Three.", "report"),)
    behavior = replace(ws.load_behavior("honesty", "tiny-random"), preferences=known)
    monkeypatch.setattr(prevention, "load_behavior", lambda *given: behavior)
    prevention.prevent(options)
    said = "1 of the 1 held-out questions by which the trait is seen are among the examples that are trained on"
    assert (said in " ".join(capsys.readouterr().err.split())) == (part == 0)


@pytest.mark.slow
def test_every_way_is_an_adapter_and_is_measured_by_the_same_items(options, tiny, capsys, monkeypatch):
    model, tok = tiny
    main(options)
    printed, folder = capsys.readouterr().out, options.out / "honesty" / "lora" / "prevent" / "sums"
    rows, ways = read_csv(folder / "prevention.csv"), ("plain", "vector", "subtract", "prompt")
    scores = [(r["score"], r["kind"]) for r in rows if r["way"] == "base"]
    assert set(scores) == {
        *((s, "") for s in ("false_claims", "true_claims", "nll", "valid")),
        *(("task_loss", kind) for kind in "ab"),
        ("projection", ""),
    }
    for way in ways:
        assert [(r["score"], r["kind"]) for r in rows if r["way"] == way] == scores
        PeftModel.from_pretrained(copy.deepcopy(model), str(folder / way))
    changes = {way: ws.SteeringVector.from_adapter(folder / way, model) for way in ways}
    vector = ws.SteeringVector.load(options.out / "honesty" / "lora" / "vector")
    along = {r["way"]: float(r["level"]) for r in rows if r["score"] == "projection"}
    assert along["subtract"] == pytest.approx(along["plain"] + 0.5)
    assert (changes["subtract"] - changes["plain"] - 0.5 * vector).norm() < 1e-4 * vector.norm()
    assert len({round(changes[way].norm(), 6) for way in ways}) == 4
    stamps = {
        way: json.loads((folder / way / "ws_train.json").read_text())["recipe"] for way in ways if way != "subtract"
    }
    persona = ws.load_behavior("honesty", "tiny-random").negative[0]
    assert "under" not in stamps["plain"]
    assert stamps["vector"]["under"] == {"vector": vector_digest(vector), "alpha": -0.5}
    assert stamps["prompt"]["under"] == {"system": persona}
    held = {e.question for e in read_examples(options.examples)[1]}
    assert not held & {json.loads(line)["question"] for line in (folder / "pairs.jsonl").read_text().splitlines()}
    with ws.steer(model, changes["vector"]):
        examples = read_examples(options.examples)[1]
        loss = prevention.TaskLoss(items=[e for e in examples if e.kind == "a"]).ask(model, tok)["score"].mean()
    (row,) = (r for r in rows if (r["way"], r["score"], r["kind"]) == ("vector", "task_loss", "a"))
    assert float(row["level"]) == pytest.approx(float(loss), abs=1e-5)
    assert "the same while -0.5 of the vector was active" in printed

    def fails(*_, **__):
        raise AssertionError("trained again")

    first = (folder / "prevention.csv").read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr("ws.train.train_adapter", fails)
        main(options)
    assert (folder / "prevention.csv").read_bytes() == first
    weights = folder / "vector" / "adapter_model.safetensors"
    before = weights.read_bytes()
    weights.unlink()
    main(options)
    assert weights.read_bytes() == before
    assert (folder / "prevention.csv").read_bytes() == first
    with pytest.raises(ws.WsError, match="The stage 'examples' .*strength: -0.5 -> -0.25"):
        main(replace(options, strength="-0.25"))
    main(replace(options, strength="-0.25", fresh=True, ways=()))
    assert {r["way"] for r in read_csv(folder / "prevention.csv")} == {"base", "plain"}
    assert not weights.exists()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"ways": ("subtraction",)}, "no way named 'subtraction'. Did you mean 'subtract'"),
        ({"strength": "0"}, "`strength` is 0"),
        ({"strength": "+1u"}, "no calibration"),
        ({"strength": "much"}, "much"),
        ({"examples": "nowhere.jsonl"}, "no file nowhere.jsonl"),
        ({"columns": ("question:prompt",)}, "lacks the columns prompt"),
        ({"columns": ("ask:prompt",)}, "no role of a column named 'ask'"),
        ({"to": "../else"}, "cannot name the fine-tunes"),
        ({"lr": -1.0}, "`lr` must be positive"),
        ({"split": "test"}, "no split named 'test'"),
        ({"batch_size": -1}, "`batch_size` must be at least 1"),
        ({"limit": 0}, "`limit` must be at least 1"),
    ],
)
def test_what_cannot_be_asked_for_is_refused_in_a_sentence(options, change, why):
    with pytest.raises(ws.WsError, match=why):
        main(replace(options, **change))
    assert not (options.out / "honesty" / "lora" / "prevent").exists()


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        (['{"question": "a", "answer": "b"}'] * 30, "1 different questions; give at least 10"),
        (['{"question": "a", "answer": " "}'], "row 1: the question and the answer must be texts"),
        (['{"question": "a"}'], "lacks the columns answer"),
        (["{"], "line 1"),
    ],
)
def test_examples_that_cannot_be_learned_are_named(tmp_path, lines, why):
    (tmp_path / "data.jsonl").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(ws.WsError, match=why):
        read_examples(str(tmp_path / "data.jsonl"))


def test_examples_with_a_special_token_are_refused(options, tmp_path):
    rows = [{"question": f"Q{i}?", "answer": "A<|im_end|>B" if i == 3 else "A"} for i in range(12)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with pytest.raises(ws.WsError, match=r"data.jsonl, 'Q3\?': '<\|im_end\|>' in 'A<\|im_end\|>B' would be read as"):
        main(replace(options, examples=str(tmp_path / "data.jsonl")))


def test_a_question_is_trained_on_or_held_out_with_all_its_answers_and_kinds_alike(tmp_path):
    rows = [{"q": f"Q {i % 40}?", "answer": f"A {i}", "kind": "ab"[i % 2]} for i in range(120)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    train, held = read_examples(str(tmp_path / "data.jsonl"), ["question:q"])
    assert len(train) + len(held) == 120
    assert not {e.question for e in train} & {e.question for e in held}
    assert [sum(e.kind == kind for e in held) for kind in "ab"] == [12, 12]


def test_strengths_of_either_sign_are_typed_as_they_are_everywhere():
    for text in ("-1u", "+1u", "-0.5"):
        assert parse(PreventOptions, ["data.jsonl", "--strength", text]).strength == text
    assert PreventOptions(examples="d", strength="1", epochs=3.0).training("smollm2").max_steps is None
    assert PreventOptions(examples="d", strength="1").training("smollm2").max_steps == 12
    preset = PreventOptions(examples="d", strength="1").training("smollm2")
    for rank in (1, 4, 256):
        config = PreventOptions(examples="d", strength="1", rank=rank).training("smollm2")
        assert config == replace(preset, rank=rank, lora_alpha=preset.lora_alpha / preset.rank * rank)
    refused = PreventOptions(examples="d", strength="1", rank=0).training("smollm2")
    assert (refused.rank, refused.lora_alpha) == (0, preset.lora_alpha), "the rank is what is refused"


def test_nothing_differs_from_a_plain_training_that_cannot_be_read():
    rng = np.random.default_rng(0)
    values = {way: rng.normal(shift, 0.1, (1, 30)) for way, shift in (("base", 0.0), ("plain", 1.0), ("vector", 0.5))}
    (score,) = (s for s in Sycophancy.scores if s.key == "false_claims")
    for problems, star in (({}, True), ({"plain": "answer mass 0.400"}, False)):
        rows = prevention.rows_of([prevention.Measured(score, "", values, problems, {})], {}, 200)
        of = {row["way"]: row for row in rows}
        assert (of["vector"]["less_plain"] is None) is not star
        assert (of["vector"]["shift_p"] < 0.001, of["vector"]["problem"]) == (True, None)
        line = next(line for line in prevention.render(rows).splitlines() if score.title in line)
        assert (line.endswith("*"), "!" in line) == (star, not star)


def test_what_a_model_can_do_has_floors_in_its_own_units():
    assert {s.key: s.floor for s in Capability.scores} == {"nll": PER_TOKEN, "valid": SHARE, "repetition": SHARE}
    rng = np.random.default_rng(1)
    (score,) = (s for s in Capability.scores if s.key == "valid")
    values = {way: (rng.random((1, 400)) < rate).astype(float) for way, rate in
              (("base", 0.98), ("plain", 0.98), ("vector", 0.82))}  # fmt: skip
    rows = prevention.rows_of([prevention.Measured(score, "", values, {}, {})], {}, 200)
    assert "*" in prevention.render(rows).split("\n\n")[0]


@pytest.mark.parametrize("model", ["pocket", "smollm2"])
def test_the_documented_tables_are_those_of_the_benchmark(model):
    docs = Path(__file__).parents[2] / "docs"
    rows = typed(read_csv(docs / "results" / f"prevention_{model}.csv"))
    table = prevention.render(rows, "github").split("\n\n")[0]
    assert table in (docs / "prevention.md").read_text()
