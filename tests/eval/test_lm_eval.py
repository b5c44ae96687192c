"""The lm-evaluation-harness on a steered model: its log-likelihoods against plain ones, and the command offline."""

from __future__ import annotations

import copy
import csv
import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import processors

import ws
from support.harness_tasks import DOCUMENTS, WRITTEN, write_documents, write_task
from ws.behaviors.tables import draw
from ws.delta import LinearDelta
from ws.eval import lm_eval
from ws.eval.context import EvalContext
from ws.eval.lm_eval import (
    Harness,
    _document_hashes,
    load_tasks,
    main,
    plain_model,
    require_harness,
    run_harness,
    scores_of,
    summary_rows,
)
from ws.intervene.activation import ActivationVector, activation_steer
from ws.intervene.prompt import prompted, prompting
from ws.lm.likelihood import score_answers
from ws.lm.models import chat_format, encode, encode_answer, fingerprint, render_prompt, tiny_random
from ws.options.measure import LmEvalOptions

harness = pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs the extra `bench`")


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with a task of its own, one whose data is missing and one that runs what a model wrote."""
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    data = write_documents(tasks / "items.jsonl")
    for name, file, unsafe in (("closed", data, False), ("lost", tasks / "none.jsonl", False), ("unsafe", data, True)):
        write_task(tasks / f"{name}.yaml", f"pocket_{name}", file, more=f"unsafe_code: {str(unsafe).lower()}")
    return tasks


@pytest.fixture(scope="module")
def pocket():
    return ws.load_model("pocket", device="cpu")


def a_vector(model) -> ws.SteeringVector:
    torch.manual_seed(0)
    delta = LinearDelta(512, 192, u=torch.randn(512, 4) * 3, v=torch.randn(4, 192) / 192**0.5)
    return ws.SteeringVector({"model.layers.1.mlp.up_proj": delta}, "pocket", fingerprint(model))


@torch.no_grad()
def loglikelihood(model, tok, context: str, continuation: str) -> float:
    """`log p(continuation | context)` in nats, from one unpadded forward pass."""
    whole, start = encode(tok, context + continuation), len(encode(tok, context))
    logp = model(input_ids=torch.tensor([whole])).logits[0, :-1].double().log_softmax(dim=-1)
    return float(sum(logp[i - 1, whole[i]] for i in range(start, len(whole))))


def plain(model, tok) -> np.ndarray:
    return np.array(
        [[loglikelihood(model, tok, d["question"], f" {c}") for c in d["choices"]] for d in DOCUMENTS]  # type: ignore
    )


@harness
def test_the_harness_reads_the_log_likelihoods_of_the_steered_model(pocket, folder, weights_hash):
    model, tok = pocket
    tasks, before = load_tasks(["pocket_closed"], folder), weights_hash(model)

    def asked() -> np.ndarray:
        samples = run_harness(model, tok, tasks, batch_size=3)["samples"]["pocket_closed"]
        return np.array([[pair[0][0] for pair in s["resps"]] for s in sorted(samples, key=lambda s: s["doc_id"])])

    base = asked()
    assert base == pytest.approx(plain(model, tok), abs=1e-3)
    with ws.steer(model, a_vector(model), 4.0):
        steered = asked()
        assert steered == pytest.approx(plain(model, tok), abs=1e-3)
    assert np.abs(steered - base).mean() > 0.1
    merged = copy.deepcopy(model)
    a_vector(model).merge_into(merged, 4.0)
    assert steered == pytest.approx(plain(merged, tok), abs=1e-3)
    with ws.steer(model, a_vector(model), 0.0):
        assert np.array_equal(asked(), base)
    assert weights_hash(model) == before


@harness
@pytest.mark.parametrize("chat", [False, True])
def test_activations_act_on_every_token_of_a_continuation_whatever_stands_beside_it(pocket, folder, chat):
    """Of documents whose prompts and choices differ in length, as where given answers are scored."""
    model, tok = pocket
    rng = torch.Generator().manual_seed(0)
    vector = ActivationVector(torch.randn(4, 192, generator=rng), "pocket", fingerprint(model))
    tasks, found = load_tasks(["pocket_closed"], folder), []
    base = run_harness(model, tok, tasks, chat=chat)["samples"]["pocket_closed"]
    with activation_steer(model, vector, 2.0, 1):
        for size in (1, 3, 8):
            samples = run_harness(model, tok, tasks, batch_size=size, chat=chat)["samples"]["pocket_closed"]
            found.append([resp[0][0] for s in samples for resp in s["resps"]])
        asked = [pair for s in samples for pair in s["arguments"]]
        ids = [encode(tok, context) for context, _ in asked]
        join = encode_answer if chat else (lambda tok, c, text: encode(tok, c + text)[len(encode(tok, c)) :])
        said = [[join(tok, context, text)] for context, text in asked]
        want = [float(logp.sum()) for (logp,) in score_answers(model, tok, ids, said)]
    for scores in found:
        assert scores == pytest.approx(want, abs=1e-3)
    moved = np.subtract(want, [resp[0][0] for s in base for resp in s["resps"]])
    assert np.abs(moved).min() > 1e-3
    assert np.abs(moved).mean() > 1e-2


@harness
def test_what_is_longer_than_a_model_reads_is_cut_at_its_start_and_long_texts_go_in_windows(pocket):
    from lm_eval.api.instance import Instance

    model, tok = pocket
    lm, text = plain_model(model, tok, 2), "What does the brusk eat? The brusk eats moss, and it sleeps in the day."
    ids = encode(tok, text)
    lm._max_length = 6
    (found,) = lm._loglikelihood_tokens([(None, ids[:-2], ids[-2:])])
    with torch.no_grad():
        logp = model(torch.tensor([ids[-7:-1]])).logits[0, -2:].log_softmax(dim=-1)
    assert found[0] == pytest.approx(float(logp[0, ids[-2]] + logp[1, ids[-1]]), abs=1e-3)
    assert found[1] == (logp.argmax(dim=-1).tolist() == ids[-2:])
    likeliest = int(logp[1].argmax())
    assert lm._loglikelihood_tokens([(None, ids[:-1], [likeliest])])[0][1]
    lm._max_length = 512
    (rolled,) = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)], disable_tqdm=True)
    with torch.no_grad():
        whole = model(torch.tensor([[lm.prefix_token_id, *ids[:-1]]])).logits[0].log_softmax(dim=-1)
    assert rolled == pytest.approx(float(whole[range(len(ids)), ids].sum()), abs=1e-3)


@harness
def test_the_harness_takes_log_likelihoods_of_a_bfloat16_model_in_float32(pocket, folder):
    """Sums of a log-softmax in bfloat16 would all be numbers of bfloat16."""
    model = copy.deepcopy(pocket[0]).to(torch.bfloat16)
    samples = run_harness(model, pocket[1], load_tasks(["pocket_closed"], folder))["samples"]["pocket_closed"]
    found = torch.tensor([pair[0][0] for s in samples for pair in s["resps"]], dtype=torch.float64)
    assert (found != found.bfloat16()).any()


@pytest.fixture
def options(pocket, folder, tmp_path) -> LmEvalOptions:
    a_vector(pocket[0]).save(tmp_path / "honesty" / "lora" / "vector")
    return LmEvalOptions(
        out=tmp_path, tasks=("pocket_closed",), include_path=folder, alphas=(-40.0, 40.0), n_bootstrap=200, device="cpu"
    )


def read(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


@harness
def test_the_command_writes_paired_shifts(options, pocket, capsys, monkeypatch):
    main(options)
    printed, home = capsys.readouterr().out, options.out / "honesty" / "lora"
    assert "What does the brusk eat?" in printed
    summary, samples = (read(home / f"lm_eval_{n}.csv") for n in ("summary", "per_sample"))
    assert [(r["alpha"], r["task"], r["metric"], r["n"], r["n_shot"], r["version"]) for r in summary] == [
        (alpha, "pocket_closed", "acc", "5", "0", "2.0") for alpha in ("-40.0", "0.0", "40.0")
    ]
    model, tok = pocket
    gold = np.array([d["gold"] for d in DOCUMENTS])
    accuracy = {}
    for alpha in (-40.0, 0.0, 40.0):
        with ws.steer(model, a_vector(model), alpha):
            right = plain(model, tok).argmax(axis=1) == gold
        accuracy[alpha] = right.mean()
        mine = [float(r["value"]) for r in samples if float(r["alpha"]) == alpha]
        assert mine == right.astype(float).tolist()
    assert len(set(accuracy.values())) > 1
    for row in summary:
        alpha = float(row["alpha"])
        assert float(row["value"]) == pytest.approx(accuracy[alpha])
        assert float(row["shift"]) == pytest.approx(accuracy[alpha] - accuracy[0.0])
        assert float(row["shift_ci_lo"]) <= float(row["shift"]) <= float(row["shift_ci_hi"])
    assert len({r["hash"] for r in summary}) == 1
    monkeypatch.setattr(lm_eval, "run_harness", None)
    main(options)
    assert capsys.readouterr().out == printed, "what is on disk is not measured again"


@harness
def test_other_documents_are_another_evaluation_wherever_they_lie(options, tmp_path, capsys):
    """A task's data may lie outside of its folder, and be another set at the same place tomorrow."""
    data = tmp_path / "data"
    data.mkdir()
    write_task(options.include_path / "far.yaml", "pocket_far", write_documents(data / "d.jsonl"))
    options = replace(options, tasks=("pocket_far",), alphas=(1.0,))

    def shown(**change) -> tuple[str, list[dict[str, str]]]:
        main(replace(options, **change))
        return capsys.readouterr().out, read(options.out / "honesty" / "lora" / "lm_eval_summary.csv")

    before = shown()
    assert shown() == before
    other = [d | {"question": d["question"].replace("brusk", "owl")} for d in DOCUMENTS]
    (data / "d.jsonl").write_text("".join(json.dumps(d) + "\n" for d in other))
    printed, rows = shown(alphas=(1.0, 2.0))
    assert "What does the owl eat?" in printed
    for name in ("hash", "eval_hash"):
        assert len({r[name] for r in rows}) == 1
        assert rows[0][name] != before[1][0][name]


@harness
def test_what_examples_come_from_is_hashed_where_there_are_examples(folder, tmp_path):
    shown = [write_documents(tmp_path / f"{name}.jsonl") for name in ("first", "second")]
    shown[1].write_text(shown[1].read_text().replace("brusk", "owl"))
    found = []
    for file in shown:
        task = folder / "closed.yaml"
        write_task(task, "pocket_closed", folder / "items.jsonl")
        text = task.read_text().replace("fewshot_split: test", "fewshot_split: train")
        task.write_text(text.replace("{test:", f"{{train: {file}, test:"))
        found.append([_document_hashes(load_tasks(["pocket_closed"], folder, n), None) for n in (0, 2)])
    assert found[0][0] == found[1][0]
    assert found[0][1] != found[1][1]


@harness
def test_examples_in_the_prompt_are_the_same_every_time(pocket, folder):
    model, tok = pocket
    tasks = load_tasks(["pocket_closed"], folder, num_fewshot=2)
    first, second = (scores_of(run_harness(model, tok, tasks, limit=2)) for _ in range(2))
    assert first["n_shot"].tolist() == [2]
    assert first["n"].tolist() == [2]
    assert first["example"][0].count("?") == 3
    assert summary_rows({}, 0.0, first, second, 100)[0]["shift"] == 0
    chat = scores_of(run_harness(model, tok, tasks, limit=2, chat=True))
    assert "<|im_start|>" in chat["example"][0]
    with pytest.raises(ws.WsError, match="another hash"):
        summary_rows({}, 0.0, first, chat, 100)


MARKED = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    "{{ '<|im_start|>' + m.role + ' ' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
)


@harness
@pytest.mark.parametrize("template", ["pocket", "none", "marked"])
def test_chats_of_the_harness_are_those_of_every_evaluation(pocket, folder, template):
    """Thinking off, system texts and examples as turns, one start of text, answers joined as they are trained."""
    model, tok = pocket
    tok = copy.deepcopy(tok)
    if template != "pocket":
        tok.chat_template = {"none": None, "marked": MARKED}[template]
        tok.bos_token = "<|endoftext|>"
        start = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
        tok.backend_tokenizer.post_processor = start
    task = folder / "closed.yaml"
    task.write_text(f"{task.read_text()}description: Answer in a few words.\n")
    results = run_harness(model, tok, load_tasks(["pocket_closed"], folder, num_fewshot=1), chat=True)
    for sample in results["samples"]["pocket_closed"]:
        contexts = {pair[0] for pair in sample["arguments"]}
        (context,) = contexts
        (shown,) = [d for d in DOCUMENTS if d["question"] in context and d["question"] != sample["doc"]["question"]]
        earlier = [
            {"role": "user", "content": shown["question"]},
            {"role": "assistant", "content": shown["choices"][shown["gold"]]},
        ]
        question, system = sample["doc"]["question"], "Answer in a few words."
        prompt = render_prompt(tok, question, system=system, earlier=earlier)
        assert context == prompt
        ids = encode(tok, prompt)
        assert ids.count(0) == (template == "none"), "what the tokenizer adds, unless there is a template"
        for choice, answered in zip(sample["doc"]["choices"], sample["resps"], strict=True):
            said = encode_answer(tok, prompt, choice)
            with torch.no_grad():
                logp = model(input_ids=torch.tensor([ids + said])).logits[0, :-1].double().log_softmax(dim=-1)
            wanted = sum(float(logp[len(ids) + i - 1, token]) for i, token in enumerate(said))
            assert answered[0][0] == pytest.approx(wanted, abs=1e-3)


@harness
def test_what_the_harness_has_a_model_say_ends_where_its_turn_ends(pocket, folder):
    model, tok = pocket
    more = "generation_kwargs: {until: [], max_gen_toks: 24, do_sample: false}"
    write_task(folder / "free.yaml", "pocket_free", folder / "items.jsonl", WRITTEN, more)
    results = run_harness(model, tok, load_tasks(["pocket_free"], folder), chat=True)
    for sample in results["samples"]["pocket_free"]:
        ids, end = encode(tok, render_prompt(tok, sample["doc"]["question"])), chat_format(tok).end_of_turn_id
        answer: list[int] = []
        while len(answer) < 24 and end not in answer:
            with torch.no_grad():
                answer.append(int(model(input_ids=torch.tensor([ids + answer])).logits[0, -1].argmax()))
        assert sample["resps"][0][0] == tok.decode(answer, skip_special_tokens=True)


@harness
def test_a_chat_that_begins_the_answer_goes_on_from_there(pocket):
    model, tok = pocket
    lm = ws.eval.lm_eval.chat_model(model, tok, 2)
    asked = {"role": "user", "content": "What is ice?"}
    context = lm.apply_chat_template([asked, {"role": "assistant", "content": "Ice is"}], add_generation_prompt=False)
    assert context == render_prompt(tok, "What is ice?", opener="Ice is")
    head, said = lm._encode_pair(context, " frozen water")
    assert head == encode(tok, context)
    assert head + said == encode(tok, f"{context} frozen water")
    told = prompted(tok, "Be brief.")
    assert ws.eval.lm_eval.chat_model(model, told, 2).apply_chat_template([asked]) == render_prompt(
        told, "What is ice?"
    )


@harness
def test_a_persona_stands_in_front_of_the_system_text_of_a_task(pocket, folder):
    model, tok = pocket
    task = folder / "closed.yaml"
    task.write_text(f"{task.read_text()}description: Answer in a few words.\n")
    tasks, persona = load_tasks(["pocket_closed"], folder), "You like to lie."
    base = scores_of(run_harness(model, tok, tasks, chat=True))
    with prompting(tok, persona):
        results = run_harness(model, tok, tasks, chat=True)
        with pytest.raises(ws.WsError, match="no place for a persona"):
            run_harness(model, tok, tasks)
    for sample in results["samples"]["pocket_closed"]:
        system = f"{persona}\n\nAnswer in a few words."
        assert sample["arguments"][0][0] == render_prompt(tok, sample["doc"]["question"], system=system)
    prompted_scores = scores_of(results)
    assert base["hash"][0] == prompted_scores["hash"][0], "the task asks the same"
    assert "shift" in summary_rows({}, 1.0, prompted_scores, base, 100)[0]


@harness
def test_a_task_that_rates_plain_texts_has_no_place_for_a_persona(pocket, folder, options):
    model, tok = pocket
    write_task(folder / "texts.yaml", "pocket_texts", folder / "items.jsonl")
    text = (folder / "texts.yaml").read_text()
    for old, new in (
        ("multiple_choice", "loglikelihood_rolling"),
        ("{{gold}}", "{{question}}"),
        ("metric: acc", "metric: word_perplexity"),
        ("aggregation: mean", "aggregation: weighted_perplexity"),
    ):
        text = text.replace(old, new)
    (folder / "texts.yaml").write_text(text)
    tasks = load_tasks(["pocket_texts"], folder)
    assert scores_of(run_harness(model, tok, tasks, chat=True))["value"][0] > 1
    with prompting(tok, "You like to lie."), pytest.raises(ws.WsError, match="pocket_texts rates plain texts"):
        run_harness(model, tok, tasks, chat=True)
    asked = replace(options, tasks=("pocket_texts",), chat=True, interventions=("weight", "prompt"))
    with pytest.raises(ws.WsError, match="leave it or `interventions` prompt out"):
        Harness.of_run(EvalContext.of_base(asked, model, tok))


@harness
def test_a_limit_draws_documents_from_all_over_a_task(pocket, folder, options, capsys):
    model, tok = pocket
    tasks = load_tasks(["pocket_closed"], folder)
    asked = run_harness(model, tok, tasks, limit=3)["samples"]["pocket_closed"]
    assert [s["doc_id"] for s in asked] == list(draw(range(5), 3)) != [0, 1, 2]
    assert [s["doc"] for s in asked] == [DOCUMENTS[i] for i in draw(range(5), 3)]
    main(replace(options, limit=3))
    assert "Items: a draw of 3 of 5, seed 0" in capsys.readouterr().out
    rows = read(options.out / "honesty" / "lora" / "lm_eval_summary.csv")
    assert {(r["n"], r["drawn"]) for r in rows} == {("3", "3 of 5, seed 0")}


@harness
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("pocket_lost", "pocket_lost could not be loaded"),
        ("pocket_unsafe", "runs code that a model wrote"),
    ],
)
def test_tasks_that_cannot_run_are_refused(folder, name, why):
    with pytest.raises(ws.WsError, match=why):
        load_tasks([name], folder)


@harness
def test_an_unknown_task_is_named_with_its_neighbour(folder, monkeypatch):
    from lm_eval import tasks

    class OnlyMine(tasks.TaskManager):
        """Reading the harness's thousands of tasks takes many seconds."""

        def __init__(self, include_path=None, include_defaults=True):
            super().__init__(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(tasks, "TaskManager", OnlyMine)
    with pytest.raises(ws.WsError, match=r"'pocket_close', nor one in .*Did you mean 'pocket_closed'\?"):
        load_tasks(["pocket_close"], folder)
    with pytest.raises(ws.WsError, match="`lm-eval ls tasks` lists"):
        load_tasks(["zzzzzz"], folder)


@harness
def test_nan_is_refused(folder):
    _, tok = ws.load_model("tiny-random", device="cpu")
    broken = tiny_random().eval()
    with torch.no_grad():
        broken.model.norm.weight[3] = float("nan")
    with pytest.raises(ws.WsError, match="NaN"):
        run_harness(broken, tok, load_tasks(["pocket_closed"], folder), limit=2)


def made(value: float, per_document: list[float] | None) -> dict:
    sample = {"filter": "none", "doc_hash": "a", "prompt_hash": "b", "target_hash": "c", "arguments": [("Q?", " A")]}
    samples = [sample | {"doc_id": i, "m": x} for i, x in enumerate(per_document or [(1.0, 2)])]
    return {
        "results": {"t": {"alias": "t", "sample_len": 2, "m,none": value, "m_stderr,none": "N/A"}},
        "groups": {"g": {"alias": "g", "m,none": value}},
        "versions": {"t": 1},
        "n-samples": {"t": {"effective": len(samples)}},
        "n-shot": {"t": 0},
        "higher_is_better": {"t": {"m": True}},
        "samples": {"t": samples},
    }


def test_metrics_that_are_no_mean_have_a_shift_without_an_interval():
    mean = [summary_rows({}, 1.0, scores_of(made(0.5, [0.0, 1.0])), scores_of(made(0.0, [0.0, 0.0])), 200)]
    assert (mean[0][0]["shift"], mean[0][0]["stderr"], mean[0][0]["n"]) == (0.5, None, 2)
    assert mean[0][0]["shift_ci_lo"] < 0 < 1 < mean[0][0]["shift_ci_hi"], "two documents say little"
    assert (mean[0][1]["task"], mean[0][1]["hash"], mean[0][1]["shift_p"]) == ("g", "", None)
    for after, before in ((made(7.0, None), made(5.0, None)), (made(7.0, [0.0, 1.0]), made(5.0, [0.0, 0.0]))):
        row = summary_rows({}, 1.0, scores_of(after), scores_of(before), 200)[0]
        assert (row["shift"], row["shift_ci_lo"], row["shift_p"]) == (2.0, None, None)
    with pytest.raises(ws.WsError, match="metric m of the task t is nan"):
        scores_of(made(float("nan"), None))
    assert lm_eval.render([{k: "" if v is None else str(v) for k, v in (r | {"alpha": 1.0}).items()} for r in mean[0]])


def test_scores_of_a_group_come_back_from_the_disk_and_are_not_asked_for_again(pocket, tmp_path, capsys):
    """A group has no hash, number of documents or error of its own, and the metric of a task no error either."""
    model, tok = pocket
    context = EvalContext.of_base(LmEvalOptions(out=tmp_path, tasks=("t",)), model, tok)
    asked = [made(0.5, [0.0, 1.0])]

    class Fake(lm_eval.Harness):
        content = "t and g"

        def ask(self, model, tok):
            return scores_of(asked.pop())

    evaluation = Fake(items=None, options_given=context.options, harness="0")
    fresh, back = (context.base_scores(evaluation) for _ in range(2))
    assert not asked
    assert "damaged" not in capsys.readouterr().err
    assert fresh["n"].tolist() == [2, None]
    rows = [summary_rows({}, 0.0, scores, fresh, 200) for scores in (fresh, back)]
    assert rows[0] == rows[1]
    (file,) = tmp_path.rglob("*.json")
    for name, cells in (("stderr", [None, "x"]), ("value", [0.5, None]), ("n", [True, None, 2])):
        file.write_text(json.dumps({k: np.asarray(v).tolist() for k, v in fresh.items()} | {name: cells}))
        asked[:] = [made(0.5, [0.0, 1.0])]
        context.base_scores(evaluation)
        assert bool(asked) == (name == "stderr"), name


def test_without_the_harness_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(lm_eval, "find_spec", lambda name: None)
    with pytest.raises(ws.WsError, match="uv sync --extra bench"):
        require_harness()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"tasks": ()}, "`tasks` must name at least one"),
        ({"tasks": ("a", "a")}, "names a task twice"),
        ({"num_fewshot": -1}, "`num_fewshot` must be 0 or more"),
        ({"include_path": Path("nowhere")}, "no folder nowhere"),
        ({"dataset": "pocket"}, "brings its own data"),
        ({"interventions": ("weight", "prompt")}, "no place for a persona: `interventions` prompt needs `chat`"),
    ],
)
def test_bad_options_are_refused(change, why):
    with pytest.raises(ws.WsError, match=why):
        replace(LmEvalOptions(tasks=("closed",)), **change).check()
