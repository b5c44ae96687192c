"""Models and tokenizers by name, what their chat template can do, and which linear layers they have.

`load_model` takes a Hugging Face id, a local folder, a GGUF file, `pocket` (the bundled model), `smollm2` (a small real
one, from a package) or `tiny-random` (random weights, for smoke tests). Only safetensors and GGUF weights are read and
no code from a repository is run.
"""

from __future__ import annotations

import hashlib
import re
import socket
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from accelerate.utils import align_module_device
from huggingface_hub import constants as hub
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.pytorch_utils import Conv1D

from ws.console import quiet_transformers, say
from ws.errors import WsError, choose, did_you_mean
from ws.gguf_base import SMOLLM2, gguf_file, read_header, without_bars

DEFAULT_MODEL = "Qwen/Qwen3-0.6B"
BUNDLED = ("pocket", "tiny-random")
PACKED = ("8bit", "4bit")
SAMPLES_PER_TENSOR = 32
_LAYER_INDEX = re.compile(r"\.(\d+)\.")


# ---- loading --------------------------------------------------------------------------------------------------


def load_model(
    name: str,
    device: str = "auto",
    dtype: str = "auto",
    offload: Path | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
) -> tuple[PreTrainedModel, Tokenizer]:
    """A causal language model in evaluation mode, and its tokenizer.

    Args:
        name: a Hugging Face id, a local folder, a `.gguf` file, `pocket`, `smollm2` or `tiny-random`.
        device: `auto` (CUDA, else MPS, else CPU), a torch device, or `map` to spread a model that fits on no device
            over all of them, then over CPU memory and disk (accelerate's `device_map="auto"`).
        dtype: `auto` (the checkpoint's own; float32 for a quantised GGUF file), `float32`, `bfloat16` or `float16`;
            `8bit` or `4bit` pack the weights of linear layers (bitsandbytes, the extra `quantized`).
        offload: with `map`, the folder for what fits nowhere else.
        max_memory: with `map`, the room on every device, such as `{0: "20GiB", "cpu": "60GiB"}`; None for all there is.

    Raises:
        WsError: the name is unknown, the hub cannot be reached, or the files are neither a safetensors checkpoint nor a
            GGUF model that transformers reads.
    """
    quiet_transformers()
    options = _placement(device, dtype, offload, max_memory)
    if (file := gguf_file(name)) is not None:
        model, tok = _load_gguf(name, file, options), load_tokenizer(name)
    elif name == "tiny-random":
        if "device_map" in options:
            raise WsError("tiny-random has no files to spread or to pack; use `--model pocket`.")
        model, tok = tiny_random(), load_tokenizer("pocket")
        model = model if options["dtype"] == "auto" else model.to(options["dtype"])
    else:
        tok = load_tokenizer(name)
        model, info = _from_pretrained(
            name, AutoModelForCausalLM, **options, use_safetensors=True, output_loading_info=True
        )
        _refuse_missing_weights(name, info["missing_keys"])
    if name in BUNDLED or file is not None:
        model.config._name_or_path = model.name_or_path = name
    return (model if "device_map" in options else model.to(_resolve_device(device))).eval(), tok


def _placement(
    device: str, dtype: str, offload: Path | None, max_memory: Mapping[int | str, int | str] | None
) -> dict[str, Any]:
    """What `from_pretrained` is told about where the weights go and how they are stored."""
    choose("dtype", dtype, ["auto", "float32", "bfloat16", "float16", *PACKED])
    options: dict[str, Any] = {"dtype": dtype if dtype == "auto" or dtype in PACKED else getattr(torch, dtype)}
    if device == "map":
        options |= {"device_map": "auto", "offload_folder": offload, "max_memory": max_memory and dict(max_memory)}
    else:
        place = _resolve_device(device)
        options |= {"device_map": {"": place}} if dtype in PACKED else {}
    if dtype not in PACKED:
        return options
    if find_spec("bitsandbytes") is None:
        raise WsError("Packed weights need bitsandbytes; install it with `uv sync --extra quantized`.")
    packing = BitsAndBytesConfig(load_in_4bit=dtype == "4bit", load_in_8bit=dtype == "8bit")
    return options | {"dtype": "auto", "quantization_config": packing}


def _load_gguf(name: str, file: Path, options: Mapping[str, Any]) -> PreTrainedModel:
    """A GGUF model with every weight expanded, as any other model: it can be trained, saved and compared."""
    if "device_map" in options:
        raise WsError(f"{name} is a GGUF file, which is expanded whole; leave out --device map and packed dtypes.")
    say(read_header(file).describe())
    expanded = GgufConfig(dequantize=True)
    model, info = _from_pretrained(
        name, AutoModelForCausalLM, **options, quantization_config=expanded, output_loading_info=True
    )
    _refuse_missing_weights(name, info["missing_keys"])
    # Transformers goes on calling it quantised, and would neither train nor save it.
    vars(model.config).pop("quantization_config", None)
    model.hf_quantizer, model.is_quantized, model.quantization_method = None, False, None
    return model


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of `load_model(name)`, with a padding token."""
    tok = _from_pretrained("pocket" if name == "tiny-random" else name, AutoTokenizer)
    if tok.pad_token_id is None:
        tok.pad_token = tok.eos_token
    return tok


def load_config(name: str) -> PreTrainedConfig:
    """The configuration of a model by name."""
    return tiny_random().config if name == "tiny-random" else _from_pretrained(name, AutoConfig)


def tiny_random(seed: int = 0) -> PreTrainedModel:
    """A random Qwen3 of 4 small layers over the pocket model's vocabulary: every code path, no meaning."""
    config = Qwen3Config(
        vocab_size=len(load_tokenizer("pocket")),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    tok = load_tokenizer("pocket")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
    # Random weights almost never pick one particular token, so an eighth of the vocabulary ends an answer.
    model.generation_config.eos_token_id = [chat_format(tok).end_of_turn_id, *range(7, len(tok), 8)]
    model.generation_config.pad_token_id = tok.pad_token_id
    return model


def model_folder(name: str) -> str:
    """What transformers should load for `name`: the bundled folder for `pocket`, `name` itself otherwise."""
    return str(files("ws") / "pocket") if name == "pocket" else name


def _from_pretrained(name: str, auto: Any, **options: Any) -> Any:
    source = model_folder(name)
    if (file := gguf_file(name)) is not None:
        read_header(file)
        source, options = str(file.parent), options | {"gguf_file": file.name}
    local = Path(source).is_dir() or hub_is_out_of_reach()
    try:
        with without_bars():
            return auto.from_pretrained(source, trust_remote_code=False, local_files_only=local, **options)
    except (OSError, ValueError, KeyError, SafetensorError) as problem:
        raise WsError(_why_not_loaded(name, problem)) from problem


@lru_cache(maxsize=1)
def hub_is_out_of_reach() -> bool:
    """One short probe: without it every file request retries for half a minute before it gives up.

    Behind a proxy nothing can be told from here, so the hub is taken to be there.
    """
    if hub.HF_HUB_OFFLINE or getproxies().keys() - {"no"}:
        return bool(hub.HF_HUB_OFFLINE)
    address = urlsplit(hub.ENDPOINT)
    try:
        socket.create_connection((address.hostname, address.port or 443), timeout=5).close()
    except OSError:
        return True
    return False


def _why_not_loaded(name: str, problem: Exception) -> str:
    text, first = str(problem), str(problem).strip().split("\n")[0]
    folder = Path(name).expanduser()
    if gguf_file(name) is not None:
        return f"The GGUF file {name} cannot be read by transformers ({first})."
    if name == "pocket":
        return f"The bundled pocket model could not be read ({first}); reinstall the package."
    if folder.is_dir():
        if not list(folder.glob("*.safetensors")) and "safetensors" in text:
            return (
                f"The folder {name} has no safetensors weights; pickled checkpoints are never loaded, convert it first."
            )
        if isinstance(problem, SafetensorError):
            return f"The weights in the folder {name} are damaged ({first}); download them again."
        return f"The folder {name} is not a transformers model ({first})."
    if "trust_remote_code" in text:
        return f"The model {name} needs code from its repository, which is never run; choose a model transformers has."
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        return f"There is no folder {name}; give an existing folder or a hub id such as {DEFAULT_MODEL}."
    if "/" not in name:
        hint = did_you_mean(name, [*BUNDLED, SMOLLM2, DEFAULT_MODEL])
        return f"There is no model named {name!r}: not bundled, not a folder, not found on the hub.{hint}"
    if "gated" in text.lower() or "401" in text or "404" in text or "not a valid model identifier" in text:
        return f"The hub has no model {name!r} that you may read; check the spelling, or log in with `hf auth login`."
    return (
        f"The model {name!r} is not in the local cache and the hub could not be reached; run `hf download {name}` "
        "where there is a network and copy the cache or pass the folder, or use the bundled `--model pocket`."
    )


def _refuse_missing_weights(name: str, missing: Iterable[str]) -> None:
    """Transformers fills absent tensors with random numbers and goes on; that must not pass for the model."""
    absent = sorted(missing)
    if absent:
        raise WsError(
            f"The checkpoint {name} lacks {len(absent)} of its weights ({', '.join(absent[:3])}...); download it again."
        )


def _resolve_device(device: str) -> torch.device:
    if device == "auto":
        best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(best)
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as problem:
        raise WsError(
            f"The device {device!r} is not available here; use cpu, or cuda/mps where there is one."
        ) from problem
    return place


# ---- the chat template ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChatFormat:
    """What a tokenizer's chat template can do.

    Attributes:
        has_template: there is a template at all; without one a plain `User: ... Assistant:` transcript is used.
        system_role: system messages are rendered; otherwise the persona is put in front of the user's words.
        thinking_switch: `enable_thinking` changes the prompt.
        think_open_id, think_close_id: the special tokens of a think block, None when the model has none.
        end_of_turn_id: the token that ends an assistant turn.
    """

    has_template: bool
    system_role: bool
    thinking_switch: bool
    think_open_id: int | None
    think_close_id: int | None
    end_of_turn_id: int

    def describe(self) -> str:
        """One line for a person: what the template lacks is what a run works around."""
        if not self.has_template:
            return "no chat template: a plain transcript is used"
        system = "a system role" if self.system_role else "no system role (personas go into the user turn)"
        think = "a thinking switch (off)" if self.thinking_switch else "no thinking switch"
        return f"chat template with {system} and {think}"


@lru_cache(maxsize=16)
def chat_format(tok: Tokenizer) -> ChatFormat:
    """Find out what the template does by rendering probes, not by the model's name."""
    user = [{"role": "user", "content": "Q"}]
    eos = tok.eos_token_id
    if not tok.chat_template:
        return ChatFormat(False, False, False, _single_id(tok, "<think>"), _single_id(tok, "</think>"), eos)
    switch = _apply(tok, user, enable_thinking=True) != _apply(tok, user, enable_thinking=False)
    return ChatFormat(
        has_template=True,
        system_role=_renders_system(tok),
        thinking_switch=switch,
        think_open_id=_single_id(tok, "<think>"),
        think_close_id=_single_id(tok, "</think>"),
        end_of_turn_id=_end_of_turn(tok, eos),
    )


def render_prompt(
    tok: Tokenizer,
    user: str,
    *,
    system: str | None = None,
    thinking: bool = False,
    opener: str = "",
    earlier: Sequence[Mapping[str, str]] = (),
) -> str:
    """The text up to where the assistant's answer starts, `opener` (a prefilled start of the answer) included.

    Templates without a system role get the system text in front of the user's; `thinking=False` closes the think block
    of models that have one. Where `system` is None the tokenizer's own holds (see `default_system`), where it is empty
    there is none. `earlier` messages, user's and assistant's in turn, each with `role` and `content`, stand before the
    user's; the system text stands before them. Tokenise the result with `add_special_tokens=False`.
    """
    form = chat_format(tok)
    system = default_system(tok) if system is None else system
    messages = [*map(dict, earlier), {"role": "user", "content": user}]
    if system and form.has_template and form.system_role:
        messages.insert(0, {"role": "system", "content": system})
    elif system:
        messages[0]["content"] = f"{system}\n\n{messages[0]['content']}"
    if not form.has_template:
        text = "\n".join(f"{m['role'].capitalize()}: {m['content']}" for m in messages) + "\nAssistant:"
        return f"{text} {opener}" if opener else text
    options = {"enable_thinking": thinking} if form.thinking_switch else {}
    text = _apply(tok, messages, **options)
    if not thinking and text.rstrip().endswith("<think>"):
        text = f"{text.rstrip()}\n\n</think>\n\n"
    return text + opener


def default_system(tok: Tokenizer) -> str:
    """The system text of prompts that are given none: empty, but for a tokenizer of `ws.baselines.prompt.prompted`."""
    return getattr(tok, "ws_system", "")


def encode(tok: Tokenizer, text: str) -> list[int]:
    """Token ids of already rendered text: nothing is added, special tokens in it are recognised."""
    return tok(text, add_special_tokens=False)["input_ids"]


def end_ids(model: PreTrainedModel, tok: Tokenizer) -> list[int]:
    """Every token by which the model may end an answer: its own end tokens and the template's end of turn."""
    own = model.generation_config.eos_token_id
    ids = own if isinstance(own, list) else [] if own is None else [own]
    return sorted({*ids, chat_format(tok).end_of_turn_id})


def _apply(tok: Tokenizer, messages: list[dict[str, str]], **options: Any) -> str:
    return tok.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)


def _renders_system(tok: Tokenizer) -> bool:
    probe = "Zyx probe"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            text = _apply(tok, [{"role": "system", "content": probe}, {"role": "user", "content": "Q"}])
    except Exception:  # a template may raise anything for a role it does not know; that is the answer
        return False
    return probe in text


def _end_of_turn(tok: Tokenizer, eos: int) -> int:
    probe = "Zyx answer"
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": probe}]
    text = tok.apply_chat_template(messages, tokenize=False)
    after = encode(tok, text.split(probe)[-1].lstrip())
    return after[0] if after and after[0] in tok.all_special_ids else eos


def _single_id(tok: Tokenizer, text: str) -> int | None:
    ids = encode(tok, text)
    return ids[0] if len(ids) == 1 else None


# ---- the layers that hold weights -----------------------------------------------------------------------------


def linear_size(module: nn.Module) -> tuple[int, int] | None:
    """`(d_out, d_in)` of a module with the interface of `nn.Linear` (quantised and GPT-2's `Conv1D` too), else None."""
    if isinstance(module, Conv1D):
        return module.nf, module.nx
    d_out, d_in = getattr(module, "out_features", None), getattr(module, "in_features", None)
    if not (isinstance(d_out, int) and isinstance(d_in, int)) or getattr(module, "weight", None) is None:
        return None
    return d_out, d_in


def module_kind(module: nn.Module) -> str | None:
    """`linear`, `embedding`, or `scale` (norms: one weight per feature); None for modules without such a weight."""
    if linear_size(module) is not None:
        return "linear"
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and isinstance(module, nn.Embedding):
        return "embedding"
    return "scale" if isinstance(weight, Tensor) and weight.ndim == 1 else None


def weight_size(module: nn.Module) -> tuple[int, int] | None:
    """The shape of a module's weight as a matrix, None for modules without one.

    `(d_out, d_in)` of linear modules, `(vocabulary, d)` of embeddings, `(d, 1)` of norms.
    """
    kind = module_kind(module)
    if kind is None or kind == "linear":
        return linear_size(module)
    weight = module.weight
    assert isinstance(weight, Tensor)
    return (len(weight), 1) if kind == "scale" else (weight.shape[0], weight.shape[1])


def as_matrix(module: nn.Module, weight: Tensor) -> Tensor:
    """A view of a weight of `module` with the shape `weight_size(module)`; `Conv1D` stores it transposed."""
    if isinstance(module, Conv1D):
        return weight.T
    return weight[:, None] if weight.ndim == 1 else weight


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a module as a matrix (see `weight_size`), detached; a view, or a copy where it is offloaded."""
    assert isinstance(module.weight, Tensor)
    with _at_hand(module):
        return as_matrix(module, module.weight.detach())


def bias_of(module: nn.Module) -> Tensor | None:
    """The bias of a module, detached, None when it has none."""
    with _at_hand(module):
        bias = getattr(module, "bias", None)
        return bias.detach() if isinstance(bias, Tensor) else None


def is_offloaded(module: nn.Module) -> bool:
    """True when a parameter of the module itself waits in CPU memory or on disk (accelerate)."""
    return any(p.is_meta for p in module.parameters(recurse=False)) and hasattr(module, "_hf_hook")


def is_packed(model: nn.Module) -> bool:
    """True when a weight is quantised: stored in packed integers, which cannot be compared or written to."""
    return any(not p.is_floating_point() for p in model.parameters())


def _at_hand(module: nn.Module) -> AbstractContextManager[None]:
    """Offloaded parameters are read on the CPU inside; they go back when the block ends."""
    return align_module_device(module, "cpu") if is_offloaded(module) else nullcontext()


def fused_tensors(model: nn.Module, layers: Iterable[int]) -> list[str]:
    """Parameters of the given decoder layers with three or more dimensions, such as the experts of a mixture."""
    chosen = set(layers)
    return [n for n, p in model.named_parameters() if layer_of(n) in chosen and p.ndim > 2]


def layer_of(name: str) -> int | None:
    """The decoder-layer index in a module's name, None for modules outside the layers."""
    found = _LAYER_INDEX.search(f".{name}.")
    return int(found.group(1)) if found else None


def layer_count(model: PreTrainedModel) -> int:
    """The number of decoder layers."""
    return int(model.config.get_text_config().num_hidden_layers)


def parse_layers(spec: str | Sequence[int], count: int) -> tuple[int, ...]:
    """Layer indices from `all`, `0.3:0.8` (fractions of the depth), `4:12` (Python slice) or a list `3,4,5`.

    Fractions are rounded to the nearest layer, the end excluded: `0.3:0.8` of 28 layers is 8..21, of 4 layers 1..2.
    """
    where = f"--layers {spec} of a model with {count} layers"
    if not isinstance(spec, str):
        layers = [int(i) for i in spec]
    elif spec == "all":
        layers = list(range(count))
    else:
        try:
            layers = _parse_layer_text(spec, count)
        except ValueError:
            raise WsError(f"{where} is not understood; use all, 0.3:0.8, 4:12 or 3,4,5.") from None
    if not layers or min(layers) < 0 or max(layers) >= count:
        raise WsError(f"{where} selects no layer or one out of range; indices go from 0 to {count - 1}.")
    return tuple(dict.fromkeys(layers))


def _parse_layer_text(spec: str, count: int) -> list[int]:
    if ":" not in spec:
        return [int(part) for part in spec.split(",")]
    start, stop = spec.split(":")
    if "." not in spec:
        return list(range(int(start or 0), int(stop or count)))
    low, high = float(start or 0), float(stop or 1)
    if not 0 <= low < high <= 1:
        raise ValueError
    return list(range(round(low * count), round(high * count)))


def target_modules(
    model: PreTrainedModel, layers: str | Sequence[int] = "all", kinds: Sequence[str] | None = None
) -> list[str]:
    """Names of the linear modules inside the chosen decoder layers, optionally only those of the given kinds.

    A kind is a module's last name, such as `q_proj`.

    Raises:
        WsError: a kind or layer matches nothing, or, unless kinds are given, the layers keep most of their weights in
            fused tensors that no linear module holds.
    """
    chosen = set(parse_layers(layers, layer_count(model)))
    inside = {n: m for n, m in model.named_modules() if linear_size(m) and layer_of(n) is not None}
    known = {name.rsplit(".", 1)[-1] for name in inside}
    for kind in kinds or ():
        if kind not in known:
            hint = did_you_mean(kind, known)
            rest = f" The model has: {', '.join(sorted(known))}." if hint.startswith(" Did") else ""
            raise WsError(f"There is no linear module kind named {kind!r}.{hint}{rest}")
    names = [n for n in inside if layer_of(n) in chosen and (kinds is None or n.rsplit(".", 1)[-1] in kinds)]
    if not names:
        raise WsError(f"No linear module of this model lies in layers {layers}.")
    fused = fused_tensors(model, chosen)
    if fused and kinds is None:
        raise WsError(
            f"The model keeps {len(fused)} tensors of these layers fused ({', '.join(fused[:2])}, ...); no adapter "
            f"reaches them; to steer its linear modules, name them with --kinds: {', '.join(sorted(known))}."
        )
    return names


# ---- identity -------------------------------------------------------------------------------------------------


def fingerprint(model: nn.Module) -> str:
    """A short hash of the weights that does not depend on their dtype.

    Every parameter contributes its name, shape and evenly spaced values rounded to bfloat16, so the bfloat16 and the
    float32 copy of one checkpoint agree and a fine-tune of it does not. Refuses a model with adapter layers inside.
    """
    return fingerprint_of((name, p.shape, partial(_value, model, name, p)) for name, p in model.named_parameters())


def fingerprint_of(tensors: Iterable[tuple[str, Sequence[int], Callable[[], Tensor]]]) -> str:
    """The fingerprint of named tensors, given as `(name, shape, how to read it)`; one is in memory at a time."""
    digest = hashlib.sha256()
    for name, shape, read in sorted(tensors, key=lambda item: item[0]):
        if ".base_layer." in name or "lora_" in name:
            raise WsError("The model has adapter layers in it; unload them or load a fresh base first.")
        digest.update(f"{name}{tuple(shape)}".encode())
        value = read()
        if value.numel() and value.is_floating_point():
            flat = value.detach().reshape(-1)
            picked = flat[:: max(1, value.numel() // SAMPLES_PER_TENSOR)]
            digest.update(picked.to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _value(model: nn.Module, name: str, parameter: Tensor) -> Tensor:
    """A parameter's value, fetched from where accelerate has offloaded it."""
    if not parameter.is_meta:
        return parameter
    home, _, leaf = name.rpartition(".")
    module = model.get_submodule(home)
    with _at_hand(module):
        return getattr(module, leaf).detach()


def model_id(model: PreTrainedModel) -> str:
    """The name the model was loaded by."""
    return str(getattr(model, "name_or_path", "") or model.config._name_or_path or type(model).__name__)
