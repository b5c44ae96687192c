"""What the commands that put vectors to use, and those that show what there is, can be told."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from typing import Annotated, ClassVar

import tyro

from ws.behaviors import behavior_name
from ws.console import command_line
from ws.errors import WsError, did_you_mean, require_count
from ws.files.runs import DEFAULT_OUT, finished_runs
from ws.lm import hub
from ws.options.shared import EngineOptions, ExportOptions, NamesModel, RunOptions, VectorOptions, VectorsOptions

# How this machine is called by itself.
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


@dataclass(frozen=True)
class ChatOptions(EngineOptions):
    """Talk to a steered model in the terminal; type /help there.

    Attributes:
        compare: begin with the base's answer beside the steered one.
        say: messages and commands to carry out, in order, instead of reading them from the terminal or a pipe.
    """

    compare: bool = False
    say: tuple[str, ...] = ()


@dataclass(frozen=True)
class PlayOptions(EngineOptions):
    """Show the base beside the steered model in a page, with sliders.

    Attributes:
        port: of the page on this machine; the first free one from 7860 on unless given.
        share: also make a public link, through Gradio's servers; anybody who has it can use the page.
    """

    port: int | None = None
    share: bool = False

    def check(self) -> None:
        """`WsError` for what makes no sense, before anything is loaded."""
        require_count("--port", self.port, 1, most=2**16 - 1)


@dataclass(frozen=True)
class ServeOptions(VectorsOptions):
    """Answer programs over HTTP as OpenAI's API does, with strengths in every request.

    Attributes:
        host: the address to listen at; this machine alone unless given, and others only with a key.
        port: to listen at; 0 takes any that is free.
        served_name: what the model is called in requests; the name that it was loaded by unless given.
        api_key: what every request has to bring as `Authorization: Bearer KEY`; the variable WS_API_KEY holds it unless
            given, and a command line can be read by others on the machine.
        allowed_hosts: what requests may call the server by, besides the names of this machine and `--host`; `*` for
            any name.
        admin: requests may add vectors that lie below `--out`, and remove vectors; needs a key.
        reproducible: no answer depends on what else is written, to the last bit; requests then share no batch.
        replicas: copies of the server behind the address, each in a process of its own, by Ray Serve (extra `ray`); on
            the cluster that the variable RAY_ADDRESS names, else here.
        max_batch: answers that are written at a time.
        max_queue: answers that wait at most; a request that brings more is told to try again.
        max_known: tokens of prompts that are remembered, so that a system prompt which many requests share is read once
            for each set of strengths; 0 for none.
        max_tokens: at most so many tokens per answer; a request that asks for more is refused.
        max_prompt: at most so many tokens per prompt; as many as the model reads unless given.
        max_strength: larger strengths of any vector, in either direction, are refused.
        timeout: seconds after which a request that has no whole answer is given up.
        grace: seconds that answers may still take once the server is to end.
        log_contents: write what is asked and answered into the log as well.
    """

    former: ClassVar[Mapping[str, str]] = {"--max-tokens": "--max-new-tokens"}

    host: str = "127.0.0.1"
    port: int = 8000
    served_name: str | None = None
    api_key: str | None = None
    allowed_hosts: tuple[str, ...] = ()
    admin: bool = False
    reproducible: bool = False
    replicas: int = 1
    max_batch: int = 16
    max_queue: int = 64
    max_known: int = 2048
    max_tokens: Annotated[int, tyro.conf.arg(name="max-new-tokens")] = 1024
    max_prompt: int | None = None
    max_strength: float = 1000.0
    timeout: float = 300.0
    grace: float = 30.0
    log_contents: bool = False

    @property
    def secret(self) -> str | None:
        """What requests have to bring, None where they need bring nothing."""
        return self.api_key or os.environ.get("WS_API_KEY") or None

    @property
    def hosts(self) -> frozenset[str]:
        """The names by which the server may be called, in small letters."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return frozenset(name.lower() for name in (*LOOPBACK, host, *self.allowed_hosts))

    def check(self) -> None:
        """`WsError` for what makes no sense or leaves the server open, before anything is loaded."""
        if not 0 <= self.port < 2**16:
            raise WsError(f"--port must lie between 0 and 65535, not {self.port}.")
        require_count("--replicas", self.replicas, 1)
        if self.replicas > 1 and self.admin:
            raise WsError("--admin would change one replica and not the others; leave it or --replicas out.")
        require_count("--max-batch", self.max_batch, 1)
        require_count("--max-queue", self.max_queue, 1)
        require_count("--max-known", self.max_known, 0)
        require_count("--max-new-tokens", self.max_tokens, 1)
        require_count("--max-prompt", self.max_prompt, 1)
        for flag, size in (
            ("--timeout", self.timeout),
            ("--grace", self.grace),
            ("--max-strength", self.max_strength),
        ):
            if not (isfinite(size) and size > 0):
                raise WsError(f"{flag} must be a positive number, not {size}.")
        if self.secret is None and (self.admin or self.host not in (*LOOPBACK, "::1")):
            why = "--admin" if self.admin else f"--host {self.host}"
            raise WsError(f"{why} needs a key: put one into the variable WS_API_KEY, or give --api-key.")
        if self.host in ("0.0.0.0", "::", "") and not self.allowed_hosts:
            raise WsError(
                f"--host {self.host} listens under every name of this machine; name those that requests may use "
                "with --allowed-hosts, or all with '*'."
            )

    def require(self) -> None:
        """`WsError` unless the vectors are there, and what answers over HTTP is installed."""
        if absent := [name for name in ("fastapi", "prometheus_client", "uvicorn") if find_spec(name) is None]:
            raise WsError(
                f"ws serve needs {', '.join(absent)}; `uv sync --extra serve` adds them for good, "
                "`uv run --extra serve ws serve ...` for one command."
            )
        super().require()


@dataclass(frozen=True)
class LoraOptions(NamesModel, ExportOptions):
    """Write a vector at a fixed strength as a PEFT LoRA (PEFT, vLLM).

    Attributes:
        rank: columns of every module; as few as `--max-error` allows unless given.
        max_error: the largest relative Frobenius error of the whole change; more is refused.
        model: the base, needed by families that are not low-rank; the one that the vector was made for unless given.
    """

    rank: int | None = None
    max_error: float = 0.01
    model: str | None = None


@dataclass(frozen=True)
class MergedOptions(NamesModel, ExportOptions):
    """Write a vector at a fixed strength into a copy of its base.

    Attributes:
        model: the base checkpoint, a folder or hub id; the one that the vector was made for unless given.
    """

    model: str | None = None


@dataclass(frozen=True)
class GgufOptions(NamesModel, ExportOptions):
    """Write a purely low-rank vector as a LoRA adapter of llama.cpp: `ws export gguf-lora --alpha +1u`.

    Attributes:
        model: the base, by name or folder; the one that the vector was made for unless given.
    """

    model: str | None = None


@dataclass(frozen=True, kw_only=True)
class PushOptions(VectorOptions):
    """Send a vector and its model card to the hub: `ws export push user/name`.

    Attributes:
        repo: the repository, `user/name`; it is made when it does not exist.
        private: a repository that only you, or your organisation, can read.
        dry_run: print what would be sent, and send nothing.
        message: of the commit.
        license: for the card, such as `apache-2.0`; without it the card names none.
        to: keep what is sent in this folder.
    """

    repo: tyro.conf.Positional[str]
    private: bool = False
    dry_run: bool = False
    message: str = "A steering vector with its card"
    license: str | None = None
    to: Path | None = None


@dataclass(frozen=True)
class ReportOptions:
    """Put what a behaviour's runs have shown on one HTML page.

    Attributes:
        behavior: whose runs, by name or by the behaviour's own TOML file.
        out: the folder of all runs and results.
        to: the file to write; `report.html` in `<out>/<behavior>/` unless given.
    """

    behavior: str = "honesty"
    out: Path = DEFAULT_OUT
    to: Path | None = None

    def require(self) -> None:
        """`WsError` unless the behaviour has a finished run."""
        name, runs = behavior_name(self.behavior), finished_runs(self.out)
        behaviors = {run.relative_to(self.out).parts[0] for run in runs}
        if name not in behaviors:
            hint = did_you_mean(name, behaviors) if behaviors else ""
            command = command_line("ws replicate", RunOptions(behavior=self.behavior, out=self.out), ("behavior",))
            raise WsError(f"No run below {self.out / name} has a vector; make one with `{command}`.{hint}")


@dataclass(frozen=True)
class TableConfig:
    """Make the AIRisk results table of a behaviour's runs, or check a page against it.

    Attributes:
        behavior: whose runs.
        out: the folder of all runs and results.
        adapters: families; every one that has been evaluated on both sets unless given.
        seeds: every one that has been evaluated unless given; then each adapter in the table must have them all.
        n_bootstrap: resamples per interval.
        check: a page whose table must be the rendering of the CSV; nothing is written then.
        csv: with `--check`, the table to compare with, if it is not the one in `<out>/<behavior>/`.
    """

    behavior: str = "honesty"
    out: Path = DEFAULT_OUT
    adapters: tuple[str, ...] | None = None
    seeds: tuple[int, ...] | None = None
    n_bootstrap: int = 10_000
    check: Path | None = None
    csv: Path | None = None


@dataclass(frozen=True)
class InspectConfig(NamesModel):
    """Say what a saved vector is, and whether it fits a model.

    Attributes:
        vector: a vector's folder or its repository on the hub, or somebody's PEFT LoRA folder.
        model: a model to check it against.
    """

    vector: tyro.conf.Positional[str]
    model: str | None = None

    def require(self) -> None:
        """`WsError` for what is no folder and cannot be a repository's name."""
        if not Path(self.vector).is_dir() and hub.parse_id(self.vector) is None:
            raise WsError(hub.no_folder(self.vector))


@dataclass(frozen=True)
class SubspaceOptions(RunOptions):
    """Show where a run's vector lies, its pair, and the cosines between vectors.

    Attributes:
        k: singular directions at either end of a weight; a `--part` of the smaller dimension unless given.
        part: share of the smaller dimension, where `--k` is not given.
        vectors: folders of vectors, or of runs, to compare with one another instead.
        all: compare every finished run below `--out`.
        per_layer: cosines per decoder layer, too.
    """

    k: int | None = None
    part: float = 0.1
    vectors: tuple[Path, ...] = ()
    all: bool = False
    per_layer: bool = False

    def check(self) -> None:
        """`WsError` for what makes no sense, before anything is loaded."""
        if not 0 < self.part <= 0.5:
            raise WsError(f"--part must lie above 0 and not above 0.5, not {self.part}.")
        if self.vectors and self.all:
            raise WsError("--vectors names the vectors to compare and --all takes every run; give one of them.")

    def require(self) -> None:
        """`WsError` unless the run is there, or vectors are compared."""
        if not (self.vectors or self.all):
            super().require()
