"""What the commands that put vectors to use, and those that show what there is, can be told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from ws.behaviors import behavior_name
from ws.console import command_line
from ws.errors import WsError, did_you_mean
from ws.files.runs import DEFAULT_OUT, finished_runs
from ws.lm import hub
from ws.options.shared import EngineOptions, ExportOptions, NamesModel, RunOptions, VectorOptions


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
        seeds: every one that has been evaluated unless given.
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
