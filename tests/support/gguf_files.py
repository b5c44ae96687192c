"""GGUF files of small models for tests: as much of llama.cpp's converter as they need, and their damage."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np

ARCHITECTURES = {"qwen3": "qwen3", "qwen2": "qwen2", "llama": "llama", "mistral": "llama"}
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def neighbours(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows as llama.cpp has them in its Llama architecture: the two that one angle rotates stand side by side."""
    mixed, size = np.empty_like(rows), len(rows) // heads
    for head in range(heads):
        for j in range(size // 2):
            mixed[head * size + 2 * j] = rows[head * size + j]
            mixed[head * size + 2 * j + 1] = rows[head * size + size // 2 + j]
    return mixed


def as_llama_cpp(name: str, rows: np.ndarray, config) -> np.ndarray:
    """A weight or bias of transformers with its rows in llama.cpp's order."""
    if config.model_type in ("llama", "mistral") and ".q_proj" in name:
        return neighbours(rows, config.num_attention_heads)
    if config.model_type in ("llama", "mistral") and ".k_proj" in name:
        return neighbours(rows, config.num_key_value_heads)
    return rows


def write_base(model, file: Path, tok=None, stored: str = "F32", **metadata) -> dict[str, np.ndarray]:
    """The model itself in GGUF; returns what its tensors are worth after being stored, by transformers' names.

    Args:
        model: of one of `ARCHITECTURES`.
        file: to write.
        tok: a byte-level BPE tokenizer whose vocabulary and template go in; None for a file without a vocabulary.
        stored: a type of `gguf.GGMLQuantizationType` for the matrices; vectors stay float32.
        metadata: further keys, with `__` for a dot, that replace or add to the file's.
    """
    config, arch = model.config, ARCHITECTURES[model.config.model_type]
    kind = gguf.GGMLQuantizationType[stored]
    writer = gguf.GGUFWriter(file, arch)
    _describe(writer, config)
    if tok is None:
        writer.add_vocab_size(config.vocab_size)
        writer.add_tokenizer_model("no_vocab")
    else:
        _add_tokenizer(writer, tok)
    for key, value in metadata.items():
        {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}[type(value)](
            key.replace("__", "."), value
        )
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config.num_hidden_layers)
    worth = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        plain = np.ascontiguousarray(as_llama_cpp(name, tensor.float().numpy(), config))
        here = kind if plain.ndim == 2 else gguf.GGMLQuantizationType.F32
        blocks = gguf.quants.quantize(plain, here)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), blocks, raw_dtype=here)
        worth[name] = gguf.quants.dequantize(gguf.quants.quantize(tensor.float().numpy(), here), here)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return worth


def _describe(writer: gguf.GGUFWriter, config) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _add_tokenizer(writer: gguf.GGUFWriter, tok) -> None:
    state = json.loads(tok.backend_tokenizer.to_str())
    ids = {**state["model"]["vocab"], **{t["content"]: t["id"] for t in state["added_tokens"]}}
    special = {t["content"] for t in state["added_tokens"]}
    tokens = sorted(ids, key=ids.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if t in special else gguf.TokenType.NORMAL for t in tokens])
    merges = state["model"]["merges"]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_eos_token_id(tok.eos_token_id)
    writer.add_pad_token_id(tok.pad_token_id)
    writer.add_chat_template(tok.chat_template)
