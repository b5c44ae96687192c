"""Rows of an evaluation set: from the hub, from a local file or folder, or from the bundled pocket versions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import polars as pl
from huggingface_hub import constants

from ws.console import say
from ws.errors import WsError
from ws.models import hub_is_out_of_reach

MAX_BAD_SHARE = 0.05
_READERS: dict[str, Callable[[Path], pl.DataFrame]] = {
    ".jsonl": pl.read_ndjson,
    ".parquet": pl.read_parquet,
    ".csv": pl.read_csv,
}

Row = Mapping[str, Any]


def read_rows(
    source: str, name: str, columns: Sequence[str], hub: tuple[str, str | None], others: Sequence[str] = ()
) -> list[Row]:
    """The rows of one table, with at least `columns`.

    Args:
        source: `pocket`, a hub id, a folder with one file whose name ends in `name` (`.jsonl`, `.parquet`, `.csv`), or
            a file. A file whose name ends in one of `others` is that table, and this one is looked for beside it.
        name: what the table is called in a folder, such as `other_violate`.
        columns: that must be there.
        hub: configuration and split of the hub's data set; a split of None stands for the only one there is.
        others: what the set's other tables are called.

    Raises:
        WsError: no such file, several that fit, missing columns, an empty table, or a hub that cannot be read.
    """
    path = Path(source).expanduser()
    if source == "pocket":
        found = _read_folder(Path(str(files("ws") / "pocket" / "data")), name)
    elif path.is_dir():
        found = _read_folder(path, name)
    elif path.is_file():
        found = _read_folder(path.parent, name) if path.stem.endswith(tuple(others)) and others else _read_file(path)
    elif source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise WsError(
            f"There is no file or folder {source}; --dataset takes one, a hub id such as owner/name, or pocket."
        )
    else:
        found = _read_hub(source, *hub)
    missing = [c for c in columns if c not in found.columns]
    if missing:
        raise WsError(f"The table {name} of {source} lacks the columns {', '.join(missing)}; it has {found.columns}.")
    if found.is_empty():
        raise WsError(f"The table {name} of {source} is empty.")
    return list(found.to_dicts())


def _read_folder(folder: Path, name: str) -> pl.DataFrame:
    fitting = [f for f in sorted(folder.iterdir()) if f.suffix in _READERS and f.stem.endswith(name)]
    if len(fitting) != 1:
        what = "no file" if not fitting else f"{len(fitting)} files"
        raise WsError(f"{folder} has {what} ending in {name} (.jsonl, .parquet or .csv); there must be one.")
    return _read_file(fitting[0])


def _read_file(file: Path) -> pl.DataFrame:
    if file.suffix not in _READERS:
        raise WsError(f"{file} is not a table that can be read; give .jsonl, .parquet or .csv.")
    try:
        return _READERS[file.suffix](file)
    except pl.exceptions.PolarsError as problem:
        raise WsError(f"{file} cannot be read ({str(problem).splitlines()[0]}).") from problem


def _read_hub(source: str, config: str, split: str | None) -> pl.DataFrame:
    import datasets  # takes seconds, and is only needed here

    if hub_is_out_of_reach():  # then the local cache serves, or nothing; retrying for minutes would not help
        datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        found = datasets.load_dataset(source, config, split=split)
        if split is None:
            (found,) = found.values()
        return pl.from_arrow(found.data.table)  # type: ignore[return-value]
    except Exception as problem:  # the library raises many kinds for one cause: the table could not be had
        place = f"{config}, {split}" if split else config
        raise WsError(
            f"The data set {source} ({place}) could not be read from the hub ({type(problem).__name__}); "
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
