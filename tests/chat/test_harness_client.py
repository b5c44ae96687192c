"""The lm-evaluation-harness over `ws serve`, through its own API models: it reads what it reads in the same process."""

from __future__ import annotations

from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import ws
from support.harness_tasks import DOCUMENTS, WRITTEN, write_documents, write_task
from support.serving import a_vector

pytest.importorskip("fastapi")
pytest.importorskip("lm_eval")
if find_spec("tenacity") is None:
    pytest.skip("the harness's API models need its extra `api`", allow_module_level=True)


@pytest.fixture(scope="module")
def manager(tmp_path_factory):
    """An index of two tasks of this test's own."""
    from lm_eval.tasks import TaskManager

    folder = tmp_path_factory.mktemp("tasks")
    data = write_documents(folder / "items.jsonl")
    write_task(folder / "choice.yaml", "pocket_choice", data)
    more = 'generation_kwargs: {until: ["."], max_gen_toks: 12, temperature: 0.0}'
    write_task(folder / "written.yaml", "pocket_written", data, WRITTEN, more)
    return TaskManager(include_path=str(folder), include_defaults=False)


def asked(manager, model, arguments, task: str, **more):
    """What the harness has read of every document, in their order."""
    from lm_eval import simple_evaluate

    results = simple_evaluate(
        model=model, model_args=arguments, tasks=[task], task_manager=manager, bootstrap_iters=0, **more
    )
    samples = sorted(results["samples"][task], key=lambda s: s["doc_id"])
    return [sample["resps"] for sample in samples], results["results"][task]


def over(address: str, path: str, model: str, **more) -> dict:
    return {"base_url": f"{address}/v1/{path}", "model": model, "max_retries": 1, "max_length": 1024, **more}


@pytest.mark.parametrize("alpha", [0, -2])
def test_log_likelihoods_over_the_server_are_those_of_the_process(manager, address, alpha):
    from lm_eval.models.huggingface import HFLM

    tokenizer = str(Path(str(files("ws") / "pocket")))
    given = over(address, "completions", f"pocket+honesty@{alpha}", tokenizer=tokenizer)
    read, scores = asked(manager, "local-completions", given, "pocket_choice")
    at_once, _ = asked(manager, "local-completions", {**given, "num_concurrent": 4, "batch_size": 3}, "pocket_choice")
    model, tok = ws.load_model("pocket", device="cpu")
    with ws.steer(model, a_vector(), alpha):
        lm = HFLM(pretrained=model, tokenizer=tok, batch_size=1, softmax_dtype="float32")
        expected, in_process = asked(manager, lm, None, "pocket_choice")

    def numbers(answers):
        return np.array([[float(pair[0][0]) for pair in document] for document in answers])

    assert numbers(read) == pytest.approx(numbers(expected), abs=1e-3)
    assert numbers(at_once) == pytest.approx(numbers(expected), abs=1e-3)
    assert [[bool(p[0][1]) for p in d] for d in read] == [[bool(p[0][1]) for p in d] for d in expected]
    assert scores["acc,none"] == in_process["acc,none"]


def test_answers_over_the_server_are_those_of_its_own_client(manager, address):
    """Chats go through the server's template, completions from the bare question."""
    import openai

    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
    chats, _ = asked(
        manager,
        "local-chat-completions",
        over(address, "chat/completions", "pocket+honesty@-2", num_concurrent=2),
        "pocket_written",
        apply_chat_template=True,
    )
    tokenizer = str(Path(str(files("ws") / "pocket")))
    texts, _ = asked(
        manager,
        "local-completions",
        over(address, "completions", "pocket+honesty@-2", tokenizer=tokenizer),
        "pocket_written",
    )
    settings = {"model": "pocket+honesty@-2", "temperature": 0, "max_tokens": 12, "stop": ["."]}
    for document, chat, text in zip(DOCUMENTS, chats, texts, strict=True):
        question = document["question"]
        answer = client.chat.completions.create(messages=[{"role": "user", "content": question}], **settings)
        assert chat == [[answer.choices[0].message.content]]
        assert text == [[client.completions.create(prompt=question, **settings).choices[0].text]]
