"""`ws serve` as the official `openai` client speaks to it: its own types parse every answer."""

from __future__ import annotations

import json
import math

import httpx
import pytest
import torch

import ws
from support.serving import a_vector, served
from ws.lm.models import encode, encode_text, end_ids, render_prompt

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")

QUESTION = "What do birds fly with?"
ASKED = [{"role": "user", "content": QUESTION}]
LONG = "Tell me about ice."


@pytest.fixture(scope="module")
def client(address):
    # Strictly: an answer that does not fit the client's types is an error instead of being passed on.
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, _strict_response_validation=True)


@pytest.fixture(scope="module")
def lenient(address):
    """As clients are unless told otherwise: OpenAI's types have no null in an echo, and OpenAI's answers have."""
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def plain():
    return ws.load_model("pocket", device="cpu")


def said(plain, tokens: list[int], alpha: float = 0.0, most: int = 24) -> tuple[str, list[int], torch.Tensor]:
    """The greedy answer of one row on its own: its text, its tokens with the end, and all log-probabilities."""
    model, tok = plain
    ends, written, logprobs = end_ids(model, tok), list[int](), []
    with torch.no_grad(), ws.steer(model, a_vector(), alpha):
        for _ in range(most):
            last = model(input_ids=torch.tensor([tokens + written])).logits[0, -1].double().log_softmax(-1)
            logprobs.append(last)
            written.append(int(last.argmax()))
            if written[-1] in ends:
                break
    text = tok.decode([t for t in written if t not in ends])
    return text, written, torch.stack(logprobs)


def prompt_of(plain, question: str = QUESTION, **more) -> list[int]:
    return encode(plain[1], render_prompt(plain[1], question, **more))


# ---- chats ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, -2.0, 4.0])
def test_a_chat_is_answered_at_the_strength_of_the_request(client, plain, alpha):
    given = client.chat.completions.create(
        model="pocket", messages=ASKED, temperature=0, max_tokens=24, extra_body={"steering": {"honesty": alpha}}
    )
    text, tokens, _ = said(plain, prompt_of(plain), alpha)
    assert given.choices[0].message.content == text
    assert given.choices[0].message.role == "assistant"
    assert given.usage.prompt_tokens == len(prompt_of(plain))
    assert given.usage.completion_tokens == len(tokens)
    assert given.usage.total_tokens == len(prompt_of(plain)) + len(tokens)
    assert (given.object, given.model) == ("chat.completion", "pocket")


def test_strengths_have_effects_and_come_by_number_by_unit_and_by_name(client):
    def content(model="pocket", **steering):
        body = {"steering": steering} if steering else {}
        given = client.chat.completions.create(
            model=model, messages=ASKED, temperature=0, max_tokens=24, logprobs=True, extra_body=body
        )
        return [token.logprob for token in given.choices[0].logprobs.content]

    steered = content(honesty=4)
    assert steered != content()
    for same in (
        {"honesty": "+1u"},
        {"honesty": "4"},
        {"honesty": "4.0"},
        {"tone": -4},
        {"honesty": 6, "tone": 2},
    ):
        assert content(**same) == pytest.approx(steered, abs=1e-4)
    names = ("honesty@4", "honesty@+1u", "honesty@+4", "honesty@4e0", "honesty@40e-1", "honesty@0.4e+1", "tone@-4")
    for name in (*names, "honesty@6+tone@2", "tone@+2+honesty@+6"):
        assert content(f"pocket+{name}") == pytest.approx(steered, abs=1e-4), name
    assert content("pocket+tone@2", honesty=6) == pytest.approx(steered, abs=1e-4)
    assert content("pocket", honesty=0, tone=0) == pytest.approx(content(), abs=1e-6)


def test_logprobs_are_those_of_the_steered_model(client, plain):
    given = client.chat.completions.create(
        model="pocket+honesty@-2",
        messages=ASKED,
        temperature=0,
        max_tokens=12,
        logprobs=True,
        top_logprobs=3,
    )
    text, tokens, logprobs = said(plain, prompt_of(plain), -2.0, 12)
    content = given.choices[0].logprobs.content
    assert [t.logprob for t in content] == pytest.approx(
        [float(p[t]) for p, t in zip(logprobs, tokens, strict=True)], abs=1e-3
    )
    for token, expected in zip(content, logprobs, strict=True):
        assert [t.logprob for t in token.top_logprobs] == pytest.approx(expected.topk(3).values.tolist(), abs=1e-3)
    ends = end_ids(*plain)
    raw = b"".join(bytes(t.bytes) for t, n in zip(content, tokens, strict=True) if n not in ends)
    assert raw.decode() == text


def test_logprobs_without_the_most_probable_tokens(client):
    given = client.chat.completions.create(model="pocket", messages=ASKED, max_tokens=3, logprobs=True)
    assert all(token.top_logprobs == [] for token in given.choices[0].logprobs.content)
    without = client.chat.completions.create(model="pocket", messages=ASKED, max_tokens=3)
    assert without.choices[0].logprobs is None


def test_a_conversation_with_a_system_message_and_parts(client, plain):
    messages = [
        {"role": "developer", "content": "Answer briefly."},
        {"role": "user", "content": [{"type": "text", "text": "Is ice "}, {"type": "text", "text": "cold?"}]},
        {"role": "assistant", "content": "Yes.", "refusal": None, "tool_calls": None},
        {"role": "user", "content": QUESTION},
    ]
    given = client.chat.completions.create(model="pocket", messages=messages, temperature=0, max_completion_tokens=12)
    earlier = [{"role": "user", "content": "Is ice cold?"}, {"role": "assistant", "content": "Yes."}]
    tokens = prompt_of(plain, system="Answer briefly.", earlier=earlier)
    assert given.choices[0].message.content == said(plain, tokens, most=12)[0]
    assert given.usage.prompt_tokens == len(tokens)


def test_an_answer_of_the_client_can_be_sent_back_as_it_is(client):
    first = client.chat.completions.create(model="pocket", messages=ASKED, temperature=0, max_tokens=8)
    again = [*ASKED, first.choices[0].message, {"role": "user", "content": "Why?"}]
    assert client.chat.completions.create(model="pocket", messages=again, max_tokens=8).choices


# ---- sampling -------------------------------------------------------------------------------------------------------


def texts(given) -> list[str]:
    return [choice.message.content for choice in sorted(given.choices, key=lambda c: c.index)]


def test_a_seed_gives_the_same_answers_again_and_n_gives_several(client):
    asked = {"model": "pocket", "messages": [{"role": "user", "content": LONG}], "temperature": 1.5, "max_tokens": 12}
    four = client.chat.completions.create(**asked, n=4, seed=3)
    assert [choice.index for choice in four.choices] == [0, 1, 2, 3]
    assert len(set(texts(four))) > 1
    assert texts(client.chat.completions.create(**asked, n=4, seed=3)) == texts(four)
    assert texts(client.chat.completions.create(**asked, n=1, seed=3)) == texts(four)[:1]
    assert texts(client.chat.completions.create(**asked, n=4, seed=4)) != texts(four)
    without = {tuple(texts(client.chat.completions.create(**asked, n=4))) for _ in range(3)}
    assert len(without) > 1, "without a seed chance decides"
    assert four.usage.prompt_tokens == client.chat.completions.create(**asked, n=1).usage.prompt_tokens


def test_a_negative_seed_is_a_seed(client):
    asked = {"model": "pocket", "messages": ASKED, "temperature": 1.5, "max_tokens": 8}
    assert texts(client.chat.completions.create(**asked, seed=-7)) == texts(
        client.chat.completions.create(**asked, seed=-7)
    )


def test_a_small_top_p_is_the_greedy_answer(client, plain):
    given = client.chat.completions.create(
        model="pocket", messages=ASKED, temperature=1.5, top_p=1e-6, max_tokens=12, n=3
    )
    assert set(texts(given)) == {said(plain, prompt_of(plain), most=12)[0]}


def test_stops_and_lengths_are_why_an_answer_ends(client, plain):
    whole, _, _ = said(plain, prompt_of(plain))
    asked = {"model": "pocket", "messages": ASKED, "temperature": 0, "max_tokens": 24}
    ended = client.chat.completions.create(**asked).choices[0]
    assert (ended.message.content, ended.finish_reason) == (whole, "stop")
    middle = whole[len(whole) // 2 : len(whole) // 2 + 3]
    for stop in (middle, ["never seen", middle], [whole[-1], middle]):
        stopped = client.chat.completions.create(**asked, stop=stop).choices[0]
        first = (
            min(whole.index(text) for text in stop if text in whole) if isinstance(stop, list) else whole.index(stop)
        )
        assert (stopped.message.content, stopped.finish_reason) == (whole[:first], "stop")
    cut = client.chat.completions.create(**asked | {"max_tokens": 2}).choices[0]
    assert cut.finish_reason == "length"
    assert whole.startswith(cut.message.content)


# ---- streams --------------------------------------------------------------------------------------------------------


def test_a_stream_is_the_whole_answer_in_pieces(client):
    asked = {
        "model": "pocket+honesty@1",
        "messages": [{"role": "user", "content": LONG}],
        "temperature": 1.5,
        "n": 3,
        "seed": 5,
        "max_tokens": 12,
    }
    asked |= {"logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    for choice in whole.choices:
        mine = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert mine[0].delta.role == "assistant"
        assert "".join(c.delta.content or "" for c in mine) == choice.message.content
        assert [c.finish_reason for c in mine if c.finish_reason] == [choice.finish_reason] == [mine[-1].finish_reason]
        logprobs = [t.logprob for c in mine if c.logprobs for t in c.logprobs.content]
        assert logprobs == pytest.approx([t.logprob for t in choice.logprobs.content], abs=1e-4)
    assert sum(len([c for c in chunk.choices if c.delta.content]) for chunk in chunks) > 3, "in pieces"


def test_a_stream_ends_with_done_and_has_usage_only_where_asked(address):
    body = {"model": "pocket", "messages": ASKED, "max_tokens": 4, "stream": True}
    with httpx.stream("POST", f"{address}/v1/chat/completions", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert all(event["choices"] and "usage" not in event for event in events)


def test_completions_are_streamed_too(lenient):
    asked = {"model": "pocket", "prompt": "Ice is", "temperature": 0, "max_tokens": 6, "logprobs": 1, "echo": True}
    whole = lenient.completions.create(**asked).choices[0]
    chunks = list(lenient.completions.create(**asked, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.text
    for name in ("tokens", "token_logprobs", "text_offset"):
        pieces = [v for c in chunks if c.choices[0].logprobs for v in getattr(c.choices[0].logprobs, name)]
        assert pieces == pytest.approx(getattr(whole.logprobs, name), abs=1e-4)


def test_a_helper_of_the_client_collects_a_stream(client, plain):
    with client.chat.completions.stream(model="pocket", messages=ASKED, temperature=0, max_tokens=24) as stream:
        assert stream.get_final_completion().choices[0].message.content == said(plain, prompt_of(plain))[0]


# ---- completions ----------------------------------------------------------------------------------------------------


def test_a_completion_goes_on_from_its_prompt(client, plain):
    tokens = encode_text(plain[1], "Ice is")
    text, written, _ = said(plain, tokens, 4.0, 8)
    for prompt in ("Ice is", tokens, ["Ice is"], [tokens]):
        given = client.completions.create(model="pocket+honesty@+1u", prompt=prompt, temperature=0, max_tokens=8)
        assert given.choices[0].text == text
        assert given.choices[0].logprobs is None
        assert (given.usage.prompt_tokens, given.usage.completion_tokens) == (len(tokens), len(written))


def test_several_prompts_are_answered_in_their_order_as_each_alone(client):
    prompts, asked = (
        ["Ice is", "Birds fly with their", "Grass"],
        {"model": "pocket", "max_tokens": 5, "n": 2, "seed": 9},
    )
    together = client.completions.create(prompt=prompts, **asked)
    alone = [client.completions.create(prompt=prompt, **asked).choices for prompt in prompts]
    assert [c.index for c in together.choices] == list(range(6))
    assert [c.text for c in together.choices] == [c.text for choices in alone for c in choices]


@pytest.mark.parametrize("alpha", [0.0, -2.0])
@pytest.mark.parametrize("most", [0, 1, 4])
def test_an_echo_has_the_probabilities_of_the_prompt(lenient, plain, alpha, most):
    """What evaluation harnesses take log-likelihoods from."""
    model, tok = plain
    prompt = "Ice is frozen water."
    tokens = encode_text(tok, prompt)
    given = lenient.completions.create(
        model="pocket",
        prompt=prompt,
        temperature=0,
        max_tokens=most,
        logprobs=2,
        echo=True,
        extra_body={"steering": {"honesty": alpha}},
    )
    with torch.no_grad(), ws.steer(model, a_vector(), alpha):
        expected = model(input_ids=torch.tensor([tokens])).logits[0].double().log_softmax(-1)
    choice, logprobs = given.choices[0], given.choices[0].logprobs
    n = len(tokens)
    assert choice.text.startswith(prompt)
    assert (choice.text == prompt) == (most == 0)
    assert n + given.usage.completion_tokens == len(logprobs.tokens)
    assert given.usage.completion_tokens <= most
    assert logprobs.token_logprobs[0] is None
    assert logprobs.top_logprobs[0] is None
    assert logprobs.token_logprobs[1:n] == pytest.approx(
        [float(expected[i, t]) for i, t in enumerate(tokens[1:])], abs=1e-3
    )
    for i, top in enumerate(logprobs.top_logprobs[1:n]):
        assert max(top.values()) == pytest.approx(float(expected[i].max()), abs=1e-3)
        assert logprobs.token_logprobs[i + 1] in top.values()
        assert len(top) in (2, 3)
    assert "".join(logprobs.tokens[:n]) == prompt
    assert [choice.text[at:][: len(t)] for at, t in zip(logprobs.text_offset[:n], logprobs.tokens, strict=False)] == (
        logprobs.tokens[:n]
    )


def test_an_echo_without_probabilities_is_the_prompt_as_it_was_given(client):
    prompt = "  Ice \u2014 caf\u00e9 \U0001f9ca is"
    given = client.completions.create(model="pocket", prompt=prompt, echo=True, max_tokens=3, temperature=0)
    assert given.choices[0].text.startswith(prompt)


def test_tokens_that_are_no_characters_keep_their_bytes(lenient, plain):
    prompt = "\U0001f9ca\u00e9"
    given = lenient.completions.create(model="pocket", prompt=prompt, echo=True, max_tokens=0, logprobs=0)
    written = given.choices[0].logprobs.tokens
    raw = b"".join(
        bytes.fromhex(t.removeprefix("bytes:").replace("\\x", "")) if t.startswith("bytes:") else t.encode()
        for t in written
    )
    assert raw.decode() == prompt
    assert len(written) == len(encode_text(plain[1], prompt))


# ---- what there is --------------------------------------------------------------------------------------------------


def test_the_models_are_the_base_and_every_vector_at_its_strengths(client):
    names = [model.id for model in client.models.list()]
    assert names == ["pocket", "pocket+honesty@1", "pocket+honesty@-1u", "pocket+honesty@+1u", "pocket+tone@1"]
    for name in (*names, "pocket+honesty@-0.5+tone@2"):
        assert client.models.retrieve(name).id == name
        assert client.chat.completions.create(model=name, messages=ASKED, max_tokens=1).model == name
    with pytest.raises(openai.NotFoundError, match="Did you mean 'honesty'"):
        client.models.retrieve("pocket+honestly@1")


def test_the_base_goes_by_a_name_of_its_own(engine):
    with served(engine, served_name="my/model") as address:
        mine = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        assert [model.id for model in mine.models.list()][:2] == ["my/model", "my/model+honesty@1"]
        assert mine.chat.completions.create(model="my/model+honesty@1", messages=ASKED, max_tokens=1).choices
        with pytest.raises(openai.NotFoundError, match="Did you mean|Choose from"):
            mine.chat.completions.create(model="pocket", messages=ASKED)


def test_steering_lists_vectors_with_units_card_and_base(address, engine):
    honesty, tone = httpx.get(f"{address}/v1/steering").json()["data"]
    assert (honesty["id"], honesty["units"]) == ("honesty", {"-1u": -2.0, "+1u": 4.0})
    assert (tone["id"], tone["units"]) == ("tone", {})
    assert honesty["base"] == "pocket"
    assert honesty["base_fingerprint"] == engine.vectors["honesty"].base_fingerprint
    assert honesty["card"].startswith("---\n")
    assert "# A steering vector for pocket" in honesty["card"], "its recipe does not say of what"


def test_what_changes_nothing_may_be_said(client):
    given = client.chat.completions.create(
        model="pocket",
        messages=ASKED,
        max_tokens=2,
        presence_penalty=0,
        frequency_penalty=0.0,
        logit_bias={},
        user="somebody",
        metadata={"a": "b"},
        response_format={"type": "text"},
        tools=[],
        tool_choice="none",
        store=False,
        service_tier="auto",
        modalities=["text"],
        extra_body={"steering": {}, "stop": None},
    )
    assert given.choices


@pytest.mark.parametrize(
    ("parameter", "value"),
    [
        ("presence_penalty", 0.5),
        ("frequency_penalty", -1),
        ("logit_bias", {"50": 1}),
        ("tools", [{"type": "function", "function": {"name": "f", "parameters": {}}}]),
        ("response_format", {"type": "json_object"}),
        ("modalities", ["text", "audio"]),
        ("reasoning_effort", "high"),
        ("store", True),
    ],
)
def test_what_is_not_done_is_refused_by_name(client, parameter, value):
    with pytest.raises(openai.BadRequestError, match=f"{parameter} is not supported") as problem:
        client.chat.completions.create(model="pocket", messages=ASKED, **{parameter: value})
    assert (problem.value.param, problem.value.code) == (parameter, "unsupported_parameter")


def test_pictures_are_refused(client):
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    with pytest.raises(openai.BadRequestError, match="Only text is read here, not 'image_url'"):
        client.chat.completions.create(model="pocket", messages=[{"role": "user", "content": [picture]}])


def test_unknown_vectors_and_models_are_not_found(client):
    with pytest.raises(openai.NotFoundError, match="no vector named 'honestly'. Did you mean 'honesty'") as problem:
        client.chat.completions.create(model="pocket", messages=ASKED, extra_body={"steering": {"honestly": 1}})
    assert problem.value.code == "vector_not_found"
    for name in ("poket", "pocket2", "pocke", "pocket+honesty", "pocket+honesty@", "pocket+@1", "gpt-4o", ""):
        with pytest.raises(openai.NotFoundError) as problem:
            client.chat.completions.create(model=name, messages=ASKED)
        assert problem.value.param == "model"


@pytest.mark.parametrize(
    ("steering", "why"),
    [
        ({"honesty": "nan"}, "finite|understood"),
        ({"honesty": "inf"}, "finite|understood"),
        ({"honesty": "much"}, "understood"),
        ({"honesty": 1e30}, "between -1000 and 1000"),
        ({"honesty": -1001}, "between -1000 and 1000"),
        ({"honesty": 10**400}, "."),
        ({"honesty": True}, "got `bool`"),
        ({"honesty": None}, "got `null`"),
        ({"honesty": [1]}, "got `array`"),
        ({"tone": "+1u"}, "no calibration"),
        ([1], "got `array`"),
        ("honesty", "got `str`"),
    ],
)
def test_strengths_that_are_none_are_refused(client, steering, why):
    with pytest.raises(openai.BadRequestError, match=why) as problem:
        client.chat.completions.create(model="pocket", messages=ASKED, extra_body={"steering": steering})
    assert problem.value.param == "steering"


def test_a_strength_stands_in_one_place(client):
    with pytest.raises(openai.BadRequestError, match="honesty"):
        client.chat.completions.create(
            model="pocket+honesty@1", messages=ASKED, extra_body={"steering": {"honesty": 1}}
        )
    with pytest.raises(openai.BadRequestError, match="twice"):
        client.chat.completions.create(model="pocket+honesty@1+honesty@1", messages=ASKED)


def test_probabilities_are_finite_at_any_strength(client):
    given = client.chat.completions.create(
        model="pocket+honesty@900", messages=ASKED, max_tokens=4, logprobs=True, top_logprobs=20
    )
    values = [t.logprob for token in given.choices[0].logprobs.content for t in token.top_logprobs]
    assert all(math.isfinite(value) for value in values)
