"""Inspect's own client of OpenAI's API asks `ws serve`, and gets what the model in its process answers."""

from __future__ import annotations

import asyncio

import pytest

import ws
from support.serving import a_vector

pytest.importorskip("inspect_ai", reason="needs the extra `inspect`")
pytest.importorskip("openai")
pytest.importorskip("fastapi")

from inspect_ai import Task, eval
from inspect_ai.dataset import Sample
from inspect_ai.model import GenerateConfig, get_model
from inspect_ai.scorer import includes
from inspect_ai.solver import generate, system_message

from ws.chat import inspect_entry  # noqa: F401, it registers the name
from ws.chat.inspect_provider import _ENGINES

SAMPLES = [("Is ice cold?", "yes"), ("What do birds fly with?", "wings"), ("Describe Petra.", "Petra")]


@pytest.fixture
def inside(tmp_path):
    """The same model and vector in this process."""
    a_vector().save(tmp_path / "honesty")
    yield get_model("ws/pocket", memoize=False, vectors=[str(tmp_path / "honesty")], device="cpu")
    _ENGINES.close()


def over(address: str, name: str):
    return get_model(f"openai-api/ws/{name}", base_url=f"{address}/v1", api_key="none", memoize=False)


@pytest.mark.parametrize("strength", [0, -2, 4])
def test_a_task_is_answered_over_the_server_as_in_the_process(address, inside, tmp_path, strength):
    """The strength is in the model's name, or in what is sent beside the other settings."""
    samples = [Sample(input=question, target=target) for question, target in SAMPLES]
    answers = []
    named, beside = over(address, f"pocket+honesty@{strength}"), {"steering": {"honesty": strength}}
    for model, body in ((named, None), (over(address, "pocket"), beside), (inside, beside)):
        task = Task(dataset=samples, solver=[system_message("Be brief."), generate()], scorer=includes())
        settings = {"temperature": 0, "max_tokens": 14, "extra_body": body}
        (log,) = eval(task, model=model, log_dir=str(tmp_path / "logs"), display="none", **settings)
        assert log.status == "success", log.error
        answers.append([(s.output.completion, s.output.stop_reason, s.output.usage.total_tokens) for s in log.samples])
    assert answers[0] == answers[1] == answers[2]
    assert any(text for text, _, _ in answers[0])


def test_a_seed_and_log_probabilities_are_the_same_over_the_server(address, inside):
    sampled = {"temperature": 1.2, "top_p": 0.9, "seed": 5, "num_choices": 3, "max_tokens": 8}
    config = GenerateConfig(**sampled, logprobs=True, top_logprobs=2, extra_body={"steering": {"honesty": 1.5}})
    near, far = (
        asyncio.run(model.generate("Describe Petra.", config=config)) for model in (inside, over(address, "pocket"))
    )
    assert [c.message.text for c in near.choices] == [c.message.text for c in far.choices]
    assert len({c.message.text for c in near.choices}) > 1
    for a, b in zip(near.choices, far.choices, strict=True):
        assert [x.token for x in a.logprobs.content] == [x.token for x in b.logprobs.content]
        wanted = [x.logprob for x in b.logprobs.content]
        assert [x.logprob for x in a.logprobs.content] == pytest.approx(wanted, abs=1e-4)
        tops = [[t.token for t in x.top_logprobs] for x in a.logprobs.content]
        assert tops == [[t.token for t in x.top_logprobs] for x in b.logprobs.content]


def test_an_unknown_vector_fails_with_the_servers_sentence(address, inside):
    with pytest.raises(Exception, match="Did you mean 'honesty'"):
        asyncio.run(over(address, "pocket+honest@1").generate("Is ice cold?"))
    with pytest.raises(ws.WsError, match="Did you mean 'honesty'"):
        asyncio.run(inside.generate("Is ice cold?", config=GenerateConfig(extra_body={"steering": {"honest": 1}})))
