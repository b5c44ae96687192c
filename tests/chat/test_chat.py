"""`ws chat`: commands, what goes to which stream, and what an interrupt does."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

import ws
from ws import console
from ws.chat.engine import Engine, Sampling
from ws.chat.terminal import Chat, carry_out, main, talk
from ws.console import parse
from ws.diff import Units, vector_digest
from ws.options.use import ChatOptions

QUESTION = "Is ice cold?"


def a_vector(size: float = 0.3) -> ws.SteeringVector:
    """Row scales of two layers of the pocket model, calibrated at -2 and +4."""
    import torch

    model, _ = ws.load_model("pocket", device="cpu")
    scales = size * torch.randn(192, generator=torch.Generator().manual_seed(1))
    deltas = {f"model.layers.{n}.self_attn.o_proj": ws.LinearDelta(192, 192, g=scales.clone()) for n in (1, 2)}
    vector = ws.SteeringVector(deltas, "pocket", ws.lm.models.fingerprint(model))
    return replace(vector, units=Units(vector_digest(vector), -2.0, 4.0))


@pytest.fixture(scope="module")
def engine():
    model, tok = ws.load_model("pocket", device="cpu")
    vector = a_vector()
    with Engine(model, tok, {"a": vector, "b": -1 * vector}) as found:
        yield found


@pytest.fixture
def chat(engine):
    return Chat(engine.converse({"b": 0}, Sampling(max_tokens=12)), io.StringIO())


def text(chat: Chat) -> str:
    return chat.out.getvalue()


def test_a_message_is_answered_on_stdout_and_nothing_else_is(chat, capsys):
    carry_out(
        chat, ["", QUESTION, "/alpha 0", "/vector", "/help", "/compare", "/compare off", "/reset", "/quit", "more"]
    )
    assert chat.over
    conversation = chat.conversation.engine.converse({"b": 0}, Sampling(max_tokens=12))
    assert text(chat) == conversation.ask(QUESTION).steered + "\n"
    printed = capsys.readouterr()
    assert printed.out == ""
    assert f"you> {QUESTION}" in printed.err
    assert "more" not in printed.err
    assert chat.conversation.turns == []


def test_strengths_by_number_and_by_unit(chat, capsys):
    chat.take("/alpha 1.5")
    assert chat.conversation.strengths == {"a": 1.5, "b": 1.5}
    chat.take("/vector b -0.25")
    assert chat.conversation.strengths == {"a": 1.5, "b": -0.25}
    capsys.readouterr()
    chat.take("/vector a +1u")
    assert chat.conversation.strengths == {"a": 4.0, "b": -0.25}
    assert "a +4   (-1u is -2, +1u is +4)\nb -0.25\n" in capsys.readouterr().err
    with pytest.raises(ws.WsError, match="no calibration"):
        chat.take("/alpha +1u")
    assert chat.conversation.strengths == {"a": 4.0, "b": -0.25}, "all or none"


def test_comparing_shows_the_base_below(chat):
    chat.take(QUESTION)
    chat.take("/compare")
    chat.take("/alpha -4")
    chat.take("/again")
    (turn,) = chat.conversation.turns
    assert text(chat).split("\n", 1)[1] == f"steered: {turn.steered}\nbase:    {turn.base}\n"
    assert turn.strengths == {"a": -4.0, "b": -4.0}


def test_probabilities_and_the_snippet_are_results(chat, capsys):
    chat.take(QUESTION)
    chat.take("/probs yes no")
    found = chat.conversation.probe(["yes", "no"])
    (_, _, yes, no) = text(chat).splitlines()[1:]
    assert [float(x) for x in yes.split()[1:] + no.split()[1:]] == pytest.approx(found.T.reshape(-1), abs=6e-4)
    chat.take("/snippet")
    assert text(chat).endswith(chat.conversation.snippet())
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("/alhpa 1", "no command named 'alhpa'. Did you mean 'alpha'"),
        ("/", "no command named ''"),
        ("/alpha", "/alpha with one strength"),
        ("/alpha much", "not understood"),
        ("/alpha calibrated", "two strengths, -1u and .1u"),
        ("/vector c 1", "no vector named 'c'"),
        ("/vector a", "a name and a strength"),
        ("/compare maybe", "no setting of /compare named 'maybe'"),
        ("/probs yes", "Nothing has been asked"),
        ("/again", "Nothing has been asked"),
        ("/vector 'a 1", "quotes come in pairs"),
    ],
)
def test_what_does_not_hold_is_said_in_a_sentence(chat, line, why):
    with pytest.raises(ws.WsError, match=why):
        chat.take(line)
    assert text(chat) == ""


def test_one_unknown_word_is_named_and_the_others_are_shown(chat, capsys):
    chat.take(QUESTION)
    chat.take("/probs yes incomprehensibilities no unpronounceability")
    said = capsys.readouterr().err
    assert "'incomprehensibilities'" in said
    assert "'unpronounceability'" in said
    found = chat.conversation.probe(["yes", "no"])
    rows = [line.split() for line in text(chat).splitlines()[-2:]]
    assert [row[0] for row in rows] == ["yes", "no"]
    assert [float(x) for row in rows for x in row[1:]] == pytest.approx(found.T.reshape(-1), abs=6e-4)
    assert list(chat.record[-1]["first_word"]) == ["yes", "no"]


def test_what_a_model_writes_is_not_obeyed_by_the_terminal(chat, monkeypatch):
    monkeypatch.setattr("ws.chat.batching.trim_answer", lambda tok, text: "a\x1b]0;x\x07b\x9bc" * bool(text))
    chat.compare = True
    chat.take(QUESTION)
    assert text(chat) == "steered: a\\x1b]0;x\\x07b\\x9bc\nbase:    a\\x1b]0;x\\x07b\\x9bc\n"


def test_words_that_are_no_token_and_no_words_at_all_are_refused(chat):
    chat.take(QUESTION)
    for line in ("/probs", "/probs incomprehensibilities"):
        with pytest.raises(ws.WsError, match=r"at least one word|No single token"):
            chat.take(line)


# ---- terminals and interrupts ---------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("variables", "colored"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)])
def test_colors_are_for_terminals_that_want_them(engine, monkeypatch, variables, colored):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    chat = Chat(engine.converse(sampling=Sampling(max_tokens=4)), Terminal())
    chat.take(QUESTION)
    assert ("\033" in text(chat)) == colored
    plain = Chat(engine.converse(sampling=Sampling(max_tokens=4)), io.StringIO())
    plain.take(QUESTION)
    assert "\033" not in text(plain)


def test_an_interrupt_stops_the_answer_and_not_the_chat(chat, monkeypatch, capsys):
    """The third token never comes: a person presses Ctrl-C. What they do next is answered as ever."""
    stream = chat.conversation.stream

    def interrupted(question):
        for number, turn in enumerate(stream(question), start=1):
            yield turn
            if number == 2 and question == "Describe Petra.":
                raise KeyboardInterrupt

    monkeypatch.setattr(chat.conversation, "stream", interrupted)
    lines = iter(["Describe Petra.", "/alfa", KeyboardInterrupt(), QUESTION])

    def read() -> str:
        line = next(lines, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("ws.chat.terminal._read", read)
    talk(chat)
    first, second = chat.conversation.turns
    assert (first.stopped, first.n_steps, second.stopped) == (True, 2, False)
    assert [turn["stopped"] for turn in chat.record] == [True, False]
    assert text(chat) == f"{first.steered}\n{second.steered}\n"
    said = capsys.readouterr().err
    for what in ("(stopped)", "error: There is no command named 'alfa'", "Ctrl-D or /quit leaves"):
        assert what in said


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def out(tmp_path):
    a_vector().save(tmp_path / "out" / "honesty" / "lora" / "vector")
    return tmp_path / "out"


def test_the_command_says_what_it_is_told_or_what_comes_through_a_pipe(out, monkeypatch, capsys):
    options = parse(ChatOptions, ["--out", str(out), "--device", "cpu", "--say", "/alpha -2", QUESTION, "/compare"])
    main(options)
    told = capsys.readouterr()
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"/alpha -2\n{QUESTION}\n"))
    main(replace(options, say=()))
    assert capsys.readouterr().out == told.out
    assert told.out.strip()
    assert "shown" in told.err
    monkeypatch.setattr(sys, "stdin", io.StringIO("/alfa\nhello\n"))
    with pytest.raises(ws.WsError, match="Did you mean 'alpha'"):
        main(replace(options, say=()))


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii"])
def test_bytes_that_are_no_utf8_are_named(out, monkeypatch, capsys, encoding):
    options = parse(ChatOptions, ["--out", str(out), "--device", "cpu", "--max-new-tokens", "2"])
    piped = io.TextIOWrapper(io.BytesIO(b"Is the s\xfcn a star?\n"), encoding=encoding)
    monkeypatch.setattr(sys, "stdin", piped)
    with pytest.raises(ws.WsError, match="byte 0xfc, which is not UTF-8"):
        main(options)
    with pytest.raises(ws.WsError, match="byte 0xfc, which is not UTF-8"):
        main(replace(options, say=("s\udcfcn",)))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Is the sün a star?\n".encode()), encoding=encoding))
    capsys.readouterr()
    main(options)
    assert "sün" in capsys.readouterr().err


def test_for_scripts_the_talk_is_one_json_object(out, monkeypatch, capsys):
    said = ["/alpha -2", QUESTION, "/probs yes no"]
    monkeypatch.setattr(sys, "argv", ["ws", "--out", str(out), "--device", "cpu", "--json", "--quiet", "--say", *said])
    handler = signal.getsignal(signal.SIGTERM)
    try:
        console.run(main, ChatOptions, "ws chat")
    finally:
        signal.signal(signal.SIGTERM, handler)
    printed = capsys.readouterr()
    answer, words = json.loads(printed.out)["data"]["chat"]
    assert (answer["question"], answer["strengths"]) == (QUESTION, {"honesty": -2.0})
    assert answer["steered"]
    assert answer["base"]
    assert {*words["first_word"]} == {"yes", "no"}
    assert 0 < words["first_word"]["yes"]["steered"] < 1
    assert printed.err == ""


def test_a_prompt_for_a_person_whose_output_is_piped_goes_to_stderr(out, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", Terminal(f"{QUESTION}\n"))
    main(ChatOptions(out=out, device="cpu", max_tokens=5))
    printed = capsys.readouterr()
    assert "you> " in printed.err
    assert "you>" not in printed.out
    assert printed.out.strip()


@pytest.mark.slow
def test_ctrl_c_reaches_a_chat_in_a_process_of_its_own(out):
    command = [sys.executable, "-m", "ws.chat.terminal", "--out", str(out), "--max-tokens", "900", "--temperature", "3"]
    streams = SimpleNamespace(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process = subprocess.Popen(
        command, text=True, bufsize=0, env=os.environ | {"OMP_NUM_THREADS": "1"}, **vars(streams)
    )
    try:
        process.stdin.write("/alpha 30\nDescribe Petra.\n")
        process.stdin.flush()
        process.stdout.read(1)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        process.stdin.write("/alpha 0\nIs ice cold?\n")
        process.stdin.close()
        assert process.wait(timeout=120) == 0
        assert "(stopped)" in process.stderr.read()
        assert len(process.stdout.read().splitlines()) >= 2
    finally:
        process.kill()
