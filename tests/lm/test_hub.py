"""Publishing and loading through the hub's real client, against a stand-in server; and what a card says and hides."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import peft
import pytest
import torch
from huggingface_hub import ModelCard, constants
from safetensors.torch import load_file

import ws
from conftest import build_adapter, build_model, tokens
from support.stand_in_hub import GATED, READ_ONLY, TOKEN, Repository, StandInHub
from support.statements import rows as statement_rows
from ws import console
from ws.analysis.compose import Operand, Term, compose
from ws.analysis.trim import scale_depth
from ws.diff import CALIBRATION, MANIFEST, VECTOR_FILES, Units, vector_digest
from ws.eval.statements import load_statements, trait_files
from ws.export.card import describe, is_local, merged_card, public, public_command, public_name, vector_card
from ws.export.lora import main as export_peft
from ws.export.push import main
from ws.files.runs import Run, read_csv, write_csv
from ws.lm.hub import check_name, commit_of, fetch, hub_is_out_of_reach, parse_id
from ws.options.use import LoraOptions, PushOptions

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def network(monkeypatch, tmp_path):
    """The client of this process, with its own cache and a log-in, allowed to ask whatever `HF_ENDPOINT` says."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)

    def point_at(url: str) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        hub_is_out_of_reach.cache_clear()

    yield point_at
    hub_is_out_of_reach.cache_clear()
    huggingface_hub.close_session()


@pytest.fixture
def hub(network):
    with StandInHub() as server:
        network(server.url)
        yield server


CONFIG = {"rank": 4, "lr": 0.0025, "epochs": 7.0, "max_steps": 17}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A finished run below a folder `out`, of two random LoRA arms, with the manifest that training leaves."""
    out = tmp_path_factory.mktemp("made") / "out"
    folder, model, behavior = out / "honesty" / "lora", build_model("qwen3"), ws.load_behavior("honesty")
    model.config._name_or_path = model.name_or_path = "ada/base"
    arms = {}
    for seed, sign in enumerate(("pos", "neg"), start=1):
        build_adapter(model, "lora", folder / sign, seed)
        arms[sign] = ws.SteeringVector.from_adapter(folder / sign, model)
        stage = Run(folder).restart(sign, {"seed": 0})
        stage.done([folder / sign / WEIGHTS], facts={"examples": 31, "steps": 17})
    recipe = {"family": "lora", "seed": 0, "pairs_sha256": "c0ffee" * 10, "config": CONFIG}
    pos, neg = (replace(v, recipe=dict(v.recipe) | recipe | {"adapter": sign}) for sign, v in arms.items())
    vector = pos - neg
    info = dict(vector.info) | {"behavior": "honesty", "behavior_sha256": behavior.digest, "seed": 0}
    replace(vector, info=info).save(folder / "vector")
    return out


@pytest.fixture
def run(made, tmp_path) -> Path:
    """A copy of the run's folder, to change."""
    return Path(shutil.copytree(made, tmp_path / "out")) / "honesty" / "lora"


def options(run: Path, **changes) -> PushOptions:
    return PushOptions(**({"repo": "ada/honesty", "out": run.parents[1]} | changes))


def load(run: Path) -> ws.SteeringVector:
    return ws.SteeringVector.load(run / "vector")


def record(run: Path, stage: str, command: str, **inputs: str) -> None:
    """File a stage as finished, by this command line and of these inputs."""
    Run(run).restart(stage, {}, inputs).done([])
    Run(run).write(stage, Run(run).facts(stage) | {"command": command})


def claims(run: Path, subject: str, shift: float = -1.25, mass: float = 0.97) -> None:
    """A summary of held-out claims, as its evaluation writes it, of a vector with this digest."""
    rows = []
    for alpha, intervention in ((-1.0, "weight"), (0.0, "base"), (1.0, "weight"), (1.0, "prompt")):
        moved = 99.0 if intervention == "prompt" else shift * alpha
        row = {"alpha": alpha, "mean_logratio": 0.5 + moved, "ci_lo": 0.25 + moved, "ci_hi": 0.75 + moved}
        row |= {"shift": moved, "shift_ci_lo": moved - 0.125, "shift_ci_hi": moved + 0.125, "mean_pmass": mass, "n": 12}
        row |= {"claims_are_true": False, "intervention": intervention, "split": "report", "eval": "sycophancy"}
        rows.append(row | {"eval_version": 2, "eval_hash": "0123456789ab", "dataset": "/srv/sets/claims"})
    write_csv(run / "sycophancy_summary.csv", rows)
    record(run, "sycophancy", "sycophancy.py --adapter lora", weight=subject, prompt="another")


# ---- there and back -------------------------------------------------------------------------------------------------


def test_a_vector_travels_through_the_hub(run, tmp_path, network):
    """Pushed by a process that knows the hub from its environment, loaded by this one: the same bits."""
    env = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    env |= {"HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "ws.export.push", "ada/honesty", "--out", str(run.parents[1])]
    with StandInHub() as hub:
        env["HF_ENDPOINT"] = hub.url
        pushed = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert pushed.returncode == 0, pushed.stderr
        assert f"in {hub.url}/ada/honesty" in pushed.stdout
        (_, _, first), (_, _, second) = hub.repositories["ada/honesty"].commits
        assert set(second) - set(first) == {*(f.name for f in (run / "vector").iterdir()), "README.md"}
        for file in (run / "vector").iterdir():
            assert second[file.name] == file.read_bytes(), "nothing had to be taken out of these"
        network(hub.url)
        loaded = ws.SteeringVector.load("ada/honesty")
    assert vector_digest(loaded) == vector_digest(load(run))
    assert loaded.info == load(run).info


def test_a_revision_is_loaded_and_the_cache_serves_when_the_hub_is_gone(network, run, monkeypatch):
    first = load(run)
    with StandInHub() as hub:
        network(hub.url)
        main(options(run))
        old = hub.repositories["ada/honesty"].commits[-1][0]
        (2 * first).save(run / "vector")
        main(options(run, message="twice as long"))
        assert [m for _, m, _ in hub.repositories["ada/honesty"].commits][1:] == [options(run).message, "twice as long"]
        assert vector_digest(ws.SteeringVector.load("ada/honesty")) == vector_digest(2 * first)
        assert vector_digest(ws.SteeringVector.load(f"ada/honesty@{old}")) == vector_digest(first)
        assert not [r for r in hub.requests if r.startswith("GET") and "README" in r], "only the vector is fetched"
        with pytest.raises(ws.WsError, match="no revision 'v9'"):
            ws.SteeringVector.load("ada/honesty@v9")
    hub_is_out_of_reach.cache_clear()
    assert vector_digest(ws.SteeringVector.load("ada/honesty")) == vector_digest(2 * first)
    with pytest.raises(ws.WsError, match="not wholly, in the local cache"):
        ws.SteeringVector.load("ada/other")
    with pytest.raises(ws.WsError, match="could not be reached, so nothing was sent"):
        main(options(run))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # then only the attempt can show that nobody is there
    hub_is_out_of_reach.cache_clear()
    with pytest.raises(ws.WsError, match="were not sent to ada/honesty, whose content is as it was: .*refused"):
        main(options(run))


def test_peft_reads_the_published_folder(run, tmp_path):
    main(options(run, dry_run=True, to=tmp_path / "sent"))
    model = build_model("qwen3")
    with torch.no_grad():
        with ws.steer(model, load(run)):
            wanted = model(tokens()).logits
        assert torch.allclose(
            peft.PeftModel.from_pretrained(model, tmp_path / "sent")(tokens()).logits, wanted, atol=1e-4
        )


def test_a_commit_replaces_the_vector_and_nothing_else(hub, run):
    main(options(run))
    repository = hub.repositories["ada/honesty"]
    repository.commit("by hand", repository.files | {"figure.svg": b"<svg/>"})
    vector = load(run)
    scaled = {n: replace(d, g=torch.full((d.d_out,), 0.125)) for n, d in vector.deltas.items()}
    shutil.rmtree(run / "vector")
    replace(vector, deltas=scaled).save(run / "vector")
    main(options(run))
    assert set(repository.files) == {".gitattributes", "README.md", "figure.svg", MANIFEST, "vector.safetensors"}
    assert vector_digest(ws.SteeringVector.load("ada/honesty")) == vector_digest(load(run))
    before = len(repository.commits)
    main(options(run))
    assert len(repository.commits) == before, "what is there already is not committed again"


def test_a_dry_run_shows_the_card_and_asks_the_hub_nothing(hub, run, capsys):
    main(options(run, dry_run=True))
    shown = capsys.readouterr().out
    assert re.search(rf"{WEIGHTS} +{(run / 'vector' / WEIGHTS).stat().st_size:,}\n", shown)
    assert shown.split("the card:\n\n")[1].strip() == str(vector_card(described(run))).strip()
    assert not hub.requests


def test_a_private_repository_is_private(hub, run, monkeypatch):
    main(options(run, private=True))
    assert hub.repositories["ada/honesty"].private
    hub.repositories["ada/known"] = Repository()
    hub.repositories["ada/known"].commit("initial commit", {})
    with pytest.raises(ws.WsError, match="ada/known exists and is public"):
        main(options(run, repo="ada/known", private=True))
    assert not hub.repositories["ada/known"].files
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ws.WsError, match=r"no repository of this name that you may read.*hf auth login"):
        ws.SteeringVector.load("ada/honesty")


# ---- what can go wrong ----------------------------------------------------------------------------------------------


def refused(capsys, action) -> str:
    """The one sentence on stderr with which a command ends."""
    with pytest.raises(SystemExit) as stopped:
        console.guard(action)
    assert stopped.value.code == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x]
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize(
    ("token", "repo", "sentence"),
    [
        (None, "ada/honesty", "Nobody is logged in.*hf auth login.*HF_TOKEN"),
        ("hf_wrong", "ada/honesty", "does not accept your token"),
        (READ_ONLY, "ada/honesty", "may not write to ada/honesty"),
        (TOKEN, "bob/honesty", "may not write to bob/honesty"),
        (TOKEN, "honesty", "'honesty' cannot name a repository"),
        (TOKEN, "ada/honesty@v1", "cannot name a repository"),
    ],
)
def test_what_cannot_be_sent_is_refused(hub, run, monkeypatch, capsys, token, repo, sentence):
    monkeypatch.delenv("HF_TOKEN") if token is None else monkeypatch.setenv("HF_TOKEN", token)
    assert re.search(sentence, refused(capsys, lambda: main(options(run, repo=repo))))
    assert not hub.repositories


def test_a_failing_commit_leaves_the_repository_as_it_was(hub, run, monkeypatch, capsys):
    main(options(run))
    before = hub.repositories["ada/honesty"].files
    (2 * load(run)).save(run / "vector")
    monkeypatch.setattr("support.stand_in_hub.Handler.commit", lambda self, *_: self.refuse(500))
    assert "whose content is as it was" in refused(capsys, lambda: main(options(run)))
    assert hub.repositories["ada/honesty"].files == before


def test_what_cannot_be_fetched_says_why(hub, capsys):
    hub.repositories["ada/notes"] = Repository()
    hub.repositories["ada/notes"].commit("notes", {"notes.txt": b"", "pytorch_model.bin": b""})
    for name, sentence in (
        ("ada/nothing", r"no folder ada/nothing, and the hub has no repository.*hf auth login"),
        (GATED, "is gated"),
        ("ada/notes", "ada/notes on the hub holds none of the files ws.json"),
        ("nothing", "no folder nothing; give an existing one, or a repository"),
        ("./ada/nothing", "no folder ./ada/nothing; give"),
    ):
        assert re.search(sentence, refused(capsys, lambda name=name: ws.SteeringVector.load(name)))
    assert not [r for r in hub.requests if "pytorch_model.bin" in r]
    with pytest.raises(ws.WsError, match="'a--b/c' cannot name"):
        fetch("a--b/c", VECTOR_FILES)


def test_statements_are_fetched_at_their_commit_and_a_misspelt_trait_is_guessed(hub):
    rows = statement_rows("x")
    first, second = ("".join(json.dumps(r) + "\n" for r in part).encode() for part in (rows, rows[:2]))
    hub.repositories["ada/evals"] = Repository()
    old = hub.repositories["ada/evals"].commit("one", {"persona/kind.jsonl": first, "persona/rude.jsonl": first})
    new = hub.repositories["ada/evals"].commit("two", {"persona/kind.jsonl": second, "other/kin.jsonl": b""})
    for source, revision, n, commit in (
        ("ada/evals", None, 2, new),
        ("ada/evals", old, 8, old),
        (f"ada/evals@{old}", None, 8, old),
    ):
        files = trait_files(source, ["kind"], revision)
        assert len(load_statements(files)) == n
        assert commit_of(files["kind"]) == commit
    assert commit_of(Path("sets/persona/kind.jsonl")) is None
    assert not [r for r in hub.requests if r.endswith("rude.jsonl")], "only what is asked for is fetched"
    with pytest.raises(ws.WsError, match="persona/kinf.jsonl. Did you mean 'persona/kind.jsonl'"):
        trait_files("ada/evals", ["kinf"])
    with pytest.raises(ws.WsError, match="no revision 'nine'"):
        trait_files("ada/evals", ["kind"], "nine")


def test_names_of_repositories():
    assert parse_id("ada/honesty") == ("ada/honesty", None)
    assert parse_id("ada/honesty@refs/pr/1") == ("ada/honesty", "refs/pr/1")
    for name in ("honesty", "/ada/honesty", "out/honesty/lora", "~/honesty", "../honesty", "ada/", "a b/c", "ada/x..y"):
        assert parse_id(name) is None
        with pytest.raises(ws.WsError, match="user/name"):
            check_name(name)


# ---- nothing of this machine is published ---------------------------------------------------------------------------

PATHS = {
    "/srv/models/qwen": "qwen",
    "~/models/qwen": "qwen",
    "../models/qwen/": "qwen",
    "C:\\models\\qwen": "qwen",
    "file:///srv/models/qwen": "qwen",
    "data:/srv/models/qwen": "data:qwen",
    "0.5*/srv/v1 + /srv/v2*2": "0.5*v1 + v2*2",
    "see '/srv/x/y', then ~bob/z": "see 'y', then z",
}


def test_paths_are_cut_down_to_names(monkeypatch):
    for text, name in PATHS.items():
        assert public({"a": [text]}) == {"a": [name]}, text
    for text in (
        "Qwen/Qwen3-0.6B",
        "honesty*1.0 - 0.5*sycophancy",
        "https://arxiv.org/abs/2511.05408",
        "and/or",
        "1 / 2",
    ):
        assert public(text) == text
        assert public_command(f"ws compose {text}") == f"ws compose {text}"
    monkeypatch.setattr(Path, "home", lambda: Path("/srv/My Name"))
    assert public("2*/srv/My Name/v + /srv/w") == "2*v + w"
    assert public([1, None, True, 0.5]) == [1, None, True, 0.5]
    for name in ("/srv/models/my qwen", "~/my qwen", "a/b/my qwen"):
        assert is_local(name)
        assert public_name(name) == "my qwen"
    assert not is_local("Qwen/Qwen3-0.6B")


@pytest.mark.parametrize(
    ("recorded", "shown"),
    [
        ("replicate.py --model pocket --out /srv/my out --seed 1", "python -m ws.replicate --model pocket --seed 1"),
        ("ws replicate --out=/srv/x --model /srv/my models/qwen", "ws replicate --model qwen"),
        ("sycophancy.py --alphas -1 1 --out-of 3", "python -m ws.eval.sycophancy --alphas -1 1 --out-of 3"),
        ("ws monitor /srv/x/change --library ../v1 --device cpu", "ws monitor change --library v1 --device cpu"),
        ("mine.py --behavior ~/b.toml", "mine.py --behavior b.toml"),
        ("ws replicate --model '/srv/my model' --seed 1", "ws replicate --model 'my model' --seed 1"),
        ("'ws demo' --model pocket", "ws demo --model pocket"),
    ],
)
def test_commands_can_be_typed_elsewhere(recorded, shown):
    assert public_command(recorded) == shown


def test_no_path_of_this_machine_is_published(run, tmp_path, capsys):
    """A base, a recipe, tables and commands that all name folders: none of them is in any file that is sent."""
    secret = tmp_path / "secret place"
    vector = replace(load(run), base_id=str(secret / "my-base"))
    vector = replace(vector, recipe={"op": "compose", "expression": f"1*{tmp_path}/secret/v", "of": vector.recipe})
    vector.save(run / "vector")
    (run / "vector" / CALIBRATION).write_text(json.dumps({"note": f"{tmp_path}/secret/questions.txt"}))
    with pytest.raises(ws.WsError, match="damaged"):
        main(options(run, dry_run=True))
    side = {"alpha": 2.0, "converged": True}
    units = {"format": 1, "subject": vector_digest(vector), "negative": side | {"alpha": -2.0}, "positive": side}
    units |= {"note": f"{tmp_path}/secret/q.txt"}
    (run / "vector" / CALIBRATION).write_text(json.dumps(units))
    claims(run, vector_digest(vector))
    record(run, "vector", f"replicate.py --out {secret} --model {secret}/my-base --adapter lora")
    main(options(run, dry_run=True, to=tmp_path / "sent"))
    sent = {f.name: f.read_bytes() for f in (tmp_path / "sent").iterdir()}
    assert set(sent) == {*(f.name for f in (run / "vector").iterdir()), "README.md"}
    for name, content in sent.items():
        for part in ("secret", str(tmp_path), str(Path.home()) + "/", "/srv"):
            assert part.encode() not in content, (name, part)
    assert vector_digest(ws.SteeringVector.load(tmp_path / "sent")) == vector_digest(vector)
    card = sent["README.md"].decode()
    assert "`my-base`, a model that was read from a folder" in card
    assert "python -m ws.replicate --model my-base --adapter lora" in card
    assert "sycophancy 2, claims, split report" in card
    assert ModelCard(card).data.get("base_model") is None
    assert json.loads(sent["adapter_config.json"])["base_model_name_or_path"] == "my-base"
    seen = capsys.readouterr()
    assert "folder of this machine and is published as 'my-base'" in seen.err
    assert str(tmp_path / "sent" / "README.md") in seen.out


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/srv/Jane Doe/My Models/my llama", "my llama"),
        ("C:\\Users\\Jane Doe\\Documents\\v 1", "v 1"),
        ("\\\\nas\\Jane Doe\\v", "v"),
        ("\\\\?\\C:\\Users\\Jane Doe\\v", "v"),
        ("file:///srv/Jane%20Doe/v", "v"),
        ("FILE:///C:/People/Jane Doe/v", "v"),
        ("~/Jane Doe/v", "v"),
        ("~jane/x y/v", "v"),
        ("/srv/O'Jane Doe/v", "v"),
        ("/srv/Jane (work)/v", "v"),
        ("/srv/Jané Müller/張/v", "v"),
        ("路径/srv/Jane 三/v", "路径v"),
        ("sqlite:////srv/Jane Doe/x.db", "sqlite:///x.db"),
        ("'/srv/Jane Doe/w'*1.0 + honesty*-0.5", "'w'*1.0 + honesty*-0.5"),
        ("1.0*/srv/Jane Doe/w - 0.5*'~/Jane b/d'", "1.0*w - 0.5*'d'"),
        ("see /srv/Jane Doe/models/x, and 'C:\\Users\\Jane Doe\\a b'", "see x, and 'a b'"),
        ("/mnt/Jane b/c d/e --seed 1", "e --seed 1"),
        (r".*\.q_proj|layers\.\d+", r".*\.q_proj|layers\.\d+"),
        ("he/she said 3/4; s/he, w/o", "he/she said 3/4; s/he, w/o"),
    ],
)
def test_paths_of_every_kind_are_cut_down(text, shown):
    assert public(text) == shown
    assert public({text: [{"a": text}]}) == {shown: [{"a": shown}]}


@pytest.mark.parametrize(
    ("recorded", "shown"),
    [
        (
            "ws x --model '/srv/O'\"'\"'Jane/my model' --out '/srv/Jane D/out' --seed 1",
            "ws x --model 'my model' --seed 1",
        ),
        ("ws x '--out=/srv/Jane D/o' '--model=/srv/Jane D/m'", "ws x --model=m"),
        ("ws x ../v1 ../v2 b --library '/srv/Jane D/x' /a/b", "ws x v1 v2 b --library x b"),
        ("ws x --behavior /srv/O'Jane/b.toml --seed 1", "ws x --behavior b.toml --seed 1"),
        ("ws x 1\n```\n<script>", "ws x 1 ``` <script>"),
    ],
)
def test_commands_with_quotes_lose_their_folders_too(recorded, shown):
    assert public_command(recorded) == shown


HOSTILE = "<script>alert(1)</script> ```\n```\n<img src=x onerror=alert(1)> [x](javascript:alert(1)) <!-- | `<b>` \x1b"


def test_what_others_wrote_is_no_markup_on_a_card(run):
    vector = load(run)
    info = dict(vector.info) | {"behavior": HOSTILE, "family": HOSTILE}
    recipe = {"op": "compose", "expression": HOSTILE, "of": vector.recipe}
    hostile = replace(vector, info=info, recipe=recipe, base_id=f'x"); {HOSTILE}')
    record(run, "vector", f"ws compose {HOSTILE}")
    for card in (
        str(vector_card(describe(hostile, f'a/b"); {HOSTILE}', run))),
        str(merged_card(describe(hostile, HOSTILE, run), 1.0, 0.1, "bfloat16")),
    ):
        text = re.sub(r"^```(python|bash)\n.*?^```$", "", card.split("---\n", 2)[2], flags=re.DOTALL | re.MULTILINE)
        assert not re.findall(r"<[A-Za-z/!]|\]\(", text)
        assert "&lt;script>" in text
        assert not re.findall(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", card), "a terminal that shows the file would obey it"
        for code in re.findall(r"^```python\n(.*?)^```$", card, flags=re.DOTALL | re.MULTILINE):
            compile(code, "card", "exec")
            assert "alert(1)" not in re.sub(r'"(\\.|[^"\\])*"', "", code), "it stays inside the literals"


def test_what_is_kept_of_a_push_takes_no_place_of_somebody_elses(run, tmp_path):
    to = tmp_path / "sent"
    main(options(run, dry_run=True, to=to))
    (to / "notes.txt").write_text("mine")
    (2 * load(run)).save(run / "vector")
    main(options(run, dry_run=True, to=to))
    assert vector_digest(ws.SteeringVector.load(to)) == vector_digest(load(run))
    assert (to / "notes.txt").read_text() == "mine"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("mine")
    for place in (tmp_path / "mine", run / "vector"):
        before = {f: f.read_bytes() for f in place.iterdir()}
        with pytest.raises(ws.WsError, match="is not a vector with its card"):
            main(options(run, dry_run=True, to=place))
        assert {f: f.read_bytes() for f in place.iterdir()} == before


def test_a_run_that_is_named_by_its_folder_is_sent_with_its_tables(run, tmp_path):
    claims(run, vector_digest(load(run)))
    main(options(run, dry_run=True, to=tmp_path / "sent"))
    main(options(run, vector=str(run), dry_run=True, to=tmp_path / "named"))
    sent, named = ({f.name: f.read_bytes() for f in (tmp_path / to).iterdir()} for to in ("sent", "named"))
    assert sent == named
    assert b"-1.250" in named["README.md"]
    before = vector_digest(load(run))
    with pytest.raises(ws.WsError, match="is the vector itself"):
        export_peft(LoraOptions(str(run), alpha="2", to=run / "vector"))
    assert vector_digest(load(run)) == before


def test_numbers_that_modules_share_are_counted_once(run):
    vector = load(run)
    first, *_ = vector.deltas
    twice = replace(vector, deltas={**vector.deltas, "lm_head": vector.deltas[first]})
    assert f"{len(twice.deltas)} modules, largest rank {vector.max_rank}, {vector.numbers:,} numbers" in str(
        vector_card(describe(twice, "ada/honesty"))
    )
    assert vector.numbers == sum(t.numel() for t in load_file(run / "vector" / WEIGHTS).values())


def test_no_vector_is_written_beside_the_card_of_another(run, tmp_path):
    to, doubled = tmp_path / "sent", 2 * load(run)
    main(options(run, dry_run=True, to=to))
    (to / "notes.txt").write_text("mine")
    before = {f: f.read_bytes() for f in to.iterdir()}
    for write in (lambda: doubled.save(to), lambda: export_peft(LoraOptions(str(run / "vector"), alpha="2", to=to))):
        with pytest.raises(ws.WsError, match=r"sent/README.md describes the vector that is there"):
            write()
        assert {f: f.read_bytes() for f in to.iterdir()} == before
    (to / "README.md").write_text("Weight-steering, as I see it.")
    doubled.save(to)
    assert vector_digest(ws.SteeringVector.load(to)) == vector_digest(doubled)
    assert {f.name for f in to.iterdir()} == {f.name for f in before}, "what is somebody's own stays"


# ---- the card -------------------------------------------------------------------------------------------------------


def described(run: Path, vector: ws.SteeringVector | None = None):
    return describe(vector or load(run), "ada/honesty", run)


def test_a_card_calls_a_paraphrase_one_and_noisy_labels_noisy(run):
    digest = vector_digest(load(run))
    claims(run, digest)
    rows = [r | {"words": "file:mine@12345678"} for r in read_csv(run / "sycophancy_summary.csv")]
    write_csv(run / "sycophancy_summary.csv", rows)
    asked = {"value_class": "Truthfulness", "protocol": "published", "words": "paraphrase", "drawn": "4 of 9, seed 0"}
    rows = [{k.replace("mean_logratio", "mean_score"): v for k, v in r.items()} | asked for r in rows]
    plain = [{k: v for k, v in r.items() if k != "claims_are_true"} for r in rows]
    write_csv(run / "airisk_truthfulness_summary.csv", plain)
    record(run, "sycophancy", "sycophancy.py --adapter lora", weight=digest)
    record(run, "airisk_truthfulness", "airisk.py --adapter lora", weight=digest)
    card = str(vector_card(described(run)))
    assert "split report, words file:mine@12345678" in card
    assert "protocol alone, words paraphrase" in card, "what an earlier version called published"
    assert "Words: paraphrase, which is this project's and not the published text" in card
    assert "43 % correct, 40 % borderline and 17 % wrong" in card
    assert "Items: a draw of 4 of 9, seed 0 (--limit)." in card


def test_the_card_says_what_the_vector_is(run):
    card = vector_card(described(run))
    again = ModelCard(str(card))
    assert again.data.to_dict() == {
        "base_model": "ada/base",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "tags": ["weight-steering", "steering-vector", "lora", "honesty"],
    }
    text, vector, behavior = again.text, load(run), ws.load_behavior("honesty")
    assert "| vector    | pos - neg" in text
    assert vector.base_fingerprint in text
    for name, value in (("steps", "17"), ("pairs trained on", "31"), ("learning rate", "0.0025"), ("rank", "4")):
        header, _, pos, neg = next(t for t in text.split("\n\n") if "learning rate" in t).splitlines()
        column = [c.strip() for c in header.split("|")].index(name)
        assert [line.split("|")[column].strip() for line in (pos, neg)] == [value, value]
    assert "epochs" not in header, "what steps override is not said"
    assert ("c0ffee" * 10)[:16] in text
    assert f'"{behavior.positive[0]}" against "{behavior.negative[0]}"' in text
    assert behavior.summary in text
    assert 'ws.SteeringVector.load("ada/honesty")' in text
    assert 'peft.PeftModel.from_pretrained(model, "ada/honesty")' in text
    assert "Not evaluated" in text
    assert "subtracted makes a model dishonest" in text
    assert "not a safety measure" in text


MORE = "a positive `alpha` gives more of the behaviour, a negative one less"
LESS = "a positive `alpha` gives less of the behaviour, a negative one more"
NO_SIGN = "what a positive `alpha` does is known from measurements alone"


def composed(*terms: tuple[float, ws.SteeringVector]) -> ws.SteeringVector:
    return compose([Operand(Term(f"v{i}", alpha), vector, alpha) for i, (alpha, vector) in enumerate(terms)])


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (lambda v: v, MORE),
        (lambda v: 0.5 * v, MORE),
        (lambda v: -v, LESS),
        (lambda v: -2 * -v, MORE),
        (lambda v: composed((-1.0, v)), LESS),
        (lambda v: composed((0.5, v)).compress(rank=1), MORE),
        (lambda v: v.select(modules=["q_proj"]).factorised(rank=1), MORE),
        (lambda v: scale_depth(v, 0.5, 1.5), MORE),
        (lambda v: scale_depth(v, -1.0, -1.0), LESS),
        (lambda v: scale_depth(v, -1.0, 1.0), NO_SIGN),
        (lambda v: composed((1.0, v), (0.5, v)), NO_SIGN),
        (lambda v: replace(v, recipe={"op": "random_like", "seed": 1, "of": v.recipe}), NO_SIGN),
        (lambda v: replace(v, recipe={"op": "checkpoints", "pos": "a", "neg": "base"}), NO_SIGN),
        (lambda v: replace(v, recipe={"adapter": "somebodys"}), NO_SIGN),
        (lambda v: replace(v, recipe={"gradient": "of the contrast at the base"}), NO_SIGN),
        (lambda v: replace(v, info={**v.info, "control": "shuffled"}), NO_SIGN),
    ],
)
def test_a_card_says_which_sign_gives_more_only_where_the_recipe_does(run, changed, said):
    """`honesty*-1` was said to give more honesty, and one fine-tune less the base to be two fine-tunes."""
    vector = changed(load(run))
    claims(run, vector_digest(vector))
    about = described(run, vector)
    text, merged = vector_card(about).text, merged_card(about, 1.0, 0.1, "bfloat16").text
    summary, known = ws.load_behavior("honesty").summary, said != NO_SIGN
    assert [line in text for line in (MORE, LESS, NO_SIGN)] == [said == line for line in (MORE, LESS, NO_SIGN)]
    assert [part in text for part in ("fine-tuned twice", summary, "under these personas")] == [known] * 3
    assert [part in merged for part in ("fine-tuned twice", summary, "under these personas")] == [known] * 3
    assert ("# Honesty: a steering" in text) == (said == MORE)
    assert (f"means {'more' if said == MORE else 'less'} of this" in merged) == known
    assert ("expects that a positive strength will lower agreement" in text) == (said == MORE)
    assert ("expects that a positive strength will raise agreement" in text) == (said == LESS)
    assert ("is a null (shuffled)" in text) == ("is a null (shuffled)" in merged) == ("control" in vector.info)


@pytest.mark.parametrize(
    ("stage", "config"), [("control", {"control": "same-side"}), ("trim", {"adapter": "lora-same-side", "rank": 4})]
)
def test_a_null_and_its_parts_are_called_one(run, stage, config):
    """A null that says so in its run's record alone, as earlier versions left it."""
    Run(run).restart(stage, config).done([])
    text = vector_card(described(run)).text
    assert NO_SIGN in text
    assert "it is a null (same-side), trained on pairs whose sides do not differ in the behaviour" in text


def test_personas_of_another_behaviour_file_are_not_shown(run):
    vector = load(run)
    other = replace(vector, info=dict(vector.info) | {"behavior_sha256": "0" * 64})
    assert "against" not in vector_card(described(run, other)).text
    mine = replace(vector, info={"behavior": "of-my-own", "behavior_sha256": "0" * 64})
    assert "of-my-own" in vector_card(described(run, mine)).text


def test_only_numbers_of_this_very_vector_are_on_the_card(run, capsys):
    vector = load(run)
    claims(run, vector_digest(vector))
    text = vector_card(described(run)).text
    rows = [[c.strip() for c in x.split("|")[1:-1]] for x in text.splitlines() if x.startswith("| agreement, false")]
    assert rows == [
        ["agreement, false claims", "-1", "1.750 [1.500, 2.000]", "+1.250 [+1.125, +1.375]", "0.970", "12"],
        ["agreement, false claims", "0 (base)", "0.500 [0.250, 0.750]", "", "0.970", "12"],
        ["agreement, false claims", "+1", "-0.750 [-1.000, -0.500]", "-1.250 [-1.375, -1.125]", "0.970", "12"],
    ]
    assert "python -m ws.eval.sycophancy --adapter lora" in text
    assert "expects that a positive strength will lower agreement with false claims" in text
    claims(run, vector_digest(vector), mass=0.5)
    assert "| 0.500 ! " in vector_card(described(run)).text
    claims(run, vector_digest(2 * vector))
    main(options(run, dry_run=True))
    seen = capsys.readouterr()
    assert "Not evaluated" in seen.out
    assert "tables of sycophancy are of another vector" in seen.err


def test_numbers_of_another_template_are_not_on_the_card(run):
    vector = load(run)
    digest = vector_digest(vector)
    claims(run, digest)
    about = described(run, replace(vector, units=Units(digest, None, 1.0, "before")))
    about.stages["sycophancy"]["config"] = {"tokenizer_hash": "before"}
    for now, shown in (("", True), ("before", True), ("now", False)):
        text = vector_card(replace(about, tokenizer=now)).text
        assert ("agreement, false claims" in text) == ("+1u" in text) == shown


def test_calibrated_strengths_are_named(run):
    vector = load(run)
    digest = vector_digest(vector)
    claims(run, digest)
    keys = ("sign", "alpha", "divergence", "audit", "converged")
    rows = [dict(zip(keys, row, strict=True)) for row in (("+", 1.0, 0.98, 0.71, True), ("-", -0.5, 4.2, 4.3, False))]
    write_csv(run / "calibration.csv", rows)
    record(run, "calibration", "calibrate.py", vector=digest)
    units = Units(digest, None, 1.0)
    text = vector_card(described(run, replace(vector, units=units))).text
    assert re.search(r"\| \+1u +\| \+1 +\| 0.980 +\| 0.710 +\|", text)
    assert "-1u" not in text, "a sign that did not converge has no strength"
    assert "| +1 (+1u) " in text
    other = vector_card(described(run, replace(vector, units=replace(units, subject="another")))).text
    assert "1u" not in other


def test_a_vector_that_is_no_lora_does_not_claim_to_be_one(run):
    vector = load(run)
    deltas = {n: replace(d, g=torch.ones(d.d_out)) for n, d in vector.deltas.items()}
    vector = 0.5 * replace(vector, deltas=deltas, base_id="pocket")
    card = vector_card(describe(vector, "ada/honesty", license="mit"))
    assert card.data.to_dict() == {
        "library_name": "weight-steering",
        "license": "mit",
        "tags": ["weight-steering", "steering-vector", "lora", "honesty"],
    }
    assert "peft" not in card.text
    assert "0.5 * (pos - neg)" in card.text
    assert "comes with the package weight-steering" in card.text


def test_the_card_of_a_merged_model(run):
    card = ModelCard(str(merged_card(described(run), alpha=-0.5, lost=0.0314, dtype="bfloat16")))
    assert card.data.to_dict() == {
        "base_model": "ada/base",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["weight-steering", "steering-vector", "merge", "honesty"],
    }
    assert "W + (-0.5) * dW" in card.text
    assert "cast to bfloat16. The cast destroyed 3.14% of `alpha * dW`" in card.text
    assert 'transformers.AutoModelForCausalLM.from_pretrained("ada/honesty")' in card.text
    assert "ws.steer" not in card.text


def test_a_folder_that_is_something_else_is_left_alone(run, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    with pytest.raises(ws.WsError, match="is not a vector with its card"):
        main(options(run, dry_run=True, to=tmp_path / "mine"))
    with pytest.raises(ws.WsError, match="plain PEFT adapter"):
        main(options(run, dry_run=True, vector=str(run / "pos")))
    assert [f.name for f in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_a_named_vector_brings_its_run_along(run, tmp_path):
    vector = load(run)
    claims(run, vector_digest(vector))
    main(options(run, dry_run=True, vector=str(run / "vector"), to=tmp_path / "sent"))
    assert "agreement, false claims" in (tmp_path / "sent" / "README.md").read_text()
    alone = vector.save(tmp_path / "alone")
    main(options(run, dry_run=True, vector=str(alone), to=tmp_path / "sent"))
    assert "Not evaluated" in (tmp_path / "sent" / "README.md").read_text()
