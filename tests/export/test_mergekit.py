"""mergekit as a peer: task arithmetic over two merged fine-tunes is the merge of their vector.

mergekit lives in an environment of its own, which `uv` makes from the package index the first time.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import ws
from conftest import build_adapter, build_model
from ws.export.merged import export_merged

WITH = ("mergekit==0.1.4", "transformers==4.55.4")  # it does not work with transformers 5
MERGEKIT = ["uv", "run", "--no-project", "--python", "3.11", *(f"--with={w}" for w in WITH), "mergekit-yaml"]


def task_arithmetic(base: Path, pos: Path, neg: Path, alpha: float, to: Path) -> dict[str, torch.Tensor]:
    """`base + alpha (pos - base) - alpha (neg - base)` as mergekit computes it, in float32."""
    models = [{"model": str(m), "parameters": {"weight": w}} for m, w in ((pos, alpha), (neg, -alpha))]
    config = {"merge_method": "task_arithmetic", "base_model": str(base), "models": models}
    config |= {"dtype": "float32", "parameters": {"normalize": False}}
    file = to.with_suffix(".yaml")
    file.write_text(json.dumps(config))  # JSON is YAML
    command = [*MERGEKIT, str(file), str(to), "--no-copy-tokenizer"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    tensors: dict[str, torch.Tensor] = {}
    for part in to.glob("*.safetensors"):
        tensors |= load_file(part)
    return tensors


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_task_arithmetic_over_two_fine_tunes_is_our_merge(dtype, tmp_path):
    if shutil.which("uv") is None:
        pytest.skip("needs uv to make an environment for mergekit")
    model = build_model("qwen3", dtype)
    model.save_pretrained(tmp_path / "base")
    sides = []
    for seed, sign in ((1, "pos"), (2, "neg")):
        build_adapter(model.float(), "lora", tmp_path / f"{sign}-adapter", seed).to(dtype).save_pretrained(
            tmp_path / sign
        )
        sides.append(ws.SteeringVector.from_adapter(tmp_path / f"{sign}-adapter", model))
    vector = replace(sides[0] - sides[1], base_id=str(tmp_path / "base"))
    export_merged(vector, 0.7, tmp_path / "ours")
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    theirs = task_arithmetic(*(tmp_path / n for n in ("base", "pos", "neg")), 0.7, tmp_path / "theirs")
    start = load_file(tmp_path / "base" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    # In float32 both are the same but for the order of the sums. In bfloat16 mergekit starts from rounded fine-tunes.
    rounding = 2**-22 if dtype == torch.float32 else 2**-7
    for name, tensor in ours.items():
        size = max(float(t.float().abs().max()) for t in (start[name], tensor))
        assert float((tensor.float() - theirs[name].float()).abs().max()) <= 4 * rounding * size, name
    moved = [n for n in ours if not torch.equal(ours[n], start[n])]
    assert len(moved) == len(vector.deltas)
