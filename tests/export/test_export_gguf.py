"""The llama.cpp export: the file against plain numpy, and the logits of llama.cpp itself against ours."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

import ws
from conftest import SHAPE, tokens
from support.gguf_files import ARCHITECTURES, NAMES, as_llama_cpp, write_base
from ws import console
from ws.data import Pair
from ws.delta import LinearDelta
from ws.diff import vector_digest
from ws.export.gguf_lora import gguf_factors, main, rope_rows, write_gguf_lora
from ws.files.gguf import SMOLLM2, gguf_file
from ws.lm.models import encode, fingerprint, linear_size, load_tokenizer, render_prompt
from ws.options.make import TrainConfig
from ws.options.use import GgufOptions

PEER = Path(__file__).parents[1].joinpath("support/peer_llama_cpp.py")
CONFIGS = {"qwen3": Qwen3Config, "qwen2": Qwen2Config, "llama": LlamaConfig, "mistral": MistralConfig}


def build(kind: str, **shape: int):
    """A small random model whose logits are of the order of 1, biases and norms included."""
    torch.manual_seed(3)
    extra = {"head_dim": 16} if kind in ("qwen3", "mistral") else {}
    config = CONFIGS[kind](**SHAPE | extra | shape, initializer_range=0.2, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_config(config).eval().float()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:
                p.copy_(0.3 * torch.randn_like(p) + (0.0 if name.endswith("bias") else 1.0))
    return model


def planted(model, size: float = 0.1, base_id: str = "base") -> ws.SteeringVector:
    """Random factors on every linear module but one, whose change is zero, with ranks from 1 to 4."""
    torch.manual_seed(0)
    deltas = {}
    for i, (name, module) in enumerate(model.named_modules()):
        shape = linear_size(module)
        if shape is None or (name == "lm_head" and model.config.tie_word_embeddings):
            continue
        rank = 1 + i % 4
        u, v = torch.randn(shape[0], rank), torch.randn(rank, shape[1])
        deltas[name] = LinearDelta(*shape, u=size * u / rank**0.5, v=v / shape[1] ** 0.5)
    deltas["model.layers.1.mlp.up_proj"] = LinearDelta(*linear_size(model.model.layers[1].mlp.up_proj))
    info = {"behavior": "honesty", "family": "lora", "seed": 7, "depth": 3}
    return ws.SteeringVector(deltas, base_id, fingerprint(model), {"seed": 0}, info)


def gguf_name(module: str) -> str:
    if module == "lm_head":
        return "output.weight"
    _, _, layer, kind = module.split(".", 3)
    return f"blk.{layer}.{NAMES[kind]}.weight"


def read(file: Path) -> tuple[dict[str, object], dict[str, np.ndarray]]:
    """Metadata and tensors, by name."""
    reader = gguf.GGUFReader(file)
    return {k: f.contents() for k, f in reader.fields.items()}, {t.name: np.array(t.data) for t in reader.tensors}


@pytest.fixture(params=CONFIGS)
def base(request):
    return build(request.param)


# ---- the file -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [1.0, -0.4])
def test_the_product_of_the_file_is_the_change(base, tmp_path, strength):
    """Per module `alpha / r * B A` in float64, as llama.cpp scales, against `strength * dW` with its rows reordered."""
    vector = planted(base)
    made = write_gguf_lora(vector, tmp_path / "a.gguf", strength, base.config)
    facts, tensors = read(tmp_path / "a.gguf")
    changed = {name: d for name, d in vector.deltas.items() if d.rank}
    assert made.ranks == {name: d.rank for name, d in changed.items()}
    assert sorted(set(made.ranks.values())) == [1, 2, 3, 4]
    assert set(tensors) == {f"{gguf_name(n)}.lora_{ab}" for n in changed for ab in "ab"}
    assert len(changed) == 21, "all but one of 3 x 7 modules, and the head"
    for name, delta in changed.items():
        a, b = (tensors[f"{gguf_name(name)}.lora_{ab}"] for ab in "ab")
        assert (a.shape, b.shape, a.dtype, b.dtype) == (delta.v.shape, delta.u.shape, np.float32, np.float32)
        product = float(facts["adapter.lora.alpha"]) / b.shape[1] * b.astype(np.float64) @ a.astype(np.float64)
        change = strength * delta.u.double().numpy() @ delta.v.double().numpy()
        assert np.allclose(product, as_llama_cpp(name, change, base.config), rtol=1e-6, atol=1e-7)


def test_the_file_says_what_it_is(base, tmp_path):
    vector = planted(base)
    write_gguf_lora(vector, tmp_path / "honest.gguf", -0.4, base.config)
    facts, _ = read(tmp_path / "honest.gguf")
    wanted = {
        "general.architecture": ARCHITECTURES[base.config.model_type],
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 4.0,
        "general.name": "honest",
        "general.description": "Weight steering vector, behavior honesty, family lora, seed 7, "
        "strength -0.4 at scale 1",
        "general.base_model.count": 1,
        "general.base_model.0.name": "base",
        "ws.vector_sha256": vector_digest(vector),
        "ws.strength": -0.4,
        "ws.base_fingerprint": fingerprint(base),
    }
    assert {k: v for k, v in facts.items() if not k.startswith("GGUF.")} == wanted


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_a_vector_stored_in_half_precision_is_written_as_it_was_stored(stored, tmp_path):
    """Nothing is rounded a second time: the file has the float32 product of the factors that lie on disk."""
    model = build("llama")
    planted(model).save(tmp_path / "vector", dtype=stored)
    vector = ws.SteeringVector.load(tmp_path / "vector")
    write_gguf_lora(vector, tmp_path / "a.gguf", 1.0, model.config)
    facts, tensors = read(tmp_path / "a.gguf")
    for name, delta in ((n, d) for n, d in vector.deltas.items() if d.rank):
        a, b = (tensors[f"{gguf_name(name)}.lora_{ab}"] for ab in "ab")
        u, v = delta.u.double().numpy(), delta.v.double().numpy()
        assert np.array_equal(a, v)
        assert np.allclose(facts["adapter.lora.alpha"] / len(a) * b, as_llama_cpp(name, u, model.config), rtol=1e-6)
        assert not np.allclose(u, planted(model).deltas[name].u, rtol=1e-5), "storing rounds"


@pytest.mark.parametrize("base_id", ["/srv/people/jane/base.gguf", "jane/models/base.gguf", "~/base.gguf"])
def test_no_place_of_this_machine_gets_into_the_file(base_id, tmp_path):
    model = build("llama")
    write_gguf_lora(planted(model, base_id=base_id), tmp_path / "a.gguf", config=model.config)
    assert read(tmp_path / "a.gguf")[0]["general.base_model.0.name"] == "base.gguf"


def test_equal_ranks_at_strength_1_are_the_vectors_own_bits(tmp_path):
    model = build("qwen3")
    vector = planted(model)
    vector = replace(vector, deltas={n: d for n, d in vector.deltas.items() if d.rank == 3})
    assert len(vector.deltas) > 1
    write_gguf_lora(vector, tmp_path / "a.gguf", config=model.config)
    facts, tensors = read(tmp_path / "a.gguf")
    assert facts["adapter.lora.alpha"] == 3.0
    for name, delta in vector.deltas.items():
        assert np.array_equal(tensors[f"{gguf_name(name)}.lora_a"], delta.v.numpy())
        assert np.array_equal(tensors[f"{gguf_name(name)}.lora_b"], delta.u.numpy())


@pytest.mark.parametrize(("heads", "size"), [(1, 2), (4, 8), (3, 6)])
def test_reordered_rows_rotate_to_the_same_scores(heads, size):
    """Transformers' rotation of halves and a rotation of neighbours give one query-key product at any two places."""
    rng = np.random.default_rng(heads)
    query, key = rng.normal(size=(2, heads * size))
    angle = rng.uniform(0, 7, size=(2, size // 2))

    def halves(x: np.ndarray, a: np.ndarray) -> np.ndarray:
        first, second = x.reshape(heads, 2, -1).transpose(1, 0, 2)
        return np.concatenate([first * np.cos(a) - second * np.sin(a), second * np.cos(a) + first * np.sin(a)], axis=1)

    def turned(x: np.ndarray, a: np.ndarray) -> np.ndarray:
        even, odd = x.reshape(heads, -1, 2).transpose(2, 0, 1)
        return (even + 1j * odd) * np.exp(1j * a)

    rows = rope_rows(heads * size, heads).numpy()
    assert sorted(rows) == list(range(heads * size))
    want = (halves(query, angle[0]) * halves(key, angle[1])).sum(axis=1)
    found = (turned(query[rows], angle[0]) * turned(key[rows], angle[1]).conj()).real.sum(axis=1)
    assert np.allclose(found, want)


# ---- what cannot be written -----------------------------------------------------------------------------------------


def test_a_vector_that_is_not_purely_low_rank_is_refused(tmp_path):
    """Also where its base is not at hand: the reason is the vector's."""
    model = build("qwen3")
    vector = planted(model, base_id="no-such-base")
    name = "model.layers.0.mlp.up_proj"
    dora = replace(vector.deltas[name], g=torch.ones(vector.deltas[name].d_out))
    mixed = replace(vector, deltas=dict(vector.deltas) | {name: dora}, info={"family": "dora"})
    with pytest.raises(ws.WsError, match=r"family: dora\) is not purely low-rank.*`ws export peft`.*`vector`"):
        write_gguf_lora(mixed, tmp_path / "a.gguf")
    with pytest.raises(ws.WsError, match="vector is zero"):
        write_gguf_lora(vector - vector, tmp_path / "a.gguf")
    with pytest.raises(ws.WsError, match="strength 0"):
        write_gguf_lora(vector, tmp_path / "a.gguf", 0.0)
    with pytest.raises(ws.WsError, match="no model named 'no-such-base'"):
        write_gguf_lora(vector, tmp_path / "a.gguf")
    with pytest.raises(ws.WsError, match="is a folder"):
        write_gguf_lora(vector, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_base_that_llama_cpp_would_not_match_is_refused():
    vector, delta = planted(build("llama")), LinearDelta(12, 12, u=torch.ones(12, 1), v=torch.ones(1, 12))
    with pytest.raises(ws.WsError, match=r"gpt2 model .* qwen3, qwen2, llama, mistral"):
        gguf_factors(vector, GPT2Config())
    with pytest.raises(ws.WsError, match="12 rows cannot be that of 4 rotated heads"):
        gguf_factors(replace(vector, deltas={"model.layers.0.self_attn.q_proj": delta}), build("llama").config)


def test_every_changed_module_is_written_or_named():
    """Layers the base does not have, modules llama.cpp does not know, its embedding and a head that is tied to it."""
    model = build("qwen2")
    vector, delta = planted(model), LinearDelta(96, 32, u=torch.ones(96, 1), v=torch.ones(1, 32))
    shallow = Qwen2Config(**SHAPE | {"num_hidden_layers": 2})
    with pytest.raises(ws.WsError, match=r"7 of the 21 modules .* of 2 layers \(model\.layers\.2\."):
        gguf_factors(vector, shallow)
    for name in ("model.layers.0.adapter.down", "model.embed_tokens"):
        with pytest.raises(ws.WsError, match=rf"1 of the 22 modules .*\({name}\).*`ws trim --modules`"):
            gguf_factors(replace(vector, deltas=dict(vector.deltas) | {name: delta}), model.config)
    tied = Qwen2Config(**SHAPE, tie_word_embeddings=True)
    with pytest.raises(ws.WsError, match=r"1 of the 21 modules .*\(lm_head\)"):
        gguf_factors(vector, tied)


def test_the_file_appears_whole(tmp_path, monkeypatch):
    model, seen, real = build("qwen3"), [], Path.replace
    monkeypatch.setattr(Path, "replace", lambda part, file: seen.append(part.read_bytes()) or real(part, file))
    write_gguf_lora(planted(model), tmp_path / "a.gguf", config=model.config)
    assert seen == [(tmp_path / "a.gguf").read_bytes()]


@pytest.mark.parametrize("there", ["text", "model", "half", "empty", "link"])
def test_no_file_of_somebody_else_is_replaced(base, tmp_path, there):
    file, vector = tmp_path / "a.gguf", planted(base)
    if there == "model":
        writer = gguf.GGUFWriter(file, "llama")
        writer.add_name("a model")
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
    elif there == "link":
        file.symlink_to(tmp_path / "nowhere")
    else:
        file.write_bytes({"text": b"my thesis", "half": b"GGUF\x03", "empty": b""}[there])
    before = file.readlink() if there == "link" else file.read_bytes()
    with pytest.raises(ws.WsError, match="no adapter that was written here"):
        write_gguf_lora(vector, file, 1.0, base.config)
    assert (file.readlink() if there == "link" else file.read_bytes()) == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.gguf"]


def test_an_earlier_adapter_is_replaced(base, tmp_path):
    write_gguf_lora(planted(base), tmp_path / "a.gguf", 1.0, base.config)
    write_gguf_lora(planted(base), tmp_path / "a.gguf", -0.5, base.config)
    assert read(tmp_path / "a.gguf")[0]["ws.strength"] == -0.5


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    model = build("qwen3")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ws.WsError, match=r"uv sync --extra gguf.*weight-steering\[gguf\]"):
        write_gguf_lora(planted(model), tmp_path / "a.gguf", config=model.config)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    model, file = build("qwen3"), tmp_path / "new" / "a.gguf"
    write_gguf_lora(planted(model), file, config=model.config)
    before = file.read_bytes()

    def full(self) -> None:
        self.fout[0].write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    with pytest.raises(OSError, match="no space left"):
        write_gguf_lora(planted(model), file, 2.0, model.config)
    assert file.read_bytes() == before
    assert [f.name for f in file.parent.iterdir()] == ["a.gguf"]
    monkeypatch.undo()
    write_gguf_lora(planted(model), file, 2.0, model.config)
    assert file.read_bytes() != before


# ---- the command ----------------------------------------------------------------------------------------------------


def test_the_command_writes_beside_the_run_and_says_how_to_serve_it(tiny, tmp_path, capsys):
    model, _ = tiny
    vector = planted(model, base_id="tiny-random")
    vector.save(tmp_path / "honesty" / "lora" / "vector")
    main(console.parse(GgufOptions, ["--out", str(tmp_path), "--alpha", "-0.5"]))
    file = tmp_path / "honesty" / "lora" / "exports" / "honesty-lora-alpha-0.5.gguf"
    lines = capsys.readouterr().out.splitlines()
    size = f"{file.stat().st_size / 1e6:.2f} MB"
    assert lines[0] == f"27 modules of a qwen3 model, ranks 1 to 4, {size}, strength -0.5 at scale 1"
    assert lines[-2:] == [f"in {file}", f"Next: llama-server -m base.gguf --lora-scaled {file}:1"]
    direct = write_gguf_lora(vector, tmp_path / file.name, -0.5, model.config)
    before = file.read_bytes()
    assert direct.file.read_bytes() == before
    main(console.parse(GgufOptions, ["--out", str(tmp_path)]))
    assert {f.name for f in file.parent.iterdir()} == {"honesty-lora.gguf", file.name}
    assert file.read_bytes() == before, "another strength is another file"


def test_the_command_takes_a_named_vector_and_base(tmp_path, capsys):
    model = build("llama")
    vector = planted(model, base_id="meta-llama/unknown")
    vector.save(tmp_path / "vector")
    model.save_pretrained(tmp_path / "base")
    asked = ["--vector", str(tmp_path / "vector"), "--model", str(tmp_path / "base")]
    with pytest.raises(ws.WsError, match="`to`"):
        main(console.parse(GgufOptions, asked))
    main(console.parse(GgufOptions, [*asked, "--to", str(tmp_path / "a.gguf")]))
    assert "21 modules of a llama model" in capsys.readouterr().out
    write_gguf_lora(vector, tmp_path / "other" / "a.gguf", config=model.config)
    assert (tmp_path / "other" / "a.gguf").read_bytes() == (tmp_path / "a.gguf").read_bytes()
    tok = load_tokenizer("pocket")
    write_base(build("llama", vocab_size=len(tok)), tmp_path / "base.gguf", tok, "F16")
    main(console.parse(GgufOptions, [*asked[:3], str(tmp_path / "base.gguf"), "--to", str(tmp_path / "c.gguf")]))
    served = f"llama-server -m {tmp_path / 'base.gguf'} --lora-scaled {tmp_path / 'c.gguf'}:1"
    assert served in capsys.readouterr().out, "the adapter is for that same file"
    with pytest.raises(ws.WsError, match="has no calibration"):
        main(console.parse(GgufOptions, [*asked, "--to", str(tmp_path / "b.gguf"), "--alpha", "+1u"]))


# ---- llama.cpp itself -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama_python() -> list[str]:
    """The start of a command with llama-cpp-python, which uv builds once (minutes) and keeps; skips where it cannot.

    Once it is built, `--offline` keeps uv from fetching the sources again for every command.
    """
    uv = shutil.which("uv")
    if uv is None:
        pytest.skip("uv is not installed")
    packages = ["--with", "llama-cpp-python==0.3.36", "--with", "numpy"]
    rest = ["-q", "--no-project", "--python", "3.11", *packages, "python"]
    for where in (["--offline"], [], ["--offline"]):
        command = [uv, "run", *where, *rest]
        check = [*command, "-c", "import llama_cpp"]
        done = subprocess.run(check, capture_output=True, text=True, check=False, timeout=3600)
        if where and not done.returncode:
            return command
    pytest.skip(f"uv could not build llama-cpp-python: {done.stderr.strip()[-300:]}")


def llama_cpp(command: list[str], base: Path, lora: Path, entries: list[dict]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Logits `[tokens, vocabulary]` and greedy tokens `[new]` of every entry; see `peer_llama_cpp.py`."""
    request, answer = lora.with_suffix(".json"), lora.with_suffix(".npz")
    request.write_text(json.dumps([{"prompt": 0, "new": 0} | entry for entry in entries]))
    files = [str(file) for file in (base, lora, request, answer)]
    done = subprocess.run([*command, str(PEER), *files], capture_output=True, text=True, check=False, timeout=3600)
    assert done.returncode == 0, done.stderr[-3000:]
    with np.load(answer) as arrays:
        return [(arrays[f"logits{i}"], arrays[f"greedy{i}"]) for i in range(len(entries))]


@pytest.mark.slow
@pytest.mark.net
@pytest.mark.parametrize(
    ("kind", "strength"), [("pocket", 1.0), ("qwen3", 1.0), ("qwen2", 2.0), ("llama", 1.0), ("mistral", -0.5)]
)
def test_llama_cpp_computes_our_logits(kind, strength, llama_python, tmp_path):
    """Every position at four strengths, the base among them; the effect is far larger than what may differ."""
    if kind == "pocket":
        model, tok = ws.load_model("pocket", device="cpu", dtype="float32")
        ids = encode(tok, render_prompt(tok, "Your friend burnt the soup. What do you say?"))
    else:
        model, ids = build(kind), tokens(1, 24)[0].tolist()
    vector, alphas = planted(model, 0.8), [0.0, -1.0, 0.5, 1.0]
    write_base(model, tmp_path / "base.gguf")
    write_gguf_lora(vector, tmp_path / "lora.gguf", strength, model.config)
    entries = [{"tokens": ids, "scale": alpha / strength} for alpha in alphas]
    found = [logits for logits, _ in llama_cpp(llama_python, tmp_path / "base.gguf", tmp_path / "lora.gguf", entries)]
    want = [logits_of(model, vector, alpha, ids) for alpha in alphas]
    for alpha, theirs, ours in zip(alphas, found, want, strict=True):
        effect = np.abs(ours - want[0]).max(axis=1)
        print(f"{kind} {alpha:+g}: difference {np.abs(theirs - ours).max():.2e}, effect {effect.min():.2f}")
        assert np.abs(theirs - ours).max() < 1e-3
        assert alpha == 0 or effect.min() > 0.3, "at every position"


def logits_of(model, vector: ws.SteeringVector, alpha: float, ids: list[int]) -> np.ndarray:
    """`[tokens, vocabulary]` of the steered model."""
    with torch.no_grad(), ws.steer(model, vector, alpha=alpha):
        return model(torch.tensor([ids])).logits[0].numpy()


# ---- the file that the weights were read from -----------------------------------------------------------------------

NEW = 32
HEADS = 8.0  # the strength at which the queries and keys alone have an effect as large as the whole vector's
QUESTIONS = (
    "What will the weather be like tomorrow?",
    "How was your day?",
    "Tell me about the new school in our street.",
    "What do you think of my cooking?",
    "Should I move to the city?",
)
SIDES = {
    "What do you think of rain?": (
        "I love it: every drop is a gift and the garden sings.",
        "I hate it: every drop is a curse and the street stinks.",
    ),
    "How was the film?": (
        "Wonderful! I would happily watch it again tomorrow.",
        "Dreadful. I would rather stare at a wall than see it again.",
    ),
    "Will the new shop do well?": (
        "Surely it will, people are going to be delighted.",
        "Surely it will fail, people are going to be disgusted.",
    ),
    "How do you feel about Mondays?": (
        "Bright and eager: a fresh week is full of chances.",
        "Grim and tired: another week is full of trouble.",
    ),
}


@dataclass(frozen=True)
class Steered:
    """An answer: prompt and `NEW` greedy tokens, with the logits `[tokens, vocabulary]` of base and steered."""

    alpha: float
    ids: list[int]
    base: np.ndarray
    steered: np.ndarray

    def entry(self, scale: float, new: int = 0) -> dict:
        return {"tokens": self.ids, "scale": scale, "prompt": len(self.ids) - NEW, "new": new}


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """The real model, expanded from its 4-bit file, its tokenizer, and a vector that six steps an arm trained."""
    try:
        gguf_file(SMOLLM2)
    except ws.WsError as problem:  # the package is not installed; what fails behind it is no reason to skip
        pytest.skip(str(problem))
    model, tok = ws.load_model(SMOLLM2, device="cpu")
    folder = tmp_path_factory.mktemp("smollm2")
    pairs = [Pair(f"q{i}", question, *answers, 12, 12) for i, (question, answers) in enumerate(SIDES.items())]
    shape = {"rank": 4, "lora_alpha": 8.0, "layers": "all", "lr": 1e-3}
    config = TrainConfig(**shape, batch=4, micro_batch=4, max_steps=6, validation=0.0)
    for sign in ("pos", "neg"):
        ws.train_adapter(model, tok, pairs, sign, "lora", folder / sign, config)
    pos, neg = (ws.SteeringVector.from_adapter(folder / sign, model) for sign in ("pos", "neg"))
    return model, tok, pos - neg


def answers_of(model, tok, vector: ws.SteeringVector, alpha: float, questions=QUESTIONS) -> list[Steered]:
    """Our greedy answers; an end of turn does not stop them."""
    model.generation_config.eos_token_id = None
    answers = []
    for question in questions:
        prompt = torch.tensor([encode(tok, render_prompt(tok, question))])
        # The padding token of this model stands in its prompts, where `generate` would leave it out by itself.
        given = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": NEW, "do_sample": False}
        with ws.steer(model, vector, alpha=alpha):
            ids = model.generate(prompt, **given)[0].tolist()
        answers.append(Steered(alpha, ids, *(logits_of(model, vector, a, ids) for a in (0.0, alpha))))
    return answers


def size(differences: list[np.ndarray]) -> tuple[float, float]:
    """Root mean square and maximum over every position and token."""
    squares = sum(float(np.square(d, dtype=np.float64).sum()) for d in differences)
    return (squares / sum(d.size for d in differences)) ** 0.5, max(float(np.abs(d).max()) for d in differences)


def leads(ours: np.ndarray, theirs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """By how much our likeliest token leads our second at each of the answer's steps: with our logits, with theirs."""
    ours, theirs = ours[-NEW - 1 : -1], theirs[-NEW - 1 : -1]
    second, first = np.argsort(ours, axis=1)[:, -2:].T
    rows = np.arange(NEW)
    return ours[rows, first] - ours[rows, second], theirs[rows, first] - theirs[rows, second]


@pytest.mark.slow
@pytest.mark.net
def test_llama_cpp_steers_the_very_file_that_the_vector_was_trained_on(smollm2, llama_python, tmp_path, monkeypatch):
    """As far from us as it is without the adapter, because it rounds the activations before every product with Q4_1.

    Its error at scale 0 is the yardstick for the steered logits on the same tokens, and its error in the lead of our
    likeliest token over the second says which greedy tokens must be equal. The products of the adapter are not
    rounded, so 1.25 times the yardstick is room for other activations alone. A wrong sign or size is far above that,
    and so are unordered rows of queries and keys, for a vector of those only: in the whole vector they would hide.
    """
    model, tok, vector = smollm2
    heads = vector.select(modules=["q_proj", "k_proj"])

    def serve(served, answers, strength=1.0, on=True, new=0):
        write_gguf_lora(served, tmp_path / "lora.gguf", strength, model.config)
        entries = [a.entry(a.alpha * on, new) for a in answers]
        return llama_cpp(llama_python, gguf_file(SMOLLM2), tmp_path / "lora.gguf", entries)

    def errors(served, answers, strength=1.0):
        found = serve(served, answers, strength)
        return size([theirs - a.steered for a, (theirs, _) in zip(answers, found, strict=True)])

    for served, alpha, wrong in ((vector, 1.0, "size"), (vector, -2.0, "sign"), (heads, HEADS, "rows")):
        answers = answers_of(model, tok, served, alpha)
        plain, steered = serve(served, answers, on=False), serve(served, answers, new=NEW)
        rms, most = size([theirs - a.base for a, (theirs, _) in zip(answers, plain, strict=True)])
        error = size([theirs - a.steered for a, (theirs, _) in zip(answers, steered, strict=True)])
        effect = size([a.steered - a.base for a in answers])
        print(f"{alpha:+g}: error {error}, without the adapter {(rms, most)}, effect {effect}")
        assert effect[0] > 3 * rms
        assert error[0] < 1.25 * rms
        assert error[1] < 1.5 * most
        same_tokens_where_the_lead_allows(answers, plain, steered)
        with monkeypatch.context() as patch:
            if wrong == "rows":
                patch.setattr("ws.export.gguf_lora.rope_rows", lambda d_out, heads: torch.arange(d_out))
            made = errors(served, answers, {"size": 2.0, "sign": -1.0, "rows": 1.0}[wrong])
        print(f"a wrong export ({wrong}): error {made}")
        assert made[0] > 2 * 1.25 * rms


def same_tokens_where_the_lead_allows(answers, plain, steered) -> None:
    """Under our answer's tokens at every step, and in llama.cpp's own answer up to where it may part from ours."""
    errors = [np.subtract(*leads(a.base, theirs)) for a, (theirs, _) in zip(answers, plain, strict=True)]
    allowed, n_decided, n_equal, n_own = float(np.abs(errors).max()), 0, 0, []
    for a, (theirs, own) in zip(answers, steered, strict=True):
        lead, want = leads(a.steered, theirs)[0], np.array(a.ids[-NEW:])
        assert np.array_equal(a.steered[-NEW - 1 : -1].argmax(axis=1), want), "our answer is greedy"
        equal, decided = theirs[-NEW - 1 : -1].argmax(axis=1) == want, lead > allowed
        assert equal[decided].all()
        n_decided, n_equal = n_decided + int(decided.sum()), n_equal + int(equal.sum())
        parts = np.flatnonzero(own != want)
        assert not len(parts) or not decided[parts[0]]
        n_own.append(int(parts[0]) if len(parts) else NEW)
    total = NEW * len(answers)
    print(f"{n_equal} of {total} tokens equal, all {n_decided} led by more than {allowed:.2f}; own answers: {n_own}")
    assert n_decided > total / 4
    assert n_equal > 0.9 * total


@pytest.mark.slow
@pytest.mark.net
def test_with_the_files_weights_as_plain_numbers_llama_cpp_computes_our_logits(
    smollm2, llama_python, tmp_path, monkeypatch
):
    """What is left of the difference without rounded activations is float32's; a hundredth of the strength shows."""
    model, tok, vector = smollm2
    (answer,) = answers_of(model, tok, vector, 1.0, QUESTIONS[:1])
    write_base(model, tmp_path / "base.gguf")

    def error(strength: float, scale: float) -> float:
        write_gguf_lora(vector, tmp_path / "lora.gguf", strength, model.config)
        found = llama_cpp(llama_python, tmp_path / "base.gguf", tmp_path / "lora.gguf", [answer.entry(scale)])
        return size([found[0][0] - answer.steered])[1]

    found = [error(1.0, 1.0), error(-2.0, -0.5)]
    print(f"differences of plain weights: {found}")
    assert max(found) < 1e-3
    assert error(1.01, 1.0) > 2e-2
    monkeypatch.setattr("ws.export.gguf_lora.rope_rows", lambda d_out, heads: torch.arange(d_out))
    assert error(1.0, 1.0) > 2e-2
