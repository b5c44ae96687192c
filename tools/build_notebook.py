"""Execute `docs/notebook.ipynb` and store what came out in it.

`uv run python tools/build_notebook.py` runs the cells with the interpreter it is called with, in an empty folder (or in
`--folder`, where a finished run in `out/` saves the training), and writes the notebook back: outputs without progress
lines, times and metadata of machines, so that a page can show them and a difference between two versions has a meaning.
The cells themselves are edited by hand, in the notebook.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbformat import NotebookNode

NOTEBOOK = Path(__file__).parents[1] / "docs" / "notebook.ipynb"
EXECUTED = "executed_sources_sha256"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def read(file: Path = NOTEBOOK) -> NotebookNode:
    """A notebook from its file."""
    return nbformat.read(file, as_version=4)


def execute(notebook: NotebookNode, folder: Path, timeout: int = 300) -> NotebookNode:
    """A copy of the notebook, executed in a folder.

    Args:
        notebook: stays as it is.
        folder: the working folder of the cells; the kernel's own files go there too.
        timeout: seconds a cell may take.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised an error.
    """
    made = copy.deepcopy(notebook)
    # No installed kernel is looked for: the interpreter that runs this is the one that the kernel runs.
    kernels = KernelSpecManager(kernel_dirs=[])
    manager = AsyncKernelManager(
        kernel_name="python3", kernel_spec_manager=kernels, connection_file=str(folder / ".kernel.json")
    )
    environment = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    # One thread, so that sums are taken in the same order on every machine; and nobody's own settings of IPython.
    environment |= {"OMP_NUM_THREADS": "1", "IPYTHONDIR": str(folder / ".ipython")}
    client = NotebookClient(made, km=manager, timeout=timeout, resources={"metadata": {"path": str(folder)}})
    client.execute(env=environment, cleanup_kc=True)
    return made


def clean(notebook: NotebookNode) -> NotebookNode:
    """A copy without what depends on the machine or the moment: stderr, times, and metadata of tools."""
    made = copy.deepcopy(notebook)
    made.metadata = NotebookNode(METADATA | {EXECUTED: sources_hash(notebook)})
    for cell in made.cells:
        cell.metadata = NotebookNode()
        if cell.cell_type == "code":
            cell.outputs = _kept(cell.outputs)
    return made


def _kept(outputs: Sequence[NotebookNode]) -> list[NotebookNode]:
    """Without stderr; what reached stdout in several portions becomes one text."""
    found: list[NotebookNode] = []
    for output in outputs:
        if output.get("name") == "stderr":
            continue
        if output.get("name") == "stdout" and found and found[-1].get("name") == "stdout":
            found[-1].text += output.text
            continue
        if "metadata" in output:
            output.metadata = NotebookNode()
        found.append(output)
    return found


def sources_hash(notebook: NotebookNode) -> str:
    """Hex SHA-256 of the code cells."""
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256(json.dumps(sources).encode()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the cells run; a temporary one if not given")
    o = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        made = clean(execute(read(), (o.folder or Path(scratch)).resolve()))
    nbformat.validate(made)
    nbformat.write(made, NOTEBOOK)
    print(f"{NOTEBOOK}: {NOTEBOOK.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
