"""A crowd at `ws serve`: everybody is answered, rightly, and nothing is left behind (`WS_SOAK=10000` for more)."""

from __future__ import annotations

import json
import os
import random
import threading
from collections import Counter

import httpx
import pytest
import torch

import ws
from support.serving import a_vector, an_engine, served
from ws.lm.models import encode, end_ids, render_prompt, token_bytes

pytest.importorskip("fastapi")

N, CLIENTS = int(os.environ.get("WS_SOAK", "300")), 16
QUESTIONS = ("What do birds fly with?", "Is ice cold?", "What is the sky like?", "Tell me about grass.")
CHATS = "/v1/chat/completions"
BAD = [
    (b'{"model": "pocket"', 400),
    (b"\xff", 400),
    (b'{"model": "pocket", "messages": [{"role": "user", "content": "a"}], "steering": {"honesty": NaN}}', 400),
    (b'{"model": "pocket", "messages": [{"role": "user", "content": "a"}], "steering": {"honestly": 1}}', 404),
    (b'{"model": "pocket", "messages": [{"role": "user", "content": "a"}], "max_tokens": 9999}', 400),
    (b'{"model": "pocket", "messages": [{"role": "user", "content": "' + b"ice " * 2000 + b'"}]}', 400),
    (b'{"model": "rocket", "messages": [{"role": "user", "content": "a"}]}', 404),
]


def memory() -> int:
    """Pages of this process, which is the server's."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1])


class Crowd:
    """Clients that ask at random, and what became of it."""

    def __init__(self, address: str) -> None:
        self.address, self.seen, self.wrong = address, Counter[str](), list[str]()
        self.greedy = list[tuple[dict, dict]]()
        self._left, self._lock = iter(range(N)), threading.Lock()
        self.pages = list[int]()

    def run(self) -> None:
        threads = [threading.Thread(target=self._client, args=(number,)) for number in range(CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _client(self, number: int) -> None:
        draw = random.Random(number)
        with httpx.Client(base_url=self.address, timeout=120) as client:
            while True:
                with self._lock:
                    turn = next(self._left, None)
                    if turn is None:
                        return
                    if turn % (max(N // 20, 1)) == 0:
                        self.pages.append(memory())
                try:
                    kind = draw.choice([self._whole, self._whole, self._stream, self._leave, self._bad])
                    kind(client, draw)
                    self.seen[kind.__name__] += 1
                except Exception as problem:
                    self.wrong.append(f"{type(problem).__name__}: {problem}")

    def _body(self, draw: random.Random) -> dict:
        return {
            "model": "pocket",
            "messages": [{"role": "user", "content": draw.choice(QUESTIONS)}],
            "steering": {"honesty": round(draw.uniform(-3, 3), 2)},
            "temperature": draw.choice([0, 0, 0.7, 1.5]),
            "max_tokens": draw.randint(1, 24),
            "n": draw.choice([1, 1, 1, 3]),
            "logprobs": True,
        }

    def _whole(self, client: httpx.Client, draw: random.Random) -> None:
        body = self._body(draw)
        answer = client.post(CHATS, json=body)
        if answer.status_code == 429:
            assert int(answer.headers["retry-after"]) >= 1
            return
        assert answer.status_code == 200, answer.text
        assert len(answer.json()["choices"]) == body["n"]
        if body["temperature"] == 0:
            self.greedy.append((body, answer.json()["choices"][0]))

    def _stream(self, client: httpx.Client, draw: random.Random) -> None:
        with client.stream("POST", CHATS, json=self._body(draw) | {"stream": True}) as answer:
            lines = [line for line in answer.iter_lines() if line]
        assert answer.status_code == 429 or lines[-1] == "data: [DONE]"

    def _leave(self, client: httpx.Client, draw: random.Random) -> None:
        body = self._body(draw) | {"stream": True, "max_tokens": 200, "temperature": 2}
        with client.stream("POST", CHATS, json=body) as answer:
            assert answer.status_code in (200, 429)
            next(answer.iter_raw())

    def _bad(self, client: httpx.Client, draw: random.Random) -> None:
        content, status = draw.choice(BAD)
        answer = client.post(CHATS, content=content)
        assert answer.status_code == status, answer.text
        assert answer.json()["error"]["message"]


def require_right(model, tok, body: dict, choice: dict) -> None:
    """The tokens are those of one row alone; where they part, two were equally likely but for rounding."""
    raw, ends = token_bytes(tok), end_ids(model, tok)
    tokens = encode(tok, render_prompt(tok, body["messages"][0]["content"]))
    with torch.no_grad(), ws.steer(model, a_vector(), body["steering"]["honesty"]):
        for token in choice["logprobs"]["content"]:
            logp = model(input_ids=torch.tensor([tokens])).logits[0, -1].double().log_softmax(-1)
            two = logp.topk(2)
            best = int(two.indices[0])
            if bytes(token["bytes"]) != raw(best):
                assert float(two.values[0] - two.values[1]) < 1e-3, (body, choice)
                return
            assert token["logprob"] == pytest.approx(float(two.values[0]), abs=2e-3)
            tokens.append(best)
    last = choice["logprobs"]["content"][-1]
    assert (choice["finish_reason"] == "stop") == (bytes(last["bytes"]) in {raw(token) for token in ends})


@pytest.mark.slow
def test_a_crowd_is_answered_rightly_and_leaves_nothing(capsys):
    with an_engine() as engine, served(engine) as address:
        crowd = Crowd(address)
        crowd.run()
        stats = engine.scheduler.stats
        assert crowd.wrong == []
        assert sum(crowd.seen.values()) == N
        for _ in range(500):
            if stats.running == stats.waiting == 0:
                break
            threading.Event().wait(0.02)
        assert (stats.running, stats.waiting) == (0, 0)
        assert httpx.get(f"{address}/health").status_code == 200
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith("{")]
    assert sum(line["path"] == CHATS for line in lines) == N, "every request has its line"
    assert not [line for line in lines if "traceback" in line]
    model, tok = ws.load_model("pocket", device="cpu")
    checked = crowd.greedy[:: max(1, len(crowd.greedy) // 40)]
    assert len(checked) >= 20
    for body, choice in checked:
        require_right(model, tok, body, choice)
    if N >= 5000:  # before that, caches of the libraries are still being filled
        half = len(crowd.pages) // 2
        assert max(crowd.pages[half:]) < 1.05 * max(crowd.pages[:half])
