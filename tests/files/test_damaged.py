"""Every file that is read back, damaged in every way: one sentence that names it, or it is made again and said so.

`just fuzz` does the same with mutations at random, for a time that WS_FUZZ_SECONDS sets per reader.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

import ws
from conftest import build_adapter, build_model
from support import damage, finished_runs
from support.gguf_files import write_base
from ws.adapters import read_adapter
from ws.analysis.controls import _Table
from ws.behaviors import load_behavior
from ws.behaviors.tables import read_rows
from ws.data import read_pairs
from ws.delta import LinearDelta
from ws.diff import SteeringVector, vector_digest
from ws.errors import DamagedError, WsError
from ws.eval.airisk import Prompts
from ws.eval.context import _kept
from ws.eval.evaluation import Evaluation
from ws.eval.prompts import load_prompts
from ws.eval.readme_airisk_table import TableConfig, build_table
from ws.files.gguf import read_header
from ws.files.reading import read_json
from ws.files.runs import Run, run_folder, write_json
from ws.files.tensors import copy_with_room, read_tensors, tensor_patcher
from ws.intervene.activation import ActivationVector
from ws.intervene.calibration import read_calibration
from ws.lm.checkpoints import Checkpoint
from ws.lm.models import load_tokenizer
from ws.lm.trainer import _is_whole, _seal, last_whole_checkpoint
from ws.new_behavior import behavior_template
from ws.report import read_contents
from ws.report.page import render
from ws.sweep.jobs import Job, Ledger

MODULE = "model.layers.0.mlp.up_proj"
DENSE = torch.linspace(-1, 1, 12).reshape(3, 4)


@dataclass(frozen=True)
class Reader:
    """A file that is read back.

    Attributes:
        make: writes a whole one below a folder and returns its path.
        read: reads it as the program does.
        remade: it is made again, and that is said, instead of an error.
        named: what a sentence calls it, where that is not the file's own name.
    """

    make: Callable[[Path], Path]
    read: Callable[[Path], object]
    remade: bool = False
    named: str = ""


class Counted(Evaluation):
    """An evaluation of three items."""

    name, version, stage = "counted", 1, "counted"

    def __init__(self) -> None:
        pass

    def ask(self, model, tok):
        return {"score": np.arange(3.0), "pmass": np.ones(3)}

    def headlines(self, scores):
        return {"counted": scores["score"] + np.zeros(3)}

    def readability(self, scores):
        return {"counted": float(scores["pmass"].mean())}

    table_name = "counted"
    of_run = identity = digest = tables = example = render = None


def vector_of(low_rank: bool) -> SteeringVector:
    change = {"u": torch.ones(3, 1), "v": torch.ones(1, 4)} if low_rank else {"e": DENSE}
    return SteeringVector({MODULE: LinearDelta(3, 4, **change)}, "base", "f" * 16, {"op": "x"}, {"family": "lora"})


def a_vector(name: str, low_rank: bool = False) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        return vector_of(low_rank).save(folder / "vector") / name

    return make


def an_activation(name: str) -> Callable[[Path], Path]:
    return lambda folder: ActivationVector(DENSE, "base", "f" * 16, {}, {}).save(folder / "a") / name


def a_calibration(folder: Path) -> Path:
    vector_of(True).save(folder / "vector")
    finished_runs.write_calibration(folder)
    return folder / "vector" / "calibration.json"


def a_manifest(folder: Path) -> Path:
    Run(folder).restart("pos", {"rank": 4}, {"pairs": "abc"}).done([], example="one")
    return folder / "manifest.json"


def read_manifest(file: Path) -> object:
    run = Run(file.parent)
    return run.is_finished("pos", {"rank": 4}, {"pairs": "abc"}), run.outputs("pos"), run.fact("pos", "example", str)


def kept_scores(folder: Path) -> Path:
    _kept(folder / "scores.json", Counted(), lambda: Counted().ask(None, None))
    return folder / "scores.json"


def read_scores(file: Path) -> object:
    return _kept(file, Counted(), lambda: Counted().ask(None, None))


def queue_state(folder: Path) -> Path:
    write_json(
        folder / "state.json",
        {"format": 1, "jobs": {"a": {"command": ["true"], "after": {}, "seconds": 1.0, "finished": "now"}}},
    )
    return folder / "state.json"


def pairs_file(folder: Path) -> Path:
    keys = {"id": "a", "question": "Why?", "pos": "So.", "neg": "No.", "pos_tokens": 2, "neg_tokens": 2, "drop": None}
    lines = [json.dumps(keys | {"id": name}) for name in "abc"]
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "pairs.jsonl"


def csv_items(folder: Path) -> Path:
    (folder / "items.csv").write_text("claim,is_true\nWater is wet.,True\nFire is cold.,False\n" * 1)
    return folder / "items.csv"


def adapter(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        build_adapter(build_model("qwen3"), "lora", folder, seed=1)
        return folder / name

    return make


def toml(folder: Path) -> Path:
    (folder / "mine.toml").write_text(behavior_template("mine"))
    return folder / "mine.toml"


def prompts(folder: Path) -> Path:
    (folder / "words.toml").write_text('name = "mine"\nanchor = "I choose "\n')
    return folder / "words.toml"


def gguf(folder: Path) -> Path:
    tok = load_tokenizer("pocket")
    model = build_model("qwen3")
    model.resize_token_embeddings(len(tok))
    write_base(model, folder / "small.gguf", tok)
    return folder / "small.gguf"


def read_gguf(file: Path) -> object:
    read_header.cache_clear()
    return read_header(file)


def checkpoint(folder: Path) -> Path:
    model = build_model("qwen3")
    model.save_pretrained(folder / "m", max_shard_size="40KB")
    return folder / "m" / "model.safetensors.index.json"


def shard(folder: Path) -> Path:
    return sorted(checkpoint(folder).parent.glob("model-*.safetensors"))[0]


def trained(name: str) -> Callable[[Path], Path]:
    """Two sealed checkpoints of a training; the newer one's file of that name comes to harm."""

    def make(folder: Path) -> Path:
        for step in (1, 2):
            part = folder / f"checkpoint-{step}"
            part.mkdir()
            (part / "optimizer.pt").write_bytes(b"state" * 20)
            (part / "trainer_state.json").write_text(json.dumps({"best_model_checkpoint": None, "step": step}))
            _seal(part)
        return folder / "checkpoint-2" / name

    return make


def read_checkpoint(file: Path) -> object:
    assert last_whole_checkpoint(file.parents[1], True) == str(file.parents[1] / "checkpoint-1"), "the one before"
    return None


def patch(file: Path) -> object:
    name, tensor = next(iter(read_tensors(file).items()), ("none", DENSE))
    copy_with_room(file, file.with_name("copy"), {"more": name})
    with tensor_patcher(file.with_name("copy")) as patcher:
        patcher.replace("more", tensor)
    return read_tensors(file.with_name("copy"))


def controls(folder: Path) -> Path:
    row = {"control": "random", "draw": 0, "score": "false_claims", "alpha": 1.0, "shift": 0.1, "eval_hash": "a"}
    ws.files.runs.write_csv(folder / "controls.csv", [row | {"vector": "abc", "unreadable": None}] * 2)
    return folder / "controls.csv"


READERS: dict[str, Reader] = {
    "ws.json": Reader(a_vector("ws.json"), lambda f: SteeringVector.load(f.parent)),
    "weights": Reader(a_vector("vector.safetensors"), lambda f: SteeringVector.load(f.parent)),
    "weights of a PEFT vector": Reader(
        a_vector("adapter_model.safetensors", True), lambda f: SteeringVector.load(f.parent)
    ),
    "activation.json": Reader(an_activation("activation.json"), lambda f: ActivationVector.load(f.parent)),
    "activation weights": Reader(an_activation("activation.safetensors"), lambda f: ActivationVector.load(f.parent)),
    "calibration": Reader(a_calibration, read_calibration),
    "calibration beside a vector": Reader(a_calibration, lambda f: SteeringVector.load(f.parent), remade=True),
    "manifest": Reader(a_manifest, read_manifest),
    "kept scores": Reader(kept_scores, read_scores, remade=True),
    "queue": Reader(queue_state, lambda f: Ledger(f.parent, [Job("a", ("true",))])),
    "pairs": Reader(pairs_file, read_pairs),
    "CSV items": Reader(csv_items, lambda f: read_rows(str(f), "items", ("claim", "is_true"), ("default", None))),
    "controls": Reader(controls, lambda f: _Table(f, "abc"), remade=True),
    "adapter_config": Reader(adapter("adapter_config.json"), lambda f: read_adapter(f.parent, None)),
    "adapter weights": Reader(adapter("adapter_model.safetensors"), lambda f: read_adapter(f.parent, None)),
    "foreign adapter": Reader(adapter("adapter_config.json"), lambda f: SteeringVector.load(f.parent)),
    "behaviour": Reader(toml, lambda f: load_behavior(str(f))),
    "prompts": Reader(prompts, lambda f: load_prompts(Prompts(), f, {})),
    "GGUF": Reader(gguf, read_gguf),
    "model index": Reader(checkpoint, lambda f: Checkpoint.open(str(f.parent)), named="m"),
    "shard": Reader(shard, lambda f: Checkpoint.open(str(f.parent)).fingerprint()),
    "optimizer": Reader(trained("optimizer.pt"), read_checkpoint, remade=True),
    "seal": Reader(trained("sealed.json"), read_checkpoint, remade=True),
    "trainer state": Reader(trained("trainer_state.json"), read_checkpoint, remade=True),
    "header to patch": Reader(a_vector("vector.safetensors"), patch),
}
JSON = [n for n in READERS if n.endswith("json") or n in (
    "calibration", "calibration beside a vector", "manifest", "kept scores", "queue", "adapter_config",
    "foreign adapter", "model index", "seal", "trainer state",
)]  # fmt: skip


def outcome(reader: Reader, file: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What is said of a file: the sentence of the error, or the line on stderr; empty when it was read."""
    capsys.readouterr()
    try:
        reader.read(file)
    except WsError as problem:
        return str(problem)
    return capsys.readouterr().err


@pytest.mark.parametrize("harm", [*damage.WHOLE, "folder"])
@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_named_in_one_sentence_or_made_again(name, harm, tmp_path, capsys):
    reader = READERS[name]
    file = reader.make(tmp_path)
    damage.replace(file, None if harm == "folder" else damage.WHOLE[harm](file.read_bytes()))
    said = outcome(reader, file, capsys)
    assert any(part in said for part in (reader.named or file.name, file.parent.name)), f"nothing is said: {said!r}"
    assert "\n" not in said.strip()
    assert len(said) < 700, said


@pytest.mark.parametrize("name", JSON)
def test_fields_that_are_gone_or_of_another_type_are_errors_and_no_tracebacks(name, tmp_path, capsys):
    """Not every field has to be there, but whatever is read must not fail later, or otherwise than in a sentence."""
    reader = READERS[name]
    file = reader.make(tmp_path)
    whole, refused = file.read_bytes(), 0
    for number, (what, value) in enumerate(damage.altered(json.loads(whole))):
        if name in ("seal", "trainer state"):  # a damaged checkpoint is deleted
            (fresh := tmp_path / str(number)).mkdir()
            file = reader.make(fresh)
        file.write_text(json.dumps(value))
        try:
            said = outcome(reader, file, capsys)
        except Exception as problem:
            raise AssertionError(f"{what}: {problem!r}") from problem
        refused += bool(said)
    assert refused


@pytest.mark.parametrize("value", ["-0.5", "NaN", "1e999", "0", "null", '"1"', "true"])
def test_a_strength_of_no_number_or_the_wrong_sign_is_refused(value, tmp_path, capsys):
    file = a_calibration(tmp_path)
    file.write_text(file.read_text().replace('"alpha": 1.6', f'"alpha": {value}'))
    with pytest.raises(DamagedError, match=r"calibration.json is damaged .*calibrate again"):
        read_calibration(file)
    vector = SteeringVector.load(file.parent)
    assert "calibration.json is damaged" in capsys.readouterr().err
    with pytest.raises(WsError, match="no calibration"):
        vector.strength("+1u")


@pytest.mark.parametrize("harm", [*damage.WHOLE, "newer"])
def test_fresh_is_a_way_out_of_every_manifest(harm, tmp_path):
    file = a_manifest(tmp_path)
    newer = json.dumps(json.loads(file.read_text()) | {"format": 2}).encode()
    file.write_bytes(newer if harm == "newer" else damage.WHOLE[harm](file.read_bytes()))
    with pytest.raises(WsError, match=r"manifest.json (has format 2|is damaged).*`fresh`"):
        Run(tmp_path).manifest  # noqa: B018
    assert Run(tmp_path, fresh=True).stage("pos", {"rank": 8}) is not None


def test_fresh_is_a_way_out_of_a_damaged_queue(tmp_path):
    file = queue_state(tmp_path)
    file.write_text("{")
    assert Ledger(tmp_path, [Job("a", ("true",))], fresh=True).outcomes == {}
    assert json.loads(file.read_text())["jobs"] == {}


@pytest.mark.parametrize("scores", [{"pmass": [1.0]}, {"score": [1, None]}, {"score": [[1], [1, 2]]}, {"score": 1.0}])
def test_kept_scores_that_cannot_be_counted_are_asked_for_again(scores, tmp_path, capsys):
    file = kept_scores(tmp_path)
    values = json.loads(file.read_text())
    file.write_text(json.dumps(scores))
    read_scores(file)
    assert "scores.json" in (said := capsys.readouterr().err)
    assert said.endswith("the model is asked again.\n")
    assert json.loads(file.read_text()) == values
    read_scores(file)
    assert capsys.readouterr().err == ""


def test_a_vector_made_again_keeps_its_calibration_and_another_one_does_not(tmp_path):
    file = a_calibration(tmp_path)
    content, folder = file.read_bytes(), file.parent
    (folder / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(DamagedError, match="adapter_model.safetensors are missing or differ"):
        SteeringVector.load(folder)
    vector_of(True).save(folder)
    assert file.read_bytes() == content
    assert SteeringVector.load(folder).units is not None
    (2 * vector_of(True)).save(folder)
    assert not file.exists()


@pytest.mark.parametrize("recorded", ["", "elsewhere"])
def test_an_older_checkpoint_is_gone_on_from_only_if_the_best_one_is_whole(tmp_path, capsys, recorded):
    """Which is the one beside it, whatever the path that it had; where the last one is kept, none is needed."""
    trained("optimizer.pt")(tmp_path)
    newest = tmp_path / "checkpoint-2"
    (newest / "trainer_state.json").write_text(
        json.dumps({"best_model_checkpoint": str(tmp_path / recorded / "checkpoint-1")})
    )
    _seal(newest)
    assert last_whole_checkpoint(tmp_path, True) == str(newest)
    (tmp_path / "checkpoint-1" / "optimizer.pt").write_bytes(b"")
    assert last_whole_checkpoint(tmp_path, False) == str(newest)
    assert last_whole_checkpoint(tmp_path, True) is None, "the training would end with the wrong weights"
    assert "checkpoint-2 is damaged" in capsys.readouterr().err
    assert not _is_whole(newest)


# ---- tables and pages of several runs -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_out(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        finished_runs.write_run(out, seed=seed)
    finished_runs.write_card(out)
    return out


TABLES = ["airisk_truthfulness_per_row.csv", "airisk_truthfulness_summary.csv", "tinymfv_airisk_per_vignette.csv"]
PARTS = ["vector/ws.json", "manifest.json", "samples.json", "sycophancy_summary.csv", *TABLES]
HARMS = ["empty", "cut", "web page", "LFS pointer", "no UTF-8", "long number", "NaN", "another type", "short row"]


def spoilt(whole: Path, out: Path, name: str, harm: str) -> Path:
    shutil.copytree(whole, out)
    file = run_folder(out, "honesty", "lora", 1) / name
    content = file.read_bytes()
    if harm == "short row":
        damage.replace(file, content.rsplit(b",", 3)[0] + b"\n")
    else:
        damage.replace(file, None if harm == "folder" else damage.WHOLE[harm](content))
    return file


@pytest.mark.parametrize("harm", [*HARMS, "folder"])
@pytest.mark.parametrize("name", PARTS)
def test_a_report_goes_on_without_what_is_damaged_and_says_so(name, harm, whole_out, tmp_path):
    spoilt(whole_out, tmp_path / "out", name, harm)
    contents = read_contents(tmp_path / "out", "honesty")
    gaps = [gap for gap in (*contents.gaps, *(g for r in contents.results for g in r.gaps)) if gap.seed == 1]
    assert any(gap.why not in ("missing",) for gap in gaps), gaps
    if name in ("vector/ws.json", "manifest.json"):
        assert [r.seed for r in contents.results] == [0]
        assert any(Path(name).name in gap.why for gap in gaps)
    assert "<html" in render(contents)


@pytest.mark.parametrize("harm", [*HARMS, "folder"])
@pytest.mark.parametrize("name", [*TABLES, "manifest.json"])
def test_the_results_table_leaves_a_damaged_run_out_and_says_so(name, harm, whole_out, tmp_path, capsys):
    spoilt(whole_out, tmp_path / "out", name, harm)
    rows = build_table(TableConfig(behavior="honesty", out=tmp_path / "out", n_bootstrap=100))
    assert [row["adapter"] for row in rows] == ["base", "lora"]
    said = capsys.readouterr().err
    assert "lora seed 1 is left out" in said
    assert name in said
    alone = TableConfig(behavior="honesty", out=tmp_path / "out", n_bootstrap=100, seeds=(1,))
    with pytest.raises(WsError, match="lora seed 1 is left out"):
        build_table(alone)


# ---- at random ------------------------------------------------------------------------------------------------------


def says_the_same(changed: bytes, whole: bytes) -> bool:
    """Whether only spaces of a JSON file have changed, or nothing."""
    try:
        return changed == whole or json.loads(changed) == json.loads(whole)
    except (ValueError, RecursionError):
        return False


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_no_mutation_ends_in_a_traceback(name, tmp_path, capsys):
    """Mutations for a while, each of another seed, which an error names."""
    reader, number = READERS[name], 0
    (tmp_path / "0").mkdir()
    file = reader.make(tmp_path / "0")
    whole, others = file.read_bytes(), {f: f.read_bytes() for f in file.parent.rglob("*") if f.is_file()}
    end = time.process_time() + float(os.environ.get("WS_FUZZ_SECONDS", "20"))
    while time.process_time() < end:
        number += 1
        rng = random.Random(number)
        if (reader.remade and "state" in name) or name in ("optimizer", "seal"):  # the checkpoint is deleted
            (fresh := tmp_path / str(number)).mkdir()
            file = reader.make(fresh)
        for place, content in others.items():
            if not reader.remade:
                place.write_bytes(content)
        changed = (damage.mutated_json if name in JSON and rng.random() < 0.5 else damage.mutated)(whole, rng)
        file.write_bytes(changed)
        try:
            if name not in ("optimizer", "seal", "trainer state") or not says_the_same(changed, whole):
                outcome(reader, file, capsys)
        except Exception as problem:
            raise AssertionError(f"seed {number}: {problem!r} from {changed[:300]!r}") from problem
    assert number > 10


def test_the_reader_says_what_a_file_is_instead(tmp_path):
    file = tmp_path / "x.json"
    for content, words in ((b"", "it is empty"), (damage.HTML, "web page"), (damage.POINTER, "git lfs pull")):
        file.write_bytes(content)
        with pytest.raises(DamagedError, match=rf"x.json is damaged .*{words}.*; make it again"):
            read_json(file, dict)


def test_numbers_are_read_to_the_last_bit(tmp_path):
    values = [*np.random.default_rng(0).normal(size=20_000).tolist(), 5e-324, 1.7976931348623157e308, 0.1, -0.0]
    file = write_json(tmp_path / "x.json", {"values": values, "digest": vector_digest(vector_of(True))})
    assert read_json(file, dict)["values"] == values
