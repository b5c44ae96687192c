"""Tables that people bring: every row as it is written, and what is no row with its line."""

from __future__ import annotations

import json

import pytest

import ws
from ws.behaviors.tables import read_rows
from ws.eval.capability import load_questions, load_texts
from ws.eval.prompts import load_prompts
from ws.eval.sycophancy import Prompts, load_claims
from ws.eval.tinymfv_airisk import load_vignettes


def read(file, content, **more):
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_rows(str(file), "claims", ("claim", "is_true"), ("default", None), **more)


GOOD = [{"claim": "a Naïve\u2028one", "is_true": True}, {"claim": "5", "is_true": False}]


@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\n\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_json_lines_are_read_as_they_are(tmp_path, end, mark):
    lines = [json.dumps(row, ensure_ascii=False) for row in GOOD]
    assert read(tmp_path / "x.jsonl", mark + (end.strip(" ") or "\n").join(lines) + end) == GOOD


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_cells_of_a_csv_file_stay_texts_where_no_other_type_is_asked_for(tmp_path, end):
    content = '\ufeffid,claim,is_true\r\n007,"1,50\nand ""more""",true\r\n1e5,a Naïve one,False' + end
    rows = read(tmp_path / "x.csv", content, types={"is_true": bool})
    assert rows == [
        {"id": "007", "claim": '1,50\nand "more"', "is_true": True},
        {"id": "1e5", "claim": "a Naïve one", "is_true": False},
    ]
    assert read(tmp_path / "x.csv", "claim,is_true\n2,maybe\n,\n", types={"is_true": bool}) == [
        {"claim": "2", "is_true": "maybe"},
        {"claim": None, "is_true": None},
    ]


ROW = json.dumps(GOOD[0], ensure_ascii=False)


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("x.jsonl", f"{ROW}\n{ROW[:-4]}", "x.jsonl line 2 is not JSON"),
        ("x.jsonl", f"{ROW}\n".encode() + ROW.encode("latin-1", "replace"), "x.jsonl line 2 is not UTF-8: byte 0xef"),
        ("x.jsonl", f"{ROW}\n\n[1]", r"x.jsonl line 3 is no object but \[1\]"),
        ("x.jsonl", f'{ROW}\n{{"claim": "a", "claim": "b"}}', "line 2 is not JSON: the key 'claim' stands there twice"),
        ("x.jsonl", f'{ROW}\n{{"claim": "\\ud83d"}}', "x.jsonl line 2: claim holds half of a surrogate pair"),
        ("x.jsonl", f'{ROW}\n{{"claim": NaN}}', "line 2 is not JSON: NaN is no number"),
        ("x.csv", "claim,is_true\nfine,true\nNaïve,true\n".encode("latin-1"), "x.csv line 3 is not UTF-8: byte 0xef"),
        ("x.csv", "claim,is_true\na,true,9\n", "x.csv line 2 has 3 cells for 2 columns"),
        ("x.csv", "claim,is_true\na,true\nb\n", "x.csv line 3 has 1 cells for 2 columns"),
        ("x.csv", 'claim,is_true\n"a,true\nb,false\n', "x.csv line 3 is not CSV"),
        ("x.csv", 'claim,is_true\n"a"b,true\n', "x.csv line 2 is not CSV"),
        ("x.csv", "claim,claim\na,b\n", "names a column twice"),
        ("x.csv", "claim,is_true\n", "is empty"),
        ("x.jsonl", "", "is empty"),
        ("x.jsonl", '{"claim": "a"}\n', "lacks the columns is_true"),
    ],
)
def test_what_is_no_row_is_said_with_its_line(tmp_path, name, content, why):
    with pytest.raises(ws.WsError, match=why):
        read(tmp_path / name, content)


def test_columns_that_some_rows_lack_are_empty_there(tmp_path):
    assert read(tmp_path / "x.jsonl", '{"claim": "a", "is_true": true}\n{"id": 3, "claim": "b"}\n') == [
        {"claim": "a", "is_true": True, "id": None},
        {"claim": "b", "is_true": None, "id": 3},
    ]


@pytest.mark.parametrize(
    "change", [{"claim": None}, {"claim": 5}, {"claim": ["x"]}, {"is_true": "yes"}, {"is_true": 1}, {"id": "c0"}]
)
def test_claims_of_another_type_are_named_not_made_to_fit(tmp_path, capsys, change):
    rows = [{"id": f"c{i}", "claim": f"claim {i}", "is_true": i % 2 == 0} for i in range(40)]
    rows[7] = rows[7] | change
    (tmp_path / "claims.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert len(load_claims(str(tmp_path))) == 39
    assert "1 of 40 rows" in (said := capsys.readouterr().err)
    assert "row 8" in said


@pytest.mark.parametrize("change", [{"text": 5}, {"text": None}, {"wrong": "much"}, {"wrong": True}, {"id": None}])
def test_vignettes_of_another_type_are_named_not_made_to_fit(tmp_path, capsys, change):
    for condition in ("other_violate", "self_violate"):
        rows = [{"id": str(i), "foundation_coarse": "Care", "wrong": 3, "text": f"{condition} {i}"} for i in range(40)]
        if condition == "other_violate":
            rows[7] = rows[7] | change
        (tmp_path / f"{condition}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert len(load_vignettes(str(tmp_path))) == 39
    assert "1 of 40 rows" in capsys.readouterr().err


def test_neutral_texts_of_another_type_or_encoding_stop(tmp_path, capsys):
    table = tmp_path / "texts.jsonl"
    table.write_text('{"text": "a"}\n{"text": null}\n{"text": " "}\n')
    assert load_texts(str(table)) == ("a",)
    assert "2 of 3 rows of" in capsys.readouterr().err
    table.write_text('{"text": "a"}\n{"text": 5}\n')
    with pytest.raises(ws.WsError, match="Row 2 of .* has 5 for a text in `text`"):
        load_texts(str(table))
    (tmp_path / "x.txt").write_bytes("How?\nNaïve?\n".encode("latin-1"))
    with pytest.raises(ws.WsError, match="x.txt line 2 is not UTF-8: byte 0xef at position 3"):
        load_questions(str(tmp_path / "x.txt"))


def test_prompts_and_behaviours_in_another_encoding_stop(tmp_path):
    prompts = tmp_path / "p.toml"
    prompts.write_bytes('agree = "Right"\nopener = "Naïve:"\n'.encode("latin-1"))
    behavior = tmp_path / "b.toml"
    behavior.write_bytes('schema = 1\nname = "b"\nsummary = "Naïve."\n'.encode("latin-1"))
    plain = Prompts("{claim}", "", "Yes", "No")
    with pytest.raises(ws.WsError, match=r"p.toml line 2 is not UTF-8: byte 0xef at position 13"):
        load_prompts(plain, prompts, {})
    with pytest.raises(ws.WsError, match=r"b.toml: line 3: .* not UTF-8: byte 0xef at position 14"):
        ws.load_behavior(str(behavior))
    prompts.write_text('\ufeffagree = "Right"\n', encoding="utf-8")
    assert load_prompts(plain, prompts, {}).agree == "Right"
