"""The `ws` command: one thin caller per subcommand."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.metadata import version
from itertools import takewhile
from pathlib import Path
from typing import Any

import tyro
from tabulate import tabulate

from ws import console
from ws.errors import choose

# How `ws --help` lists the commands: a module, its function, the class of its options, what it does.
GROUPS: dict[str, dict[str, tuple[str, str, str, str]]] = {
    "Start": {
        "demo": (
            "ws.cli",
            "demo",
            "DemoConfig",
            "steer the bundled pocket model, end to end, offline, in a few minutes",
        ),
        "replicate": (
            "ws.replicate",
            "main",
            "ReplicateConfig",
            "one behaviour and one adapter, from data to a first reading",
        ),
        "sweep": ("ws.run_sweep", "main", "SweepConfig", "adapters x seeds x evaluations on one set of pairs"),
        "queue": (
            "ws.sweep.queue",
            "main",
            "QueueConfig",
            "a sweep as a graph of jobs: here, in pueue or on a ray cluster",
        ),
    },
    "Make": {
        "init-behavior": (
            "ws.new_behavior",
            "main_init",
            "InitOptions",
            "write a commented file for your own behaviour",
        ),
        "data": ("ws.data", "main", "DataCommand", "sample contrast pairs"),
        "train": ("ws.train", "main", "TrainCommand", "train the two arms on pairs"),
        "diff": ("ws.diff", "main", "DiffOptions", "the vector between any two full fine-tunes of one base"),
        "compose": (
            "ws.analysis.compose",
            "main",
            "ComposeOptions",
            "add vectors up, and measure what they do to each other",
        ),
        "trim": (
            "ws.analysis.trim",
            "main",
            "TrimOptions",
            "fewer layers, modules or columns of a vector, or a depth profile",
        ),
    },
    "Measure": {
        "eval-sycophancy": ("ws.eval.sycophancy", "main", "SycophancyOptions", "held-out claims on a finished run"),
        "eval-airisk": ("ws.eval.airisk", "main", "AiriskOptions", "AIRiskDilemmas on a finished run"),
        "eval-tinymfv-airisk": (
            "ws.eval.tinymfv_airisk",
            "main",
            "TinymfvOptions",
            "tiny-mfv (airisk) on a finished run",
        ),
        "eval-preference": (
            "ws.eval.preference",
            "main",
            "PreferenceOptions",
            "which of two given answers is likelier, on held-out questions",
        ),
        "eval-statements": (
            "ws.eval.statements",
            "main",
            "StatementOptions",
            "statements that somebody with a trait would say (model-written evals)",
        ),
        "eval-capability": ("ws.eval.capability", "main", "CapabilityOptions", "what steering costs on neutral text"),
        "eval-lm-eval": ("ws.eval.lm_eval", "main", "LmEvalOptions", "lm-evaluation-harness tasks on a finished run"),
        "calibrate": (
            "ws.intervene.calibrate",
            "main",
            "CalibrateOptions",
            "find the strengths that cost a given divergence",
        ),
        "compare": (
            "ws.analysis.compare",
            "main",
            "CompareOptions",
            "every way of steering at the same cost, beside its nulls",
        ),
    },
    "Check": {
        "check-behavior": ("ws.new_behavior", "main_check", "CheckOptions", "all that is wrong with a behaviour file"),
        "controls": (
            "ws.analysis.controls",
            "main",
            "ControlOptions",
            "compare a run's shifts with those of random vectors",
        ),
        "confounds": ("ws.eval.confounds", "main", "ConfoundOptions", "say what else could have made a run's shifts"),
        "slope": ("ws.analysis.slope", "main", "SlopeOptions", "test the slope at alpha 0, from gradients alone"),
        "monitor": (
            "ws.analysis.monitor",
            "main",
            "MonitorOptions",
            "how far fine-tunes have moved along known behaviours",
        ),
    },
    "Use": {
        "chat": ("ws.chat.terminal", "main", "ChatOptions", "talk to a steered model in the terminal"),
        "play": ("ws.chat.page", "main", "PlayOptions", "the base beside the steered model in a page, with sliders"),
        "export-peft": ("ws.export.lora", "main", "LoraOptions", "a vector at a fixed strength as a PEFT LoRA (vLLM)"),
        "export-merged": ("ws.export.merged", "main", "MergedOptions", "a vector written into a copy of its base"),
        "export-gguf-lora": ("ws.export.gguf_lora", "main", "GgufOptions", "a vector as a LoRA of llama.cpp"),
        "push": ("ws.export.push", "main", "PushOptions", "a vector and its model card to the hub"),
    },
    "Look": {
        "report": ("ws.report", "main", "ReportOptions", "what a behaviour's runs have shown, as one HTML page"),
        "summarize-airisk": (
            "ws.eval.readme_airisk_table",
            "main",
            "TableConfig",
            "the results table of a behaviour's runs, or a check of a page against it",
        ),
        "inspect": ("ws.cli", "inspect", "InspectConfig", "say what a saved vector is, and whether it fits a model"),
        "subspace": (
            "ws.subspace",
            "main",
            "SubspaceOptions",
            "where a vector lies, its pair, cosines between vectors",
        ),
    },
}
COMMANDS = {name: command for group in GROUPS.values() for name, command in group.items()}
# `ws eval NAME` and `ws export NAME` are the commands of these names; alone they list them.
WITH_MEMBERS = ("eval", "export")


@dataclass(frozen=True)
class DemoConfig:
    """Steer a model that is at hand offline, end to end, and print its dose-response curve and answers to read.

    Attributes:
        model: `pocket`, made for this project (a minute); or `smollm2`, a small real one (ten minutes).
        adapter: an adapter family, or `all` for the six.
        behavior: by default honesty on pocket, and truthfulness on smollm2.
        n_topics: questions to train on; None for the default of `ws data`.
        out: where everything goes.
        seed: of both arms.
        fresh: start over, forgetting what is on disk.
    """

    model: str = "pocket"
    adapter: str = "lora"
    behavior: str = "honesty"
    n_topics: int | None = None
    out: Path = Path("out")
    seed: int = 0
    fresh: bool = False

    @classmethod
    def preset(cls, model: str = "pocket") -> DemoConfig:
        """The defaults for a model."""
        return cls(model=model, behavior="truthfulness") if model == "smollm2" else cls(model=model)


_ABOUT = {
    "pocket": "Honesty is built into the pocket model: this shows that the pipeline works, and not how models behave.",
    "smollm2": "SmolLM2-135M-Instruct is a real model, not trained here; it is small and knows only plain facts.",
}


def demo(config: DemoConfig) -> None:
    """The command `ws demo`."""
    from ws.adapters import FAMILIES
    from ws.replicate import ReplicateConfig, as_data, render, replicate, verdict, written
    from ws.report import write_report

    chosen = list(FAMILIES) if config.adapter == "all" else [choose("adapter", config.adapter, [*FAMILIES, "all"])]
    texts, data, files = list[str](), dict[str, Any](), list[Path]()
    for number, adapter in enumerate(chosen):
        preset = ReplicateConfig.preset(config.model, adapter)
        options = replace(
            preset,
            behavior=config.behavior,
            data=preset.data if config.n_topics is None else replace(preset.data, n_topics=config.n_topics),
            out=config.out,
            seed=config.seed,
            fresh=config.fresh,
        )
        # The pairs are shared by the families: sampling them again for each would only cost time.
        reading = replicate(options if number == 0 else replace(options, fresh_data=False))
        if len(chosen) > 1:
            console.say(verdict(reading))
        texts.append(f"{config.behavior} x {adapter} on {config.model}\n\n{render(reading)}\n")
        data[adapter], files = as_data(reading), files + written(reading)
    texts.append(_ABOUT.get(config.model, ""))
    files.append(write_report(config.out, config.behavior))
    further = "demo --model smollm2" if config.model == "pocket" else "replicate --model Qwen/Qwen3-0.6B"
    following = f"open {files[-1]}, then ws {further}"
    console.show(console.Result("\n".join(texts), {"runs": data}, files, following))


@dataclass(frozen=True)
class InspectConfig:
    """Say what a saved vector is, and whether it fits a model.

    Attributes:
        vector: a vector's folder or its repository on the hub, or somebody's PEFT LoRA folder.
        model: a model to check it against.
    """

    vector: tyro.conf.Positional[str]
    model: str | None = None


def inspect(config: InspectConfig) -> None:
    """The command `ws inspect`."""
    from ws.diff import SteeringVector
    from ws.lm.models import load_model

    vector = SteeringVector.load(config.vector)
    facts: dict[str, Any] = {
        "base": f"{vector.base_id} ({vector.base_fingerprint or 'fingerprint unknown'})",
        **{k: v for k, v in vector.info.items() if not k.endswith("sha256")},
        "modules": len(vector.deltas),
        "parameters stored": sum(t.numel() for d in vector.deltas.values() for t in d.coordinates().values()),
        "largest rank": vector.max_rank,
        "loads as a PEFT LoRA": "yes" if vector.is_low_rank else "no",
    }
    if config.model:
        model, _ = load_model(config.model, device="cpu")
        vector.matched(model)
        facts |= {f"fits {config.model}": "yes", "norm": f"{vector.norm(model):.4g}"}
    elif not any(d.depends_on_weight for d in vector.deltas.values()):
        facts["norm"] = f"{vector.norm():.4g}"
    console.show(console.Result(tabulate(facts.items(), tablefmt="plain", disable_numparse=True), facts))


def main() -> None:
    """Dispatch to a subcommand; without one, list them."""
    flags = list(takewhile(lambda argument: argument in console.FLAGS, sys.argv[1:]))
    arguments = sys.argv[1 + len(flags) :]
    if told := _told(arguments):
        print(told)
        return
    if arguments[0] in WITH_MEMBERS:
        arguments[:2] = ["-".join(arguments[:2])]  # `ws eval airisk` is `ws eval-airisk`
    sys.argv[1:] = [*arguments, *flags]
    console.guard(lambda: _run(arguments[0]))


def _told(arguments: Sequence[str]) -> str:
    """What is answered without a command: the list of them, of the members of one, or the version."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        return _help(GROUPS)
    if arguments[0] == "--version":
        return version("weight-steering")
    if arguments[0] in WITH_MEMBERS and (not arguments[1:] or arguments[1] in ("-h", "--help")):
        return _help({"": {n: c for n, c in COMMANDS.items() if n.startswith(f"{arguments[0]}-")}})
    return ""


def _run(name: str) -> None:
    module, function, options, _ = COMMANDS[choose("command", name, COMMANDS)]
    home = import_module(module)
    sys.argv = [f"ws {name}", *sys.argv[2:]]
    console.run(getattr(home, function), getattr(home, options), f"ws {name}")


def _help(groups: Mapping[str, Mapping[str, tuple[str, str, str, str]]]) -> str:
    width = max(map(len, COMMANDS))
    lines = list[str]()
    for title, commands in groups.items():
        lines += ["", *([title] if title else [])]
        lines += [f"  {name:<{width}}  {text}" for name, (_, _, _, text) in commands.items()]
    last = ["", "ws COMMAND --help lists a command's options.", console.COMMON_FLAGS]
    return "\n".join(["usage: ws COMMAND [options]", *lines, *last])


if __name__ == "__main__":
    main()
