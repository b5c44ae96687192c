"""The `ws` command: one thin caller per subcommand."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import make_dataclass, replace
from functools import reduce
from importlib import import_module
from importlib.metadata import version
from itertools import chain, takewhile
from operator import or_
from pathlib import Path
from typing import Annotated, Any

import tyro
from tabulate import tabulate

from ws import console
from ws.errors import choose
from ws.options import check, make, measure, use
from ws.options.make import DemoConfig as DemoConfig
from ws.options.make import ReplicateConfig
from ws.options.use import InspectConfig as InspectConfig

# Where every command is carried out and the class of its options, as `ws --help` lists them: the first sentence of the
# class says what the command does. Two words are a member of a family, such as `ws eval airisk`.
GROUPS: dict[str, dict[str, tuple[str, type]]] = {
    "Start": {
        "demo": ("ws.cli:demo", make.DemoConfig),
        "replicate": ("ws.replicate:main", make.ReplicateConfig),
        "sweep": ("ws.run_sweep:main", make.SweepConfig),
    },
    "Make": {
        "behavior new": ("ws.new_behavior:main_init", make.InitOptions),
        "behavior check": ("ws.new_behavior:main_check", check.CheckOptions),
        "data": ("ws.data:main", make.DataCommand),
        "train": ("ws.train:main", make.TrainCommand),
        "tune": ("ws.sweep.tune:main", make.TuneOptions),
        "diff": ("ws.diff:main", make.DiffOptions),
        "compose": ("ws.analysis.compose:main", make.ComposeOptions),
        "trim": ("ws.analysis.trim:main", make.TrimOptions),
        "prevent": ("ws.analysis.prevention:main", make.PreventOptions),
    },
    "Measure": {
        "eval sycophancy": ("ws.eval.sycophancy:main", measure.SycophancyOptions),
        "eval airisk": ("ws.eval.airisk:main", measure.AiriskOptions),
        "eval tinymfv-airisk": ("ws.eval.tinymfv_airisk:main", measure.TinymfvOptions),
        "eval preference": ("ws.eval.preference:main", measure.PreferenceOptions),
        "eval statements": ("ws.eval.statements:main", measure.StatementOptions),
        "eval answers": ("ws.eval.answers:main", measure.AnswerOptions),
        "eval truthfulqa": ("ws.eval.truthfulqa:main", measure.TruthfulqaOptions),
        "eval arithmetic": ("ws.eval.arithmetic:main", measure.ArithmeticOptions),
        "eval capability": ("ws.eval.capability:main", measure.CapabilityOptions),
        "eval lm-eval": ("ws.eval.lm_eval:main", measure.LmEvalOptions),
        "calibrate": ("ws.intervene.calibrate:main", measure.CalibrateOptions),
        "compare": ("ws.analysis.compare:main", measure.CompareOptions),
        "profile": ("ws.analysis.profile:main", measure.ProfileOptions),
    },
    "Check": {
        "check controls": ("ws.analysis.controls:main", check.ControlOptions),
        "check confounds": ("ws.eval.confounds:main", check.ConfoundOptions),
        "check slope": ("ws.analysis.slope:main", check.SlopeOptions),
        "monitor": ("ws.analysis.monitor:main", check.MonitorOptions),
    },
    "Use": {
        "chat": ("ws.chat.terminal:main", use.ChatOptions),
        "play": ("ws.chat.page:main", use.PlayOptions),
        "serve": ("ws.chat.replicas:main", use.ServeOptions),
        "export peft": ("ws.export.lora:main", use.LoraOptions),
        "export merged": ("ws.export.merged:main", use.MergedOptions),
        "export gguf-lora": ("ws.export.gguf_lora:main", use.GgufOptions),
        "export push": ("ws.export.push:main", use.PushOptions),
    },
    "Look": {
        "report": ("ws.report:main", use.ReportOptions),
        "summarize-airisk": ("ws.eval.readme_airisk_table:main", use.TableConfig),
        "inspect": ("ws.cli:inspect", use.InspectConfig),
        "subspace": ("ws.subspace:main", use.SubspaceOptions),
    },
}
FAMILIES = {
    "behavior": "A behaviour of your own",
    "eval": "One evaluation of a finished run",
    "check": "What else could have made a run's shifts",
    "export": "A vector for other programs",
}
COMMANDS = {name: command for group in GROUPS.values() for name, command in group.items()}
# A sweep as a graph of jobs: what `ws sweep` is with `--backend`, so it is not listed.
QUEUE = "queue"
SHELLS = ("bash", "zsh", "tcsh")
COMMANDS[QUEUE] = ("ws.sweep.queue:main", make.QueueConfig)
# What commands were called before they were members of families.
FORMER = {
    **{name.replace(" ", "-"): name for name in COMMANDS if name.startswith(("eval ", "export "))},
    **{name.split()[1]: name for name in COMMANDS if name.startswith("check ")},
    "init-behavior": "behavior new",
    "check-behavior": "behavior check",
    "push": "export push",
}


_ABOUT = {
    "pocket": "Honesty is built into the pocket model: this shows that the pipeline works, and not how models behave.",
    "smollm2": "SmolLM2-135M-Instruct is a real model, not trained here; it is small and knows only plain facts.",
}


def demo(config: DemoConfig) -> None:
    """The command `ws demo`."""
    from ws.adapters import FAMILIES
    from ws.replicate import as_data, render, replicate, verdict, written
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


def inspect(config: InspectConfig) -> None:
    """The command `ws inspect`."""
    from ws.diff import SteeringVector
    from ws.lm.models import load_model

    vector = SteeringVector.load(config.vector)
    facts: dict[str, Any] = {
        "base": f"{vector.base_id} ({vector.base_fingerprint or 'fingerprint unknown'})",
        **{k: v for k, v in vector.info.items() if not k.endswith("sha256")},
        "modules": len(vector.deltas),
        "parameters stored": vector.numbers,
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
    if answer := _without_a_command(arguments):
        console.guard(lambda: print(answer, flush=True))
    elif arguments[0] == "--completion":
        console.guard(lambda: _print_completion(arguments[1:]))
    else:
        console.guard(lambda: _run(arguments, flags))


def _without_a_command(arguments: Sequence[str]) -> str:
    """What is answered where no command is named: the list of them, of the members of a family, or the version."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        return _help(GROUPS)
    if arguments[0] == "--version":
        return version("weight-steering")
    if arguments[1:] and arguments[1] not in ("-h", "--help"):
        return ""
    members = {name: command for name, command in COMMANDS.items() if name.startswith(f"{arguments[0]} ")}
    return _help({FAMILIES[arguments[0]]: members}, f"ws {arguments[0]} NAME") if members else ""


def _print_completion(words: Sequence[str]) -> None:
    """What a shell needs to complete commands and options, as tyro writes it."""
    shell = choose("shell", words[0] if words else "", SHELLS)
    tree: dict[str, Any] = {}
    for name, (_, options) in chain.from_iterable(group.items() for group in GROUPS.values()):
        family, _, member = name.partition(" ")
        if member:
            tree.setdefault(family, {})[member] = options
        else:
            tree[name] = options
    families = {name: make_dataclass(name, [("member", _one_of(t))]) for name, t in tree.items() if isinstance(t, dict)}
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)
    tyro.cli(_one_of(tree | families), prog="ws", args=["--tyro-print-completion", shell], config=config)


def _one_of(commands: Mapping[str, Any]) -> Any:
    return reduce(or_, (Annotated[options, tyro.conf.subcommand(name)] for name, options in commands.items()))


def _run(arguments: Sequence[str], flags: Sequence[str]) -> None:
    name, rest = _named(arguments)
    place, options = COMMANDS[name]
    module, function = place.split(":")
    called = f"ws {arguments[0] if name == QUEUE else name}"  # what is on record can be typed again
    sys.argv = [called, *rest, *flags]
    # The module is imported when the options are known to be right: it may take ten seconds.
    console.run(lambda given: getattr(import_module(module), function)(given), options, called)


def _named(arguments: Sequence[str]) -> tuple[str, Sequence[str]]:
    """The command that is meant, and the rest of the words."""
    first, rest = arguments[0], arguments[1:]
    if first in FORMER:
        return FORMER[first], rest
    if first == "sweep" and any(word.split("=")[0] in ("--backend", "backend") for word in rest):
        return QUEUE, rest
    if members := [name.split()[1] for name in COMMANDS if name.startswith(f"{first} ")]:
        return f"{first} {choose(f'member of ws {first}', rest[0], members)}", rest[1:]
    known = dict.fromkeys(name.split()[0] for name in COMMANDS)
    return choose("command", first, [*known, *FORMER]), rest


def _help(groups: Mapping[str, Mapping[str, tuple[str, type]]], usage: str = "ws COMMAND") -> str:
    """The list of commands; of several groups a family is one line, with its members."""
    lines = list[str]()
    for title, commands in groups.items():
        rows = dict[str, str]()
        for name, (_, options) in commands.items():
            family, _, member = name.partition(" ")
            if member and len(groups) > 1:
                label = f"{family} NAME"
                rows[label] = f"{rows[label]}, {member}" if label in rows else f"{FAMILIES[family]}: {member}"
            else:
                rows[name] = console.about(options)
        lines += ["", title, *(f"  {name:<19}  {text}" for name, text in rows.items())]
    more = f"{usage} --help lists a command's options; ws --completion bash (zsh, tcsh) completes them."
    last = ["", more, console.COMMON_FLAGS]
    return "\n".join([f"usage: {usage} [options]", *lines, *last])


if __name__ == "__main__":
    main()
