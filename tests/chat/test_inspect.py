"""`ws/...` as a model of Inspect: what a task is answered with, what is refused, and the command that finds it."""

from __future__ import annotations

import asyncio
import copy
import json
import os
import socket
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import torch
from test_session import plain_greedy

import ws
from support.serving import a_vector
from ws.analysis.controls import draw_seed
from ws.chat.batching import Request
from ws.chat.protocol import LOWEST
from ws.diff import vector_digest
from ws.lm.models import encode, render_prompt
from ws.steer import _STEERED

pytest.importorskip("inspect_ai", reason="needs the extra `inspect`")

from inspect_ai import Task, eval
from inspect_ai.dataset import Sample
from inspect_ai.log import list_eval_logs, read_eval_log
from inspect_ai.model import (
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageTool,
    ChatMessageUser,
    ContentImage,
    ContentReasoning,
    ContentText,
    GenerateConfig,
    ResponseSchema,
    get_model,
)
from inspect_ai.scorer import includes
from inspect_ai.solver import generate, system_message
from inspect_ai.tool import ToolCall, ToolInfo
from inspect_ai.util import JSONSchema

from ws.chat import inspect_entry  # noqa: F401, it registers the name
from ws.chat.inspect_provider import _ENGINES, MAX_TOKENS, InspectOptions, prompt_of

ROOT = Path(__file__).parents[2]
QUESTIONS = ("Is ice cold?", "What do birds fly with?", "Describe Petra.")
GREEDY = {"temperature": 0, "max_tokens": 14}


@pytest.fixture(scope="module")
def pocket():
    return ws.load_model("pocket", device="cpu")


@pytest.fixture(scope="module")
def vectors() -> dict[str, ws.SteeringVector]:
    """`honesty`, calibrated at -2 and +4, and its opposite `tone`, which is not; both lie in `places`."""
    return {"honesty": a_vector(), "tone": -1 * a_vector()}


@pytest.fixture(scope="module")
def places(vectors, tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("vectors")
    for name, vector in vectors.items():
        vector.save(folder / name)
    sides = {"negative": {"alpha": -2.0, "converged": True}, "positive": {"alpha": 4.0, "converged": True}}
    calibration = {"format": 1, "subject": vector_digest(vectors["honesty"]), **sides}
    (folder / "honesty" / "calibration.json").write_text(json.dumps(calibration), encoding="utf-8")
    return [str(folder / name) for name in vectors]


@pytest.fixture(autouse=True)
def nothing_is_left():
    """A test closes what it opened; the engine of models that Inspect keeps goes with the process."""
    yield
    _ENGINES.close()
    assert not _STEERED


@pytest.fixture
def model(places):
    """Makes models that are closed at the end."""
    made = []

    def make(steering=None, config=None, **arguments):
        given = {"vectors": places, "device": "cpu"} | arguments
        given |= {} if steering is None else {"steering": steering}
        made.append(get_model("ws/pocket", config=config or GenerateConfig(), memoize=False, **given))
        return made[-1]

    return make


def merged(pocket, vectors, strengths):
    """A copy of the model with the changes in its weights."""
    twin, alpha = copy.deepcopy(pocket[0]), strengths.get("honesty", 0.0) - strengths.get("tone", 0.0)
    if alpha:
        vectors["honesty"].merge_into(twin, alpha)
    return twin


def task(*solvers) -> Task:
    samples = [Sample(input=q, target=t) for q, t in zip(QUESTIONS, ("yes", "wings", "Petra"), strict=True)]
    return Task(dataset=samples, solver=[*solvers, generate()], scorer=includes())


def ask(model, messages, **config):
    return asyncio.run(model.generate(messages, config=GenerateConfig(**config)))


# ---- a task ---------------------------------------------------------------------------------------------------------


def test_a_task_is_answered_by_the_model_at_its_strengths(pocket, vectors, model, tmp_path, monkeypatch):
    """Against plain decoding of merged models, one at a time; nothing is fetched meanwhile."""

    def unreachable(*args, **kwargs):
        raise AssertionError(f"asked for {args}")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    answers = []
    for steering, strengths in (
        (None, {}),
        ({"honesty": "+1u"}, {"honesty": 4.0}),
        ({"honesty": "-0.5u", "tone": 2}, {"honesty": -1.0, "tone": 2.0}),
        (-1.5, {"honesty": -1.5, "tone": -1.5}),
    ):
        (log,) = eval(
            task(system_message("Be brief.")), model=model(steering), log_dir=str(tmp_path), display="none", **GREEDY
        )
        assert log.status == "success", log.error
        alone = merged(pocket, vectors, strengths)
        prompts = [render_prompt(pocket[1], q, system="Be brief.") for q in QUESTIONS]
        texts = [plain_greedy(alone, pocket[1], prompt, GREEDY["max_tokens"]) for prompt in prompts]
        outputs = [sample.output for sample in log.samples]
        assert [output.completion for output in outputs] == texts
        assert [output.usage.input_tokens for output in outputs] == [len(encode(pocket[1], p)) for p in prompts]
        assert all(output.usage.total_tokens > output.usage.input_tokens for output in outputs)
        stored = read_eval_log(log.location)
        assert [sample.output.completion for sample in stored.samples] == texts
        assert stored.eval.model == "ws/pocket"
        assert stored.eval.model_args.get("steering") == steering, "the strengths are on record"
        answers.append(tuple(texts))
    assert len(list_eval_logs(str(tmp_path))) == 4
    assert len(set(answers)) == 3, "the last two cancel each other"
    assert answers[3] == answers[0]


def test_samples_share_a_batch_and_keep_their_strengths(pocket, vectors, model):
    steered = model()
    alphas = [-4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0, "+1u"]

    async def all_at_once():
        bodies = [GenerateConfig(**GREEDY, extra_body={"steering": {"honesty": a}}) for a in alphas]
        return await asyncio.gather(*(steered.generate(QUESTIONS[2], config=body) for body in bodies))

    outputs = asyncio.run(all_at_once())
    prompt = render_prompt(pocket[1], QUESTIONS[2])
    for alpha, output in zip([*alphas[:-1], 4.0], outputs, strict=True):
        alone = merged(pocket, vectors, {"honesty": alpha})
        assert output.completion == plain_greedy(alone, pocket[1], prompt, GREEDY["max_tokens"])
    stats = steered.api.engine.scheduler.stats
    assert stats.steps < stats.tokens / 2, "one pass gives several rows a token"
    assert steered.api.max_connections() == steered.api.engine.scheduler.max_batch


# ---- settings -------------------------------------------------------------------------------------------------------


def test_choices_are_drawn_as_the_engine_draws_them(model):
    steered = model({"honesty": 1}, reproducible=True)
    config = {"temperature": 1.3, "top_p": 0.8, "seed": 2**32 + 3, "num_choices": 3, "max_tokens": 10}
    output = ask(steered, QUESTIONS[1], **config)
    engine = steered.api.engine
    tokens = encode(engine.tok, render_prompt(engine.tok, QUESTIONS[1]))
    asked = [Request(tokens, {"honesty": 1.0}, 10, 1.3, 0.8, draw_seed(3, n)) for n in range(3)]
    answers = engine.scheduler.submit(*asked)
    texts = ["".join(piece.text for piece in answer) for answer in answers]
    assert [choice.message.text for choice in output.choices] == texts
    assert len(set(texts)) > 1
    assert output.usage.output_tokens == sum(answer.n_tokens for answer in answers)
    assert ask(steered, QUESTIONS[1], **config).choices[2].message.text == texts[2]
    hot = {"temperature": 2.0, "max_tokens": 10}
    assert len({ask(steered, QUESTIONS[1], **hot).completion for _ in range(4)}) > 1, "without a seed by chance"


def test_log_probabilities_are_those_of_the_merged_model(pocket, vectors, model):
    prompt = render_prompt(pocket[1], QUESTIONS[1])
    output = ask(model({"honesty": 2}), QUESTIONS[1], **GREEDY, logprobs=True, top_logprobs=3)
    content = output.choices[0].logprobs.content
    assert len(content) == output.usage.output_tokens
    ids = encode(pocket[1], prompt)
    with torch.no_grad():
        for entry in content:
            logp = merged(pocket, vectors, {"honesty": 2.0})(torch.tensor([ids])).logits[0, -1].log_softmax(dim=-1)
            top = logp.topk(3)
            assert [t.logprob for t in entry.top_logprobs] == pytest.approx(top.values.tolist(), abs=1e-4)
            assert entry.logprob == pytest.approx(float(top.values[0]), abs=1e-4)
            assert entry.token == pocket[1].decode([int(top.indices[0])])
            ids.append(int(top.indices[0]))
    assert b"".join(bytes(e.bytes) for e in content).decode().strip().startswith(output.completion)
    bare = ask(model(), QUESTIONS[1], **GREEDY, logprobs=True).choices[0].logprobs.content
    assert all(entry.top_logprobs is None for entry in bare)
    assert all(LOWEST <= entry.logprob <= 0 for entry in bare)
    assert ask(model(), QUESTIONS[1], **GREEDY).choices[0].logprobs is None


def test_why_an_answer_ended_is_given_in_inspects_words(pocket, model):
    steered = model()
    whole = ask(steered, QUESTIONS[1], temperature=0)
    assert whole.stop_reason == "stop"
    assert whole.usage.output_tokens < MAX_TOKENS
    word = whole.completion.split()[2]
    stopped = ask(steered, QUESTIONS[1], temperature=0, stop_seqs=["", word, "no such text"])
    assert (stopped.completion, stopped.stop_reason) == (
        whole.completion[: whole.completion.index(word)].strip(),
        "stop",
    )
    assert ask(steered, QUESTIONS[1], temperature=0, max_tokens=2).stop_reason == "max_tokens"
    room = steered.api.engine.scheduler.room
    long = ask(steered, "bird " * room)
    assert (long.stop_reason, long.usage) == ("model_length", None)
    assert str(room) in long.error
    words = next(
        n for n in range(room, 0, -1) if len(encode(pocket[1], render_prompt(pocket[1], "a " * n))) <= room - 3
    )
    near = ask(steered, "a " * words, temperature=2.0, max_tokens=400, seed=0)
    assert near.stop_reason in ("model_length", "stop")
    assert near.usage.total_tokens <= room


def test_messages_become_the_prompt_of_a_conversation(pocket, model):
    api, tok = model().api, pocket[1]
    user, assistant = ChatMessageUser(content="A?"), ChatMessageAssistant(content="B.")
    assert prompt_of(api.engine, [user]) == render_prompt(tok, "A?")
    parts = [ContentReasoning(reasoning="hm"), ContentText(text="B.")]
    for answer in (assistant, ChatMessageAssistant(content=parts)):
        messages = [ChatMessageSystem(content="S"), ChatMessageSystem(content="T"), user, answer]
        earlier = [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "B."}]
        whole = render_prompt(tok, "C?", system="S\n\nT", earlier=earlier)
        assert prompt_of(api.engine, [*messages, ChatMessageUser(content="C?")]) == whole
    begun = prompt_of(api.engine, [user, assistant])
    assert begun == render_prompt(tok, "A?", opener="B."), "an answer that was begun is continued"


# ---- what is not done -----------------------------------------------------------------------------------------------

CALL = ToolCall(id="1", function="look", arguments={})
SCHEMA = ResponseSchema(name="s", json_schema=JSONSchema(type="object"))


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"response_schema": SCHEMA}, "response_schema"),
        ({"frequency_penalty": 0.5, "presence_penalty": 0.5}, "frequency_penalty, presence_penalty"),
        ({"top_k": 5}, "top_k"),
        ({"logit_bias": {3: 1.0}}, "logit_bias"),
        ({"best_of": 2}, "best_of"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"extra_body": {"steering": {}, "tone": 1}}, "tone"),
        ({"extra_body": {"steering": {"honest": 1}}}, "Did you mean 'honesty'"),
        ({"extra_body": {"steering": {"honesty": [1]}}}, "honesty"),
        ({"extra_body": {"steering": {"tone": "+1u"}}}, "no calibration"),
        ({"top_logprobs": 2}, "logprobs"),
        ({"top_p": 1.5}, "top_p"),
        ({"temperature": -1.0}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"num_choices": 0}, "num_choices"),
        ({"num_choices": 10**9}, "num_choices"),
        ({"logprobs": True, "top_logprobs": 10**6}, "top_logprobs"),
    ],
)
def test_settings_that_would_be_ignored_are_refused_by_name(model, config, named):
    with pytest.raises(ws.WsError, match=named):
        ask(model(), QUESTIONS[0], **config)


def test_what_asks_for_nothing_is_no_reason_to_refuse(model):
    neutral = {"frequency_penalty": 0.0, "logit_bias": {}, "internal_tools": False, "batch": False, "extra_body": {}}
    neutral |= {"reasoning_effort": "none", "top_k": -1, "best_of": 1, "parallel_tool_calls": True}
    assert ask(model(), QUESTIONS[0], **GREEDY, **neutral).completion == ask(model(), QUESTIONS[0], **GREEDY).completion


@pytest.mark.parametrize(
    ("messages", "named"),
    [
        ([ChatMessageUser(content=[ContentText(text="See"), ContentImage(image="data:image/png;base64,")])], "image"),
        ([ChatMessageUser(content="A?"), ChatMessageAssistant(content="", tool_calls=[CALL])], "tools"),
        ([ChatMessageUser(content="A?"), ChatMessageTool(content="3"), ChatMessageUser(content="B?")], "tools"),
        ([ChatMessageUser(content="A?"), ChatMessageSystem(content="S"), ChatMessageUser(content="B?")], "system"),
        ([ChatMessageSystem(content="S")], "the user's"),
        ([ChatMessageSystem(content="S"), ChatMessageAssistant(content="A")], "the user's"),
        ([ChatMessageUser(content="\ud800")], "A message"),
        ([ChatMessageUser(content="A?"), ChatMessageAssistant(content="\udce4")], "A message"),
    ],
)
def test_messages_that_are_not_read_are_refused(model, messages, named):
    with pytest.raises(ws.WsError, match=named):
        prompt_of(model().api.engine, messages)


def test_tools_are_refused_by_name(model):
    with pytest.raises(ws.WsError, match="look"):
        asyncio.run(model().generate("A?", tools=[ToolInfo(name="look", description="Looks.")]))


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"steering": {"honest": 1}}, "Did you mean 'honesty'"),
        ({"steering": {"tone": "+1u"}}, "no calibration"),
        ({"steering": {"honesty": float("nan")}}, "finite"),
        ({"steering": {"honesty": True}}, "honesty"),
        ({"steering": "much"}, "not understood"),
        ({"steering": {1: 1}}, "no vector named '1'"),
        ({"out": 3}, "out"),
        ({"stering": 1}, "Did you mean 'steering'"),
        ({"max_batch": "many"}, "max_batch"),
        ({"max_batch": 0}, "max_batch"),
        ({"vectors": ["no/such/vector"]}, "no vector named"),
        ({"vectors": 3}, "vectors"),
        ({"base_url": "http://127.0.0.1:1/v1"}, "openai-api"),
    ],
)
def test_a_model_that_cannot_be_had_is_refused_when_it_is_asked_for(model, arguments, why):
    with pytest.raises(ws.WsError, match=why):
        model(**arguments)
    assert not _ENGINES._shared, "nothing is kept for it"


def test_nan_ends_one_sample_with_a_sentence(model):
    steered = model()
    with pytest.raises(ws.WsError, match="too large"):
        ask(steered, QUESTIONS[0], **GREEDY, extra_body={"steering": {"honesty": 3e38}})
    assert ask(steered, QUESTIONS[0], **GREEDY).completion


# ---- engines --------------------------------------------------------------------------------------------------------


def test_models_that_differ_by_their_strengths_share_an_engine(model):
    first, second, other = model(), model({"honesty": 1}), model(reproducible=True)
    assert first.api.engine is second.api.engine is not other.api.engine
    assert first.api.connection_key() == second.api.connection_key() != other.api.connection_key()
    other.api.close()
    first.api.close()
    first.api.close()
    assert ask(second, QUESTIONS[0], **GREEDY).completion, "one still needs it"
    second.api.close()
    assert not _STEERED
    with pytest.raises(ws.WsError, match="closed"):
        ask(second, QUESTIONS[0], **GREEDY)
    assert ask(model(), QUESTIONS[0], **GREEDY).completion, "and it can be had again"


def test_answers_that_inspect_keeps_are_found_by_model_arguments(model, tmp_path, monkeypatch):
    """They are on the disk, and a vector that has been made anew has the same name."""
    monkeypatch.setenv("INSPECT_CACHE_DIR", str(tmp_path))
    asked = {"cache": True, "temperature": 2.0, "max_tokens": 12}  # by chance: the same again was not written again
    first, steered = model(), model({"honesty": 4})
    answer = ask(first, QUESTIONS[2], **asked).completion
    written = first.api.engine.scheduler.stats.tokens
    assert ask(model(), QUESTIONS[2], **asked).completion == answer
    assert first.api.engine.scheduler.stats.tokens == written
    assert ask(steered, QUESTIONS[2], **asked).completion != answer
    assert steered.api.engine.scheduler.stats.tokens > written
    again = model(base_url=first.api.base_url)
    assert again.api.base_url == first.api.base_url, "as a log brings it back"
    identities = {first.api.base_url, steered.api.base_url}
    for scale in (1, 2):
        (scale * a_vector()).save(tmp_path / "honesty")
        identities.add(model(vectors=[str(tmp_path / "honesty")]).api.base_url)
        _ENGINES.close()
    assert len(identities) == 4


def test_arguments_of_the_command_line_are_read_as_those_of_python(places):
    listed = InspectOptions.read("pocket", {"vectors": places[:1], "out": Path("runs"), "max_batch": 4})
    assert listed == InspectOptions.read("pocket", {"vectors": places[0], "out": "runs", "max_batch": 4})
    assert listed.vectors == (places[0],)
    assert listed.out == Path("runs")


def test_a_sample_that_is_given_up_leaves_the_batch(model, monkeypatch):
    steered = model()
    scheduler = steered.api.engine.scheduler
    monkeypatch.setattr(scheduler, "_ends", frozenset())  # no answer ends by itself
    config = GenerateConfig(max_tokens=400, num_choices=8)

    async def give_up():
        sample = asyncio.create_task(steered.generate(QUESTIONS[2], config=config))
        while scheduler.stats.steps < 3:
            await asyncio.sleep(0.001)
        sample.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sample

    asyncio.run(give_up())
    deadline = time.monotonic() + 20
    while scheduler.stats.running and time.monotonic() < deadline:
        time.sleep(0.01)
    assert scheduler.stats.running == 0
    assert scheduler.stats.tokens < 8 * 400, "it was not written to its end"


def test_tokens_are_counted_by_the_models_own_tokenizer(pocket, model):
    api = model().api
    assert asyncio.run(api.count_text_tokens("What do birds fly with?")) == len(
        pocket[1]("What do birds fly with?", add_special_tokens=False)["input_ids"]
    )


def test_inspect_learns_of_the_name_without_loading_torch():
    """It loads the entry points of all packages whenever it looks for anything."""
    code = "import sys, ws.chat.inspect_entry; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- the command ----------------------------------------------------------------------------------------------------

TASK = """
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import includes


@task
def birds():
    return Task(dataset=[Sample(input="What do birds fly with?", target="wings")], scorer=includes())
"""


@pytest.fixture
def inspect_command(tmp_path):
    """`inspect ARGUMENTS` beside an installed package that has the entry points of `pyproject.toml`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = ["[inspect_ai]", *(f"{k} = {v}" for k, v in project["entry-points"]["inspect_ai"].items())]
    installed = tmp_path / "installed" / "entry_points_of_ws-0.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: entry-points-of-ws\nVersion: 0\n")
    (installed / "entry_points.txt").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "birds.py").write_text(TASK, encoding="utf-8")
    path = os.pathsep.join(filter(None, [str(installed.parent), os.environ.get("PYTHONPATH")]))

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "inspect_ai", *arguments]
        env = {**os.environ, "PYTHONPATH": path, "INSPECT_DISPLAY": "plain"}
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=env)

    return run


@pytest.mark.slow
def test_the_command_finds_the_provider_and_takes_strengths(inspect_command, places, pocket, vectors, tmp_path):
    asked = ["eval", "birds.py", "--model", "ws/pocket", "-M", f"vectors={','.join(places)}", "-M", "device=cpu"]
    settings = ["--temperature", "0", "--max-tokens", "14", "--log-dir", str(tmp_path / "logs")]
    done = inspect_command(*asked, "-M", "steering={honesty: +1u, tone: 1}", *settings)
    assert done.returncode == 0, done.stdout + done.stderr
    (log,) = list_eval_logs(str(tmp_path / "logs"))
    (sample,) = read_eval_log(log).samples
    alone, prompt = merged(pocket, vectors, {"honesty": 4.0, "tone": 1.0}), render_prompt(pocket[1], QUESTIONS[1])
    assert sample.output.completion == plain_greedy(alone, pocket[1], prompt, 14)
    wrong = inspect_command(*asked, "-M", "steering={honest: 1}", *settings)
    assert wrong.returncode == 2
    assert "Did you mean 'honesty'" in wrong.stderr.splitlines()[-1]
    assert "Traceback" not in wrong.stdout + wrong.stderr
