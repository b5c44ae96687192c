"""A family that is registered at run time passes the contract of the six; it is the one that docs/adapters.md shows."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import replace

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

import ws
import ws.adapters
from conftest import build_adapter
from test_docs import ROOT, snippets
from test_families import (  # noqa: F401  collected here a second time, with the fixture `family` below
    relative,
    test_alpha_per_row_equals_one_at_a_time,
    test_an_untrained_adapter_is_the_zero_vector,
    test_dense_difference_equals_the_difference_of_merges,
    test_one_side_equals_pefts_merge,
    test_peft_reads_low_rank_folders_exactly_and_refuses_the_others,
    test_save_and_load_are_bit_exact,
    test_steered_logits_equal_merged_weights,
    test_swapping_the_arms_negates,
)
from test_smoke import out, test_replicate_end_to_end  # noqa: F401
from ws.adapters import COMMON_FIELDS, FAMILIES, AdapterSpec, Family, family_of, peft_config, register
from ws.diff import vector_digest


@pytest.fixture
def loha() -> Family:
    """The family of the documentation, registered by its snippet."""
    (code,) = [
        c for language, c in snippets(ROOT / "docs" / "adapters.md") if language == "python" and "register(" in c
    ]
    namespace: dict[str, object] = {}
    exec(compile(code, "docs/adapters.md", "exec"), namespace)
    assert isinstance(namespace["LOHA"], Family)
    return namespace["LOHA"]


@pytest.fixture
def family(loha) -> str:
    return loha.name


def test_its_vectors_are_low_rank_of_the_square(base, loha, tmp_path):
    build_adapter(base, "loha", tmp_path / "a", seed=1, rank=3)
    vector = ws.SteeringVector.from_adapter(tmp_path / "a", base)
    assert vector.is_low_rank
    assert vector.max_rank == 3**2
    assert vector.info["family"] == "loha"


def test_what_its_variant_leaves_out_is_read_off_the_layers(qwen3, loha, tmp_path, capsys):
    """`extract` knows no scales per module; such a folder is still read exactly, by another way."""
    torch.manual_seed(0)
    config = LoHaConfig(r=2, alpha=4, target_modules=["q_proj"], alpha_pattern={"q_proj": 9}, init_weights=False)
    model = get_peft_model(copy.deepcopy(qwen3), config)
    model.save_pretrained(str(tmp_path / "a"))
    assert family_of(PeftConfig.from_pretrained(str(tmp_path / "a"))) is None
    vector = ws.SteeringVector.from_adapter(tmp_path / "a", qwen3)
    assert "of no family known here" in capsys.readouterr().err
    after = dict(model.merge_and_unload().named_parameters())
    for name, change in vector.dense(qwen3):
        assert relative(dict(qwen3.named_parameters())[name] + change, after[name]) < 1e-5


def test_modules_that_peft_has_no_layer_for_are_refused(loha):
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=16, n_positions=8))
    with pytest.raises(ws.WsError, match="PEFT has no loha for a Conv1D .* it has: ia3, dora, lora, pissa"):
        peft_config(model, AdapterSpec("loha", layers="all"))


def test_a_family_states_the_fields_it_understands(qwen3, loha, tmp_path):
    """What its `extract` does not read is refused by name; what it reads or need not read is taken."""
    build_adapter(qwen3, "loha", tmp_path / "a", seed=1)
    file = tmp_path / "a" / "adapter_config.json"
    stored = json.loads(file.read_text())

    def read(**settings) -> ws.SteeringVector:
        file.write_text(json.dumps(stored | settings))
        return ws.SteeringVector.from_adapter(tmp_path / "a", qwen3)

    before = vector_digest(read())
    assert vector_digest(read(module_dropout=0.5, init_weights=False, use_effective_conv2d=False)) == before
    assert vector_digest(read(alpha=stored["alpha"] * 2)) != before
    for setting in ({"use_effective_conv2d": True}, {"modules_to_save": ["lm_head"]}, {"wonder": 1}):
        with pytest.raises(ws.WsError, match=f"{min(setting)}="):
            read(**setting)


def test_a_family_that_states_no_fields_understands_what_it_configures(qwen3, loha, tmp_path):
    plain = replace(loha, name="plain", fields=None)
    assert plain.understands() == COMMON_FIELDS | {"r", "alpha"}
    register(plain)
    build_adapter(qwen3, "plain", tmp_path / "a", seed=1)
    vector = ws.SteeringVector.from_adapter(tmp_path / "a", qwen3)
    assert vector.info["family"] == "plain"
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"module_dropout": 0.5}))
    with pytest.raises(ws.WsError, match=r"has module_dropout=0\.5: the tensors of plain adapters"):
        ws.SteeringVector.from_adapter(tmp_path / "a", qwen3)


def test_a_family_that_could_not_read_what_it_trains_is_refused_before_it_does(qwen3, loha):
    register(replace(loha, name="blind", fields=frozenset({"r"})))
    with pytest.raises(ws.WsError, match=r"What blind would train has alpha=64\.0"):
        peft_config(qwen3, AdapterSpec("blind"))


@pytest.mark.parametrize("name", ["", "Loha", "lo-ha", "2loha", "../loha", "lo ha"])
def test_names_that_cannot_be_folders_and_options_are_refused(loha, name):
    with pytest.raises(ws.WsError, match="cannot name an adapter family"):
        register(replace(loha, name=name))


def test_a_name_that_is_taken_is_refused(loha):
    for taken in ("lora", "loha"):
        with pytest.raises(ws.WsError, match=f"adapter family '{taken}' already"):
            register(replace(loha, name=taken))
    assert FAMILIES["lora"].extract is not loha.extract


def test_the_last_one_registered_that_fits_reads_a_folder():
    stable = replace(FAMILIES["lora"], name="rslora", variant=lambda config: config.use_rslora)
    register(stable)
    assert family_of(LoraConfig(use_rslora=True)) is stable
    assert family_of(LoraConfig()) is FAMILIES["lora"]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "lora"),
        ({"init_lora_weights": False}, "lora"),
        ({"init_lora_weights": "gaussian"}, "lora"),
        ({"use_dora": True}, "dora"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
        ({"init_lora_weights": "olora"}, None),
        ({"init_lora_weights": "olora", "use_dora": True}, None),
    ],
)
def test_which_lora_is_of_which_family(options, name):
    """Whatever moves the base before training is no plain LoRA."""
    found = family_of(LoraConfig(**options))
    assert (found.name if found else None) == name


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Install a package with an entry point: what pip leaves of one, in a folder on the path."""

    def install(entry: str, code: str) -> None:
        about = tmp_path / "more_families-1.0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text("Metadata-Version: 2.1\nName: more-families\nVersion: 1.0\n")
        (about / "entry_points.txt").write_text(f"[ws.families]\n{entry}\n")
        (tmp_path / "more_families.py").write_text(code)
        monkeypatch.delitem(sys.modules, "more_families", raising=False)
        monkeypatch.syspath_prepend(tmp_path)
        ws.adapters._register_installed.cache_clear()

    yield install
    ws.adapters._register_installed.cache_clear()


def test_families_of_installed_packages_are_found_by_name(installed):
    installed("stable = more_families:STABLE", _STABLE)
    assert ws.adapters.family("stable").learning_rate == 0.25
    assert family_of(LoraConfig(use_rslora=True)).name == "stable"
    with pytest.raises(ws.WsError, match="Did you mean 'stable'"):
        ws.adapters.family("stabel")


@pytest.mark.parametrize("entry", ["x = more_families:MISSING", "x = no_such_module:X"])
def test_an_installed_family_that_cannot_be_loaded_is_named(installed, entry):
    installed(entry, _STABLE)
    with pytest.raises(ws.WsError, match=f"adapter family {entry[4:]} cannot be loaded"):
        ws.adapters.family("lora")


_STABLE = """
from dataclasses import replace
from ws.adapters import FAMILIES

STABLE = replace(
    FAMILIES["lora"], name="stable", learning_rate=0.25, variant=lambda config: config.use_rslora
)
"""
