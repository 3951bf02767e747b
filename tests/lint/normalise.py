"""Record notebooks: run them from a fresh kernel, and write them in one normal form.

    python -m tests.lint.normalise PATH…              only the form
    python -m tests.lint.normalise --execute PATH…    run from top to bottom first; in the lab VM only

A notebook is rewritten only when every cell did what its tags say. PATH is a notebook or a directory.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import nbformat
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[2]
METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    # Without this lexer every `!command` is a warning of the site's build.
    "language_info": {"name": "python", "pygments_lexer": "ipython3"},
}
# jupyter: cell is folded in JupyterLab; mystnb: alt text on the site; nbval: why an output is not compared.
CELL_METADATA = ("jupyter", "mystnb", "nbval", "tags")
ANSI = re.compile(r"\x1b\[[0-9;]*m")


class RecordingError(Exception):
    """A notebook could not be recorded; its file is as it was."""


def notebooks(paths: Iterable[Path]) -> Iterator[Path]:
    """The notebooks named, and those in the directories named, without checkpoints and build output."""
    for path in paths:
        if path.is_dir():
            found = sorted(path.rglob("*.ipynb"))
            yield from (file for file in found if not {".ipynb_checkpoints", "_build"} & set(file.parts))
        else:
            yield path


def dumps(book: NotebookNode) -> str:
    """The one way in which a notebook stands in its file."""
    return str(nbformat.writes(book, version=4, indent=1)).rstrip("\n") + "\n"


def normalise(book: NotebookNode) -> NotebookNode:
    """Take out of a notebook what differs from run to run or from editor to editor; in place."""
    book.metadata = nbformat.from_dict(METADATA)
    book.nbformat, book.nbformat_minor = 4, 5
    taken: set[str] = set()
    for cell in book.cells:
        cell.metadata = nbformat.from_dict({key: cell.metadata[key] for key in CELL_METADATA if cell.metadata.get(key)})
        cell.source = "\n".join(line.rstrip() for line in cell.source.strip("\n").split("\n"))
        cell.id = _id(cell, taken)
    executed = [cell for cell in book.cells if cell.cell_type == "code"]
    for number, cell in enumerate(executed, 1):
        if cell.execution_count is not None:
            cell.execution_count = number
        cell.outputs = list(_merged(_output(output, cell.execution_count) for output in cell.outputs))
        _describe_images(cell)
    return book


def _id(cell: NotebookNode, taken: set[str]) -> str:
    """The cell's own id (nbformat 4.5), or one made from its text where it has none or shares it."""
    wanted, number = str(cell.get("id", "")), 0
    while not wanted or wanted in taken:
        wanted = hashlib.sha256(f"{cell.source}{number}".encode()).hexdigest()[:8]
        number += 1
    taken.add(wanted)
    return wanted


def _output(output: NotebookNode, count: int | None) -> NotebookNode:
    if output.output_type == "execute_result":
        output.execution_count = count
    if output.output_type in ("execute_result", "display_data"):
        sizes = {mime: value for mime, value in output.metadata.items() if mime.startswith("image/")}
        output.metadata = nbformat.from_dict(sizes)
    if output.output_type == "error":
        output.traceback = list(_own_frames(output.traceback))
    return output


def _own_frames(traceback: Iterable[str]) -> Iterator[str]:
    """The lines of the cell and the error itself, without the places inside libraries and without colours."""
    for part in traceback:
        text = ANSI.sub("", part)
        if not text.startswith("File "):
            # "Cell In[7]" counts runs of the kernel, not cells of the page.
            yield re.sub(r"Cell In\[\d+\]", "Cell", text)


def _merged(outputs: Iterable[NotebookNode]) -> Iterator[NotebookNode]:
    """One stream output where the kernel happened to flush several in a row."""
    last: NotebookNode | None = None
    for output in outputs:
        if last is not None and output.output_type == last.output_type == "stream" and output.name == last.name:
            last.text += output.text
            continue
        if last is not None:
            yield last
        last = output
    if last is not None:
        yield last


def _describe_images(cell: NotebookNode) -> None:
    """The site takes an image's alt text from the cell; labs.show says it as text/plain."""
    for output in cell.outputs:
        data = output.get("data", {})
        if "image/png" in data and "text/plain" in data and not data["text/plain"].startswith("<"):
            image = cell.metadata.get("mystnb", {}).get("image", {}) | {"alt": data["text/plain"]}
            cell.metadata.mystnb = nbformat.from_dict(cell.metadata.get("mystnb", {}) | {"image": image})


def execute(path: Path, timeout: float) -> NotebookNode:
    """Run every cell in a fresh kernel, in the notebook's directory.

    Args:
        path: the notebook.
        timeout: seconds for one cell.

    Raises:
        RecordingError: a cell failed, did not fail although it should, or did not end in time.
    """
    from nbclient import NotebookClient  # only where something is executed
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    book = _read(path)
    for cell in book.cells:
        cell.pop("outputs", None) if cell.cell_type != "code" else cell.update(outputs=[], execution_count=None)
    client = NotebookClient(book, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": path.parent}})
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    try:
        client.execute(env=os.environ | {"PYTHONPATH": search})
    except CellExecutionError as error:
        raise RecordingError(f"{path}: cell {_failed(book)}: {ANSI.sub('', str(error)).strip()}") from None
    except (CellTimeoutError, DeadKernelError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RecordingError(f"{path}: cell {_running(book)}: {type(error).__name__}: {reason}") from None
    for number, cell in enumerate(book.cells, 1):
        if "raises-exception" in cell.metadata.get("tags", ()) and not _errors(cell):
            raise RecordingError(f"{path}: cell {number}: tagged raises-exception, and raised none")
    return book


def _errors(cell: NotebookNode) -> list[NotebookNode]:
    return [output for output in cell.get("outputs", ()) if output.output_type == "error"]


def _failed(book: NotebookNode) -> int:
    """The number, from 1 and Markdown counted, of the cell that raised although no tag says so."""
    return next(
        number
        for number, cell in enumerate(book.cells, 1)
        if _errors(cell) and "raises-exception" not in cell.metadata.get("tags", ())
    )


def _running(book: NotebookNode) -> int:
    """The number of the last cell that was begun."""
    begun = [number for number, cell in enumerate(book.cells, 1) if cell.get("metadata", {}).get("execution")]
    return begun[-1] if begun else 1


def _read(path: Path) -> NotebookNode:
    try:
        book: NotebookNode = nbformat.read(path, as_version=4)
    except (OSError, nbformat.reader.NotJSONError, nbformat.ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise RecordingError(f"{path}: not a notebook that can be read: {reason}") from None
    return book


def record(path: Path, *, run: bool, timeout: float) -> bool:
    """Write the notebook anew if anything changed; whether it did."""
    text = dumps(normalise(execute(path, timeout) if run else _read(path)))
    if path.read_text(encoding="utf-8") == text:
        return False
    new = path.with_name(f".{path.name}.new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)
    return True


def main(arguments: list[str] | None = None) -> int:
    """Record every notebook named; 1 if one could not be recorded."""
    parser = argparse.ArgumentParser(prog="python -m tests.lint.normalise", description=str(__doc__).splitlines()[0])
    parser.add_argument("paths", nargs="+", type=Path)
    parser.add_argument("--execute", action="store_true", help="run every cell first, from a fresh kernel")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one cell (default: %(default)g)")
    options = parser.parse_args(arguments)
    status = 0
    for path in notebooks(options.paths):
        try:
            changed = record(path, run=options.execute, timeout=options.timeout)
        except RecordingError as error:
            print(error, file=sys.stderr)
            status = 1
        else:
            print(f"{path}: {'written' if changed else 'unchanged'}", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
