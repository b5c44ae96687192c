"""Publishing: a vector and its card as a repository on the hub, which `SteeringVector.load("user/name")` reads back.

`ws export push user/name` sends the saved vector's own files, weights bit for bit, with a model card; `--dry-run` shows
what would be sent. What names a folder of this machine is cut down to the folder's name first.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from tabulate import tabulate

from ws import console
from ws.diff import CALIBRATION, MANIFEST, VECTOR_FILES, read_units
from ws.errors import WsError
from ws.export.card import Subject, describe, stale_evaluations, vector_card
from ws.export.source import folder_of, vector_of
from ws.files.places import FolderKind
from ws.files.public import is_local, public, public_name
from ws.files.reading import read_json
from ws.files.runs import CARD, RUN_MANIFEST, atomic_folder, write_json, write_text
from ws.lm import hub
from ws.options.use import PushOptions as PushOptions

PEFT_CONFIG = "adapter_config.json"
KIND = FolderKind("not a vector with its card", (MANIFEST, CARD), (*VECTOR_FILES, CARD))


def prepare(about: Subject, source: Path, folder: Path) -> list[Path]:
    """Write what is published into `folder`, all at once: the vector's files, and the card.

    Args:
        about: what the card says.
        source: where the vector was saved.
        folder: the place; replaced when it holds a vector with its card.

    Returns:
        The files, in order of their names.

    Raises:
        WsError: the source was not saved by `SteeringVector.save`, or the folder holds something else.
    """
    if not (source / MANIFEST).is_file():
        raise WsError(f"{source} is a plain PEFT adapter; load it as a vector and save that, then push the result.")
    if (source / CALIBRATION).exists():
        read_units(source / CALIBRATION)  # what cannot be read is not sent
    with atomic_folder(folder, KIND) as part:
        for name in VECTOR_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, part / name)
        for name in (MANIFEST, CALIBRATION, PEFT_CONFIG):
            if (part / name).is_file():
                _clean(part / name)
        write_text(part / CARD, str(vector_card(about)))
    return sorted(set(folder.iterdir()) - set(KIND.others(folder)))


def _clean(file: Path) -> None:
    """Take this machine's folders out of a JSON file; one that names none keeps its bytes."""
    record = read_json(file, dict[str, Any], "make the vector again")
    cleaned = public(record)
    if file.name == MANIFEST:
        cleaned["base"]["id"] = public_name(record["base"]["id"])
    if file.name == PEFT_CONFIG and record.get("base_model_name_or_path"):
        cleaned["base_model_name_or_path"] = public_name(record["base_model_name_or_path"])
    if cleaned != record:
        write_json(file, cleaned)


def main(options: PushOptions) -> None:
    """The command `ws export push`."""
    o = options
    hub.check_name(o.repo)
    source = folder_of(o)
    behavior = o.behavior if o.behavior.endswith(".toml") else None
    if o.to is not None:
        KIND.require(o.to)
    about = describe(vector_of(o), o.repo, _run(o, source), behavior, o.license)
    with tempfile.TemporaryDirectory() as scratch:
        folder = o.to or Path(scratch) / "vector"
        files = prepare(about, source, folder)
        _warn(about)
        sizes = {f.name: f.stat().st_size for f in files}
        table = tabulate([[n, f"{s:,}"] for n, s in sizes.items()], ["file", "bytes"], colalign=("left", "right"))
        if o.dry_run:
            text = (folder / CARD).read_text(encoding="utf-8")
            card = f"the card is {folder / CARD}" if o.to else f"the card:\n\n{text}"
            data = {"sent": False, "repo": o.repo, "bytes": sizes, "card": text}
            table = f"{table}\n\nNothing was sent to {o.repo}; {card}"
            console.show(console.Result(table, data, files if o.to else ()))
            return
        address = hub.send(folder, o.repo, o.message, o.private, replaces=VECTOR_FILES)
    data = {"sent": True, "repo": o.repo, "bytes": sizes, "address": address}
    console.show(console.Result(f"{table}\n\nin {address}", data, (), f'ws.SteeringVector.load("{o.repo}")'))


def _run(options: PushOptions, source: Path) -> Path | None:
    """The run that the vector is of: the one asked for, or the one whose folder it lies in."""
    if options.run_folder is None and not (source.name == "vector" and (source.parent / RUN_MANIFEST).is_file()):
        return None
    return source.parent


def _warn(about: Subject) -> None:
    """Say what a reader of the card will miss."""
    base = about.vector.base_id
    if is_local(base):
        console.warn(
            f"the base {base} is a folder of this machine and is published as {public_name(base)!r}; add to the "
            "card where others can get it."
        )
    if stale := stale_evaluations(about):
        console.warn(f"the tables of {', '.join(stale)} are of another vector or tokenizer and left off the card.")


if __name__ == "__main__":
    console.run(main, PushOptions, "python -m ws.export.push")
