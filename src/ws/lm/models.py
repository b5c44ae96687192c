"""Models and tokenizers by name, what their chat template can do, and which linear layers they have.

`load_model` takes a Hugging Face id, a local folder, a GGUF file, `pocket` (the bundled model), `smollm2` (a small real
one, from a package) or `tiny-random` (random weights, for smoke tests). Only safetensors and GGUF weights are read and
no code from a repository is run.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from datetime import datetime
from functools import cache, lru_cache, partial
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock, get_ident
from typing import Any

import torch
from accelerate.utils import align_module_device
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle
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
from ws.errors import DamagedError, WsError, choose, decoded, did_you_mean, shortened
from ws.files.gguf import SMOLLM2, gguf_file, read_header, without_bars
from ws.files.reading import disguise, read_bytes
from ws.files.runs import BUNDLED as BUNDLED
from ws.files.runs import DEFAULT_MODEL, model_name, sha256_file, sha256_json
from ws.files.tensors import INDEX, open_tensors, weight_files
from ws.lm.hub import hub_is_out_of_reach

PACKED = ("8bit", "4bit")
SAMPLES_PER_TENSOR = 32
# Bytes of a GGUF file that is parsed once and kept in memory, expanded to about seven times as much.
KEPT_GGUF = 250_000_000
AGAIN = "download it again"  # what to do about a damaged checkpoint
# What transformers reads of a folder besides its weights. It may go on from what is damaged without a word: an answer
# then has other sampling settings, or a pointer of git LFS for a prompt.
_SIDE_FILES = (
    *("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.json", "chat_template.jinja", "chat_template.json"),
)
_LAYER_INDEX = re.compile(r"\.(\d+)\.")
_NO_GRADIENT = re.compile(r"require grad|inplace operation|derivative for|not differentiable|autograd")


# ---- loading --------------------------------------------------------------------------------------------------


def load_model(
    name: str | os.PathLike[str],
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
        dtype: `auto` (the checkpoint's own; float32 for a GGUF file), `float32`, `bfloat16` or `float16`;
            `8bit` or `4bit` pack the weights of linear layers (bitsandbytes, the extra `quantized`).
        offload: with `map`, the folder for what fits nowhere else.
        max_memory: with `map`, the room on every device, such as `{0: "20GiB", "cpu": "60GiB"}`; None for all there is.

    Raises:
        WsError: the name is unknown, the hub cannot be reached, or the files are neither a safetensors checkpoint nor a
            GGUF model that transformers reads.
    """
    quiet_transformers()
    name = model_name(name)
    options = _placement(device, dtype, offload, max_memory)
    if (file := gguf_file(name)) is not None:
        model, tok = _load_gguf(name, file, options), load_tokenizer(name)
    elif name == "tiny-random":
        if "device_map" in options:
            raise WsError("tiny-random has no files to spread or to pack; use `--model pocket`.")
        model, tok = tiny_random(), load_tokenizer("pocket")
        model = model if options["dtype"] == "auto" else model.to(options["dtype"])
    else:
        tok, model = load_tokenizer(name), _load_weights(name, **options, use_safetensors=True)
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
    # Transformers would take that of plain weights, of some architectures, and fail at an ending in capitals.
    dtype = torch.float32 if options["dtype"] == "auto" else options["dtype"]
    model = _load_weights(name, **{**options, "dtype": dtype})
    # Transformers goes on calling it quantised, and would neither train nor save it.
    vars(model.config).pop("quantization_config", None)
    model.hf_quantizer, model.is_quantized, model.quantization_method = None, False, None
    return model


def load_tokenizer(name: str, only_local: bool = False) -> Tokenizer:
    """The tokenizer of `load_model(name)`, with a padding token; `only_local` never asks the hub."""
    tok = _from_pretrained("pocket" if name == "tiny-random" else name, AutoTokenizer, only_local)
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
    """What transformers should load for `name`: the bundled folder for `pocket`, else the name (see `model_name`)."""
    return str(files("ws") / "pocket") if name == "pocket" else model_name(name)


def _from_pretrained(name: str, auto: Any, only_local: bool = False, **options: Any) -> Any:
    source = model_folder(name)
    if (file := gguf_file(name)) is not None:
        read_header(file)
        source, options = str(file.parent), options | {"gguf_file": file.name}
    is_folder = Path(source).is_dir()
    if is_folder and file is None:
        _require_sound(Path(source), with_weights=auto is AutoModelForCausalLM)
    options["local_files_only"] = only_local or is_folder or hub_is_out_of_reach()
    try:
        if file is None or file.stat().st_size > KEPT_GGUF:
            return _load(auto, source, **options)
        return deepcopy(_load_once(file.stat().st_mtime_ns, auto, source, **options))
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as problem:  # values that make no sense come out of transformers as errors of any kind
        raise WsError(_why_not_loaded(name, problem)) from problem


def _require_sound(folder: Path, with_weights: bool) -> None:
    """`DamagedError` for a file of a model's folder that is not what its name says."""
    for file in (folder / name for name in _SIDE_FILES):
        if file.is_file():
            _require_sound_file(file, file.stat().st_mtime_ns)
    if with_weights and (folder / INDEX).is_file():
        weight_files(folder, AGAIN)


@lru_cache(maxsize=64)  # config, tokenizer and model are loaded one after the other
def _require_sound_file(file: Path, changed: int) -> None:
    content = read_bytes(file, AGAIN)
    why, text = disguise(content), decoded(content, str(file))
    if file.suffix == ".json" and not why:
        try:
            why = "" if isinstance(json.loads(text), dict) else "it is no JSON object"
        except (ValueError, RecursionError) as problem:
            why = str(problem)
    if why:
        raise DamagedError(f"{file} is damaged ({why}); {AGAIN}.")


def _load(auto: Any, source: str, **options: Any) -> Any:
    if "gguf_file" not in options:
        return auto.from_pretrained(source, trust_remote_code=False, **options)
    if auto is AutoModelForCausalLM:
        options["quantization_config"] = GgufConfig(dequantize=True)
    with without_bars():
        return auto.from_pretrained(source, trust_remote_code=False, **options)


@lru_cache(maxsize=3)  # a model, its tokenizer and its configuration
def _load_once(changed: int, auto: Any, source: str, **options: Any) -> Any:
    """What to make copies of: transformers takes seconds to parse even a small GGUF file, and does so several times."""
    return _load(auto, source, **options)


def _why_not_loaded(name: str, problem: Exception) -> str:
    text = str(problem)
    first = re.sub(r":\n\s*", ": ", text.strip()).split("\n")[0]
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
            return _damaged_weights(folder) or f"The weights in the folder {name} are damaged ({first}); {AGAIN}."
        if "ignore_mismatched_sizes" in text:
            return f"The weights in the folder {name} have other shapes than its config.json asks for; {AGAIN}."
        return f"The folder {name} is not a transformers model ({first or type(problem).__name__})."
    if not isinstance(problem, (OSError, ValueError, KeyError, SafetensorError)):
        return f"The files of the model {name} cannot be read by transformers ({first or type(problem).__name__})."
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


def _damaged_weights(folder: Path) -> str:
    """Which file with weights is damaged and how, as a sentence; empty where each can be opened."""
    try:
        for file in weight_files(folder, AGAIN):
            with open_tensors(file, AGAIN):
                pass
    except WsError as problem:
        return str(problem)
    return ""


def _load_weights(name: str, **options: Any) -> PreTrainedModel:
    """The model with all of its weights: transformers would fill absent ones with random numbers and go on."""
    model, info = _from_pretrained(name, AutoModelForCausalLM, **options, output_loading_info=True)
    if absent := sorted(info["missing_keys"]):
        raise WsError(
            f"The checkpoint {name} lacks {len(absent)} of its weights ({', '.join(absent[:3])}...); download it again."
        )
    return model


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

# Some templates ask for today's date, and the same question would be another prompt every day. They are all given the
# one that Llama 3's own template falls back to. A function cannot be handed to a template, so it is put in front of it.
FIXED_DATE = datetime(2024, 7, 26)
_DIRECTIVES = {f"%{c}": FIXED_DATE.strftime(f"%{c}") for c in "aAbBcdDeFGHIjmMpRSTuUVwWxXyY"}
_DIRECTIVES |= {f"%-{c}": _DIRECTIVES[f"%{c}"].lstrip("0") or "0" for c in "dHIjmMSy"}
_STRFTIME = (
    "{%- macro strftime_now(format) -%}{{ format"
    + "".join(f" | replace({code!r}, {text!r})" for code, text in _DIRECTIVES.items())
    + " }}{%- endmacro %}\n"  # the newline is trimmed, and the template begins at the start of a line as it did
)


@dataclass(frozen=True)
class ChatFormat:
    """What a tokenizer's chat template can do, and how an answer stands in it.

    Attributes:
        has_template: there is a template at all; without one a plain `User: ... Assistant:` transcript is used.
        system_role: system messages are rendered; otherwise the persona is put in front of the user's words.
        thinking_switch: `enable_thinking` changes the prompt.
        has_date: the template asks for today's date, and is given `FIXED_DATE`.
        think_close_id: the token that closes the think block that answers start with: the template can switch it on, or
            always opens one; None without a block. The mere tokens are not enough: some vocabularies have them for
            models that never learned to use them. Nor is a block whose tags are no single tokens: nothing says when
            one is closed, so that such a model is asked for its reasons in its answer.
        opened: what the template, which has no switch, ends its prompt with and does not put before an answer that is
            there: a thought that it opens in words of its own. Prompts leave it out, for nothing says how it is closed.
        answer_header: what the template writes between its prompt and an answer without a thought, such as the name of
            a channel; prompts without thinking end with it.
        before_answer: white space between the prompt and an answer: the space of `Assistant: Yes`.
        after_answer: what the template writes between an answer and the token that ends the turn, mostly nothing.
        end_of_turn_id: the token that ends an assistant turn: what the template writes there, else the end of text;
            None when the tokenizer has neither.
        default_system: the system text that the template puts into a conversation without one; mostly empty.
    """

    has_template: bool
    system_role: bool
    thinking_switch: bool
    has_date: bool
    think_close_id: int | None
    opened: str
    answer_header: str
    before_answer: str
    after_answer: str
    end_of_turn_id: int | None
    default_system: str = ""

    def describe(self) -> str:
        """One line for a person: what the template lacks is what a run works around."""
        if not self.has_template:
            return "no chat template: a plain transcript is used"
        system = "a system role" if self.system_role else "no system role (personas go into the user turn)"
        system += (
            f", its own system prompt where none is given ({self.default_system!r})" if self.default_system else ""
        )
        think = "a thinking switch (off)" if self.thinking_switch else "no thinking switch"
        think += f", the thought that it opens ({self.opened!r}) left out" if self.opened else ""
        today = f", its date fixed to {FIXED_DATE:%d %b %Y}" if self.has_date else ""
        return f"chat template with {system} and {think}{today}"


def chat_template(tok: Tokenizer) -> str | None:
    """The text of the tokenizer's chat template, of several the default one; None when there is none."""
    try:
        return tok.get_chat_template() if tok.chat_template else None
    except ValueError as problem:
        named = ", ".join(map(str, tok.chat_template or ()))
        raise WsError(
            f"The tokenizer {tok.name_or_path} has several chat templates ({named}) and no default one; set "
            "`tok.chat_template` to the text of one of them."
        ) from problem


def chat_format(tok: Tokenizer) -> ChatFormat:
    """Find out what the template does by rendering probes, not by the model's name."""
    return _chat_format(tok, *_state(tok))


def _state(tok: Tokenizer) -> tuple[str | None, int, tuple[tuple[str, str], ...]]:
    """What may be changed in a tokenizer while it is used; what is remembered of it is remembered with this."""
    return chat_template(tok), len(tok), tuple((name, str(token)) for name, token in tok.special_tokens_map.items())


@lru_cache(maxsize=16)
def _chat_format(tok: Tokenizer, template: str | None, *state: Any) -> ChatFormat:
    if template is None:
        return ChatFormat(False, False, False, False, None, "", "", " ", "", tok.eos_token_id)
    user = [{"role": "user", "content": "Zyx question"}]
    if "Zyx question" not in _apply(tok, user):
        raise WsError(
            f"The chat template of {tok.name_or_path} leaves out what the user says where that is a text; it asks for "
            "something else, such as content as a list of parts, which is not supported: give the tokenizer one for "
            "texts."
        )
    switch = _apply(tok, user, enable_thinking=True) != _apply(tok, user, enable_thinking=False)
    opened, header, before, after, end = _around_answer(tok, switch)
    block = switch or _prompt(tok, user, switch, thinking=True).rstrip().endswith("<think>")
    close = _single_id(tok, "</think>") if block and _single_id(tok, "<think>") is not None else None
    return ChatFormat(
        has_template=True,
        system_role=_renders_system(tok),
        thinking_switch=switch,
        has_date="strftime_now" in template,
        think_close_id=close,
        opened=opened,
        answer_header=header,
        before_answer=before,
        after_answer=after,
        end_of_turn_id=end,
        default_system=_default_system(tok, switch) if _renders_system(tok) else "",
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
    of models that have one, and models that have none are left in no thought either way. Where `system` is None the
    tokenizer's own holds (see `default_system`), where it is empty none is given, and a template that has one for that
    case (`ChatFormat.default_system`) puts it in. `earlier` messages, user's and assistant's in turn, each with `role`
    and `content`, stand before the user's; the system text stands before them. Tokenise the result with `encode`, which
    knows whether it begins with a start of text already.
    """
    form = chat_format(tok)
    system = default_system(tok) if system is None else system
    messages = [*map(dict, earlier), {"role": "user", "content": user}]
    if system and form.has_template and form.system_role:
        messages.insert(0, {"role": "system", "content": system})
    elif system:
        first = next(m for m in messages if m["role"] == "user")  # a conversation may begin with a greeting
        first["content"] = f"{system}\n\n{first['content']}"
    if form.has_template:
        thinking = thinking and form.think_close_id is not None
        text = _prompt(tok, messages, form.thinking_switch, thinking)
        text = text if thinking else text.removesuffix(form.opened) + form.answer_header
    else:
        text = "\n".join(f"{m['role'].capitalize()}: {m['content']}" for m in messages) + "\nAssistant:"
    return text + form.before_answer + opener if opener else text


def default_system(tok: Tokenizer) -> str:
    """The system text of prompts that are given none: empty, but for a tokenizer of `ws.intervene.prompt.prompted`."""
    return getattr(tok, "ws_system", "")


def _prompt(tok: Tokenizer, messages: list[dict[str, str]], switch: bool, thinking: bool) -> str:
    text = _apply(tok, messages, **({"enable_thinking": thinking} if switch else {}))
    if not thinking and text.rstrip().endswith("<think>"):
        text = f"{text.rstrip()}\n\n</think>\n\n"
    return text


def _apply(tok: Tokenizer, messages: list[dict[str, str]], prompt: bool = True, **options: Any) -> str:
    """The one place that renders a chat template, for a prompt or for a conversation that ends with its last message.

    Raises:
        WsError: the template refuses the messages or does not work.
    """
    template = chat_template(tok)
    assert template is not None
    if "strftime_now" in template:
        options["chat_template"] = _STRFTIME + template
    try:
        return tok.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, **options)
    except Exception as problem:  # a template is a program of its own and may raise anything
        roles = ", ".join(m["role"] for m in messages)
        raise WsError(f"The chat template of {tok.name_or_path} cannot render {roles} ({problem}).") from problem


def _renders_system(tok: Tokenizer) -> bool:
    probe = "Zyx probe"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return probe in _apply(tok, [{"role": "system", "content": probe}, {"role": "user", "content": "Q"}])
    except WsError:  # refused: there is no such role
        return False


def _default_system(tok: Tokenizer, switch: bool) -> str:
    """What stands in a prompt without a system message where the text of one would; thinking is off."""
    probe, user = "Zyx probe", [{"role": "user", "content": "Q"}]
    head, _, tail = _prompt(tok, [{"role": "system", "content": probe}, *user], switch, thinking=False).partition(probe)
    plain = _prompt(tok, user, switch, thinking=False)
    return plain[len(head) : len(plain) - len(tail)] if plain.startswith(head) and plain.endswith(tail) else ""


def _around_answer(tok: Tokenizer, switch: bool) -> tuple[str, str, str, str, int | None]:
    """`ChatFormat.opened` and the four after it, from conversations that end with an answer or go on after it."""
    asked, answer, more = [{"role": "user", "content": "Zyx question"}], "Zyx answer", "Zyx more"
    said = [*asked, {"role": "assistant", "content": answer}]
    prompt, whole = _prompt(tok, asked, switch, thinking=False), _conversation(tok, said, switch)
    head, _, tail = whole.rpartition(answer)
    excess = prompt[len(head) :] if asked[0]["content"] in head and prompt.startswith(head) else ""
    opened = excess if excess.strip() and "</think>" not in excess and not switch else ""
    join = head[len(prompt) :] if head.startswith(prompt) else ""
    header = join.rstrip(" ") if join.strip() else ""  # a prompt that ends with a space splits the answer's first word
    before = join.removeprefix(header)
    lead, end = _end_of_turn(tok, tail if head else "")
    if end is None:  # some templates close only turns that others follow
        start, _, rest = _conversation(tok, [*said, {"role": "user", "content": more}], switch).partition(answer)
        if more in rest:
            lead, end = _end_before(tok, rest[: rest.index(more)], start[: start.find(asked[0]["content"])])
    if end is None:
        return opened, header, before, "", tok.eos_token_id
    stop = tok.convert_ids_to_tokens(end)
    is_eaten = _pieces(tok, answer + lead + stop) == [*_pieces(tok, answer), end]  # some tokens take the space before
    return opened, header, before, "" if is_eaten else lead, end


def _conversation(tok: Tokenizer, messages: list[dict[str, str]], switch: bool) -> str:
    """Messages of which the last needs no answer; empty where the template refuses them."""
    try:
        return _apply(tok, messages, prompt=False, **({"enable_thinking": False} if switch else {}))
    except WsError:
        return ""


def _end_before(tok: Tokenizer, between: str, opening: str) -> tuple[str, int | None]:
    """`_end_of_turn` of what stands between an answer and the next question, less what opens the user's turn.

    `opening` is what stands before the first question.
    """
    tails = [between[i:] for i in range(len(between) + 1)]
    header = next(part for part in tails if opening.endswith(part))
    lead, end = _end_of_turn(tok, between.removesuffix(header))
    if end is None:  # all of it opens the turn, or it closes the turn of the system as well
        lead, end = _end_of_turn(tok, between)
        end = None if end == _end_of_turn(tok, opening)[1] else end
    return lead, end


def _end_of_turn(tok: Tokenizer, tail: str) -> tuple[str, int | None]:
    """What stands before the first token in `tail` that can be no piece of a text, and that token; None without one.

    Special tokens, with a name or without, and all that were added to the vocabulary are never merged with their
    neighbours. White space that was added is text all the same, and a start of text ends nothing.
    """
    apart = {*tok.all_special_ids, *tok.get_added_vocab().values()} - {tok.unk_token_id, tok.bos_token_id}
    for token in _pieces(tok, tail):
        if token == tok.eos_token_id or (token in apart and tok.decode([token]).strip()):
            return tail[: max(0, tail.find(tok.convert_ids_to_tokens(token)))], token
    return "", None


# ---- tokens ---------------------------------------------------------------------------------------------------


def encode(tok: Tokenizer, prompt: str) -> list[int]:
    """Token ids of a rendered prompt; special tokens in it are recognised.

    A chat template writes its own start of text or wants none, so nothing is added to what it made; a plain transcript
    begins as the tokenizer begins any text.
    """
    return encode_text(tok, prompt) if chat_template(tok) is None else _pieces(tok, prompt)


def encode_text(tok: Tokenizer, text: str) -> list[int]:
    """Token ids of a text that no template made, behind what the tokenizer itself puts before a text (mostly BOS)."""
    whole, bare = tok("a")["input_ids"], _pieces(tok, "a")
    places = range(len(whole) - len(bare) + 1)
    start = next((i for i in places if whole[i : i + len(bare)] == bare), 0)
    return [*whole[:start], *_pieces(tok, text)]


def encode_after(tok: Tokenizer, before: str, text: str) -> list[int]:
    """Token ids of `text` where it follows `before`, which keeps its own tokens.

    Alone it may get others: a sentencepiece tokenizer takes the beginning of a text for the beginning of a word. So
    both are tokenised together and those of `before` are cut off. Where the two melt at the seam, a neighbour that
    does not melt with `text` stands in for `before`.
    """
    for neighbour in (before, "\n", "x"):
        head, whole = _pieces(tok, neighbour), _pieces(tok, neighbour + text)
        if whole[: len(head)] == head:
            return whole[len(head) :]
    return _pieces(tok, text)


def encode_answer(tok: Tokenizer, prompt: str, answer: str, ended: bool = False) -> list[int]:
    """Token ids of an answer behind a rendered prompt, joined as the model writes it and the template does.

    White space around the answer is not part of it.

    Args:
        prompt: see `render_prompt`; it has no opener.
        ended: with what follows the answer up to and with the token that ends the turn.

    Raises:
        WsError: the end of the turn is asked for, and the tokenizer has no token for it.
    """
    form, text = chat_format(tok), answer.strip()
    text = form.before_answer + text if text else ""
    if not ended:
        return encode_after(tok, prompt, text)
    if form.end_of_turn_id is None:
        raise WsError(f"The tokenizer {tok.name_or_path} has no token that ends an answer; set its eos_token.")
    return [*encode_after(tok, prompt, text + form.after_answer), form.end_of_turn_id]


def special_tokens_in(tok: Tokenizer, text: str) -> set[str]:
    """The special tokens that a text holds by their names, and that a tokenizer would read there, such as ends of turn.

    Added tokens that are no special ones, such as a tag or white space, are text like any other.
    """
    return set(_special_names(tok, *_state(tok)).findall(text))


@lru_cache(maxsize=16)
def _special_names(tok: Tokenizer, *state: Any) -> re.Pattern[str]:
    added = {token.content for token in tok.added_tokens_decoder.values() if token.special}
    names = sorted({*tok.all_special_tokens, *added} - {""}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names)) or "(?!)")


def require_plain(tok: Tokenizer, placed: Iterable[tuple[str, str]]) -> None:
    """`WsError` where a text that somebody wrote holds a special token: it would end a turn, or begin one.

    Args:
        placed: texts, each behind its place.
    """
    for place, text in placed:
        if special := special_tokens_in(tok, text):
            raise WsError(
                f"{place}: {min(special)!r} in {shortened(text, 80)} would be read as a special token; remove it."
            )


def decode_answer(tok: Tokenizer, ids: Sequence[int]) -> str:
    """The text of an answer from its tokens without the end of turn; the counterpart of `encode_answer`."""
    return trim_answer(tok, tok.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def trim_answer(tok: Tokenizer, text: str) -> str:
    """An answer without white space around it, and without what the template writes between it and the end of turn."""
    return text.strip().removesuffix(chat_format(tok).after_answer.strip()).rstrip()


def token_bytes(tok: Tokenizer) -> Callable[[int], bytes]:
    """What gives a token's bytes; those of an answer's tokens, put together, are its text in UTF-8."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode  # a module of everybody's converters

    added = tok.get_added_vocab().values()
    decoder = getattr(getattr(tok, "backend_tokenizer", None), "decoder", None)
    alphabet = bytes_to_unicode() if "ByteLevel" in repr(decoder) else {}
    byte_level = {character: byte for byte, character in alphabet.items()}

    @cache
    def raw(token: int) -> bytes:
        piece = tok.convert_ids_to_tokens(token)
        if piece is None:  # a model may have more rows than its tokenizer has tokens
            return b""
        if token not in added and byte_level.keys() >= set(piece):
            return bytes(byte_level[character] for character in piece)
        if match := re.fullmatch(r"<0x([0-9A-F]{2})>", piece):
            return bytes.fromhex(match[1])
        return (piece if token in added else piece.replace("\u2581", " ")).encode("utf-8", "replace")

    return raw


def end_ids(model: PreTrainedModel, tok: Tokenizer) -> list[int]:
    """Every token that ends an answer: the model's own end tokens, the template's end of turn, the end of text."""
    eos = model.generation_config.eos_token_id
    ids = eos if isinstance(eos, list) else [eos]
    return sorted({i for i in (*ids, chat_format(tok).end_of_turn_id, tok.eos_token_id) if i is not None})


def tokenizer_hash(tok: Tokenizer) -> str:
    """Identifies how texts become tokens: the tokenizer with its chat template, 16 hex digits.

    Of vocabulary, merges, normaliser, pre-tokeniser, post-processor, added and special tokens, the template's text, and
    one rendered prompt with its answer, because the code here has a part in it. Names, files and times do not count,
    nor does the system text of a prompted tokenizer. Whatever is kept for later and depends on rendered text is kept
    under this hash.
    """
    return _tokenizer_hash(tok, *_state(tok))


def tokenizer_hash_on_disk(name: str) -> str:
    """The hash of a model's tokenizer as it lies on this machine now; empty where there is no copy of it."""
    try:
        return tokenizer_hash(load_tokenizer(name, only_local=True))
    except WsError:
        return ""


@lru_cache(maxsize=16)
def _tokenizer_hash(tok: Tokenizer, *state: Any) -> str:
    prompt, form = render_prompt(tok, "Is it so?", system="Be brief."), chat_format(tok)
    others = {"thinking": True}, {"opener": "I say:"}
    rendered = [prompt, *(render_prompt(tok, "Is it so?", system="", **other) for other in others)]
    ids = [*(encode(tok, text) for text in rendered), encode_text(tok, "A text."), encode_answer(tok, prompt, "It is.")]
    ends = [form.after_answer, form.end_of_turn_id]
    options = [getattr(tok, name, None) for name in ("split_special_tokens", "clean_up_tokenization_spaces")]
    return sha256_json([_vocabulary(tok), state, options, ids, ends])[:16]


def _vocabulary(tok: Tokenizer) -> Any:
    """All of the tokenizer proper, as plain values."""
    if tok.is_fast:
        whole = json.loads(tok.backend_tokenizer.to_str())
        return {name: part for name, part in whole.items() if name not in ("padding", "truncation")}  # of the last call
    with TemporaryDirectory() as folder:
        files = {Path(file).name: sha256_file(Path(file)) for file in tok.save_vocabulary(folder)}
    return [files, tok.get_vocab(), sorted((i, repr(token)) for i, token in tok.added_tokens_decoder.items())]


def _pieces(tok: Tokenizer, text: str) -> list[int]:
    return tok(text, add_special_tokens=False)["input_ids"]


def _single_id(tok: Tokenizer, text: str) -> int | None:
    ids = _pieces(tok, text)
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
    """True when a weight is quantised: stored in integers or bytes, which cannot be compared or written to."""
    return any(not p.is_floating_point() or p.itemsize == 1 for p in model.parameters())


def _at_hand(module: nn.Module) -> AbstractContextManager[None]:
    """Offloaded parameters are read on the CPU inside; they go back when the block ends."""
    return align_module_device(module, "cpu") if is_offloaded(module) else nullcontext()


def fused_tensors(model: nn.Module, layers: Iterable[int]) -> list[str]:
    """Parameters of the given decoder layers that stack matrices, such as the experts of a mixture.

    Kernels of convolutions and vectors that are stored with further dimensions of 1 are none.
    """
    chosen = set(layers)
    convolutions = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, _ConvNd)}
    stacked = (n for n, p in model.named_parameters() if p.ndim > 2 and p.numel() > max(p.shape))
    return [n for n in stacked if layer_of(n) in chosen and n not in convolutions]


def layer_of(name: str) -> int | None:
    """The decoder-layer index in a module's name, None for modules outside the layers."""
    match = _LAYER_INDEX.search(f".{name}.")
    return int(match.group(1)) if match else None


def layer_count(model: PreTrainedModel) -> int:
    """The number of decoder layers."""
    return int(model.config.get_text_config().num_hidden_layers)


def decoder_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder blocks in order: the one list of as many modules as the model has layers, within no other layer.

    Raises:
        WsError: there is no such list, or there are several.
    """
    count = layer_count(model)
    lists = {
        name: list(module)
        for name, module in model.get_decoder().named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and layer_of(name) is None
    }
    if len(lists) != 1:
        seen = ", ".join(lists) or "none"
        raise WsError(f"{model_id(model)} must have one list of {count} decoder blocks; it has {seen}.")
    return next(iter(lists.values()))


def parse_layers(spec: str | Sequence[int], count: int) -> tuple[int, ...]:
    """Layer indices from `all`, `0.3:0.8` (fractions of the depth), `4:12` (Python slice) or a list `3,4,5`.

    Fractions are rounded to the nearest layer, the end excluded: `0.3:0.8` of 28 layers is 8..21, of 4 layers 1..2.
    """
    where = f"layers {shortened(spec)} of a model with {count} layers"
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
        return list(range(max(int(start or 0), -1), min(int(stop or count), count + 1)))  # out of range, but not by far
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
    own = {m for block in decoder_blocks(model) for m in block.modules()}  # a vision tower has layers, too
    inside = {n: m for n, m in model.named_modules() if m in own and linear_size(m)}
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
            f"reaches them; to steer its linear modules, name them with --modules: {', '.join(sorted(known))}."
        )
    return names


# ---- weights that are used without their module --------------------------------------------------------------------

# What is asked of a weight without computing with it; a kernel that is handed a bare address does compute.
_METADATA = (bool, int, str, torch.dtype, torch.device, torch.layout, torch.Size)


class _Watch(TorchFunctionMode):
    """Looks on during one forward pass: which modules are called, and which weights are used outside their modules."""

    def __init__(self, model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.model, self.modules, self.thread = model, modules, get_ident()
        self.called, self.used, self.inside = set[nn.Module](), set[str](), 0
        self.handles: list[RemovableHandle] = []
        weights = {id(m.weight) for m in modules.values()}
        owners = {m for m in model.modules() if id(getattr(m, "weight", None)) in weights}  # tied ones among them
        for module in owners | {*modules.values()}:
            self.handles.append(module.register_forward_pre_hook(self._enter))
            self.handles.append(module.register_forward_hook(self._leave, always_call=True))
        for parent in {self._parent(name) for name in modules} - owners - {model}:
            self.handles.append(parent.register_forward_pre_hook(self._note))
        self.__enter__()

    def stop(self) -> None:
        """Take the hooks and the mode off again."""
        self.__exit__(None, None, None)
        for handle in self.handles:
            handle.remove()

    def passed_by(self) -> list[str]:
        """Modules that were not called although their weight was used, or nobody of their kind was."""
        missed = {n: m for n, m in self.modules.items() if m not in self.called}
        kinds: dict[str, set[bool]] = {}
        for name, module in self.modules.items():
            # A kernel may take weights, or copies of them, where Python does not see it. But what lies in every layer,
            # and is called in none of those that ran, is called nowhere; experts without a token are another matter.
            alone = module not in self.called and self._parent(name) in self.called and layer_of(name) is not None
            kinds.setdefault(_LAYER_INDEX.sub(".", name), set()).add(alone)
        return [n for n in missed if n in self.used or kinds[_LAYER_INDEX.sub(".", n)] == {True}]

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if not self.inside and (not isinstance(result, _METADATA) or function is Tensor.data_ptr):
            given = [t for a in (*args, *(kwargs or {}).values()) for t in (a if isinstance(a, (list, tuple)) else [a])]
            weights = {id(t) for t in given if isinstance(t, nn.Parameter)}
            self.used |= {n for n, m in self.modules.items() if id(m.weight) in weights} if weights else set()
        return result

    def _parent(self, name: str) -> nn.Module:
        return self.model.get_submodule(name.rpartition(".")[0])

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.called.add(module)
        self.inside += 1

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.inside -= 1

    def _note(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.called.add(module)


@contextmanager
def require_gradients(model: nn.Module, advice: str) -> Iterator[None]:
    """Inside, `WsError` where torch has no gradient for a part of the model; `advice` is the end of the sentence."""
    try:
        yield
    except RuntimeError as problem:
        if not _NO_GRADIENT.search(str(problem)):
            raise
        raise WsError(
            f"A {type(model).__name__} cannot be trained, because torch has no gradient for a part of it ({problem}); "
            f"{advice}."
        ) from problem


@contextmanager
def require_calls(model: nn.Module, modules: Mapping[str, nn.Module], advice: str) -> Iterator[None]:
    """Inside, `model` stops at its first forward pass if it uses a weight of one of the modules without calling it.

    Hooks on such a module never run (Mamba's `dt_proj`, some routers), nor does an adapter in its place. Modules that a
    pass has no use for, such as experts without a token, are no concern. The first pass in training mode and the first
    in evaluation are watched, for some models go other ways in each; later ones cost nothing.

    Args:
        model: what is called.
        modules: by their names in it.
        advice: what to do, the end of the sentence.

    Raises:
        WsError: from the forward pass, with the names.
    """
    watch: _Watch | None = None
    checked, alone = set[bool](), Lock()

    def begin(root: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal watch
        if modules and root.training not in checked and alone.acquire(blocking=False):
            watch = _Watch(root, modules)

    def end(root: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        nonlocal watch
        if watch is None or watch.thread != get_ident():
            return
        watch.stop()
        missed, watch = watch.passed_by(), None
        alone.release()
        if missed and output is not None:  # a pass that failed has no output, and says so itself
            kinds = ", ".join(sorted({n.rsplit(".", 1)[-1] for n in missed}))
            raise WsError(
                f"The model uses the weights of {kinds} ({len(missed)} modules, such as {missed[0]}) without calling "
                f"these modules, so that nothing which is put on them has an effect: {advice}."
            )
        checked.update({root.training} if output is not None else ())

    # The last to begin is the first to end, as modes have to be when such blocks nest.
    handles = model.register_forward_pre_hook(begin), model.register_forward_hook(end, always_call=True, prepend=True)
    try:
        yield
    finally:
        if watch is not None and watch.thread == get_ident():  # an interrupt calls no hooks
            watch.stop()
        for handle in handles:
            handle.remove()


# ---- identity -------------------------------------------------------------------------------------------------


def fingerprint(model: nn.Module, copied_to: torch.dtype | None = None) -> str:
    """A short hash of the weights that does not depend on their dtype.

    Every parameter contributes its name, shape and evenly spaced values rounded to bfloat16, so the bfloat16 and the
    float32 copy of one checkpoint agree and a fine-tune of it does not. A float16 copy rounds other digits away and
    has another hash: `copied_to` gives that of the model's copy in such a dtype. A packed parameter contributes how
    often its half-bytes occur. Refuses a model with adapter layers inside.
    """
    again = _stored_again(model)
    parameters = [(n, p) for n, p in model.named_parameters() if n not in again]
    return fingerprint_of(((name, p.shape, partial(_value, model, name, p)) for name, p in parameters), copied_to)


def fingerprint_of(
    tensors: Iterable[tuple[str, Sequence[int], Callable[[], Tensor]]], copied_to: torch.dtype | None = None
) -> str:
    """The fingerprint of named tensors, given as `(name, shape, how to read it)`; one is in memory at a time."""
    digest = hashlib.sha256()
    for name, shape, read in sorted(tensors, key=lambda item: item[0]):
        if ".base_layer." in name or "lora_" in name:
            raise WsError("The model has adapter layers in it; unload them or load a fresh base first.")
        flat = read().detach().reshape(-1)
        if not flat.is_floating_point():  # packed, and laid out anew in the first pass on some devices
            codes = flat.view(torch.uint8)
            counts = torch.bincount(codes & 15, minlength=16) + torch.bincount(codes >> 4, minlength=16)
            digest.update(f"{name}{counts.tolist()}".encode())
            continue
        digest.update(f"{name}{tuple(shape)}".encode())
        if flat.numel():
            picked = flat[:: max(1, flat.numel() // SAMPLES_PER_TENSOR)].to(copied_to)
            digest.update(picked.to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _stored_again(model: nn.Module) -> set[str]:
    """Tied weights that are two parameters only because both wait on disk, where transformers does not compare them."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    again = set[str]()
    for pair in getattr(model, "all_tied_weights_keys", {}).items():
        first, other = (parameters.get(name) for name in pair)
        if first is None or other is None or first is other or not (first.is_meta and other.is_meta):
            continue
        if torch.equal(*(_value(model, name, parameters[name]) for name in pair)):
            again.add(max(pair, key=list(parameters).index))  # the first name counts, as of any tied weight
    return again


def _value(model: nn.Module, name: str, parameter: Tensor) -> Tensor:
    """A parameter's value, fetched from where accelerate has offloaded it."""
    if not parameter.is_meta:
        return parameter
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    with _at_hand(module):
        return getattr(module, leaf).detach()


def require_base(model: nn.Module, base_id: str, expected: str | None, what: str) -> None:
    """Refuse weights that something was not made for.

    What was made on the float16 copy of a base fits the base. The digits that a quantised or float16 model has lost
    cannot be compared; there the name has to agree.

    Args:
        model: what it is put into.
        base_id, expected: name and fingerprint of what it was made on; no fingerprint is one that is not known.
        what: how the sentence begins, such as "The vector was made for".

    Raises:
        WsError: another base.
    """
    if expected is None or (now := fingerprint(model)) == expected or fingerprint(model, torch.float16) == expected:
        return
    name, dtypes = model_id(model), {p.dtype for p in model.parameters()}
    if is_packed(model) or torch.float16 in dtypes:
        if model_name(name) != model_name(base_id):
            raise WsError(
                f"{what} {base_id} and this model, whose weights are quantised or float16 and cannot be compared, is "
                f"{name}."
            )
        return
    loaded = " and ".join(sorted(str(dtype)[6:] for dtype in dtypes))
    precision = f" in the precision it was made in (this is {loaded}; was it float16?)" if name == base_id else ""
    raise WsError(
        f"{what} {base_id} ({expected}) and this model's weights differ ({now}); load that base{precision}, or make a "
        "vector for this one."
    )


def model_id(model: nn.Module) -> str:
    """The name the model was loaded by."""
    named = getattr(model, "name_or_path", "") or getattr(getattr(model, "config", None), "_name_or_path", "")
    return str(named or type(model).__name__)
