"""A purely low-rank vector as a LoRA adapter of llama.cpp, which scales it while it serves.

`python -m ws.export.gguf_lora` writes one GGUF file, and `llama-server -m base.gguf --lora-scaled FILE:X` steers with
`X` times its strength. To the product `W x` of every changed module llama.cpp adds

    scale * (alpha / r) * B (A x)        A = lora_a [r, d_in], B = lora_b [d_out, r]

where `alpha` is one number of the file and `r` that module's own rank (`llama_adapter_lora_weight::get_scale`,
src/llama-adapter.h of llama.cpp). With `R` the largest rank, the file has `alpha = R`, `A = V` and
`B = strength * (r / R) * U`, so that the product is `scale * strength * U V x` whatever the ranks are.

Names come from the package `gguf` (the extra `gguf`). Where llama.cpp's converter reorders the rows of a weight, those
of `B` are reordered alike (see `rope_rows`).
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedConfig

from ws import console
from ws.diff import SteeringVector, vector_digest
from ws.errors import WsError
from ws.export.source import strength_text, vector_of
from ws.files.gguf import gguf_file, gguf_package, metadata_of
from ws.files.public import public_name
from ws.files.runs import atomic_file
from ws.lm.models import load_config
from ws.options.use import GgufOptions as GgufOptions

# The `model_type` of a base to its architecture in `gguf.MODEL_ARCH`; llama.cpp runs Mistral models as Llama ones.
ARCHITECTURES = {"qwen3": "QWEN3", "qwen2": "QWEN2", "llama": "LLAMA", "mistral": "LLAMA"}
VECTOR_KEY = "ws.vector_sha256"  # by which an adapter that was written here is known


@dataclass(frozen=True)
class GgufFactors:
    """The two tensors of one module.

    Attributes:
        module: its name in the base.
        name: of its weight in GGUF; the tensors are this with `.lora_a` and `.lora_b`.
        a, b: float32, as they are in the file; `b` with everything that scales.
    """

    module: str
    name: str
    a: Float[Tensor, "r d_in"]
    b: Float[Tensor, "d_out r"]


@dataclass(frozen=True)
class GgufLora:
    """A LoRA adapter that was written for llama.cpp.

    Attributes:
        file: where.
        architecture: of the base, as llama.cpp calls it.
        strength: what is baked in; `--lora-scaled FILE:X` steers with `X` times that.
        ranks: the rank of every module in the file, by the base's module names.
    """

    file: Path
    architecture: str
    strength: float
    ranks: Mapping[str, int]

    def describe(self) -> str:
        """What the file holds."""
        low, high = min(self.ranks.values()), max(self.ranks.values())
        rank = f"rank {high}" if low == high else f"ranks {low} to {high}"
        size = self.file.stat().st_size / 1e6
        return (
            f"{len(self.ranks)} modules of a {self.architecture} model, {rank}, {size:.2f} MB, "
            f"strength {self.strength:g} at scale 1"
        )


# ---- the tensors ----------------------------------------------------------------------------------------------------


def rope_rows(d_out: int, heads: int) -> Int[Tensor, "d_out"]:
    """Which row of a query or key weight of transformers is at each row of llama.cpp's, in its Llama architecture.

    Transformers rotates entry `j` of a head with entry `j + h / 2`, where `h` is the head's size; llama.cpp rotates
    neighbours, so its converter puts row `j` of a head at `2 j` and row `j + h / 2` at `2 j + 1` (`LlamaModel.permute`
    of convert_hf_to_gguf). Its Qwen architectures rotate as transformers does.
    """
    if d_out % (2 * heads):
        raise WsError(f"A weight with {d_out} rows cannot be that of {heads} rotated heads; is this the right base?")
    return torch.arange(d_out).view(heads, 2, -1).transpose(1, 2).flatten()


def gguf_factors(vector: SteeringVector, config: PreTrainedConfig, strength: float | int = 1.0) -> list[GgufFactors]:
    """The tensors of the adapter, module by module; modules whose change is zero (rank 0) are left out.

    Args:
        vector: a purely low-rank one.
        config: of the base, for its architecture.
        strength: what `lora_b` is multiplied by, besides the module's rank over the largest.

    Raises:
        WsError: a vector that is not purely low-rank or zero, another architecture, or a module that llama.cpp cannot
            add a LoRA to.
    """
    _check_low_rank(vector)
    factors = []
    for module, name in _gguf_names(vector, config).items():
        delta, heads = vector.deltas[module], _rotated_heads(module, config)
        assert delta.u is not None
        assert delta.v is not None
        b = (delta.u.double() * (strength * delta.rank / vector.max_rank)).float().cpu()
        b = b if heads is None else b[rope_rows(delta.d_out, heads)]
        factors.append(GgufFactors(module, name, delta.v.float().cpu(), b))
    return factors


def _check_low_rank(vector: SteeringVector) -> None:
    if not vector.is_low_rank:
        family = vector.info.get("family", "unknown")
        raise WsError(
            f"This vector (family: {family}) is not purely low-rank, and a LoRA adapter of llama.cpp is nothing else; "
            "make a low-rank one with `ws export peft` (--rank, --max-error) and name that folder with --vector."
        )
    if vector.is_zero:
        raise WsError("The steering vector is zero: there is nothing to export.")


def _gguf_names(vector: SteeringVector, config: PreTrainedConfig) -> dict[str, str]:
    """The name of every changed module's weight in GGUF; `WsError` when one has none."""
    gguf, arch = gguf_package(), _architecture(config)
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, arch), config.num_hidden_layers)
    changed = sorted(name for name, delta in vector.deltas.items() if delta.rank)
    # llama.cpp reads a LoRA of the embedding transposed, and a head that is tied to it has no tensor of its own.
    without = {None, "token_embd"} | ({"output"} if config.tie_word_embeddings else set())
    left = [name for name in changed if names.get_name(name) in without]
    if left:
        raise WsError(
            f"llama.cpp cannot add a LoRA to {len(left)} of the {len(changed)} modules that the vector changes in a "
            f"{config.model_type} model of {config.num_hidden_layers} layers ({', '.join(left[:3])}); leave them out "
            "with `ws trim --modules` or `--layers`."
        )
    return {name: f"{names.get_name(name)}.weight" for name in changed}


def _architecture(config: PreTrainedConfig) -> str:
    if config.model_type not in ARCHITECTURES:
        raise WsError(
            f"A {config.model_type} model cannot be exported to llama.cpp here; the bases that can are "
            f"{', '.join(ARCHITECTURES)}."
        )
    return ARCHITECTURES[config.model_type]


def _rotated_heads(module: str, config: PreTrainedConfig) -> int | None:
    """The heads of a query or key projection whose rows llama.cpp reorders, None for every other module."""
    if _architecture(config) != "LLAMA":
        return None
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    return heads.get(module.rsplit(".", 1)[-1])


# ---- the file -------------------------------------------------------------------------------------------------------


def write_gguf_lora(
    vector: SteeringVector, file: str | Path, strength: float | int = 1.0, config: PreTrainedConfig | None = None
) -> GgufLora:
    """Write the adapter, all at once; an earlier one there is replaced.

    Args:
        vector: a purely low-rank one.
        file: the GGUF file.
        strength: the alpha that is baked in, not 0; scale 1 of llama.cpp steers with it.
        config: of the base; None to read that of the base the vector was made for.

    Raises:
        WsError: see `gguf_factors`; no package `gguf`, no such base, or a place that holds something else.
    """
    file, gguf = Path(file), gguf_package()
    if strength == 0:
        raise WsError("An adapter of strength 0 would change nothing at any scale; give another --alpha.")
    if file.is_dir():
        raise WsError(f"{file} is a folder; give the adapter's file name.")
    if (file.exists() or file.is_symlink()) and VECTOR_KEY not in metadata_of(file):
        raise WsError(f"{file} exists and is no adapter that was written here; choose another place with --to.")
    _check_low_rank(vector)  # before the base is looked for
    config = config or load_config(vector.base_id)
    factors = gguf_factors(vector, config, strength)
    arch = gguf.MODEL_ARCH_NAMES[getattr(gguf.MODEL_ARCH, _architecture(config))]
    with atomic_file(file) as part, closing(gguf.GGUFWriter(part, arch)) as writer:
        _describe_in(writer, gguf.Keys.Adapter, vector, file.stem, strength)
        _write_tensors(writer, factors)
    return GgufLora(file, arch, float(strength), {f.module: f.a.shape[0] for f in factors})


def _describe_in(writer: Any, keys: Any, vector: SteeringVector, name: str, strength: float | int) -> None:
    """What llama.cpp needs to know, and where the adapter comes from."""
    writer.add_type("adapter")
    writer.add_string(keys.TYPE, "lora")
    writer.add_float32(keys.LORA_ALPHA, float(vector.max_rank))
    writer.add_name(name)
    facts = [f"{key} {vector.info[key]}" for key in ("behavior", "family", "seed") if key in vector.info]
    writer.add_description(", ".join(["Weight steering vector", *facts, f"strength {strength:g} at scale 1"]))
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, public_name(vector.base_id))
    writer.add_string(VECTOR_KEY, vector_digest(vector))
    writer.add_float64("ws.strength", float(strength))
    if vector.base_fingerprint is not None:
        writer.add_string("ws.base_fingerprint", vector.base_fingerprint)


def _write_tensors(writer: Any, factors: Sequence[GgufFactors]) -> None:
    for f in factors:
        writer.add_tensor(f"{f.name}.lora_a", f.a.contiguous().numpy())
        writer.add_tensor(f"{f.name}.lora_b", f.b.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()


# ---- the command ----------------------------------------------------------------------------------------------------


def main(options: GgufOptions) -> None:
    """The command `python -m ws.export.gguf_lora`."""
    vector = vector_of(options)
    alpha = vector.strength(options.alpha)
    file = options.target(f"{options.name}{'' if alpha == 1 else strength_text(alpha)}.gguf")
    config = None if options.model is None else load_config(options.model)
    written = write_gguf_lora(vector, file, alpha, config)
    base = gguf_file(options.model or vector.base_id) or "base.gguf"
    serve = shlex.join(["llama-server", "-m", str(base), "--lora-scaled", f"{file}:1"])
    console.show(console.Result(written.describe(), {"lora": written}, [file], serve))


if __name__ == "__main__":
    console.run(main, GgufOptions, "python -m ws.export.gguf_lora")
