"""A LoRA vector on a model of Qwen3-0.6B's exact shape (random weights): memory, size, time and error.

`uv run python -m benchmarks.vector` builds the model and two rank-32 adapters in a temporary folder, then measures

- peak memory of a fresh process that loads the base, builds, saves and loads the vector, against one that only loads,
  and against one that does the same with the touched matrices of merge-and-subtract (`benchmarks.reference`);
- the size of the saved vector against dense dW in bfloat16, of the touched matrices and of the whole model;
- building the vector against merge-and-subtract, and saving and loading it against those matrices, in alternation;
- the relative error of both results against float64.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

import ws
from benchmarks import harness, reference
from ws.adapters import peft_config

QWEN3_06B = Qwen3Config(
    vocab_size=151936,
    hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    tie_word_embeddings=True,
)


def load(folder: Path) -> PreTrainedModel:
    """The base with every weight in memory: a file that is only mapped would not count, and flatter the ratio."""
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype="auto").eval()
    read(dict(model.named_parameters()))
    return model


def read(tensors: Mapping[str, Tensor]) -> None:
    """Every bfloat16 number of some tensors."""
    for tensor in tensors.values():
        tensor.detach().view(torch.int16).amax()


def prepare(folder: Path) -> None:
    """Write the random base in bfloat16 and two adapters whose change is about 1 % of the weights they touch."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(QWEN3_06B).to(torch.bfloat16)
    model.save_pretrained(folder / "base")
    for sign, seed in (("pos", 1), ("neg", 2)):
        torch.manual_seed(0)
        peft_model = get_peft_model(model, peft_config(model, ws.AdapterSpec("lora")))
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, p in peft_model.named_parameters():
                if "lora_" in name:
                    p.add_(torch.randn_like(p) * (8e-4 if "lora_B" in name else 2e-2))
        peft_model.save_pretrained(str(folder / sign), save_embedding_layers=False)
        model = peft_model.unload()
    print(json.dumps({"prepared": True}))


def build(base: PreTrainedModel, folder: Path) -> ws.SteeringVector:
    return ws.SteeringVector.from_adapter(folder / "pos", base) - ws.SteeringVector.from_adapter(folder / "neg", base)


def only_load(folder: Path) -> None:
    model = load(folder)
    print(json.dumps({"bytes": sum(p.numel() * p.element_size() for p in model.parameters())}))


def load_and_build(folder: Path) -> None:
    vector = build(load(folder), folder)
    vector.save(folder / "vector")
    print(json.dumps({"norm": ws.SteeringVector.load(folder / "vector").norm()}))


def merge_and_subtract(folder: Path) -> None:
    """The same by the usual procedure, which here keeps the touched matrices alone."""
    base = load(folder)
    names = [f"{name}.weight" for name in build(base, folder).deltas]  # a few MiB, and gone again
    dense = reference.merge_and_subtract(base, folder / "pos", folder / "neg")
    dense = {name: dense[name].contiguous() for name in names}
    save_file(dense, folder / "dense.safetensors")
    read(load_file(folder / "dense.safetensors"))
    print(json.dumps({"matrices": len(dense)}))


PARTS = {"prepare": prepare, "only_load": only_load, "load_and_build": load_and_build, "merge": merge_and_subtract}


def storing(vector: ws.SteeringVector, base: PreTrainedModel, folder: Path, rounds: int) -> dict[str, harness.Ratio]:
    """Saving and loading dense dW of the touched matrices in bfloat16, over the same of the vector."""
    dense = {name: change.to(torch.bfloat16) for name, change in vector.dense(base)}
    file = folder / "stored.safetensors"
    return {
        "dense_save_over_save": harness.compare(
            lambda: vector.save(folder / "stored"), lambda: save_file(dense, file), rounds
        ),
        "dense_load_over_load": harness.compare(
            lambda: ws.SteeringVector.load(folder / "stored"), lambda: read(load_file(file)), rounds
        ),
    }


def sizes(vector: ws.SteeringVector, base: PreTrainedModel, folder: Path) -> dict[str, float]:
    """File sizes, and how many times larger dense dW in bfloat16 is."""
    vector.save(folder / "half", dtype=torch.bfloat16)
    exact, half = (sum(f.stat().st_size for f in (folder / name).iterdir()) for name in ("vector", "half"))
    touched = 2 * sum(d.d_out * d.d_in for d in vector.deltas.values())
    whole = 2 * sum(p.numel() for p in base.parameters())
    return {
        "vector_mib": exact / 2**20,
        "vector_bfloat16_mib": half / 2**20,
        "dense_whole_model_over_vector": whole / exact,
        "dense_whole_model_over_vector_bfloat16": whole / half,
        "dense_touched_matrices_over_vector": touched / exact,
        "dense_touched_matrices_over_vector_bfloat16": touched / half,
    }


def errors(vector: ws.SteeringVector, base: PreTrainedModel, folder: Path) -> dict[str, float]:
    """Relative Frobenius error of dW, ours and by merge-and-subtract, against float64; and the size of dW."""
    dense = reference.merge_and_subtract(base, folder / "pos", folder / "neg")
    files = [load_file(folder / s / "adapter_model.safetensors") for s in ("pos", "neg")]
    totals = dict.fromkeys(("exact", "ours", "usual", "weight"), 0.0)
    for name, change in vector.dense(base):
        key = f"base_model.model.{name.removesuffix('.weight')}"
        p, n = ((f[f"{key}.lora_B.weight"].double() @ f[f"{key}.lora_A.weight"].double()) * 2 for f in files)
        totals["exact"] += float((p - n).square().sum())
        totals["ours"] += float((change.double() - (p - n)).square().sum())
        totals["usual"] += float((dense[name].double() - (p - n)).square().sum())
        totals["weight"] += float(base.get_parameter(name).detach().double().square().sum())
    return {
        "size_of_change": (totals["exact"] / totals["weight"]) ** 0.5,
        "error_ours": (totals["ours"] / totals["exact"]) ** 0.5,
        "error_merge_and_subtract": (totals["usual"] / totals["exact"]) ** 0.5,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    if options.part:
        PARTS[options.part](options.folder)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        part = ["-m", "benchmarks.vector", "--folder", name, "--part"]
        harness.fresh_process([*part, "prepare"])
        done = harness.in_turns({p: [*part, p] for p in ("only_load", "load_and_build", "merge")}, options.rounds)
        alone, ours, usual = ([process.peak_mib for process in side] for side in done.values())
        base = load(folder)
        vector = build(base, folder)
        ratio = harness.compare(
            lambda: build(base, folder),
            lambda: reference.merge_and_subtract(base, folder / "pos", folder / "neg"),
            options.rounds,
        )
        results = {
            "base_mib": done["only_load"][0].output["bytes"] / 2**20,
            "peak_only_load_mib": max(alone),
            "peak_load_build_save_load_mib": max(ours),
            "peak_ratio": harness.Spread.ratio(ours, alone),
            "peak_over_merge_and_subtract": harness.Spread.ratio(ours, usual),
            "merge_and_subtract_over_build": ratio,
            **storing(vector, base, folder, options.rounds),
            **sizes(vector, base, folder),
            **errors(vector, base, folder),
        }
    harness.record("vector", results)


if __name__ == "__main__":
    main()
