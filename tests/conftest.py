"""Shared fixtures: small random models of several architectures and random adapters of every family."""

from __future__ import annotations

import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # threads of one worker would only stand in the way of the other's
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# The commands that are run are many, and compiling what they import would be most of their time.
if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):
    sys.dont_write_bytecode = False

import copy
import gc
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import HealthCheck, Phase, settings
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config, Qwen3Config
from transformers import PreTrainedTokenizerBase as Tokenizer

from ws.adapters import FAMILIES, PISSA_INIT_FILE, SIGNED_INIT_FILE, AdapterSpec, peft_config

# A machine that has other work says nothing about a test.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
# A mutant is dead with the first example that fails: no smaller one is looked for, and none is kept.
settings.register_profile(
    "mutation", settings.get_profile("busy"), derandomize=True, database=None, phases=[Phase.explicit, Phase.generate]
)
settings.load_profile("busy")

EVALUATION_NAMES = (
    *("sycophancy", "airisk", "tinymfv_airisk", "preference", "statements", "answers", "truthfulqa", "arithmetic"),
)
FAMILY_NAMES = ("ia3", "oft", "dora", "lora", "pissa", "delora")
SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}

# A template that has no system role, as Gemma's.
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)


def pytest_collection_finish() -> None:
    """Libraries collect garbage again and again; what the imports have left need not be looked through each time."""
    gc.collect()
    gc.freeze()


def build_model(architecture: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A small random model; `qwen2` has biases on q, k and v, which are made non-zero."""
    torch.manual_seed(7)
    config = Qwen3Config(**SHAPE, head_dim=8) if architecture == "qwen3" else Qwen2Config(**SHAPE)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, p in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(p, std=0.5)
    return model.to(dtype)


def build_sharing(vocab_size: int = 96, kind: str = "Gemma4") -> PreTrainedModel:
    """A small random model whose last two blocks read the keys and values of blocks below."""
    torch.manual_seed(7)
    shape = SHAPE | {"vocab_size": vocab_size, "num_hidden_layers": 4, "head_dim": 8, "num_kv_shared_layers": 2}
    shape |= {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 64}
    shape |= {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": vocab_size, "pad_token_id": 0}
    config = getattr(transformers, f"{kind}TextConfig")(**shape)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


def build_adapter(
    model: PreTrainedModel, family: str, folder: Path, seed: int, size: float = 0.3, **spec
) -> PreTrainedModel:
    """Save a randomised adapter of `family` in `folder`, as training would; returns PEFT's own merge of it."""
    settings = {"rank": 4, "lora_alpha": 6.0, "layers": "all", "oft_block": 8, "delora_lambda": 2.0} | spec
    torch.manual_seed(11)  # both arms of a contrast start from one initialisation
    peft_model = get_peft_model(copy.deepcopy(model), peft_config(model, AdapterSpec(family, **settings)))
    initial = {
        n.replace(".default.", "."): p.detach().clone() for n, p in peft_model.named_parameters() if ".lora_" in n
    }
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in peft_model.named_parameters():
            if p.requires_grad:
                p.add_(
                    torch.randn_like(p)
                    * size
                    * (0.1 if "oft" in name else p.std().clamp(min=0.3, max=1.0) if p.numel() > 1 else 0.1)
                )
    peft_model.save_pretrained(str(folder))
    if family == "pissa":
        save_file({k: v.contiguous() for k, v in initial.items()}, folder / PISSA_INIT_FILE)
    elif family == "dora":
        sizes = {k.removesuffix(".weight"): v for k, v in initial.items() if "magnitude" in k}
        save_file(sizes, folder / SIGNED_INIT_FILE)
    return peft_model.merge_and_unload()


def reworded(tok: Tokenizer) -> Tokenizer:
    """A copy of a bundled tokenizer whose chat template begins an answer with another word."""
    made = copy.deepcopy(tok)
    made.chat_template = tok.chat_template.replace("assistant\\n", "helper\\n")
    assert made.chat_template != tok.chat_template
    return made


def without_thinking(tok: Tokenizer) -> Tokenizer:
    """A template that never thinks, over a vocabulary that has the think tokens."""
    plain = copy.deepcopy(tok)
    plain.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    return plain


def lay_out(source: Path, target: Path, copies: str, sharded: bool = False) -> Path:
    """A copy of a checkpoint in one file whose tied weights are stored otherwise.

    `copies`: `once`; `twice`, equal; `apart`, the second with values of its own; `other`, under the other name alone.
    Of two shards one has a weight and the other its copy.
    """
    ties = AutoModelForCausalLM.from_pretrained(source).all_tied_weights_keys
    assert ties
    tensors, noise = load_file(source / "model.safetensors"), torch.Generator().manual_seed(9)
    for second, first in ties.items():
        first, second = (second, first) if second in tensors else (first, second)
        if copies != "once":
            tensors[second] = tensors[first].clone()
        if copies == "apart":
            tensors[second] += 0.05 * torch.randn(tensors[first].shape, generator=noise).to(tensors[first].dtype)
        if copies == "other":
            del tensors[first]
    names = sorted(tensors, key=lambda name: name not in ties)  # all the second names into the first shard
    parts = [names[:10], names[10:]] if sharded else [names]
    files = [f"model-{i}-of-2.safetensors" for i in (1, 2)] if sharded else ["model.safetensors"]
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors"))
    for file, part in zip(files, parts, strict=True):
        save_file({name: tensors[name] for name in part}, target / file, metadata={"format": "pt"})
    if sharded:
        places = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": places}
        (target / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return target


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    """Families and evaluations that a test (or a snippet) registers are gone after it, and so is the engine that
    Inspect's models of one process share: its model stays steered while it lives."""
    yield
    provider = sys.modules.get("ws.chat.inspect_provider")
    if provider:
        provider._ENGINES.close()
    suite = sys.modules.get("ws.eval.suite")
    for name in suite.SUITE.keys() - set(EVALUATION_NAMES) if suite else ():
        del suite.SUITE[name]
    for name in FAMILIES.keys() - set(FAMILY_NAMES):
        del FAMILIES[name]


@pytest.fixture(params=["qwen3", "qwen2"])
def base(request) -> PreTrainedModel:
    """A small random base model, of each architecture."""
    return build_model(request.param)


@pytest.fixture
def qwen3() -> PreTrainedModel:
    return build_model("qwen3")


@pytest.fixture(scope="session")
def tiny():
    """The `tiny-random` model and its tokenizer."""
    import ws

    return ws.load_model("tiny-random", device="cpu")


@pytest.fixture(params=FAMILY_NAMES)
def family(request) -> str:
    """Each of the six adapter families."""
    return request.param


@pytest.fixture(scope="session")
def chromium():
    """The browser that pages are looked at with; whoever asks for these tests needs it."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert program, "these tests need Debian's chromium"
    with pytest.importorskip("playwright.sync_api").sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def weights_hash() -> Callable[[PreTrainedModel], str]:
    """A hash over every bit of a model's weights."""
    import hashlib

    def digest(model: PreTrainedModel) -> str:
        h = hashlib.sha256()
        for name, t in model.state_dict().items():
            h.update(name.encode() + t.contiguous().view(torch.uint8).numpy().tobytes())
        return h.hexdigest()

    return digest


def tokens(rows: int = 3, length: int = 9) -> torch.Tensor:
    """Random token ids `[rows, length]`."""
    return torch.randint(0, SHAPE["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def engine():
    """Of the pocket model with two vectors, its requests joining and leaving one batch."""
    from support.serving import an_engine

    with an_engine() as engine:
        yield engine


@pytest.fixture(scope="module")
def address(engine):
    """Of a server on it, without the last `/v1`."""
    from support.serving import served

    with served(engine) as address:
        yield address
