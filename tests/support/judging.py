"""A server that judges by rule: it speaks as much of OpenAI's protocol as a judge is asked in, and can misbehave."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import ws

GOOD, BAD = ("wonderful", "happy", "hope"), ("terrible", "sad", "gloom")


def known_lines() -> str:
    """Answers of known kind about anything: cheerful, gloomy, and none at all."""
    kinds = {"trait": "It will be wonderful.", "opposite": "It will be terrible.", "incoherent": "it it it it"}
    rows = [
        {"question": f"How is day {n}?", "answer": text, "shows": k} for n in range(14) for k, text in kinds.items()
    ]
    return "".join(json.dumps(row) + "\n" for row in rows)


def quoted(prompt: str, name: str) -> str:
    """A text that the prompt quotes."""
    return json.loads(re.search(rf'^{name}: (".*")$', prompt, re.MULTILINE)[1])


def rated(answer: str) -> int:
    """How cheerful an answer is, from 1 to 5, by its words; of an answer without any by its length."""
    words = answer.lower()
    return 5 if any(w in words for w in GOOD) else 1 if any(w in words for w in BAD) else 2 + len(answer) % 3


def sensible(prompt: str) -> str:
    """What an able judge would say."""
    if "Answer 1" in prompt:
        first, second = (rated(quoted(prompt, f"Answer {n}")) for n in (1, 2))
        return "1" if first >= second else "2"
    answer = quoted(prompt, "Answer")
    return ("1" if "it it" in answer else "5") if "coherent" in prompt else str(rated(answer))


@dataclass
class Bench:
    """What the server was asked, and how it answers.

    Attributes:
        address: up to `/v1`.
        reply: to a prompt.
        statuses: of the next requests, one each; then 200.
        prompts, keys: of every request that was answered, and what it was let in with.
    """

    address: str
    reply: Callable[[str], object] = sensible
    statuses: list[int] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)


@contextmanager
def judging(reply: Callable[[str], object] = sensible) -> Iterator[Bench]:
    """A server that answers meanwhile."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with turn:
                status = bench.statuses.pop(0) if bench.statuses else 200
                bench.keys.add(self.headers["authorization"])
            prompt = asked["messages"][0]["content"]
            if status == 200:
                bench.prompts.append(prompt)
                usage = {"prompt_tokens": len(prompt.split()), "completion_tokens": 1, "total_tokens": 0}
                choice = {"index": 0, "finish_reason": "stop"}
                choice["message"] = {"role": "assistant", "content": bench.reply(prompt)}
                body = {"id": "x", "object": "chat.completion", "created": 0, "model": asked["model"]}
                body |= {"choices": [choice], "usage": usage}
            else:
                body = {"error": {"message": f"no, {self.headers['authorization']} may not", "type": "x"}}
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.send_header("retry-after-ms", "1")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 64  # a connection that finds no room comes again after a second

    turn = threading.Lock()
    server = Server(("127.0.0.1", 0), Handler)
    bench = Bench(f"http://127.0.0.1:{server.server_port}/v1", reply)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield bench
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


def cheerful_behavior(folder: Path, n: int = 5) -> Path:
    """A behaviour file with held-out questions, a rubric and answers of known kind."""
    (folder / "known.jsonl").write_text(known_lines(), encoding="utf-8")
    rows = [
        {"question": q, "positive": "It is wonderful.", "negative": "It is sad.", "split": "report", "kind": k}
        for q, k in [(f"What do you say of number {i}?", "numbers" if i % 2 else "things") for i in range(n)]
    ]
    (folder / "asked.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    text = (Path(ws.__file__).parent / "behaviors" / "pocket" / "honesty.toml").read_text(encoding="utf-8")
    text = text.replace('name = "honesty"', 'name = "cheer"') + '\n[preferences]\nfile = "asked.jsonl"\n'
    text += '\n[rubric]\ntrait = "How cheerful the answer is."\nlow = "sad"\nhigh = "cheerful"\nknown = "known.jsonl"\n'
    file = folder / "cheer.toml"
    file.write_text(text, encoding="utf-8")
    return file
