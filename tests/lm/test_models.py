"""Loading models by name, and finding out what a chat template can do."""

from __future__ import annotations

import copy
import datetime
import io
import json
import shutil
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)
from transformers.utils import chat_template_utils

import ws
from conftest import NO_SYSTEM, build_model
from ws.data import Pair, prompt_ids, sample_answers
from ws.eval.capability import read_texts
from ws.intervene.prompt import prompted
from ws.lm import hub
from ws.lm.models import (
    chat_format,
    decode_answer,
    encode,
    encode_after,
    encode_answer,
    encode_text,
    end_ids,
    fingerprint,
    layer_of,
    linear_size,
    load_tokenizer,
    model_folder,
    module_kind,
    parse_layers,
    render_prompt,
    target_modules,
    token_bytes,
    tokenizer_hash,
    tokenizer_hash_on_disk,
    weight_of,
    weight_size,
)
from ws.lm.rollout import REASONS, thinking_prompt, thinks_aloud
from ws.train import build_examples

ALWAYS_THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


@pytest.fixture
def tok():
    return load_tokenizer("pocket")


def test_pocket_and_tiny_random_load_and_say_what_they_are():
    for name in ("pocket", "tiny-random"):
        model, tok = ws.load_model(name, device="cpu")
        assert model.name_or_path == name
        assert not model.training
        assert tok.pad_token_id is not None
        ids = torch.tensor([encode(tok, render_prompt(tok, "Hello"))])
        with torch.no_grad():
            assert torch.isfinite(model(ids).logits).all()


def test_tiny_random_is_the_same_every_time():
    marks = {fingerprint(ws.load_model("tiny-random")[0]) for _ in range(2)}
    assert len(marks) == 1


def test_local_folders_load_and_dtype_is_honoured(tmp_path, tok):
    model = build_model("qwen3")
    model.save_pretrained(tmp_path / "m")
    tok.save_pretrained(tmp_path / "m")
    again, _ = ws.load_model(str(tmp_path / "m"), dtype="bfloat16")
    assert again.dtype == torch.bfloat16
    assert fingerprint(again) == fingerprint(model)


def test_the_fingerprint_tells_a_fine_tune_from_its_base_but_not_dtypes_apart(qwen3):
    mark = fingerprint(qwen3)
    assert fingerprint(build_model("qwen3", torch.bfloat16)) == mark
    with torch.no_grad():
        qwen3.model.layers[1].self_attn.q_proj.weight *= 1.02
    assert fingerprint(qwen3) != mark


def test_the_pocket_template_can_do_everything(tok):
    form = chat_format(tok)
    assert form.has_template
    assert form.system_role
    assert form.thinking_switch
    assert tok.convert_ids_to_tokens(form.end_of_turn_id) == "<|im_end|>"
    assert tok.convert_ids_to_tokens(form.think_close_id) == "</think>"
    closed, open_ = render_prompt(tok, "Q"), render_prompt(tok, "Q", thinking=True)
    assert closed.endswith("<think>\n\n</think>\n\n")
    assert open_.endswith("assistant\n")
    assert render_prompt(tok, "Q", system="S", opener="My answer:").endswith("</think>\n\nMy answer:")


def test_without_a_system_role_the_persona_goes_into_the_user_turn(tok):
    tok.chat_template = NO_SYSTEM
    form = chat_format(tok)
    assert not form.system_role
    text = render_prompt(tok, "What is it?", system="Be honest.")
    assert "Be honest.\n\nWhat is it?" in text
    assert text.endswith("model\n")


@pytest.mark.parametrize("template", [NO_SYSTEM, None])
def test_the_persona_goes_into_a_users_turn_where_the_assistant_speaks_first(tok, template):
    tok.chat_template = template
    greeting = [{"role": "assistant", "content": "Welcome!"}]
    text = render_prompt(tok, "What is it?", system="Be honest.", earlier=greeting)
    assert text.index("Welcome!") < text.index("Be honest.\n\nWhat is it?")
    assert greeting == [{"role": "assistant", "content": "Welcome!"}]


def test_a_template_that_always_thinks_gets_its_block_closed(tok):
    tok.chat_template = ALWAYS_THINKS
    assert not chat_format(tok).thinking_switch
    assert render_prompt(tok, "Q").endswith("<think>\n\n</think>\n\n")
    assert render_prompt(tok, "Q", thinking=True).endswith("<think>\n")


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("opened", ["<thought>\n", "Here are my reasoning steps:\n", " <reasoning>"])
def test_a_thought_opened_in_other_words_is_left_out_as_the_conversation_leaves_it_out(tok, opened, thinking):
    tok.chat_template = ALWAYS_THINKS.replace("<think>\n", opened)
    form = chat_format(tok)
    assert (form.opened, form.think_close_id) == (opened, None)
    assert repr(opened) in form.describe()
    asked, answer = [{"role": "user", "content": "Q"}], {"role": "assistant", "content": "My answer: Yes"}
    whole = tok.apply_chat_template([*asked, answer], tokenize=False)
    assert whole.startswith(render_prompt(tok, "Q", opener="My answer:", thinking=thinking))
    assert chat_format(load_tokenizer("pocket")).opened == ""


@pytest.mark.parametrize("template", ["<think>", "<think>\\n", "{% if enable_thinking %}<think>\\n{% endif %}"])
def test_a_block_whose_tags_are_no_tokens_is_never_left_open(tok, tmp_path, template):
    """Nothing would say when it is closed, so that such a model gives its reasons in its answer."""
    tok.save_pretrained(tmp_path)
    for file in (tmp_path / "tokenizer.json", tmp_path / "tokenizer_config.json"):
        file.write_text(file.read_text().replace("think>", "thunk>"))
    tok = load_tokenizer(str(tmp_path))
    tok.chat_template = ALWAYS_THINKS.replace("<think>\n", template.replace("\\n", "\n"))
    assert chat_format(tok).think_close_id is None
    aloud = thinking_prompt(tok, "Q")
    assert aloud == render_prompt(tok, "Q" + REASONS)
    assert aloud.count("<think>") == aloud.count("</think>")


def test_without_a_template_a_plain_transcript_is_used(tok):
    tok.chat_template = None
    assert not chat_format(tok).has_template
    assert chat_format(tok).end_of_turn_id == tok.eos_token_id
    assert render_prompt(tok, "Q", system="S", opener="A:") == "User: S\n\nQ\nAssistant: A:"


# ---- prompts and answers as tokens ----------------------------------------------------------------------------------

MARKS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")


def own_tokens(tok: PreTrainedTokenizerFast, special: bool = True) -> PreTrainedTokenizerFast:
    """The tokenizer with the marks of the templates below, which have no name in it."""
    tok.add_tokens([AddedToken(mark, special=special, normalized=False) for mark in MARKS])
    tok.chat_template = None
    return tok


def begins_with(backend: Backend, token: str, end: str = "") -> None:
    """Let a backend put a token before every text, and perhaps one after it."""
    ids = [(t, backend.token_to_id(t)) for t in (token, end) if t]
    backend.post_processor = processors.TemplateProcessing(single=f"{token} $A {end}".strip(), special_tokens=ids)


def byte_level() -> PreTrainedTokenizerFast:
    return own_tokens(load_tokenizer("pocket"))


def byte_level_with_bos() -> PreTrainedTokenizerFast:
    tok = own_tokens(load_tokenizer("pocket"), special=False)
    tok.add_special_tokens({"bos_token": "<s>"})
    begins_with(tok.backend_tokenizer, "<s>")
    return tok


@lru_cache(maxsize=1)
def corpus() -> list[str]:
    letters = [f"{a}{b}" for a in "abcdefghijklmnopqrstuvwxyzTI" for b in " .:?/"]
    return [*ws.load_behavior("honesty", "pocket").questions[:300], *letters, *["User: I see.\nAssistant: Yes.\n"] * 9]


def unigram(prepend: str, end: str = "") -> PreTrainedTokenizerFast:
    """Like a sentencepiece model: spaces belong to the words that follow, and a text's first word is taken for one."""
    backend = Backend(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend)
    backend.decoder = decoders.Metaspace(prepend_scheme=prepend)
    special = ["<unk>", "<s>", "</s>", *MARKS]
    options = {"initial_alphabet": list("\n[]/INSTE"), "unk_token": "<unk>", "show_progress": False}
    backend.train_from_iterator(corpus(), trainers.UnigramTrainer(vocab_size=600, special_tokens=special, **options))
    begins_with(backend, "<s>", end)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def legacy_bpe() -> PreTrainedTokenizerFast:
    """Like a Llama 2 tokenizer: every stretch between special tokens gets a space in front."""
    trained = Backend(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trained.train_from_iterator(corpus(), trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>"]))
    model = json.loads(trained.to_str())["model"]
    special = ["<unk>", "<s>", "</s>"]
    words = [*special, *(f"<0x{i:02X}>" for i in range(256)), *(w for w in model["vocab"] if w not in special)]
    merges = [tuple(m) for m in model["merges"]]
    vocab = {word: i for i, word in enumerate(words)}
    backend = Backend(models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    begins_with(backend, "<s>")
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    return own_tokens(PreTrainedTokenizerFast(tokenizer_object=backend, **names))


@lru_cache(maxsize=8)
def built(name: str) -> PreTrainedTokenizerFast:
    made = {
        "bytes": byte_level,
        "bytes, bos": byte_level_with_bos,
        "first": lambda: unigram("first"),
        "always, eos after": lambda: unigram("always", "</s>"),
        "legacy": legacy_bpe,
    }
    return made[name]()


TOKENIZERS = ("bytes", "bytes, bos", "first", "always, eos after", "legacy")
TURNS = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
ASKS = "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
BLOCKS = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}{% else %}"
    "{% set rest = messages %}{% endif %}<|system|>\n\nIt is {{ strftime_now('%d %b %Y') }}."
    "{% if messages[0].role == 'system' %}{{ '\n' + messages[0].content }}{% endif %}<|end|>"
    "{% for m in rest %}{{ '<|' + m.role + '|>\n\n' + m.content | trim + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n\n' }}{% endif %}"
)
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}"
)
TEMPLATES = {  # with the token that ends a turn, None for the end of text
    "none": (None, None),
    "marks": (TURNS + ASKS, "<|end|>"),
    "date and bos": (BLOCKS, "<|end|>"),
    "no system": ("{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + TURNS
                  + ASKS, "<|end|>"),
    "brackets": (BRACKETS, None),
    "brackets, spaces": (BRACKETS.replace("trim +", "trim + ' ' +"), None),
    "line break": (TURNS.replace("<|end|>", "\n<|end|>") + ASKS, "<|end|>"),
    "thinks": (TURNS + "{% if add_generation_prompt %}<|assistant|>\n<think>\n{% endif %}", "<|end|>"),
    "channel": (TURNS.replace("|>\n{{", "|>{{ '[to all]' if m.role == 'assistant' else '' }}\n{{")
                + "{% if add_generation_prompt %}<|assistant|>{% endif %}", "<|end|>"),
    "mark and text": (TURNS.replace("<|end|>", " [END]<|end|>") + ASKS, "<|end|>"),
}  # fmt: skip
# What is not there after the last answer: nothing follows it, or what does is a text.
OPEN_ENDS = {
    "nothing": (TURNS.replace("<|end|>\n", "") + ASKS, None),
    "a line": (TURNS.replace("<|end|>", "") + ASKS, None),
    "bos opens": ("{{ bos_token }}" + TURNS.replace("<|end|>\n", "") + ASKS, None),
    "text": (TURNS.replace("<|end|>", "\n### end") + ASKS, None),
    "between": (TURNS.replace("<|end|>\n", "{% if not loop.last or m.role == 'user' %}<|end|>\n{% endif %}") + ASKS,
                "<|end|>"),
}  # fmt: skip
UNTOLD = OPEN_ENDS["between"][0].replace("in messages %}", "in messages if m.role != 'system' %}")
OPEN_ENDS["between, told"] = "<|system|>\nBe kind.<|end|>\n" + UNTOLD, "<|end|>"
QUESTION, ANSWER = "Is the ice cold?", "The ice is cold."


def with_template(name: str, template: str | None) -> PreTrainedTokenizerFast:
    tok = copy.deepcopy(built(name))
    tok.chat_template = template
    return tok


def reference(tok, messages, prompt: bool) -> list[int]:
    """What transformers makes of a conversation, today's date put in place of the fixed one."""
    dated = tok.chat_template.replace("strftime_now('%d %b %Y')", "'26 Jul 2024'")
    options = {"add_generation_prompt": prompt, "chat_template": dated}
    return tok.apply_chat_template(messages, tokenize=True, **options)["input_ids"]


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def end_token(tok, end: str | None) -> int:
    return tok.eos_token_id if end is None else tok.convert_tokens_to_ids(end)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_prompt_and_answer_are_the_conversation_in_tokens(name, template):
    text, end = TEMPLATES[template]
    tok = with_template(name, text)
    prompt = prompt_ids(tok, QUESTION)
    learned = build_examples(tok, [Pair("1", QUESTION, ANSWER, "No.", 1, 1)] * 2, "pos", 500)[0]
    if text is None:
        start = tok("")["input_ids"][: 1 if name != "bytes" else 0]
        whole = [*start, *tok(f"User: {QUESTION}\nAssistant: {ANSWER}", add_special_tokens=False)["input_ids"]]
        whole.append(tok.eos_token_id)
        begin = [*start, *tok(f"User: {QUESTION}\nAssistant:", add_special_tokens=False)["input_ids"]]
    else:
        begin, whole = reference(tok, turns(QUESTION), True), reference(tok, turns(QUESTION, ANSWER), False)
        whole = whole[: len(whole) - whole[::-1].index(end_token(tok, end))]
    if template == "thinks":  # transformers shows no conversation with the block that is closed here
        whole = tok(f"{render_prompt(tok, QUESTION)}{ANSWER}<|end|>", add_special_tokens=False)["input_ids"]
        begin = whole[: len(prompt)]
    channel = encode_after(tok, "<|assistant|>", "[to all]\n") if template == "channel" else []
    assert prompt == begin + channel
    assert [*learned.prompt, *learned.response] == whole
    assert list(learned.prompt) == prompt
    assert learned.response[-1] == end_token(tok, end)
    assert learned.response.count(end_token(tok, end)) == 1
    assert decode_answer(tok, learned.response[:-1]) == ANSWER


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("template", OPEN_ENDS)
def test_the_end_of_a_turn_is_looked_for_where_others_follow_and_else_is_the_end_of_text(name, template):
    text, end = OPEN_ENDS[template]
    tok = with_template(name, text)
    assert chat_format(tok).end_of_turn_id == end_token(tok, end)
    prompt = encode(tok, render_prompt(tok, QUESTION))
    shown = tok.apply_chat_template(turns(QUESTION, ANSWER), tokenize=False)
    shown = shown[: shown.index(ANSWER) + len(ANSWER)]
    said = encode_answer(tok, render_prompt(tok, QUESTION), ANSWER, ended=True)
    assert [*prompt, *said[:-1]] == tok(shown, add_special_tokens=False)["input_ids"]
    assert said[-1] == end_token(tok, end)
    assert said.count(said[-1]) == 1


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_prompt_begins_once_and_as_the_tokenizer_or_the_template_wants(name, template):
    tok = with_template(name, TEMPLATES[template][0])
    wants = "bos_token" in tok.chat_template if tok.chat_template else True
    count = int(wants and tok.bos_token is not None)
    earlier = turns("Is fire hot?", "It is.")
    for prompt in (
        render_prompt(tok, QUESTION),
        render_prompt(tok, QUESTION, system="Be brief.", opener="I say:"),
        render_prompt(tok, QUESTION, earlier=earlier),
    ):
        ids = encode(tok, prompt)
        assert ids.count(tok.bos_token_id) == count if tok.bos_token else True
        assert not count or ids[0] == tok.bos_token_id
        assert ids[-1] != tok.eos_token_id
    whole = encode(tok, render_prompt(tok, QUESTION, earlier=earlier))
    if tok.chat_template is None:
        text = f"User: Is fire hot?\nAssistant: It is.\nUser: {QUESTION}\nAssistant:"
        assert whole == [*tok("")["input_ids"][:count], *tok(text, add_special_tokens=False)["input_ids"]]
    elif template not in ("thinks", "channel"):
        assert whole == reference(tok, [*earlier, *turns(QUESTION)], True)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_an_opener_stands_where_the_answer_would(name, template):
    tok = with_template(name, TEMPLATES[template][0])
    prompt = render_prompt(tok, QUESTION)
    opened = encode(tok, render_prompt(tok, QUESTION, opener="I say: it"))
    assert opened == encode(tok, prompt) + encode_answer(tok, prompt, "I say: it")
    whole = encode(tok, prompt) + encode_answer(tok, prompt, "I say: it is.")
    assert whole[: len(opened)] == opened


@pytest.mark.parametrize("name", TOKENIZERS)
def test_text_goes_on_as_if_it_had_been_tokenised_as_a_whole(name):
    tok = built(name)
    for before, text in (("I see", ". It is."), ("I see.", " It is."), ("I", "t is"), ("a", "\n\nI see: ")):
        joined = tok(before + text, add_special_tokens=False)["input_ids"]
        head = tok(before, add_special_tokens=False)["input_ids"]
        after = encode_after(tok, before, text)
        if joined[: len(head)] == head:
            assert head + after == joined
        assert tok.decode(head + after) == tok.decode(joined)


def parrot(tokens: list[int], ends: int | list[int] | None = None):
    """A model that answers every prompt with the same tokens, and what it was given."""
    model, given = build_model("qwen3"), SimpleNamespace()
    model.generation_config.eos_token_id = ends

    def generate(input_ids, attention_mask, eos_token_id, **options):
        given.prompt, given.ends = input_ids[0][attention_mask[0].bool()].tolist(), eos_token_id
        return torch.cat([input_ids, torch.tensor([tokens])], dim=1)

    model.generate = generate
    return model, given


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("template", [*TEMPLATES, *OPEN_ENDS])
def test_what_is_generated_is_what_is_trained_on(name, template):
    tok = with_template(name, (TEMPLATES | OPEN_ENDS)[template][0])
    example = build_examples(tok, [Pair("1", QUESTION, ANSWER, "No.", 1, 1)] * 2, "pos", 500)[0]
    more = tok("It is", add_special_tokens=False)["input_ids"]
    model, given = parrot([*example.response, *more])
    (answer,) = sample_answers(model, tok, [render_prompt(tok, QUESTION)], 99)
    assert given.prompt == list(example.prompt)
    assert (answer.text, answer.tokens, answer.ended) == (ANSWER, len(example.response) - 1, True)
    assert given.ends == end_ids(model, tok) == sorted({example.response[-1], tok.eos_token_id})


def test_a_tokenizer_without_an_end_says_so_when_one_is_taught():
    tok = copy.deepcopy(built("bytes"))
    tok.eos_token = None
    assert chat_format(tok).end_of_turn_id is None
    assert end_ids(parrot([], [7, 5])[0], tok) == [5, 7]
    with pytest.raises(ws.WsError, match="no token that ends an answer"):
        build_examples(tok, [Pair("1", QUESTION, ANSWER, "No.", 1, 1)] * 2, "pos", 500)


def test_a_text_to_read_begins_like_a_transcript():
    tok = built("bytes, bos")
    model = ws.lm.models.tiny_random().eval()
    model.resize_token_embeddings(len(tok))
    (nll, kl), text = (read_texts(model, tok, ["It is."], model)[k] for k in ("nll", "kl")), encode_text(tok, "It is.")
    assert text[0] == tok.bos_token_id
    assert len(nll) == len(kl) == len(text) - 1
    assert encode(tok, render_prompt(tok, "Q"))[0] == tok.bos_token_id


class Tomorrow(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(2031, 1, 2)


def test_the_date_of_a_template_is_always_the_same(monkeypatch):
    tok = with_template("bytes, bos", TEMPLATES["date and bos"][0])
    assert "its date fixed to 26 Jul 2024" in chat_format(tok).describe()
    assert "date" not in chat_format(with_template("bytes", TURNS + ASKS)).describe()
    prompt, digest = render_prompt(tok, QUESTION), tokenizer_hash(tok)
    assert "It is 26 Jul 2024." in prompt
    monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow)
    assert "It is 02 Jan 2031." in tok.apply_chat_template(turns(QUESTION), tokenize=False)
    later = copy.deepcopy(tok)
    assert render_prompt(later, QUESTION) == prompt
    assert tokenizer_hash(later) == digest


@pytest.mark.parametrize(
    "space", ["", "\n", "  ", "\n\n  ", "{#- said -#}\n ", "  {% if true %}\n", "  {%- if true %}"]
)
def test_to_fix_a_date_moves_no_white_space(space):
    close = "{% endif %}" if "if true" in space else ""
    asks = "{{ strftime_now('%A %d %B %Y, %-d.%m.%y %H:%M') }}"
    says = "Friday 26 July 2024, 26.07.24 00:00"
    texts = []
    for today in (asks, says):
        tok = with_template("bytes", f"{space}{today}{close}{TURNS}{ASKS}")
        texts.append(render_prompt(tok, QUESTION))
    assert texts[0] == texts[1]


def test_a_template_that_does_not_work_is_a_sentence():
    tok = with_template("bytes", "{{ raise_exception('no such thing') }}")
    with pytest.raises(ws.WsError, match=r"chat template of .* cannot render user \(no such thing\)"):
        render_prompt(tok, "Q")
    tok.chat_template = {"tools": TURNS}
    with pytest.raises(ws.WsError, match=r"several chat templates \(tools\) and no default one"):
        render_prompt(tok, "Q")
    tok.chat_template = "{% for m in messages %}<|user|>{{ m['content'][0]['text'] }}{% endfor %}" + ASKS
    with pytest.raises(ws.WsError, match="leaves out what the user says.*list of parts"):
        render_prompt(tok, "Q")
    tok.chat_template = (
        "{% if messages[0]['role'] != 'system' %}{{ raise_exception('system first') }}{% endif %}" + TURNS
    )
    with pytest.raises(ws.WsError, match=r"cannot render user \(system first\)"):
        render_prompt(tok, "Q")
    tok.chat_template = {"tools": "other", "default": TURNS + ASKS}
    assert render_prompt(tok, "Q") == "<|user|>\nQ<|end|>\n<|assistant|>\n"


def test_a_system_prompt_that_the_template_brings_is_named_and_left_alone():
    own = "{% if messages[0].role != 'system' %}<|system|>\nBe helpful.<|end|>\n{% endif %}"
    tok = with_template("bytes", own + TURNS + ASKS)
    assert chat_format(tok).default_system == "Be helpful."
    assert "its own system prompt where none is given ('Be helpful.')" in chat_format(tok).describe()
    assert render_prompt(tok, "Q", system="") == "<|system|>\nBe helpful.<|end|>\n<|user|>\nQ<|end|>\n<|assistant|>\n"
    assert "helpful" not in render_prompt(tok, "Q", system="Be brief.")
    tok.chat_template = tok.chat_template.removeprefix(own)
    assert chat_format(tok).default_system == ""
    assert render_prompt(tok, "Q", system="") == "<|user|>\nQ<|end|>\n<|assistant|>\n"
    assert chat_format(load_tokenizer("pocket")).default_system == ""
    brief = "{% if enable_thinking is defined and not enable_thinking %}Be brief.{% else %}Think at length.{% endif %}"
    tok.chat_template = own.replace("Be helpful.", brief) + TURNS + ASKS  # as SmolLM3's: another one where it thinks
    assert chat_format(tok).default_system == "Be brief."
    assert "<|system|>\nBe brief.<|end|>" in render_prompt(tok, "Q")


# ---- what texts depend on -------------------------------------------------------------------------------------------


def altered(tok, change) -> PreTrainedTokenizerFast:
    """A copy of a tokenizer whose backend was changed as JSON."""
    made, whole = copy.deepcopy(tok), json.loads(tok.backend_tokenizer.to_str())
    change(whole)
    made._tokenizer = Backend.from_str(json.dumps(whole))
    return made


def swap(vocabulary: dict[str, int]) -> None:
    vocabulary["Ġis"], vocabulary["Ġthe"] = vocabulary["Ġthe"], vocabulary["Ġis"]


def test_the_hash_of_a_tokenizer_sees_all_that_texts_depend_on(tmp_path):
    tok = load_tokenizer("pocket")
    first = tokenizer_hash(tok)
    changed = [
        altered(tok, lambda t: t["model"]["merges"].pop()),
        altered(tok, lambda t: swap(t["model"]["vocab"])),
        altered(tok, lambda t: t.update(normalizer={"type": "NFKC"})),
        altered(tok, lambda t: t["added_tokens"][3].update(special=False)),
        altered(tok, lambda t: t["added_tokens"][2].update(rstrip=True)),
        *(copy.deepcopy(tok) for _ in range(6)),
    ]
    changed[5].chat_template = tok.chat_template.replace("assistant", "Assistant")
    changed[6].chat_template = None
    changed[7].add_tokens(["zyx"])
    changed[8].eos_token = "<|endoftext|>"
    begins_with(changed[9].backend_tokenizer, "<|endoftext|>")
    changed[10].split_special_tokens = True
    assert len({first, *map(tokenizer_hash, changed)}) == len(changed) + 1
    same = [copy.deepcopy(tok), prompted(tok, "Lie."), load_tokenizer("tiny-random")]
    same[0](["a", "a b c"], padding=True, truncation=True, max_length=2)
    same[0].padding_side, same[0].name_or_path = "right", "elsewhere"
    tok.save_pretrained(tmp_path)
    assert {tokenizer_hash(t) for t in (*same, load_tokenizer(str(tmp_path)))} == {first}
    assert tokenizer_hash_on_disk(str(tmp_path)) == first
    assert tokenizer_hash_on_disk("someone/some-model-that-is-not-cached") == ""
    assert len({tokenizer_hash(built(name)) for name in TOKENIZERS}) == len(TOKENIZERS)


def test_a_tokenizer_that_is_changed_in_use_is_looked_at_again():
    tok = load_tokenizer("pocket")
    first, end = tokenizer_hash(tok), chat_format(tok).end_of_turn_id
    template = tok.chat_template
    tok.chat_template = template.replace("<|im_end|>", "<|endoftext|>")
    assert tokenizer_hash(tok) != first
    assert chat_format(tok).end_of_turn_id != end
    tok.chat_template = TURNS + ASKS
    assert (chat_format(tok).think_close_id, thinks_aloud(tok, 1)) == (None, True)
    tok.chat_template = template
    assert not thinks_aloud(tok, 1)
    assert tokenizer_hash(tok) == first
    assert chat_format(tok).end_of_turn_id == end


def test_a_tokenizer_written_in_python_has_a_hash(tmp_path):
    from transformers import ByT5Tokenizer

    names = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    one, other, third = ByT5Tokenizer(**names), ByT5Tokenizer(**names), ByT5Tokenizer(**names, extra_ids=7)
    assert not one.is_fast
    assert tokenizer_hash(one) == tokenizer_hash(other) != tokenizer_hash(third)
    other.chat_template = TURNS + ASKS
    assert tokenizer_hash(one) != tokenizer_hash(other)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("poket", "Did you mean 'pocket'"),
        ("./nowhere/model", "no folder"),
        ("someone/some-model-that-is-not-cached", "hf download"),
    ],
)
def test_unknown_models_are_explained(name, message):
    with pytest.raises(ws.WsError, match=message):
        ws.load_model(name)


def test_a_model_is_named_by_a_path_too_and_by_nothing_else():
    folder = Path(model_folder("pocket"))
    assert ws.load_model(folder)[0].name_or_path == str(folder.resolve())
    for other in (None, 3):
        with pytest.raises(ws.WsError, match=f"hub id, a folder, .*, not {other!r}"):
            ws.load_model(other)


@pytest.mark.parametrize(
    ("endpoint", "port"), [("https://hub.test", 443), ("http://hub.test", 80), ("http://hub.test:8000", 8000)]
)
def test_the_hub_is_asked_at_the_port_of_its_address(endpoint, port, monkeypatch):
    asked = []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    monkeypatch.setattr(hub, "getproxies", dict)
    monkeypatch.setattr(hub.socket, "create_connection", lambda address, timeout: asked.append(address) or io.BytesIO())
    assert not hub.hub_is_out_of_reach.__wrapped__()
    assert asked == [("hub.test", port)]


def test_without_a_network_the_answer_comes_at_once(monkeypatch):

    asked = []

    def unreachable(address, timeout):
        asked.append(address)
        raise OSError("no route")

    hub.hub_is_out_of_reach.cache_clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "getproxies", dict)
    monkeypatch.setattr(hub.socket, "create_connection", unreachable)
    try:
        with pytest.raises(ws.WsError, match="hub could not be reached"):
            ws.load_model("someone/some-model-that-is-not-cached")
    finally:
        hub.hub_is_out_of_reach.cache_clear()
    assert len(asked) == 1
    assert asked[0][1] == 443


def test_folders_that_are_no_safetensors_model_are_explained(tmp_path, tok):
    with pytest.raises(ws.WsError, match="not a transformers model"):
        ws.load_model(str(tmp_path))
    folder = tmp_path / "m"
    shutil.copytree(model_folder("pocket"), folder, ignore=shutil.ignore_patterns("__pycache__", "data"))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ws.WsError, match="damaged|safetensors"):
        ws.load_model(str(folder))
    weights.unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ws.WsError, match="never loaded"):
        ws.load_model(str(folder))


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"
SIDE_FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", "chat_template.jinja")


@pytest.fixture(scope="module")
def in_shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "m"
    model, tok = ws.load_model("pocket")
    model.save_pretrained(folder, max_shard_size="3MB")
    tok.save_pretrained(folder)
    ws.load_model(str(folder))
    return folder


@pytest.fixture
def damaged(in_shards, tmp_path):
    """What is said of the model with another content of one of its files."""

    def said(name: str, content: bytes) -> str:
        folder = tmp_path / "m"
        shutil.copytree(in_shards, folder)
        assert (folder / name).is_file()
        (folder / name).write_bytes(content)
        try:
            with pytest.raises(ws.WsError) as problem:
                ws.load_model(str(folder))
        finally:
            shutil.rmtree(folder)
        return str(problem.value)

    return said


@pytest.mark.parametrize("name", [*SIDE_FILES, "model.safetensors.index.json", "model-00002-of-00003.safetensors"])
def test_a_file_of_a_model_that_is_something_else_is_named(name, damaged):
    contents = {b"": "it is empty", POINTER: "git lfs pull", b"<!DOCTYPE html>": "web page", b'{"a": "\xe9"}': ""}
    contents |= {} if name.endswith("jinja") else {b"[1, 2]": "", b"[" * 100_000: "", b'{"a": ': ""}
    for content, words in contents.items():
        said = damaged(name, content)
        assert name in said
        assert words in said


@pytest.mark.parametrize(
    "values",
    [
        {"hidden_size": "a"}, {"hidden_size": 0}, {"num_attention_heads": 0}, {"num_attention_heads": 7},
        {"num_hidden_layers": -3}, {"dtype": "float99"}, {"vocab_size": -2}, {"hidden_act": "zz"},
        {"rope_scaling": 5}, {"model_type": ["qwen3"]},
    ],
    ids=str,
)  # fmt: skip
def test_a_configuration_that_makes_no_sense_is_one_sentence(values, in_shards, damaged):
    config = json.loads((in_shards / "config.json").read_text()) | values
    assert "\n" not in damaged("config.json", json.dumps(config).encode())


@pytest.mark.parametrize("place", ["../m/model-00001-of-00003.safetensors", "/etc/passwd", ".", "", 5, None])
def test_an_index_leads_nowhere_but_to_the_files_beside_it(place, in_shards, damaged):
    index = json.loads((in_shards / "model.safetensors.index.json").read_text())
    index["weight_map"][min(index["weight_map"])] = place
    assert "model.safetensors.index.json is damaged" in damaged(
        "model.safetensors.index.json", json.dumps(index).encode()
    )


def test_an_index_of_nothing_is_damaged(damaged):
    assert "model.safetensors.index.json is damaged" in damaged("model.safetensors.index.json", b'{"weight_map": {}}')


def test_a_checkpoint_with_missing_weights_is_refused(tmp_path, tok):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "m"
    build_model("qwen3").save_pretrained(folder)
    tok.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ws.WsError, match="lacks 1 of its weights"):
        ws.load_model(str(folder))


@pytest.mark.parametrize(("device", "dtype"), [("cuda:77", "auto"), ("abacus", "auto"), ("cpu", "float99")])
def test_impossible_devices_and_dtypes_are_explained(device, dtype):
    with pytest.raises(ws.WsError):
        ws.load_model("tiny-random", device=device, dtype=dtype)


@pytest.mark.parametrize(
    ("spec", "count", "want"),
    [
        ("0.3:0.8", 28, range(8, 22)),
        ("0.3:0.8", 4, (1, 2)),
        ("all", 3, (0, 1, 2)),
        ("1:3", 4, (1, 2)),
        ("2,0", 4, (2, 0)),
        (":0.5", 4, (0, 1)),
        ([3], 4, (3,)),
    ],
)
def test_layer_specs(spec, count, want):
    assert parse_layers(spec, count) == tuple(want)


@pytest.mark.parametrize("spec", ["0.8:0.3", "9", "-1", "a:b", "", "0.0:0.01", "1.0:2.0", "3:1"])
def test_bad_layer_specs_say_what_is_understood(spec):
    with pytest.raises(ws.WsError, match="layers"):
        parse_layers(spec, 4)


def test_blocks_of_a_vision_tower_are_no_decoder_layers():
    """Texts never pass them, so that an adapter there would only be counted, stored and waited for."""
    size = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    text = Gemma3TextConfig(**size, num_hidden_layers=4, num_key_value_heads=1, head_dim=16, vocab_size=64)
    vision = SiglipVisionConfig(**size, num_hidden_layers=6, image_size=28, patch_size=14)
    with torch.device("meta"):
        config = Gemma3Config(text_config=text.to_dict(), vision_config=vision.to_dict(), mm_tokens_per_image=4)
        model = AutoModelForCausalLM.from_config(config)
    assert any(".layers.1." in name for name, _ in model.named_modules() if "vision" in name)
    names = target_modules(model, "0.3:0.8")
    assert len(names) == 2 * 7
    assert not [name for name in names if "vision" in name]
    with pytest.raises(ws.WsError, match="fc1"):
        target_modules(model, "all", ["fc1"])


def test_target_modules_are_the_seven_kinds_inside_the_layers(qwen3):
    names = target_modules(qwen3, "0.3:0.8")
    assert {layer_of(n) for n in names} == {1}
    assert len(names) == 7
    assert target_modules(qwen3, "all", ["q_proj"]) == [f"model.layers.{i}.self_attn.q_proj" for i in range(3)]
    with pytest.raises(ws.WsError, match="Did you mean 'q_proj'"):
        target_modules(qwen3, "all", ["q_prj"])


def test_modules_of_gpt2_count_as_linear_with_their_own_orientation():
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=50))
    assert len(target_modules(model)) == 4
    up = model.transformer.h[0].mlp.c_fc
    assert linear_size(up) == (64, 16)
    assert tuple(weight_of(up).shape) == (64, 16)
    assert module_kind(model.transformer.wpe) == "embedding"
    assert weight_size(model.transformer.ln_f) == (16, 1)
    assert weight_size(model.transformer.h[0].attn) is None


def test_fused_experts_are_refused_by_name_unless_kinds_are_named():
    from transformers import AutoModelForCausalLM, MixtralConfig

    config = MixtralConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ws.WsError, match=r"fused \(model\.layers\.0\.mlp\.experts.*`modules`: k_proj, o_proj"):
        target_modules(model)
    assert target_modules(model, kinds=["q_proj", "o_proj"]) == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.o_proj",
    ]


def test_the_bytes_of_tokens_are_the_text():
    """Also where a character is several tokens: of a byte-level vocabulary, and of one that falls back to bytes."""
    _, tok = ws.load_model("pocket", device="cpu")
    text = "Ice \u2014 caf\u00e9 \U0001f9ca is\n\tcold<|im_end|>"
    raw = token_bytes(tok)
    assert b"".join(map(raw, encode_text(tok, text))).decode() == text
    assert raw(10**6) == b""
    characters = ["\u2581", "\u2581i", "i", "c", "e", *(f"<0x{byte:02X}>" for byte in range(256)), "<s>"]
    model = models.BPE({piece: n for n, piece in enumerate(characters)}, [("\u2581", "i")], byte_fallback=True)
    pieces = Backend(model)
    pieces.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    pieces.add_special_tokens(["<s>"])
    other = PreTrainedTokenizerFast(tokenizer_object=pieces)
    raw = token_bytes(other)
    assert b"".join(map(raw, other("ice \U0001f9cae<s>")["input_ids"])).decode() == " ice \U0001f9cae<s>"
