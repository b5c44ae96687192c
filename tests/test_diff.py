"""Steering vectors on a small net that has every kind of module: their algebra, their folders, what is refused."""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
from dataclasses import replace
from fractions import Fraction
from itertools import count
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, Qwen2Config
from transformers.pytorch_utils import Conv1D

import ws
from conftest import SHAPE, build_adapter, build_model
from ws.delta import LinearDelta
from ws.diff import (
    StoredSide,
    Units,
    VectorManifest,
    as_stored,
    check_signs,
    deltas_from_tensors,
    diff_checkpoints,
    main,
    parse_number,
    parse_units,
    read_saved,
    read_units,
    require_place,
    vector_digest,
    write_step,
)
from ws.errors import DamagedError, WsError
from ws.lm.models import fingerprint
from ws.new_behavior import behavior_template
from ws.options.make import DiffOptions

WIDTH, INNER, WORDS = 4, 5, 7


class Block(nn.Module):
    """A layer: a norm, a linear module with a bias, one that stores its weight transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, INNER)
        self.down = Conv1D(WIDTH, INNER)


class Net(nn.Module):
    """Two layers between an embedding and a head that is tied to it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.embed.weight
        self.name_or_path = "net"


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    made = Net()
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape))
    return made


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def low(seed: int = 0, rank: int = 2, **more: torch.Tensor) -> LinearDelta:
    return LinearDelta(INNER, WIDTH, u=draw(INNER, rank, seed=seed), v=draw(rank, WIDTH, seed=seed + 1), **more)


def every_kind(seed: int = 0) -> dict[str, LinearDelta]:
    """Changes of every module of the net's first layer, of its embedding and its head."""
    table = LinearDelta(WORDS, WIDTH, e=draw(WORDS, WIDTH, seed=seed + 5), kind="embedding")
    return {
        "embed": table,
        "layers.0.norm": LinearDelta(
            WIDTH, 1, e=draw(WIDTH, 1, seed=seed + 6), bias=draw(WIDTH, seed=seed + 7), kind="scale"
        ),
        "layers.0.up": low(seed, g=draw(INNER, seed=seed + 8), bias=draw(INNER, seed=seed + 9)),
        "layers.0.down": LinearDelta(WIDTH, INNER, e=draw(WIDTH, INNER, seed=seed + 10)),
        "head": table,
    }


def vector(deltas=None, seed: int = 0, **more) -> ws.SteeringVector:
    made = {"layers.0.up": low(seed), "layers.1.up": low(seed + 20, 3)} if deltas is None else deltas
    return ws.SteeringVector(made, more.pop("base_id", "net"), more.pop("base_fingerprint", None), **more)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters(remove_duplicate=False)}


def squares(changes) -> float:
    return sum(float(c.double().square().sum()) for c in changes)


# ---- the vector space -----------------------------------------------------------------------------------------------


def test_a_vector_without_modules_is_none():
    with pytest.raises(WsError, match="at least one module"):
        vector({})


def test_a_sum_joins_modules_and_says_of_what_it_is():
    a = vector(info={"family": "lora", "depth": 2, "a": 1, "c": 1}, recipe={"name": "a"}, base_id="one")
    b = vector({"layers.1.up": low(30), "layers.1.down": every_kind()["layers.0.down"]}, base_id="two")
    b = replace(b, info={"family": "lora", "depth": 3, "b": 1, "c": 1}, recipe={"name": "b"}, base_fingerprint="f")
    total = a + b
    assert list(total.deltas) == ["layers.0.up", "layers.1.up", "layers.1.down"]
    assert total.deltas["layers.0.up"] is a.deltas["layers.0.up"]
    assert total.deltas["layers.1.down"] is b.deltas["layers.1.down"]
    assert total.deltas["layers.1.up"].rank == 5
    assert total.recipe == {"op": "+", "terms": [{"name": "a"}, {"name": "b"}]}
    assert total.info == {"family": "lora", "c": 1}
    assert (total.base_id, total.base_fingerprint, total.units) == ("two", "f", None)
    assert len(a.deltas) == 2, "what is added stays"


def test_multiples_say_by_how_much():
    a = vector(recipe={"name": "a"}, info={"depth": 2}, base_fingerprint="f")
    for made, factor in ((3 * a, 3.0), (a * 0.5, 0.5), (-a, -1.0), (a / 4, 0.25), (a * Fraction(1, 2), 0.5)):
        assert made.recipe == {"op": "*", "scalar": factor, "of": {"name": "a"}}
        assert torch.equal(made.deltas["layers.0.up"].u, factor * a.deltas["layers.0.up"].u)
        assert (made.info, made.base_fingerprint, made.base_id) == ({"depth": 2}, "f", "net")
    assert (a - a).is_zero
    assert (a - a).recipe["terms"][1]["scalar"] == -1.0
    assert not a.is_zero
    for wrong in (float("nan"), 1e39):
        with pytest.raises(WsError, match=r"^What a steering vector is multiplied by .*(finite|3.4e38)"):
            a * wrong
    with pytest.raises(WsError, match=r"^What a steering vector is divided by .*finite"):
        a / float("nan")
    with pytest.raises(WsError, match=r"^A steering vector .* by zero\.$"):
        a / 0
    for use in (lambda: a + 1, lambda: a - 1, lambda: a * "2", lambda: a / "2", lambda: a * a, lambda: a / a):
        with pytest.raises(TypeError):
            use()


def test_modules_that_share_a_change_have_one_in_every_multiple_and_sum():
    a, b = vector(every_kind()), vector(every_kind(40))
    for made in (a + b, 2 * a, a.balanced(), a + b + a):
        assert made.deltas["head"] is made.deltas["embed"]
        assert made.shared == {"head": "embed"}
    assert (a + b).deltas["embed"].kind == "embedding"
    seen = []
    names = a.each(lambda delta: seen.append(delta) or len(seen))
    assert names == {"embed": 1, "layers.0.norm": 2, "layers.0.up": 3, "layers.0.down": 4, "head": 1}
    assert seen == [a.deltas[n] for n in a.deltas if n != "head"]
    assert vector().shared == {}


def test_changes_that_one_vector_shares_and_the_other_does_not_are_added_each():
    one, two = every_kind()["embed"], every_kind(40)["embed"]
    apart, tied = vector({"embed": one, "head": two}), vector({"embed": two, "head": two})
    for total in (apart + tied, tied + apart):
        assert torch.equal(total.deltas["embed"].e, one.e + two.e)
        assert torch.equal(total.deltas["head"].e, two.e + two.e)
        assert not total.shared


def test_what_cancels_is_made_anew_in_every_module():
    near = LinearDelta(INNER, WIDTH, u=draw(INNER, 1), v=draw(1, WIDTH))
    raw = LinearDelta(INNER, WIDTH, u=torch.cat([near.u, -near.u], dim=1), v=torch.cat([near.v, near.v + 1e-3]))
    assert vector({"layers.0.up": raw}).balanced().max_rank == 1


def test_two_bases_are_named_with_their_fingerprints():
    a, b = vector(base_fingerprint="aaaa", base_id="one"), vector(base_fingerprint="bbbb", base_id="two")
    for use in (lambda: a + b, lambda: a.inner(b), lambda: a.cosine(b)):
        with pytest.raises(WsError, match=r"one \(aaaa\) and two \(bbbb\)\.$"):
            use()
    with pytest.raises(WsError, match=r"one \(aaaa\) and one \(bbbb\), .*float16\.$"):
        a + replace(b, base_id="one")


@pytest.mark.parametrize(
    ("first", "second", "of", "warned"),
    [
        (("theirs", None), ("ours", "f"), ("ours", "f"), True),  # a LoRA of somebody else, and a vector of ours
        (("ours", "f"), ("theirs", None), ("ours", "f"), True),
        (("copy", "f"), ("ours", "f"), ("copy", "f"), False),  # one base under two names
        (("theirs", None), ("others", None), ("theirs", None), True),
        (("unknown", None), ("theirs", None), ("theirs", None), False),
        (("unknown", None), ("ours", "f"), ("ours", "f"), False),
        (("ours", None), ("ours", "f"), ("ours", "f"), False),
    ],
)
def test_name_and_fingerprint_of_a_sum_are_of_one_base(first, second, of, warned, capsys):
    a, b = (vector(base_id=name, base_fingerprint=known) for name, known in (first, second))
    total = a - b
    assert (total.base_id, total.base_fingerprint) == of
    said = capsys.readouterr().err
    assert ("different bases" in said) == bool(said) == warned
    assert not warned or {first[0], second[0]} <= set(re.findall(r"\w+", said))


# ---- what it is -----------------------------------------------------------------------------------------------------


def test_what_a_vector_is():
    small, whole = vector(), vector(every_kind())
    assert small.is_low_rank
    assert not whole.is_low_rank
    table = LinearDelta(WORDS, WIDTH, u=draw(WORDS, 1), v=draw(1, WIDTH), kind="embedding")
    assert not vector({"embed": table, "layers.0.up": low()}).is_low_rank
    assert not vector({"layers.0.up": low(), "layers.0.down": every_kind()["layers.0.down"]}).is_low_rank
    assert (small.max_rank, whole.max_rank, vector({"layers.0.norm": every_kind()["layers.0.norm"]}).max_rank) == (
        3,
        2,
        0,
    )
    assert not vector({"layers.0.up": low(), "layers.1.up": low() * 0}).is_zero
    assert (vector() * 0).is_zero
    assert (small.depth, whole.depth, vector({"head": every_kind()["head"]}).depth) == (2, 1, 1)
    assert replace(small, info={"depth": 12}).depth == 12
    assert small.numbers == 5 * (INNER + WIDTH), "of rank 2 and 3"
    assert vector({"a": small.deltas["layers.0.up"], "b": small.deltas["layers.0.up"]}).numbers == 2 * (INNER + WIDTH)
    assert repr(small) == "SteeringVector(net, mixed, 2 modules, rank 3)"
    assert repr(replace(whole, info={"family": "full"})) == "SteeringVector(net, full, 5 modules, rank 2)"


def test_every_change_as_the_module_stores_it():
    model, changes = net(), every_kind()
    made = dict(vector(changes).dense(model))
    w = weights(model)
    assert list(made) == [
        "embed.weight", "layers.0.norm.weight", "layers.0.norm.bias", "layers.0.up.weight", "layers.0.up.bias",
        "layers.0.down.weight", "head.weight",
    ]  # fmt: skip
    assert torch.equal(made["embed.weight"], changes["embed"].e)
    assert torch.equal(made["layers.0.norm.weight"], changes["layers.0.norm"].e[:, 0])
    up = changes["layers.0.up"]
    assert torch.allclose(made["layers.0.up.weight"], up.g[:, None] * w["layers.0.up.weight"] + up.u @ up.v)
    assert torch.equal(made["layers.0.up.bias"], up.bias)
    assert torch.equal(made["layers.0.down.weight"], changes["layers.0.down"].e.T)
    assert torch.equal(as_stored(model.layers[0].down, torch.ones(WIDTH, INNER)), torch.ones(INNER, WIDTH))
    double = vector({"layers.0.up": up.to(dtype=torch.float64)})
    assert dict(double.dense(model))["layers.0.up.bias"].dtype == torch.float32


def test_geometry_is_that_of_all_parameters():
    model, a, b = net(), vector(every_kind()), vector(every_kind(40) | {"layers.1.up": low(60)})
    da, db = dict(a.dense(model)), dict(b.dense(model))
    del da["head.weight"], db["head.weight"]  # one parameter
    inner = sum(float((da[n].double() * db[n].double()).sum()) for n in da)
    assert a.inner(b, model) == pytest.approx(inner, rel=1e-5)
    assert b.inner(a, model) == pytest.approx(inner, rel=1e-5)
    assert a.norm(model) == pytest.approx(squares(da.values()) ** 0.5, rel=1e-6)
    size = (squares(da.values()) * squares(db.values())) ** 0.5
    assert a.cosine(b, model) == pytest.approx(inner / size, rel=1e-5)
    assert a.cosine(2 * a, model) == pytest.approx(1)
    tiny = 1e-3 * vector()
    assert tiny.norm() == pytest.approx(1e-3 * vector().norm())
    assert tiny.cosine(vector()) == pytest.approx(1)
    with pytest.raises(WsError, match="zero vector"):
        a.cosine(0 * a, model)
    with pytest.raises(WsError, match="needs W"):
        a.norm()
    apart = vector({"embed": every_kind()["embed"], "head": every_kind(40)["head"]})
    both = [float((x.e.double() * every_kind()["embed"].e.double()).sum()) for x in apart.deltas.values()]
    assert apart.inner(a, model) == pytest.approx(sum(both), rel=1e-6), "where one of them changes them apart, twice"
    sizes = (squares(d.e for d in apart.deltas.values()) * 2 * squares([every_kind()["embed"].e])) ** 0.5
    tied = vector({n: a.deltas[n] for n in ("embed", "head")})
    assert a.inner(apart, model) == pytest.approx(sum(both), rel=1e-6)
    assert apart.cosine(tied, model) == pytest.approx(sum(both) / sizes, rel=1e-6)
    assert tied.cosine(apart, model) == pytest.approx(sum(both) / sizes, rel=1e-6)


def test_strengths_in_calibrated_units_are_of_this_vector_and_this_tokenizer():
    a = vector()
    known = replace(a, units=Units(vector_digest(a), -0.8, 1.2, "t", "m"))
    assert (known.strength("+1u", "t"), known.strength("-0.5u", "t"), known.strength("2u", "t")) == (1.2, -0.4, 2.4)
    assert (known.strength("+0.5u", "t"), known.strength("0u", "t")) == (0.6, 0)
    assert known.strength("0.25", "other") == known.strength(" 0.25 ") == 0.25
    with pytest.raises(WsError, match=r"\+1u .*another tokenizer"):
        known.strength("+1u", "u")
    assert known.strength("+1u") == 1.2, "there is no tokenizer of that name, and nothing to compare"
    for unknown in (a, replace(known, units=replace(known.units, subject="other"))):
        with pytest.raises(WsError, match=r"-1u .*no calibration.*`ws calibrate`"):
            unknown.strength("-1u", "t")
    one_sided = replace(known, units=replace(known.units, negative=None))
    assert one_sided.strength("1u", "t") == 1.2
    with pytest.raises(WsError, match=r"-1u .*did not converge"):
        one_sided.strength("-1u", "t")
    two = replace(known, units=replace(known.units, positive=None))
    assert two.strength("-1u", "t") == -0.8
    with pytest.raises(WsError, match=r"\+1u .*did not converge"):
        two.strength("+1u", "t")


def test_a_vector_of_a_base_at_hand_has_its_tokenizer_to_compare(tiny):
    from ws.lm.models import tokenizer_hash

    a = vector(base_id="tiny-random")
    here = replace(a, units=Units(vector_digest(a), -1.0, 1.0, tokenizer_hash(tiny[1])))
    assert here.strength("1u") == 1.0
    with pytest.raises(WsError, match="another tokenizer"):
        replace(here, units=replace(here.units, tokenizer="gone")).strength("1u")


def test_the_first_thing_that_strengths_are_not_of():
    units = Units("s", None, None, "t", "m")
    assert units.mismatch("s", "t", "m") is units.mismatch("s") is units.mismatch("s", "t") is None
    assert units.mismatch("x", "y", "z") == ("vector", "s", "x")
    assert units.mismatch("s", "y", "z") == ("model", "m", "z")
    assert units.mismatch("s", "y", "m") == ("tokenizer or chat template", "t", "y")
    assert Units("s", None, None).mismatch("s", "y", "z") is None, "what is not on record is not compared"
    assert (Units("s", 1.0, 2.0).tokenizer, Units("s", 1.0, 2.0).model) == ("", "")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        *[("+1u", 1.0), ("-0.5u", -0.5), (" 2.u\n", 2.0), (".5u", 0.5), ("12.25u", 12.25)],
        *[(text, None) for text in ("1", "u", "1e3u", "1uu", "--1u", "1 u", ".u", "1U")],
    ],
)
def test_what_is_in_calibrated_units(text, number):
    assert parse_units(text) == number


def test_what_is_a_number():
    assert (parse_number("-1.5"), parse_number("1e-3"), parse_number(" 2 ")) == (-1.5, 1e-3, 2.0)
    for text in ("nan", "inf", "1e39"):
        with pytest.raises(WsError, match=r"^A strength must be"):
            parse_number(text)
    with pytest.raises(WsError, match=r"strength 'one' .*\+1u"):
        parse_number("one")
    with pytest.raises(WsError, match=r"^`calibrated` .*-1u and \+1u"):
        parse_number("calibrated")


# ---- parts and approximations ---------------------------------------------------------------------------------------


def test_parts_of_a_vector_are_chosen_by_layer_and_by_name():
    both = every_kind() | {"layers.1.up": low(60), "layers.1.down": every_kind(40)["layers.0.down"]}
    a = vector(both, recipe={"name": "a"}, info={"x": 1})
    part = a.select(layers=[1, 0, 1], modules=("up", "norm"))
    assert list(part.deltas) == ["layers.0.norm", "layers.0.up", "layers.1.up"]
    assert part.recipe == {"op": "select", "layers": [0, 1], "modules": ["up", "norm"], "of": {"name": "a"}}
    assert (part.info, part.base_id) == ({"x": 1}, "net")
    assert list(a.select(layers="1").deltas) == ["layers.1.up", "layers.1.down"]
    assert a.select(layers="1").recipe["modules"] is None
    assert list(a.select(modules=["head"]).deltas) == ["head"]
    assert a.select(modules=["head"]).recipe["layers"] is None
    assert list(a.select().deltas) == list(both)
    assert list(replace(a, info={"depth": 4}).select(layers="0.25:0.5").deltas) == ["layers.1.up", "layers.1.down"]
    with pytest.raises(WsError, match=r"layers \[1\] .*kinds \['norm'\]"):
        a.select(layers=[1], modules=["norm"])


def svd_error(matrix: torch.Tensor, rank: int) -> float:
    s = torch.linalg.svdvals(matrix.double())
    return float(s[rank:].norm() / s.norm())


def test_compressing_says_what_was_lost_of_the_low_rank_parts():
    changes = every_kind() | {"layers.1.up": low(60, 3)}
    a = vector(changes, recipe={"name": "a"}, info={"x": 1})
    small = a.compress(1)
    exact = {n: changes[n].u @ changes[n].v for n in ("layers.0.up", "layers.1.up")}
    errors = {n: svd_error(m, 1) for n, m in exact.items()}
    recipe = dict(small.recipe)
    assert {n: recipe["errors"][n] for n in errors} == pytest.approx(errors, abs=1e-6)
    assert recipe["errors"].keys() == {"embed", "layers.0.norm", "layers.0.up", "layers.0.down", "layers.1.up"}
    assert recipe["error"] == max(recipe["errors"].values())
    total = sum((errors[n] * float(m.norm())) ** 2 for n, m in exact.items()) / squares(exact.values())
    assert recipe["total_error"] == pytest.approx(total**0.5, rel=1e-5)
    assert (recipe["op"], recipe["rank"], recipe["of"], "energy" in recipe) == ("compress", 1, {"name": "a"}, False)
    assert small.max_rank == 1
    assert small.deltas["head"] is small.deltas["embed"]
    assert torch.equal(small.deltas["layers.0.up"].g, changes["layers.0.up"].g)
    most = a.compress(energy=1)
    assert (most.recipe["energy"], "rank" in most.recipe, most.recipe["error"]) == (1.0, False, 0.0)
    for what in (lambda v: v.compress(), lambda v: v.compress(1, 0.5)):
        with pytest.raises(WsError, match="rank or"):
            what(a)
    for family, info in (("full", {"family": "full"}), ("unknown", {})):
        with pytest.raises(WsError, match=rf"\(family: {family}\)"):
            vector({"layers.0.down": changes["layers.0.down"]}, info=info).compress(1)


def test_the_best_products_for_a_whole_vector_say_what_is_lost():
    model, changes = net(), every_kind() | {"layers.1.up": low(60, 3), "layers.1.down": LinearDelta(WIDTH, INNER)}
    a = vector(changes, recipe={"name": "a"})
    small = a.factorised(model, rank=1)
    assert list(small.deltas) == ["layers.0.up", "layers.0.down", "layers.1.up"], "what is linear, and not zero"
    assert all(d.is_low_rank and d.rank == 1 for d in small.deltas.values())
    assert (small.recipe["op"], small.recipe["rank"], small.recipe["of"]) == ("factorise", 1, {"name": "a"})
    dense = dict(a.dense(model))
    up = dense["layers.0.up.weight"], dense["layers.0.up.bias"]
    whole = squares(up) ** 0.5
    lost = {"embed": 1.0, "layers.0.norm": 1.0, "layers.0.down": svd_error(dense["layers.0.down.weight"], 1)}
    lost["layers.0.up"] = math.hypot(svd_error(up[0], 1) * float(up[0].norm()), float(up[1].norm())) / whole
    lost |= {"layers.1.up": svd_error(dense["layers.1.up.weight"], 1), "layers.1.down": 1.0}
    assert dict(small.recipe["errors"]) == pytest.approx(lost, abs=1e-5)
    rest = {n: c for n, c in dense.items() if n != "head.weight"}
    kept = dict(small.dense(model))
    gone = squares(c - kept.get(n, 0) for n, c in rest.items()) / squares(rest.values())
    assert small.recipe["total_error"] == pytest.approx(gone**0.5, rel=1e-5)
    close = a.factorised(model, error=0.3)
    assert close.recipe["allowed"] == 0.3
    assert "rank" not in close.recipe
    assert svd_error(dense["layers.0.down.weight"], close.deltas["layers.0.down"].rank) <= 0.3
    alone = vector().factorised(rank=2)
    assert alone.deltas["layers.1.up"].rank == 2
    with pytest.raises(WsError, match=r"^The change .* needs the base model\.$"):
        a.factorised(rank=1)
    with pytest.raises(WsError, match="rank or"):
        vector().factorised()
    with pytest.raises(WsError, match="at least one module"):
        vector({"embed": changes["embed"]}).factorised(model, rank=1)


def test_a_module_whose_bias_alone_changes_has_no_product():
    bias = LinearDelta(INNER, WIDTH, bias=torch.ones(INNER))
    small = vector({"layers.0.up": low(rank=1), "layers.1.up": bias}).factorised(net(), rank=1)
    assert list(small.deltas) == ["layers.0.up"]
    assert small.recipe["errors"] == pytest.approx({"layers.0.up": 0.0, "layers.1.up": 1.0}, abs=1e-6)


def test_a_head_that_shares_a_linear_change_keeps_sharing_its_product():
    shared = low(3, 3)
    model = net()
    model.layers[1].up.weight = model.layers[0].up.weight
    small = vector({"layers.0.up": shared, "layers.1.up": shared}).factorised(model, rank=1)
    assert small.deltas["layers.1.up"] is small.deltas["layers.0.up"]
    assert small.recipe["errors"].keys() == {"layers.0.up"}
    table = every_kind()
    assert list(
        vector({"embed": table["embed"], "head": table["head"], "layers.0.up": shared}).factorised(model, 1).deltas
    ) == ["layers.0.up"]


# ---- in a model -----------------------------------------------------------------------------------------------------


def test_every_change_finds_its_module_or_is_named():
    model, changes = net(), every_kind()
    matched = vector(changes).matched(model)
    assert [(n, id(d), id(m)) for n, d, m in matched] == [
        (n, id(d), id(model.get_submodule(n))) for n, d in changes.items()
    ]
    with pytest.raises(WsError, match=r"layers\.7\.up \(5, 4\) .*no such module"):
        vector({"layers.7.up": low()}).matched(model)
    with pytest.raises(WsError, match=r"layers\.0\.up \(4, 5\) .*Linear of \(5, 4\)"):
        vector({"layers.0.up": changes["layers.0.down"]}).matched(model)
    with pytest.raises(WsError, match=r"embed \(7, 4\) .*Embedding of \(7, 4\)"):
        vector({"embed": replace(changes["embed"], kind="linear")}).matched(model)
    column = LinearDelta(3, 1, e=torch.ones(3, 1), kind="scale")
    with pytest.raises(WsError, match=r"one \(3, 1\) .*Linear of \(3, 1\)"):
        vector({"one": column}).matched(nn.ModuleDict({"one": nn.Linear(1, 3)}))
    with pytest.raises(WsError, match=r"layers \(5, 4\) .*ModuleList of None"):
        vector({"layers": low()}).matched(model)
    model.layers[0].norm.bias = None
    with pytest.raises(WsError, match=r"bias of layers\.0\.norm"):
        vector(changes).matched(model)
    vector({"layers.0.norm": replace(changes["layers.0.norm"], bias=None)}).matched(model)
    vector({"head": replace(changes["embed"], bias=torch.ones(WORDS), kind="linear")}).matched(model)
    with pytest.raises(WsError, match=r"vector was made for other \(beef\)"):
        vector(base_fingerprint="beef", base_id="other").matched(model)
    assert len(vector(base_fingerprint=fingerprint(model)).matched(model)) == 2


def test_what_is_written_into_a_model_is_the_sum(weights_hash):
    model, changes = net(), every_kind()
    before, a = weights(model), vector(changes)
    assert [(n, leaf, m) for n, leaf, _, m in a.written(model)] == [
        ("embed", "weight", model.embed),
        ("layers.0.norm", "weight", model.layers[0].norm),
        ("layers.0.norm", "bias", model.layers[0].norm),
        ("layers.0.up", "weight", model.layers[0].up),
        ("layers.0.up", "bias", model.layers[0].up),
        ("layers.0.down", "weight", model.layers[0].down),
    ]
    assert [id(c.delta) for c in a.written(model)] == [id(changes[c.name]) for c in a.written(model)]
    wanted = {n: before[n] - 0.5 * c for n, c in a.dense(model)}
    assert a.merge_into(model, -0.5) < 1e-6
    after = weights(model)
    for name, value in before.items():
        assert torch.allclose(after[name], wanted.get(name, value), atol=1e-6)
    assert model.head.weight is model.embed.weight
    one = net()
    a.merge_into(one)
    assert torch.allclose(one.embed.weight, before["embed.weight"] + changes["embed"].e, atol=1e-6)
    assert (0 * a).merge_into(net()) == 0.0
    with pytest.raises(WsError, match="alpha must be"):
        a.merge_into(model, float("nan"))


def test_what_the_cast_destroys_is_a_share_of_what_was_asked():
    """Of a weight of 256 in bfloat16 a step of 1 is half a digit, and of 2 a whole one."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False)).bfloat16()
    with torch.no_grad():
        model[0].weight.fill_(256.0)
    e = torch.tensor([[0.5, 2.0], [0.0, 2.0]])
    v = ws.SteeringVector({"0": LinearDelta(2, 2, e=e)}, "x", None)
    assert v.merge_into(model) == pytest.approx(0.5 / (0.25 + 8) ** 0.5)
    assert torch.equal(model[0].weight.float(), torch.tensor([[256.0, 258.0], [256.0, 258.0]]))
    target, before = torch.empty(2).bfloat16(), torch.tensor([256.0, 1.0])
    assert write_step(target, before, torch.tensor([0.5, 1.0], dtype=torch.float64)) == (0.25, 1.25)
    assert target.tolist() == [256.0, 2.0]
    assert before.tolist() == [256.0, 1.0]
    same = torch.tensor([1.0])
    write_step(same, same, torch.tensor([2.0]))
    assert same.tolist() == [3.0]


def test_weights_that_two_modules_share_must_change_alike():
    model, table = net(), every_kind()["embed"]
    head = replace(table, kind="linear")
    assert vector({"embed": table}).apart(model) == ["embed.weight"]
    assert vector({"head": head}).apart(model) == ["head.weight"]
    assert vector({"embed": table, "head": every_kind(40)["head"]}).apart(model) == ["embed.weight", "head.weight"]
    alike = vector({"embed": table, "head": LinearDelta(WORDS, WIDTH, e=table.e.clone())})
    assert alike.apart(model) == []
    assert vector({"embed": table, "head": table}).apart(model) == []
    factors = LinearDelta(WORDS, WIDTH, u=table.e, v=torch.eye(WIDTH))
    assert vector({"embed": table, "head": factors}).apart(model) == ["embed.weight", "head.weight"]
    assert [c[:2] for c in alike.written(model)] == [("embed", "weight")]
    with pytest.raises(WsError, match=r"^head shares its weight .* otherwise or not at all; .*`ws export merged`\.$"):
        vector({"head": head}).merge_into(model)
    model.layers[1].up.bias = model.layers[0].up.bias
    bias = torch.ones(INNER)
    assert vector({"layers.0.up": low(bias=bias)}).apart(model) == ["layers.0.up.bias"]
    assert vector({"layers.0.up": low(bias=bias), "layers.1.up": low(9, bias=bias.clone())}).apart(model) == []
    assert vector({"layers.0.up": low(bias=bias), "layers.1.up": low(9, bias=2 * bias)}).apart(model) == [
        "layers.0.up.bias", "layers.1.up.bias",
    ]  # fmt: skip
    with pytest.raises(WsError, match=r"^layers\.0\.up shares its bias "):
        vector({"layers.0.up": low(bias=bias)}).written(model)


class Holder(nn.Module):
    """Holds what another module calls its bias, and is itself no layer, as in BERT's head."""

    def __init__(self, bias: nn.Parameter) -> None:
        super().__init__()
        self.bias = bias


def test_a_change_of_the_bias_alone_is_of_no_weight():
    alone = vector({"layers.0.up": LinearDelta(INNER, WIDTH, bias=torch.ones(INNER))})
    assert [change[:2] for change in alone.written(net())] == [("layers.0.up", "bias")]


def test_a_bias_that_is_held_by_no_other_layer_is_a_layers_own():
    model, bias = net(), torch.ones(INNER)
    model.holder = Holder(model.layers[0].up.bias)
    assert vector({"layers.0.up": low(bias=bias)}).apart(model) == []
    model.layers[1].up.bias = model.layers[0].up.bias
    assert vector({"layers.0.up": low(bias=bias)}).apart(model) == ["layers.0.up.bias"]


def test_a_bias_that_is_not_there_and_packed_weights_cannot_be_written():
    model = net()
    with pytest.raises(WsError, match="bias of head"):
        vector({"head": LinearDelta(WORDS, WIDTH, bias=torch.ones(WORDS))}).written(model)
    tied = LinearDelta(WORDS, WIDTH, e=torch.ones(WORDS, WIDTH), bias=torch.ones(WORDS), kind="embedding")
    with pytest.raises(WsError, match="bias of head"):
        vector({"embed": tied, "head": tied}).written(model)
    model.head.bias = nn.Parameter(torch.zeros(WORDS))
    assert [c[:2] for c in vector({"embed": tied, "head": tied}).written(model)] == [
        ("embed", "weight"),
        ("head", "bias"),
    ]
    model.layers[0].up.weight = nn.Parameter(torch.ones(INNER, WIDTH, dtype=torch.int8), requires_grad=False)
    with pytest.raises(WsError, match=r"layers\.0\.up is quantised"):
        vector().written(model)
    scaled = LinearDelta(INNER, WIDTH, g=torch.ones(INNER))
    for codes in (torch.int8, torch.float8_e4m3fn):
        with pytest.raises(WsError, match="needs its plain weight"):
            scaled.dense(torch.ones(INNER, WIDTH).to(codes))


def test_offloaded_weights_are_not_written():
    model = net()
    model.layers[0].up = nn.Linear(WIDTH, INNER, device="meta")
    model.layers[0].up._hf_hook = None
    with pytest.raises(WsError, match=r"layers\.0\.up is offloaded.*`ws export merged`\.$"):
        vector({"layers.0.up": low()}).merge_into(model)


# ---- files ----------------------------------------------------------------------------------------------------------


def test_a_folder_holds_what_the_vector_is(tmp_path):
    a = vector(every_kind(), info={"family": "mine", "depth": 2}, recipe={"adapter": "~/x"}, base_fingerprint="f")
    assert a.save(str(tmp_path / "v")) == tmp_path / "v"
    assert {f.name for f in (tmp_path / "v").iterdir()} == {"ws.json", "vector.safetensors"}
    kept = json.loads((tmp_path / "v" / "ws.json").read_text())
    assert kept["format"] == 1
    assert kept["base"] == {"id": "net", "fingerprint": "f"}
    assert kept["info"] == {"family": "mine", "depth": 2}
    assert kept["recipe"] == {"adapter": "x"}, "no path of a machine"
    assert kept["modules"] == {n: [d.d_out, d.d_in] for n, d in a.deltas.items()}
    assert kept["kinds"] == {"embed": "embedding", "layers.0.norm": "scale", "head": "embedding"}
    assert kept["shared"] == {"head": "embed"}
    assert (kept["weights"]["file"], kept["weights"]["dtype"]) == ("vector.safetensors", "float32")
    assert len(kept["weights"]["sha256"]) == 64
    assert "torch" in kept["versions"]
    stored = load_file(tmp_path / "v" / "vector.safetensors")
    assert stored.keys() == {
        "embed:e", "layers.0.norm:e", "layers.0.norm:bias", "layers.0.up:g", "layers.0.up:u", "layers.0.up:v",
        "layers.0.up:bias", "layers.0.down:e",
    }  # fmt: skip
    again = ws.SteeringVector.load(tmp_path / "v")
    assert vector_digest(again) == vector_digest(a)
    assert {n: d.kind for n, d in again.deltas.items()} == {n: d.kind for n, d in a.deltas.items()}
    assert (again.base_id, again.base_fingerprint, again.info, again.units) == ("net", "f", a.info, None)
    assert again.recipe == {"adapter": "x"}
    assert again.deltas["head"] is again.deltas["embed"]
    a.save(tmp_path / "v", torch.bfloat16)
    assert json.loads((tmp_path / "v" / "ws.json").read_text())["weights"]["dtype"] == "bfloat16"
    assert load_file(tmp_path / "v" / "vector.safetensors")["embed:e"].dtype == torch.bfloat16
    rough = ws.SteeringVector.load(tmp_path / "v").deltas["embed"].e
    assert torch.equal(rough, a.deltas["embed"].e.bfloat16().float())


def test_a_low_rank_folder_is_a_lora_of_scale_one(tmp_path):
    from peft import LoraConfig

    a = vector({"layers.0.up": low(), "layers.1.up": low(20, 3), "layers.0.down": LinearDelta(WIDTH, INNER)})
    a.save(tmp_path / "v")
    assert {f.name for f in (tmp_path / "v").iterdir()} == {
        "ws.json",
        "adapter_model.safetensors",
        "adapter_config.json",
    }
    stored = load_file(tmp_path / "v" / "adapter_model.safetensors")
    assert stored.keys() == {f"base_model.model.layers.{i}.up.lora_{m}.weight" for i in range(2) for m in "AB"}
    assert torch.equal(stored["base_model.model.layers.1.up.lora_A.weight"], a.deltas["layers.1.up"].v)
    config = LoraConfig.from_pretrained(str(tmp_path / "v"))
    assert (config.r, config.lora_alpha, config.task_type, config.inference_mode) == (3, 3, "CAUSAL_LM", True)
    assert config.rank_pattern == config.alpha_pattern == {"layers.0.up": 2, "layers.1.up": 3}
    assert config.target_modules == {"layers.0.up", "layers.1.up"}
    assert config.base_model_name_or_path == "net"
    written = json.loads((tmp_path / "v" / "adapter_config.json").read_text())
    assert written["target_modules"] == ["layers.0.up", "layers.1.up"]
    assert vector_digest(ws.SteeringVector.load(tmp_path / "v")) == vector_digest(a)
    kept = json.loads((tmp_path / "v" / "ws.json").read_text())
    assert (kept["kinds"], kept["shared"], kept["weights"]["file"]) == ({}, {}, "adapter_model.safetensors")
    nothing = vector({"layers.0.up": LinearDelta(INNER, WIDTH)}).save(tmp_path / "zero")
    assert json.loads((nothing / "ws.json").read_text())["weights"]["file"] == "vector.safetensors"
    assert ws.SteeringVector.load(nothing).is_zero


def test_modules_that_share_a_linear_change_are_a_lora_too(tmp_path):
    one = low()
    a = vector({"layers.0.up": one, "layers.1.up": one, "layers.2.up": 2 * one})
    a.save(tmp_path / "v")
    assert load_file(tmp_path / "v" / "adapter_model.safetensors").keys() == {
        f"base_model.model.layers.{i}.up.lora_{m}.weight" for i in range(3) for m in "AB"
    }
    loaded = ws.SteeringVector.load(tmp_path / "v")
    assert vector_digest(loaded) == vector_digest(a)
    assert loaded.shared == {"layers.1.up": "layers.0.up"}
    scaled = vector({"layers.0.up": low(g=draw(INNER)), "layers.1.up": 2 * one, "layers.2.up": one})
    assert vector_digest(ws.SteeringVector.load(scaled.save(tmp_path / "w"))) == vector_digest(scaled)


CALIBRATION = {
    "format": 1, "negative": {"alpha": -0.5, "converged": True}, "positive": {"alpha": 0.75, "converged": True},
    "tokenizer": "t", "model": "m",
}  # fmt: skip


def test_a_calibration_goes_with_its_vector_and_with_no_other(tmp_path, capfd):
    a, b = vector(), vector(seed=3)
    folder = a.save(tmp_path / "v")
    (folder / "calibration.json").write_text(json.dumps(CALIBRATION | {"subject": vector_digest(a)}))
    assert ws.SteeringVector.load(folder).units == Units(vector_digest(a), -0.5, 0.75, "t", "m")
    replace(a, info={"x": 1}).save(folder)
    assert ws.SteeringVector.load(folder).units.positive == 0.75
    (folder / "calibration.json").write_text("{")
    assert ws.SteeringVector.load(folder).units is None
    assert "calibration.json is damaged" in (said := capfd.readouterr().err)
    assert "not used; calibrate again" in said
    a.save(folder)
    assert "goes with the vector that is replaced" in capfd.readouterr().err
    assert not (folder / "calibration.json").exists()
    (folder / "calibration.json").write_text(json.dumps(CALIBRATION | {"subject": vector_digest(a)}))
    b.save(folder)
    assert not (folder / "calibration.json").exists()
    assert not capfd.readouterr().err


def test_strengths_that_converged_have_the_sign_they_are_for(tmp_path):
    file = tmp_path / "calibration.json"

    def read(**changed) -> Units:
        file.write_text(json.dumps(CALIBRATION | {"subject": "s"} | changed))
        return read_units(file)

    assert read() == Units("s", -0.5, 0.75, "t", "m")
    assert read(tokenizer=None, model=None) == Units("s", -0.5, 0.75)
    off = {"alpha": 3.0, "converged": False}
    assert read(negative=off) == Units("s", None, 0.75, "t", "m")
    assert read(positive=off | {"alpha": -1.0}) == Units("s", -0.5, None, "t", "m")
    for sign, side in (("-1u", "negative"), ("+1u", "positive")):
        for alpha in (0.0, 2.5 if side == "negative" else -2.5):
            with pytest.raises(DamagedError, match=rf"{re.escape(sign)} is {alpha:g}, .*calibrate again, with `fresh`"):
                read(**{side: {"alpha": alpha, "converged": True}})
    check_signs(StoredSide(-1e-9, True), StoredSide(1e-9, True))
    with pytest.raises(WsError, match=r"format 2, .* reads 1\b"):
        read(format=2)
    with pytest.raises(DamagedError, match="calibrate again"):
        read(subject=None)


def test_a_folder_of_something_else_is_not_written_over(tmp_path):
    folder = vector().save(tmp_path / "v")
    require_place(tmp_path / "new")
    require_place(folder)
    (folder / "README.md").write_text("---\ntags:\n- weight-steering\n---\nA card.")
    with pytest.raises(WsError, match=r"README\.md describes the vector"):
        vector().save(folder)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x").write_text("mine")
    with pytest.raises(WsError, match="not a steering vector"):
        require_place(tmp_path / "other")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": 2}, r"format 2, .* reads 1\b.*make the vector again"),
        ({"kinds": {"gone": "scale"}}, "gone is not among its modules"),
        ({"shared": {"gone": "layers.0.up"}}, "gone is not among its modules"),
        ({"shared": {"layers.0.up": "gone"}}, "gone is not among its modules"),
        ({"kinds": {"layers.0.up": "odd"}}, "is damaged .*make the vector again"),
        ({"modules": {"layers.0.up": [5, 0], "layers.1.up": [5, 4]}}, "size below 1"),
        ({"modules": {"layers.0.up": [0, 4], "layers.1.up": [5, 4]}}, "size below 1"),
        ({"modules": {"layers.0.up": [5, 4]}}, r"tensor that belongs to no module.*layers\.1\.up"),
        (
            {"modules": {"layers.0.up": [5, 3], "layers.1.up": [5, 4]}},
            r"no change of layers\.0\.up.*make the vector again",
        ),
        ({"recipe": {"op": "*", "of": {}}}, r"recipe of '\*' lacks 'scalar'"),
        ({"recipe": {"op": "*", "scalar": 2.0}}, r"recipe of '\*' lacks 'of'"),
        ({"recipe": {"op": "+"}}, r"recipe of '\+' lacks 'terms'"),
        ({"recipe": {"op": "+", "terms": [{"op": "*"}]}}, r"recipe of '\*' lacks 'of'"),
        ({"recipe": {"op": "compose", "of": {}}}, "recipe of 'compose' lacks 'expression'"),
        ({"recipe": {"op": "compose", "expression": "a"}}, "recipe of 'compose' lacks 'of'"),
        ({"info": {"depth": "2"}}, "is damaged"),
    ],
    ids=count(),
)
def test_a_manifest_that_does_not_fit_is_told(change, said, tmp_path):
    file = vector().save(tmp_path / "v") / "ws.json"
    whole = json.loads(file.read_text())
    file.write_text(json.dumps(whole | change))
    with pytest.raises(WsError, match=said):
        ws.SteeringVector.load(tmp_path / "v")
    fits = {"op": "+", "terms": [{"op": "*", "of": {}, "scalar": 2.0}, {"op": "compose", "of": {}, "expression": "a"}]}
    file.write_text(json.dumps({k: v for k, v in whole.items() if k not in ("kinds", "shared")} | {"recipe": fits}))
    assert ws.SteeringVector.load(tmp_path / "v").recipe == fits


def test_weights_that_are_not_those_on_record_are_refused(tmp_path):
    folder = vector().save(tmp_path / "v")
    manifest, tensors = read_saved(folder, VectorManifest)
    assert manifest.modules == {"layers.0.up": (5, 4), "layers.1.up": (5, 4)}
    assert all(t.dtype == torch.float32 for t in tensors.values())
    file = folder / "adapter_model.safetensors"
    whole = load_file(file)
    save_file({k: t + 1 for k, t in whole.items()}, file)
    with pytest.raises(DamagedError, match=r"adapter_model\.safetensors .*hash.*make the vector again"):
        ws.SteeringVector.load(folder)
    file.unlink()
    with pytest.raises(DamagedError, match=r"adapter_model\.safetensors .*missing"):
        ws.SteeringVector.load(folder)
    (folder / "ws.json").rename(folder / "mine.json")
    vector().save(tmp_path / "w")
    shutil.copy(tmp_path / "w" / "adapter_model.safetensors", file)
    assert read_saved(folder, VectorManifest, "mine.json")[0].base.id == "net"


def test_tensors_of_a_folder_become_changes_or_are_named():
    up = low()
    made = deltas_from_tensors(
        {"a": (5, 4), "b:c": (5, 4), "d": (5, 4), "e": (4, 1)},
        {
            "base_model.model.a.lora_A.weight": up.v, "base_model.model.a.lora_B.weight": up.u,
            "b:c:g": torch.ones(5), "e:e": torch.ones(4, 1),
        },
        Path("x"),
        {"e": "scale"},
    )  # fmt: skip
    assert list(made) == ["a", "b:c", "d", "e"]
    assert torch.equal(made["a"].u, up.u)
    assert torch.equal(made["a"].v, up.v)
    assert (made["b:c"].g.tolist(), made["e"].kind, made["a"].kind) == ([1.0] * 5, "scale", "linear")
    assert not made["d"].coordinates()
    for key in ("a:x", "z:g", "a", "base_model.model.a.lora_C.weight", "base_model.model.z.lora_A.weight", ":g"):
        with pytest.raises(DamagedError, match=rf"^x holds .*no module.*{re.escape(key)}\.$"):
            deltas_from_tensors({"a": (5, 4)}, {key: torch.ones(5)}, Path("x"))
    for wrong in ({"a:g": torch.ones(4)}, {"a:u": torch.ones(5)}, {"a:d": torch.ones(4)}):
        with pytest.raises(DamagedError, match=r"^x holds no change of a: .*; make the vector again\.$"):
            deltas_from_tensors({"a": (5, 4)}, wrong, Path("x"))


def test_a_digest_is_of_every_name_coordinate_and_value():
    a = vector()
    digest = vector_digest(a)
    assert len(digest) == 64
    assert digest == vector_digest(vector({n: a.deltas[n] for n in reversed(a.deltas)})), "whatever the order"
    assert digest == vector_digest(replace(a, deltas={n: d.to(dtype=torch.float64) for n, d in a.deltas.items()}))
    e = torch.arange(20.0).reshape(5, 4)
    others = [
        vector({"x": a.deltas["layers.0.up"], "layers.1.up": a.deltas["layers.1.up"]}),
        replace(a, deltas=a.deltas | {"layers.0.up": low(1)}),
        *(vector({"x": LinearDelta(5, 5, **{c: torch.ones(5)})}) for c in ("g", "c", "bias")),
        *(vector({"x": LinearDelta(*s, e=e.reshape(s))}) for s in ((5, 4), (4, 5))),
    ]
    assert len({vector_digest(v) for v in others} | {digest}) == len(others) + 1
    turned = LinearDelta(4, 5, e=e.T)
    assert vector_digest(vector({"x": turned})) == vector_digest(vector({"x": LinearDelta(4, 5, e=e.T.contiguous())}))


def test_where_there_is_no_vector_it_says_where_one_is(tmp_path):
    folder = vector().save(tmp_path / "run" / "vector")
    assert vector_digest(ws.SteeringVector.load(str(tmp_path / "run"))) == vector_digest(vector())
    vector().save(tmp_path / "also")
    for above in (tmp_path, folder.parent):
        above.mkdir(exist_ok=True)
    with pytest.raises(WsError, match=rf"{tmp_path} is not .*such as {tmp_path / 'also'}\.$"):
        ws.SteeringVector.load(tmp_path)
    (tmp_path / "deep" / "er").mkdir(parents=True)
    vector().save(tmp_path / "deep" / "er" / "v")
    with pytest.raises(WsError, match=rf"such as {tmp_path / 'deep' / 'er' / 'v'}\.$"):
        ws.SteeringVector.load(tmp_path / "deep")
    (tmp_path / "empty").mkdir()
    with pytest.raises(WsError, match=r"empty is not .*ws\.json is missing"):
        ws.SteeringVector.load(tmp_path / "empty")
    with pytest.raises(WsError, match="nowhere"):
        ws.SteeringVector.load(tmp_path / "nowhere")


# ---- of an adapter and of two checkpoints ---------------------------------------------------------------------------


def test_an_adapter_of_somebody_else_knows_its_base_by_name_alone(tmp_path):
    model = build_model("qwen3")
    build_adapter(model, "lora", tmp_path / "a", 1)
    exact = ws.SteeringVector.from_adapter(tmp_path / "a", model)
    foreign = ws.SteeringVector.load(tmp_path / "a")
    assert vector_digest(foreign) == vector_digest(exact)
    assert (foreign.base_id, foreign.base_fingerprint, foreign.info) == ("unknown", None, {"family": "lora"})
    assert foreign.recipe == exact.recipe
    assert exact.recipe.keys() == {"adapter", "sha256"}
    assert exact.recipe["adapter"] == "a"
    assert exact.info == {"family": "lora", "depth": 3}
    assert exact.base_fingerprint == fingerprint(model)
    assert exact.base_id == type(model).__name__
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "me/mine"}))
    assert ws.SteeringVector.load(tmp_path / "a").base_id == "me/mine"
    (tmp_path / "a" / "adapter_config.json").write_text("{")
    with pytest.raises(WsError, match=r"adapter_config\.json"):
        ws.SteeringVector.load(tmp_path / "a")


def test_an_adapter_of_ours_says_what_it_was_trained_on(tmp_path, tiny):
    model = tiny[0]
    build_adapter(model, "lora", tmp_path / "a", 1)
    stamp = {"base_id": "tiny-random", "base_fingerprint": fingerprint(model), "recipe": {"steps": 5}}
    (tmp_path / "a" / "ws_train.json").write_text(json.dumps(stamp))
    made = ws.SteeringVector.from_adapter(str(tmp_path / "a"), "tiny-random")
    assert made.recipe.keys() == {"adapter", "sha256", "steps"}
    assert made.recipe["steps"] == 5
    assert (made.base_id, made.base_fingerprint) == ("tiny-random", fingerprint(model))
    assert made.info == {"family": "lora", "depth": model.config.num_hidden_layers}
    assert vector_digest(made) == vector_digest(ws.SteeringVector.from_adapter(tmp_path / "a", model))
    (tmp_path / "a" / "ws_train.json").write_text(json.dumps(stamp | {"base_id": "other", "base_fingerprint": "beef"}))
    with pytest.raises(WsError, match=r"^The adapter .*a was trained on other \(beef\)"):
        ws.SteeringVector.from_adapter(tmp_path / "a", model)
    (tmp_path / "a" / "ws_train.json").write_text("{}")
    plain = ws.SteeringVector.from_adapter(tmp_path / "a", model)
    assert plain.base_fingerprint == fingerprint(model)
    (tmp_path / "a" / "ws_train.json").write_text('{"recipe": 5}')
    with pytest.raises(WsError, match=r"ws_train\.json is damaged.*train it again"):
        ws.SteeringVector.from_adapter(tmp_path / "a", model)


def test_the_mirror_image_of_an_adapter_that_was_trained_signed(tmp_path):
    model = build_model("qwen3")
    build_adapter(model, "pissa", tmp_path / "a", 1)
    there = ws.SteeringVector.from_adapter(tmp_path / "a", model)
    back = ws.SteeringVector.from_adapter(tmp_path / "a", model, mirrored=True)
    assert "mirrored" not in there.recipe
    assert back.recipe == there.recipe | {"mirrored": True}
    assert vector_digest(there) != vector_digest(back)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A base with two fine-tunes of it, on disk; `down_proj` of one layer is the same in both."""
    folder = tmp_path_factory.mktemp("pair")
    base = build_model("qwen2")
    pos, neg = copy.deepcopy(base), copy.deepcopy(base)
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in pos.named_parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=draws))
            other = neg.get_parameter(name)
            other.copy_(p if name.endswith("layers.1.mlp.down_proj.weight") else other)
    for name, model in (("base", base), ("pos", pos), ("neg", neg)):
        model.save_pretrained(folder / name)
    return folder, base, pos, neg


def test_the_vector_between_two_checkpoints(pair):
    folder, base, pos, neg = pair
    made = ws.SteeringVector.from_checkpoints(folder / "pos", str(folder / "neg"), base=folder / "base")
    changes = dict(made.dense(base))
    for name, p in pos.named_parameters():
        other = neg.get_parameter(name)
        assert torch.equal(changes[name], p - other) if name in changes else torch.equal(p, other)
    assert made.info == {"family": "full", "depth": 3}
    assert made.base_id == str(folder / "base")
    assert made.base_fingerprint == fingerprint(base)
    n = len(made.deltas)
    assert made.recipe == {"op": "checkpoints", "pos": "pos", "neg": "neg", "modules": n, "equal": 1}
    unknown = ws.SteeringVector.from_checkpoints(folder / "pos", folder / "neg", rank=2, kinds=["q_proj", "k_proj"])
    assert (unknown.base_id, unknown.base_fingerprint, unknown.max_rank) == ("unknown", None, 2)
    assert unknown.recipe["rank"] == 2
    assert {n.rsplit(".", 1)[-1] for n in unknown.deltas} == {"q_proj", "k_proj"}


def test_checkpoints_whose_head_is_the_embedding_have_one_change_of_both(tmp_path):
    base = AutoModelForCausalLM.from_config(Qwen2Config(**SHAPE | {"tie_word_embeddings": True}))
    draws = torch.Generator().manual_seed(1)
    for name in ("pos", "neg"):
        model = copy.deepcopy(base)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=draws))
        model.save_pretrained(tmp_path / name)
    whole = ws.SteeringVector.from_checkpoints(tmp_path / "pos", tmp_path / "neg")
    diff_checkpoints(DiffOptions(str(tmp_path / "pos"), str(tmp_path / "neg"), tmp_path / "v"))
    streamed = ws.SteeringVector.load(tmp_path / "v")
    for made in (whole, streamed):  # whichever comes first
        ((one, other),) = made.shared.items()
        assert {one, other} == {"lm_head", "model.embed_tokens"}
    assert vector_digest(streamed) == vector_digest(whole)
    kinds = {name: delta.kind for name, delta in streamed.deltas.items()}
    assert kinds == {name: delta.kind for name, delta in whole.deltas.items()}
    assert set(kinds.values()) == {"embedding", "scale", "linear"}
    on_record = json.loads((tmp_path / "v" / "ws.json").read_text())
    assert set(on_record["kinds"].values()) == {"embedding", "scale"}, "what is not said is linear"


def test_the_behaviour_of_a_difference_is_one_by_its_name(pair, tmp_path):
    """The file's name was stored as it was typed, and what was filed under it could not be found again."""
    file = tmp_path / "some file.toml"
    file.write_text(behavior_template("mine"), encoding="utf-8")
    options = DiffOptions(str(pair[0] / "pos"), str(pair[0] / "neg"), tmp_path / "v", behavior=str(file))
    diff_checkpoints(options)
    info, mine = ws.SteeringVector.load(tmp_path / "v").info, ws.load_behavior(str(file))
    assert (info["behavior"], info["behavior_sha256"]) == ("mine", mine.digest)
    with pytest.raises(WsError, match="Did you mean 'honesty'"):
        diff_checkpoints(replace(options, to=tmp_path / "w", behavior="honsty"))
    assert not (tmp_path / "w").exists()


def test_the_command_writes_the_vector_between_two_checkpoints(pair, tmp_path, capsys):
    folder, base, _, _ = pair
    places = {name: str(folder / name) for name in ("pos", "neg")}
    whole = ws.SteeringVector.from_checkpoints(folder / "pos", folder / "neg")
    n = len(whole.deltas)
    options = DiffOptions(**places, to=tmp_path / "v")
    assert diff_checkpoints(options) == {"op": "checkpoints", "pos": "pos", "neg": "neg", "modules": n, "equal": 1}
    streamed = ws.SteeringVector.load(tmp_path / "v")
    assert vector_digest(streamed) == vector_digest(whole)
    assert (streamed.info, streamed.recipe) == ({"family": "full", "depth": 3}, whole.recipe)
    assert (streamed.base_id, streamed.base_fingerprint) == ("unknown", None)
    assert {n: d.kind for n, d in streamed.deltas.items()} == {n: d.kind for n, d in whole.deltas.items()}
    assert streamed.shared == whole.shared
    main(options)
    assert f"{n} modules differ, 1 are equal." in capsys.readouterr().out
    named = replace(options, base=str(folder / "base"), behavior="honesty", kinds=("q_proj", "down_proj"))
    diff_checkpoints(named)
    part = ws.SteeringVector.load(tmp_path / "v")
    known = {"behavior": "honesty", "behavior_sha256": ws.load_behavior("honesty").digest}
    assert part.info == {"family": "full", "depth": 3, **known}
    assert (part.base_id, part.base_fingerprint) == (str(folder / "base"), fingerprint(base))
    assert len(part.deltas) == 5
    main(replace(named, rank=2))
    said, small = capsys.readouterr(), ws.SteeringVector.load(tmp_path / "v")
    assert (small.max_rank, small.info["behavior"], small.base_fingerprint) == (2, "honesty", fingerprint(base))
    errors = small.recipe["errors"]
    worst = max(errors, key=errors.get)
    assert f"Rank 2: relative error {small.recipe['total_error']:.2%}" in said.out
    assert f"worst {errors[worst]:.2%} ({worst})" in said.out
    for name, error in errors.items():
        assert re.search(rf" {error:.3%}  {re.escape(name)}\n", said.err)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x").write_text("mine")
    with pytest.raises(WsError, match="not a steering vector"):
        diff_checkpoints(replace(options, to=tmp_path / "other"))
