"""Rows of an evaluation set: from the hub, a local file or folder, or the bundled versions; and draws of them."""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from ws.console import say
from ws.errors import WsError, require_characters
from ws.files.reading import json_lines, parse_csv, read_bytes

CHOOSE = "give another file or folder"  # what to do about a table that cannot be read
MAX_BAD_SHARE = 0.05
DRAW_SEED = 0
# The commits that published sets are read at unless another revision is asked for, where one is known.
PINNED = {"kellycyy/AIRiskDilemmas": "8674d1f5844c3909b05e06d9f30bbc2b7c753f39"}
Row = Mapping[str, Any]
Item = TypeVar("Item")


def read_rows(
    source: str,
    name: str,
    columns: Sequence[str],
    place: tuple[str, str | None],
    others: Sequence[str] = (),
    types: Mapping[str, type] | None = None,
    revision: str | None = None,
    prefer: str = "",
) -> list[Row]:
    """The rows of one table, with at least `columns`.

    Args:
        source: `pocket`, a hub id (`owner/name`, or `owner/name@revision`), a folder with one file whose name ends in
            `name` (`.jsonl`, `.parquet`, `.csv`), or a file. A file whose name ends in one of `others` is that table,
            and this one is looked for beside it.
        name: what the table is called in a folder, such as `other_violate`.
        columns: that must be there.
        place: configuration and split of the hub's data set; a split of None stands for the only one there is.
        others: what the set's other tables are called.
        types: of the columns that are no text (`bool`, `float`), for CSV files, which hold nothing but text.
        revision: of the hub's data set: a branch, tag or commit; None for the one that is pinned, else the main branch.
        prefer: where several files of a folder end in `name`, the one that ends in `<prefer>_<name>` is it.

    Raises:
        WsError: no such file, several that fit, one that is not UTF-8 or breaks its format (with the line), missing
            columns, an empty table, or a hub that cannot be read.
    """
    path, types = Path(source).expanduser(), types or {}
    require_hub(source, "--revision", revision)
    if source == "pocket":
        rows = _read_file(_file_in(Path(str(files("ws") / "pocket" / "data")), name, prefer), types)
    elif path.is_dir():
        rows = _read_file(_file_in(path, name, prefer), types)
    elif path.is_file():
        other = next((o for o in others if path.stem.endswith(o)), "")  # this table lies beside it, named alike
        prefix = path.stem.removesuffix(other).rstrip("_")
        rows = _read_file(_file_in(path.parent, name, prefix) if other else path, types)
    elif source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise WsError(
            f"There is no file or folder {source}; --dataset takes one, a hub id such as owner/name, or pocket."
        )
    else:
        rows = _read_hub(source, *place, revision)
    if not rows:
        raise WsError(f"The table {name} of {source} is empty.")
    there = list(dict.fromkeys(column for row in rows for column in row))
    missing = [c for c in columns if c not in there]
    if missing:
        raise WsError(f"The table {name} of {source} lacks the columns {', '.join(missing)}; it has {there}.")
    return [dict.fromkeys(there) | dict(row) for row in rows]


def single_table(source: str) -> str:
    """The only table in a folder, whatever it is called; any other source, and a folder with several, as it is."""
    path = Path(source).expanduser()
    files = [file for file in sorted(path.iterdir()) if file.suffix in _READERS] if path.is_dir() else []
    return str(files[0]) if len(files) == 1 else source


def is_on_hub(source: str) -> bool:
    """Whether a source of rows names a data set on the hub, and nothing on this machine."""
    from ws.lm import hub  # its client takes most of a second, and only what the hub holds needs it

    return source != "pocket" and not Path(source).expanduser().exists() and hub.parse_id(source) is not None


def require_hub(source: str, option: str, value: object) -> None:
    """`WsError` where an option that only a data set on the hub has is given for another source; None is not given."""
    if value is not None and not is_on_hub(source):
        raise WsError(f"{option} is of a data set on the hub, and {source} is none.")


def revision_of(source: str, revision: str | None = None) -> str:
    """The revision of a data set on the hub that is read: the one asked for, else the pinned one, else `main`."""
    from ws.lm import hub

    name, at = hub.parse_id(source) or (source, None)
    return revision or at or PINNED.get(name) or "main"


def _file_in(folder: Path, name: str, prefer: str = "") -> Path:
    fitting = [f for f in sorted(folder.iterdir()) if f.suffix in _READERS and f.stem.endswith(name)]
    if len(fitting) > 1 and prefer:
        fitting = [f for f in fitting if f.stem.endswith(f"{prefer}_{name}")] or fitting
    if len(fitting) != 1:
        what = "no file" if not fitting else f"{len(fitting)} files"
        raise WsError(f"{folder} has {what} ending in {name} (.jsonl, .parquet or .csv); there must be one.")
    return fitting[0]


def _read_file(file: Path, types: Mapping[str, type]) -> list[Row]:
    if file.suffix not in _READERS:
        raise WsError(f"{file} is not a table that can be read; give .jsonl, .parquet or .csv.")
    return _READERS[file.suffix](file, types)


def _read_parquet(file: Path, types: Mapping[str, type]) -> list[Row]:
    _require_data_extra(f"The Parquet file {file}")
    import pyarrow
    from pyarrow import parquet

    try:
        return list(parquet.read_table(file).to_pylist())
    except (pyarrow.ArrowException, OSError) as problem:
        raise WsError(f"{file} cannot be read ({str(problem).splitlines()[0]}).") from problem


def _require_data_extra(what: str) -> None:
    """`WsError` where the libraries that read Arrow tables are not installed; they are larger than all the rest."""
    if find_spec("datasets") is None or find_spec("pyarrow") is None:
        raise WsError(
            f"{what} needs the packages datasets and pyarrow; install them with `uv sync --extra data` or "
            '`pip install "weight-steering[data]"`, or give a .jsonl or .csv file.'
        )


def _read_json_lines(file: Path, types: Mapping[str, type]) -> list[Row]:
    rows = list[Row]()
    for number, row in json_lines(read_bytes(file, CHOOSE), str(file)):
        for name, cell in row.items():  # JSON can write half of a character, the other formats cannot
            text = cell if isinstance(cell, str) else json.dumps(cell, ensure_ascii=False)
            require_characters(text, f"{file} line {number}: {name}")
        rows.append(row)
    return rows


def _read_csv(file: Path, types: Mapping[str, type]) -> list[Row]:
    """Rows of texts, None for an empty cell; those of `types` as what they are, where they can be read so."""
    rows = parse_csv(read_bytes(file, CHOOSE), str(file))
    return [{k: _typed(v, types.get(k, str)) if v else None for k, v in row.items()} for row in rows]


def _typed(text: str, kind: type) -> Any:
    """A cell as a truth value or a number; as it is where it is neither, for whoever checks the rows."""
    if kind is bool:
        return {"true": True, "false": False}.get(text.strip().lower(), text)
    if kind is float:
        try:
            return float(text)
        except ValueError:
            return text
    return text


_READERS: dict[str, Callable[[Path, Mapping[str, type]], list[Row]]] = {
    ".jsonl": _read_json_lines,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
}
SUFFIXES = tuple(_READERS)
_HALVES = re.compile("[\ud800-\udfff]")


def is_text(value: Any) -> bool:
    """Whether a cell is a text with something in it, and of whole characters."""
    return isinstance(value, str) and bool(value.strip()) and not _HALVES.search(value)


def _read_hub(source: str, config: str, split: str | None, revision: str | None = None) -> list[Row]:
    _require_data_extra(f"The data set {source} on the hub")
    import datasets
    from huggingface_hub import constants

    from ws.lm import hub

    if hub.hub_is_out_of_reach():  # then the local cache serves, or nothing; retrying for minutes would not help
        datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    name, _ = hub.parse_id(source) or (source, None)
    at = revision_of(source, revision)
    try:
        loaded = datasets.load_dataset(name, config, split=split, revision=at)
        if split is None:
            (loaded,) = loaded.values()
        return list(loaded.data.table.to_pylist())
    except Exception as problem:  # the library raises many kinds for one cause: the table could not be had
        place = f"{config}, {split}" if split else config
        pinned = f", at the pinned revision {at}; --revision main reads the newest" if at == PINNED.get(name) else ""
        raise WsError(
            f"The data set {source} ({place}{pinned}) could not be read from the hub ({type(problem).__name__}); "
            "check the name and the network, or pass --dataset a local folder, or --dataset pocket."
        ) from problem


def tolerate(bad: Sequence[str], total: int, where: str) -> None:
    """Name rows that break the schema on stderr; stop when they are more than `MAX_BAD_SHARE` of all."""
    if not bad:
        return
    named = "; ".join(bad[:5]) + (" ..." if len(bad) > 5 else "")
    text = f"{len(bad)} of {total} rows of {where} break the schema: {named}"
    if len(bad) > MAX_BAD_SHARE * total:
        raise WsError(f"{text}; at most {MAX_BAD_SHARE:.0%} may.")
    say(f"note: {text}; they are left out.")


# ---- a part of them -------------------------------------------------------------------------------------------------


def draw(
    items: Sequence[Item], limit: int | None, group: Callable[[Item], Hashable] = lambda item: None
) -> tuple[Item, ...]:
    """At most `limit` items, drawn by a fixed seed and evenly over their groups, in the order they had.

    Sets come sorted, so their first items are no sample. Every group gives as many as any other until it has no more.
    A larger limit holds all items of a smaller one, and the draw is the same on every machine: items are ranked by a
    hash of the seed and of their place.
    """
    if limit is None or limit >= len(items):
        return tuple(items)
    members = defaultdict(list)
    for place in sorted(range(len(items)), key=_shuffled):
        members[group(items[place])].append(place)
    rounds = sorted((turn, _shuffled(place), place) for m in members.values() for turn, place in enumerate(m))
    return tuple(items[place] for place in sorted(place for *_, place in rounds[:limit]))


def evenly(items: Sequence[Item], n: int) -> list[Item]:
    """`n` of the items, at even distances from the first one on; at most as many as there are."""
    return [items[i * len(items) // n] for i in range(n)]


def _shuffled(place: int) -> str:
    return hashlib.sha256(f"{DRAW_SEED} {place}".encode()).hexdigest()


def draw_fact(items: Sequence[Any], whole: Sequence[Any]) -> str:
    """What rows say of their items: `all`, or how many of how many were drawn by which seed."""
    return "all" if len(items) == len(whole) else f"{len(items)} of {len(whole)}, seed {DRAW_SEED}"
