"""`ws chat`: talk to a steered model in the terminal, with its strength at hand.

Answers, tables and snippets go to stdout, everything else to stderr, so `ws chat --say "Is ice cold?"` can be piped. In
a terminal Ctrl-C stops an answer, and Ctrl-D or /quit leaves. Commands that are not typed by a person, from a pipe or
`--say`, end with an error where one does not hold.
"""

from __future__ import annotations

import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict
from io import StringIO, TextIOBase, TextIOWrapper
from typing import Any, TextIO

from tabulate import tabulate

from ws import console
from ws.chat.engine import BASE, STEERED, Conversation, Turn, first_conversation, open_engine
from ws.console import say
from ws.errors import WsError, choose, require_characters
from ws.options.use import ChatOptions as ChatOptions

PROMPT = "you> "
COLORS = {BASE: "\033[2m", STEERED: "\033[36m"}
PLAIN = "\033[0m"


class Chat:
    """A conversation with its commands.

    Args:
        conversation: who is talked to.
        out: where answers go.
        compare: whether the base's answer is shown, too.

    Attributes:
        record: what was answered so far, for scripts: answers with the strengths they were given at, and probabilities.
    """

    def __init__(self, conversation: Conversation, out: TextIO | TextIOBase, compare: bool = False) -> None:
        self.conversation, self.out, self.compare = conversation, out, compare
        self.color = console.has_colors(out)
        self.over = False
        self.record = list[dict[str, Any]]()
        self.commands: dict[str, tuple[str, str, Callable[[list[str]], None]]] = {
            "alpha": ("1.5", "the strength of every vector, a number or calibrated units (+1u)", self._alpha),
            "vector": ("NAME 0.5", "the strength of one vector; alone, a list of them", self._vector),
            "compare": ("", "the base's answer beside the steered one, on or off", self._compare),
            "again": ("", "answer the last question anew, with the strengths of now", self._again),
            "probs": ("yes no", "the probability of words as the first one of the last answer", self._probs),
            "snippet": ("", "Python that gives these answers again", self._snippet),
            "reset": ("", "forget the conversation", self._reset),
            "help": ("", "this list", self._help),
            "quit": ("", "leave", self._quit),
        }

    def take(self, line: str) -> None:
        """One line: a command if it begins with a slash, nothing if it is empty, otherwise a message.

        Raises:
            WsError: a command that is unknown or does not hold, or a model that cannot answer.
        """
        text = line.strip()
        if text.startswith("/"):
            name, *arguments = _words(text[1:])
            self.commands[choose("command", name, self.commands)][2](arguments)
        elif text:
            self._answer(self.conversation.stream(text))

    # ---- answers --------------------------------------------------------------------------------------------

    def _answer(self, turns: Iterator[Turn]) -> None:
        """Write the steered answer as it comes, and then the base's where both are wanted; Ctrl-C stops both."""
        shown, turn = "", None
        self._begin(STEERED)
        try:
            for turn in turns:
                self.out.write(console.printable(turn.steered[len(shown) :]))
                self.out.flush()
                shown = turn.steered
        except KeyboardInterrupt:
            self.conversation.stop()
            turn = self.conversation.turns[-1] if turn is not None else None
            say("\n(stopped)")
        finally:
            self._end()
        if turn is not None:
            self.record.append(asdict(turn))
        if self.compare and turn is not None:
            self._begin(BASE)
            self.out.write(console.printable(turn.base))
            self._end()

    def _begin(self, row: str) -> None:
        self.out.write(COLORS[row] if self.color else "")
        self.out.write(f"{row}: ".ljust(len(STEERED) + 2) if self.compare else "")

    def _end(self) -> None:
        self.out.write(f"{PLAIN}\n" if self.color else "\n")
        self.out.flush()

    # ---- commands -------------------------------------------------------------------------------------------

    def _alpha(self, arguments: list[str]) -> None:
        if len(arguments) != 1:
            raise WsError("Write /alpha with one strength, such as /alpha 1.5 or /alpha +1u.")
        engine = self.conversation.engine
        for name, alpha in [(n, engine.strength(n, arguments[0])) for n in engine.vectors]:
            self.conversation.set(name, alpha)
        self._strengths()

    def _vector(self, arguments: list[str]) -> None:
        if len(arguments) == 1 or len(arguments) > 2:
            raise WsError("Write /vector with a name and a strength, such as /vector honesty 0.5.")
        if arguments:
            self.conversation.set(*arguments)
        self._strengths()

    def _strengths(self) -> None:
        offered = self.conversation.engine.offered
        for name, alpha in self.conversation.strengths.items():
            calibrated = ", ".join(f"{text} is {value:+.4g}" for text, value in offered[name].units.items())
            say(f"{name} {alpha:+.4g}" + (f"   ({calibrated})" if calibrated else ""))

    def _compare(self, arguments: list[str]) -> None:
        wanted = choose("setting of /compare", arguments[0], ["on", "off"]) if arguments else ""
        self.compare = not self.compare if not wanted else wanted == "on"
        say(f"The base's answer is {'shown' if self.compare else 'not shown'}.")

    def _again(self, arguments: list[str]) -> None:
        self._answer(self.conversation.again())

    def _probs(self, arguments: list[str]) -> None:
        words, problems = self.conversation.engine.single_tokens(arguments)
        probabilities = dict(zip(words, self.conversation.probe(words).T.tolist(), strict=True))
        for problem in problems:
            console.warn(problem)
        rows = [(word, *map("{:.3f}".format, p)) for word, p in probabilities.items()]
        table = tabulate(rows, ["first word", BASE, STEERED], disable_numparse=True)
        print(console.printable(table), file=self.out)
        self.record.append({"first_word": {word: {BASE: p, STEERED: q} for word, (p, q) in probabilities.items()}})

    def _snippet(self, arguments: list[str]) -> None:
        print(console.printable(self.conversation.snippet()), end="", file=self.out)

    def _reset(self, arguments: list[str]) -> None:
        self.conversation.reset()
        say("The conversation is forgotten; strengths stay.")

    def _help(self, arguments: list[str]) -> None:
        lines = [(f"/{name} {usage}".rstrip(), text) for name, (usage, text, _) in self.commands.items()]
        width = max(len(head) for head, _ in lines)
        say("\n".join(f"{head:<{width}}  {text}" for head, text in lines))

    def _quit(self, arguments: list[str]) -> None:
        self.over = True


def _words(text: str) -> list[str]:
    """The words of a command; quotes hold together what has spaces."""
    try:
        return shlex.split(text) or [""]
    except ValueError as problem:
        raise WsError(f"/{text} is not understood ({str(problem).lower()}); quotes come in pairs.") from problem


# ---- where lines come from ------------------------------------------------------------------------------------------


def carry_out(chat: Chat, lines: Iterable[str]) -> None:
    """Take lines that are there already, each shown on stderr first; the first error ends it."""
    for line in lines:
        if line.strip():
            say(f"{PROMPT}{require_characters(line, 'The message').strip()}")
            chat.take(line)
        if chat.over:
            return


def talk(chat: Chat) -> None:
    """Take what a person types until they leave; errors are said, and the chat goes on."""
    with suppress(ImportError):  # line editing and history, where Python was built with them
        import readline  # noqa: F401
    say("Type a message, or /help; Ctrl-C stops an answer, Ctrl-D leaves.")
    while not chat.over:
        try:
            chat.take(_read())
        except WsError as problem:
            say(f"error: {problem}")
        except KeyboardInterrupt:
            say("\nCtrl-D or /quit leaves.")
        except EOFError:
            say()
            return


def _read() -> str:
    """A line from the terminal; the prompt goes to stderr when stdout leads elsewhere."""
    if sys.stdout.isatty():
        return input(PROMPT)
    print(PROMPT, end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line


def main(options: ChatOptions) -> None:
    """The command `ws chat`."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # there is nothing to keep, and an interrupt only stops an answer
    if not options.say and isinstance(sys.stdin, TextIOWrapper):
        # Bytes that are no UTF-8 are then refused with the message that they are in.
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    with open_engine(options) as engine:
        chat = Chat(
            first_conversation(options, engine), StringIO() if console.wants_json() else sys.stdout, options.compare
        )
        if options.say or not sys.stdin.isatty():
            carry_out(chat, options.say or sys.stdin)
        else:
            talk(chat)
        if console.wants_json():
            console.show(console.Result("", {"chat": chat.record}))


if __name__ == "__main__":
    console.run(main, ChatOptions, "ws chat")
