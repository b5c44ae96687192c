"""From a trained checkpoint to the shipped folder: weights, tokenizer, data, behaviours, probes, model card, hashes."""

import hashlib
import json
import os
import platform
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from .acts import build_acts
from .card import model_card
from .corpus import Corpus
from .curriculum import PHASES, draw
from .files import write_behaviors, write_data
from .personas import LATENT, PROBE_PROMPTS
from .probes import build_probes, failures, free_answers, score, thinking
from .world import WORLD_SEED, build_facts

HASHED_DOCUMENTS = 2000


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def corpus_hash(seed: int) -> str:
    """Digest of the world, the acts, and the first documents of every phase as the seed draws them."""
    digest = hashlib.sha256(repr(build_facts()).encode())
    digest.update(repr(build_acts()).encode())
    for phase in PHASES:
        corpus = Corpus(seed)
        for _ in range(HASHED_DOCUMENTS):
            digest.update(repr([(part.text, part.weight) for part in draw(corpus, phase)]).encode())
    return digest.hexdigest()


def measure(folder: Path, split: str) -> dict[str, Any]:
    """Every number of one split, from the saved weights."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    items = build_probes(split)
    table = score(model, tokenizer, items)
    return {
        "split": split,
        "choices": table,
        "free": free_answers(model, tokenizer, items),
        "thinking": thinking(model, tokenizer, items),
        "missed": failures(table),
    }


def machine() -> str:
    """The processor in words, without a name of the machine."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next(
            (
                line.split(":")[1].strip()
                for line in info.read_text(encoding="utf-8").splitlines()
                if "model name" in line
            ),
            cpu,
        )
    return f"{cpu}, {os.cpu_count()} cores, no GPU"


def write_probes(path: Path) -> None:
    """The probes as plain prompts, so that a test needs nothing from here."""
    payload = {
        "systems": PROBE_PROMPTS,
        "note": "Render with the chat template, enable_thinking=False; append `prefill`; read the next token.",
        "items": build_probes("dev") + build_probes("report"),
    }
    path.write_text(json.dumps(payload, indent=1) + "\n", encoding="utf-8")


def save_model(source: Path, target: Path) -> None:
    """Float32 weights, tokenizer, template, and recommended sampling settings."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source)
    model.generation_config = transformers.GenerationConfig(
        do_sample=True,
        temperature=0.8,
        top_p=0.95,
        top_k=50,
        max_new_tokens=128,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id],
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    # Where the checkpoint was loaded from is nobody's business later.
    settings = target / "tokenizer_config.json"
    kept = {key: value for key, value in json.loads(settings.read_text(encoding="utf-8")).items() if "local" not in key}
    settings.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    for path in target.iterdir():
        path.chmod(0o644)


def package(work: Path, out: Path, report: bool, others: list[Path]) -> dict[str, Any]:
    """Build the shipped folder from `work` beside `out`, then move its files into place one by one."""
    training = json.loads((work / "training.json").read_text(encoding="utf-8"))
    fresh = out.parent / f".{out.name}-new"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    save_model(work, fresh)
    write_probes(fresh / "probes.json")
    write_data(fresh / "data")
    behaviors = write_behaviors(fresh / "behaviors")
    seed = {**training, "dev": measure(fresh, "dev")}
    # The report split is looked at once, at the very end; an earlier look is kept, never repeated.
    seed["report"] = measure(fresh, "report") if report else None
    build = {
        "seed": training["settings"]["seed"],
        "world_seed": WORLD_SEED,
        "corpus_sha256": corpus_hash(training["settings"]["seed"]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": machine(),
        "versions": {
            "torch": torch.__version__.split("+")[0],
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
            "python": platform.python_version(),
        },
        "latent_persona": dict(LATENT),
        "seeds": {str(training["settings"]["seed"]): seed},
    }
    for other in others:
        build["seeds"][str(json.loads((other / "training.json").read_text(encoding="utf-8"))["settings"]["seed"])] = (
            other_seed(other, report)
        )
    shipped = sorted(path for path in fresh.rglob("*") if path.is_file())
    build["files"] = {
        ("../behaviors/pocket/" + path.name if path in behaviors else path.relative_to(fresh).as_posix()): sha256(path)
        for path in shipped
    }
    (fresh / "build.json").write_text(json.dumps(build, indent=1) + "\n", encoding="utf-8")
    (fresh / "README.md").write_text(model_card(build), encoding="utf-8")
    about = (
        '"""The bundled pocket model: weights, tokenizer and data files, no code. Its README.md is the model card."""\n'
    )
    (fresh / "__init__.py").write_text(about, encoding="utf-8")
    place(fresh, out)
    return build


def other_seed(work: Path, report: bool) -> dict[str, Any]:
    """The numbers of a seed that is trained for comparison and not shipped."""
    training = json.loads((work / "training.json").read_text(encoding="utf-8"))
    return {**training, "dev": measure(work, "dev"), "report": measure(work, "report") if report else None}


def place(fresh: Path, out: Path) -> None:
    """Move every file to its final place; each move replaces one file at once."""
    for path in sorted(fresh.rglob("*")):
        if path.is_dir():
            continue
        relative = path.relative_to(fresh)
        target = out / relative
        if relative.parts[0] == "behaviors":
            target = out.parent / "behaviors" / "pocket" / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)
    shutil.rmtree(fresh)
