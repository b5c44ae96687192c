"""Logits and greedy answers of llama.cpp under a LoRA adapter, in an environment of its own.

Run by `test_export_gguf.py` as `python peer_llama_cpp.py BASE.gguf LORA.gguf REQUEST.json ANSWER.npz`. The request is a
list of `{"tokens": [...], "scale": x, "prompt": p, "new": n}`. For its entry `i` the answer has `logits<i>`
`[tokens, vocabulary]`, of one pass over the tokens, and `greedy<i>` `[n]`: the likeliest continuation of the first `p`
tokens, decoded one by one. The model and the adapter are loaded once and only the adapter's scale is changed, as a
server does it; activations between products, and the cache, are float32.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path

import llama_cpp as lc
import numpy as np


def load(base: Path, lora: Path, length: int) -> tuple:
    """The model's context and the adapter; the exit status says when llama.cpp does not take one of them."""
    lc.llama_backend_init()
    model = lc.llama_model_load_from_file(str(base).encode(), lc.llama_model_default_params())
    if not model:
        sys.exit(f"llama.cpp does not load the model {base.name}")
    adapter = lc.llama_adapter_lora_init(model, str(lora).encode())
    if not adapter:
        sys.exit(f"llama.cpp does not load the adapter {lora.name}")
    options = lc.llama_context_default_params()
    options.n_ctx = options.n_batch = options.n_ubatch = max(length, 64)
    options.type_k = options.type_v = lc.GGML_TYPE_F32
    options.flash_attn_type = lc.LLAMA_FLASH_ATTN_TYPE_DISABLED
    options.n_threads = options.n_threads_batch = 1
    return model, lc.llama_init_from_model(model, options), adapter


def begin(context, adapter, scale: float) -> None:
    """An empty context with the adapter at this scale."""
    adapters, scales = (lc.llama_adapter_lora_p_ctypes * 1)(adapter), (ctypes.c_float * 1)(scale)
    if lc.llama_set_adapters_lora(context, adapters, 1, scales):
        sys.exit(f"llama.cpp does not set the adapter's scale to {scale}")
    lc.llama_memory_clear(lc.llama_get_memory(context), True)


def decode(context, tokens: list[int], start: int, vocabulary: int) -> np.ndarray:
    """The logits `[tokens, vocabulary]` of tokens that stand at the places from `start` on."""
    batch = lc.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, start + i, 1, 1
        batch.seq_id[i][0] = 0
    if lc.llama_decode(context, batch):
        sys.exit("llama.cpp does not decode the tokens")
    logits = np.ctypeslib.as_array(lc.llama_get_logits(context), (len(tokens), vocabulary)).copy()
    lc.llama_batch_free(batch)
    return logits


def greedy(context, prompt: list[int], new: int, vocabulary: int) -> list[int]:
    """The `new` likeliest tokens behind the prompt; an end of turn does not stop it."""
    answer, tokens = [], prompt
    for _ in range(new):
        start = 0 if not answer else len(prompt) + len(answer) - 1
        answer.append(int(decode(context, tokens, start, vocabulary)[-1].argmax()))
        tokens = answer[-1:]
    return answer


def main(base: Path, lora: Path, request: Path, target: Path) -> None:
    entries = json.loads(request.read_text(encoding="utf-8"))
    model, context, adapter = load(base, lora, max(len(e["tokens"]) + e["new"] for e in entries))
    size = lc.llama_vocab_n_tokens(lc.llama_model_get_vocab(model))
    answers = {}
    for i, entry in enumerate(entries):
        begin(context, adapter, entry["scale"])
        answers[f"logits{i}"] = decode(context, entry["tokens"], 0, size)
        begin(context, adapter, entry["scale"])
        answers[f"greedy{i}"] = np.array(greedy(context, entry["tokens"][: entry["prompt"]], entry["new"], size))
    np.savez(target, **answers)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
