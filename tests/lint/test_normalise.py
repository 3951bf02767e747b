"""The recorder: what it writes is the same every time, and a failing notebook is left alone."""

import json

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from tests.lint import normalise
from tests.lint.bad import make


def write(path, *cells, **metadata):
    path.write_text(nbformat.writes(new_notebook(cells=list(cells), metadata=metadata)))
    return path


def cell(source, *tags, **metadata):
    return new_code_cell(source, metadata=({"tags": list(tags)} if tags else {}) | metadata)


def run(path, *options):
    return normalise.main(["--execute", "--timeout", "60", *options, str(path)])


def test_recording_runs_from_the_top_in_the_notebooks_directory(tmp_path, capsys):
    here = cell("from pathlib import Path\nprint(Path.cwd().name)", editable=True)
    path = write(tmp_path / "a.ipynb", new_markdown_cell("# a"), here, cell("6 * 7"), authors=["me"])
    assert run(path) == 0
    assert capsys.readouterr().out == f"{path}: written\n"
    book = nbformat.read(path, as_version=4)
    assert book.metadata == normalise.METADATA
    assert [c.execution_count for c in book.cells[1:]] == [1, 2]
    assert book.cells[1].outputs[0].text == f"{tmp_path.name}\n"
    assert book.cells[1].metadata == {}
    assert book.cells[2].outputs[0].data == {"text/plain": "42"}


def test_recording_twice_changes_nothing(tmp_path, capsys):
    path = write(
        tmp_path / "a.ipynb",
        cell("import sys\nprint(1, flush=True)\nprint(2, file=sys.stderr)\n1 / 0", "raises-exception"),
    )
    assert run(path) == 0
    first = path.read_bytes()
    assert first.endswith(b"}\n")
    assert run(path) == 0
    assert path.read_bytes() == first
    assert "unchanged" in capsys.readouterr().out


def test_a_stored_error_names_no_file_and_has_no_colours(tmp_path):
    path = write(tmp_path / "a.ipynb", cell("import json\njson.loads('{')", "raises-exception"))
    assert run(path) == 0
    stored = "\n".join(nbformat.read(path, as_version=4).cells[0].outputs[0].traceback)
    assert "json.loads" in stored
    assert "JSONDecodeError: " in stored
    assert "decoder.py" not in stored
    assert "\x1b" not in stored


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ([cell("1"), cell("1 / 0")], "cell 2: "),
        ([cell("1", "raises-exception")], "cell 1: tagged raises-exception, and raised none"),
        ([cell("1"), cell("import os\nos._exit(1)")], "DeadKernelError"),
    ],
)
def test_a_cell_that_does_not_do_what_it_should_leaves_the_file_alone(tmp_path, capsys, cells, message):
    path = write(tmp_path / "a.ipynb", *cells)
    before = path.read_bytes()
    assert run(path) == 1
    assert message in capsys.readouterr().err
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.ipynb"]


def test_the_error_shows_the_line_that_failed(tmp_path, capsys):
    run(write(tmp_path / "a.ipynb", cell("zero = 0\nprint(1 / zero)")))
    err = capsys.readouterr().err
    assert "print(1 / zero)" in err
    assert "ZeroDivisionError" in err


def test_a_cell_that_does_not_end_is_named(tmp_path, capsys):
    path = write(tmp_path / "a.ipynb", cell("1"), cell("import time\ntime.sleep(60)"))
    assert run(path, "--timeout", "1") == 1
    assert "cell 2: CellTimeoutError" in capsys.readouterr().err


def test_what_is_no_notebook_is_named(tmp_path, capsys):
    (tmp_path / "a.ipynb").write_text("{")
    assert normalise.main([str(tmp_path)]) == 1
    assert "a.ipynb: not a notebook that can be read" in capsys.readouterr().err


def test_without_execute_nothing_is_run_and_nothing_pretends_to_have_been():
    book = new_notebook(cells=[cell("1 / 0")])
    assert normalise.normalise(book).cells[0].execution_count is None


def test_streams_are_joined_and_pictures_get_their_alt_text():
    parts = [new_output("stream", name="stdout", text=text) for text in ("a\n", "b\n")]
    drawn = new_output(
        "display_data",
        data={"image/png": make.PIXEL, "text/plain": "Plot of x"},
        metadata={"needs_background": "light"},
    )
    book = normalise.normalise(new_notebook(cells=[new_code_cell("f()", outputs=[*parts, drawn], execution_count=9)]))
    (code,) = book.cells
    assert [output.output_type for output in code.outputs] == ["stream", "display_data"]
    assert code.outputs[0].text == "a\nb\n"
    assert code.metadata.mystnb.image.alt == "Plot of x"
    assert code.outputs[1].metadata == {}
    assert code.execution_count == 1


def test_equal_cells_get_different_ids_and_keep_them():
    book = new_notebook(cells=[cell("1"), cell("1")])
    for code in book.cells:
        del code["id"]
    first = [code.id for code in normalise.normalise(book).cells]
    assert len(set(first)) == 2
    assert [code.id for code in normalise.normalise(book).cells] == first


def test_the_form_is_json_with_sorted_keys_and_one_space():
    text = normalise.dumps(normalise.normalise(make.good()))
    assert text == json.dumps(json.loads(text), indent=1, sort_keys=True, ensure_ascii=False) + "\n"
