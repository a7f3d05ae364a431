"""Every notebook runs from a clean kernel, and what is committed of it was printed and drawn by such a run."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode

from notebooks.execute import FOLDER, METADATA, execute

NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
PICTURE = "image/png"
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:home|work|root|tmp|Users)\b")
LINK = re.compile(r"\]\(([\w./-]+)\)")

# What a notebook says to show, as lines of its output: regular expressions, each for at least one whole line.
CLAIMS = {
    "01_first_tour": (
        r"Question: What does Nora have\? Answer: glass bell",
        r"4 +same story: True .*",
        r"12 stories of 200 tokens, 4 switches on the way",
        r"1 distinct text\(s\): .*",
        r"compiles after warm-up: 0",
    ),
    # A machine that is slow enough goes narrow by way of 2+2.
    "02_watching_a_burst": (
        r"72 answers, 1728 tokens",
        r"\d+\. 4 -> (2\+2|1\+1\+1\+1): .* running requests moved",
    ),
    "03_inside_zero_copy": (
        r"4 +(\d+) of \1 views inside resident buffers",
        r"a copy is inside: False",
        r" +4 +6 +([\d,]+) of \1 +0 +0",
        r"donated: False   aliased +0 bytes   new arrays: \['copy'\]",
        r"pools where they were:   True",
        r"weights where they were: True",
        r"compiles since start:    0",
    ),
    "04_your_own_policy": (
        r"policy in force: patient",
        r" +[24+]+ -> 1\+1\+1\+1 +\d+ requests, so groups of 1",
        r"policy in force: load_adaptive",
    ),
    "05_reading_results": (r"weight bytes moved: 0", r"the same number of KV bytes .* in every step: True"),
}

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def pictures(notebook: NotebookNode) -> list[int]:
    """How many each code cell drew."""
    return [sum(PICTURE in output.get("data", {}) for output in cell.outputs) for cell in code_cells(notebook)]


def texts(notebook: NotebookNode) -> list[str]:
    """All that is written in it, by people and by cells."""
    found = [cell.source for cell in notebook.cells]
    for output in (output for cell in code_cells(notebook) for output in cell.outputs):
        found += [output.get("text", ""), *output.get("traceback", [])]
        found += [str(text) for kind, text in output.get("data", {}).items() if kind != PICTURE]
    return found


def complaints(notebook: NotebookNode) -> list[str]:
    """What no run should leave behind: cells that failed, did not run or warn, and paths of the machine."""
    cells = code_cells(notebook)
    found = [] if [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)) else ["cells left out"]
    for output in (output for cell in cells for output in cell.outputs):
        if output.output_type == "error":
            found.append(f"{output.ename}: {output.evalue}")
        elif output.get("name") == "stderr" and "Warning" in output.text:
            found.append(output.text)
    return found + [text for text in texts(notebook) if MACHINE_PATH.search(text)]


def unshown_claims(notebook: NotebookNode, stem: str) -> list[str]:
    lines = [
        line for cell in code_cells(notebook) for output in cell.outputs for line in output.get("text", "").split("\n")
    ]
    return [claim for claim in CLAIMS[stem] if not any(re.fullmatch(claim, line) for line in lines)]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For programs of this worker's notebooks alone: jax warns of a file that another process still writes."""
    return tmp_path_factory.mktemp("compiled")


@pytest.mark.slow
@each_notebook
def test_it_runs_from_a_clean_kernel(
    path: Path, compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLY_JAX_CACHE_DIR", str(compiled))
    for name in ("XLA_FLAGS", "NPROC"):  # the devices of the tests: a notebook has to configure its own
        monkeypatch.delenv(name, raising=False)
    executed = execute(Path(shutil.copy(path, tmp_path)))
    assert complaints(executed) == []
    assert unshown_claims(executed, path.stem) == []
    assert pictures(executed) == pictures(nbformat.read(path, as_version=4)), "outputs are old: make notebooks"


@each_notebook
def test_it_is_committed_with_the_outputs_of_a_whole_run(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata == METADATA
    assert complaints(notebook) == []
    assert unshown_claims(notebook, path.stem) == []
    assert sum(pictures(notebook)) > 0


@each_notebook
def test_its_links_lead_somewhere_and_the_readme_lists_it(path: Path) -> None:
    links = [link for text in texts(nbformat.read(path, as_version=4)) for link in LINK.findall(text)]
    assert links, "no way to the next one"
    assert [link for link in links if not (FOLDER / link).exists()] == []
    assert f"notebooks/{path.name}" in (FOLDER.parent / "README.md").read_text(encoding="utf-8")


def test_a_bad_notebook_is_noticed() -> None:
    failed = nbformat.v4.new_output("error", ename="ValueError", evalue="no", traceback=["in /home/me/x.py"])
    warned = nbformat.v4.new_output("stream", name="stderr", text="UserWarning: old")
    cell = nbformat.v4.new_code_cell("1 / 0", outputs=[failed, warned], execution_count=2)
    notebook = nbformat.v4.new_notebook(cells=[cell])
    assert complaints(notebook) == ["cells left out", "ValueError: no", "UserWarning: old", "in /home/me/x.py"]
