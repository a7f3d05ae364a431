"""Runs the notebooks from a clean kernel, and keeps what they printed and drew: ``make notebooks``."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import nbformat
from ipykernel.kernelspec import make_ipkernel_cmd
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).parent
# Of one cell: only something that waits for ever takes this long.
TIMEOUT_SECONDS = 600
# What the kernel writes here besides would differ with every Python version.
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def execute(path: Path) -> NotebookNode:
    """The notebook, run by the Python that runs this, in the notebooks' folder; its file stays as it is.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    manager = AsyncKernelManager(kernel_name="python3")
    assert manager.kernel_spec is not None
    manager.kernel_spec.argv = make_ipkernel_cmd(extra_arguments=["--log-level=ERROR"])
    resources = {"metadata": {"path": str(FOLDER)}}
    client = NotebookClient(
        notebook,
        km=manager,
        timeout=TIMEOUT_SECONDS,
        record_timing=False,
        coalesce_streams=True,
        resources=resources,
    )
    client.execute()
    notebook.metadata = nbformat.from_dict(METADATA)
    return notebook


def main() -> None:
    """Runs the notebooks named on the command line, or all of them."""
    for path in [Path(name) for name in sys.argv[1:]] or sorted(FOLDER.glob("*.ipynb")):
        started = time.perf_counter()
        nbformat.write(execute(path), path)
        print(f"{path.name}: {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
