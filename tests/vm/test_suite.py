"""How machines share a suite: each file is run once, whole, by one of them; whatever is not run is an error."""

import re
import sys
import threading
import time
from pathlib import Path

import nbformat
import pytest
from nbformat import v4

from vm import suite
from vm.steps import LabError

FILES = {"test_a.py": 3, "test_b.py": 1, "test_c.py": 2}
COUNTED = """
import pathlib, pytest

@pytest.fixture(scope="module", autouse=True)
def once():
    with pathlib.Path({log!r}).open("a") as log:
        log.write("+" + __file__.rpartition("/")[2] + "\\n")
    yield

@pytest.mark.parametrize("number", range({count}))
def test_it(number):
    assert number != {bad}
"""


@pytest.fixture
def place(tmp_path):
    """Three files of tests, which note when their module's fixture is set up."""
    write(tmp_path)
    return tmp_path


def write(place, bad=-1):
    for name, count in FILES.items():
        (place / name).write_text(COUNTED.format(log=str(place / "log"), count=count, bad=bad))


def session(place, *extra):
    return [sys.executable, "-m", "pytest", "-p", "tests.share", "-c", "/dev/null", f"--rootdir={place}", *extra, place]


def sizes(path):
    return False, FILES[path]


def comes_about(condition, seconds):
    """Whether it does, in that time."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return bool(condition())


def alive(pid):
    """proc_pid_stat(5): neither gone nor a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def passed(output):
    return sorted(int(number) for number in re.findall(r"(\d+) passed", output))


def test_one_machine_runs_all_the_longest_first(place, capsys):
    handout = suite.Handout(sizes)
    assert suite.Lanes().share(1, session(place), handout) == 0
    output = capsys.readouterr().out
    assert passed(output) == [6]
    assert re.findall(r"^  (\S+): \d+ s in lab machine 1$", output, re.MULTILINE) == [*sorted(FILES, key=sizes)][::-1]
    assert (place / "log").read_text().split() == ["+test_a.py", "+test_c.py", "+test_b.py"]
    assert handout.left() == []


def test_notebooks_and_the_long_tests_are_given_out_before_the_rest():
    offered = ["tests/test_registry.py", *suite.LONG, "book/01-container/01-process.ipynb"]
    handout = suite.Handout(suite._weight)
    given = [handout.next(offered) for _ in offered]
    assert set(given[: len(suite.LONG) + 1]) == {*suite.LONG, "book/01-container/01-process.ipynb"}


def test_two_machines_run_each_file_once(place, capsys):
    handout, lanes = suite.Handout(sizes), suite.Lanes()
    assert handout.next(list(FILES)) == "test_a.py"  # the other machine's
    assert lanes.share(2, session(place), handout) == 0
    assert passed(capsys.readouterr().out) == [3]
    assert sorted((place / "log").read_text().split()) == ["+test_b.py", "+test_c.py"]


def test_a_failure_is_told_at_once_and_at_the_end_in_one_piece(place, capsys):
    write(place, bad=0)
    assert suite.Lanes().share(1, session(place, "-ra"), suite.Handout(sizes)) == 1
    meanwhile, _, ending = capsys.readouterr().out.partition("▸ lab machine 1 ends\n")
    assert re.search(r"^✗ test_a.py::test_it\[0\] \(call\)\n(.*\n)+.*assert 0 != 0", meanwhile, re.MULTILINE)
    assert re.search(r"^FAILED .*test_a.py::test_it\[0\]", ending, re.MULTILINE) and "3 failed, 3 passed" in ending


def test_a_file_that_cannot_be_collected_ends_it(place):
    (place / "test_b.py").write_text("import nothing_of_that_name\n")
    assert suite.Lanes().share(1, session(place), suite.Handout(sizes)) == 2


def test_a_machine_that_dies_fails_the_suite_and_leaves_are_named(place):
    handout = suite.Handout(sizes)
    (place / "test_a.py").write_text("import os\ndef test_it():\n    os.kill(os.getpid(), 9)\n")
    assert suite.Lanes().share(1, session(place), handout) == -9
    assert handout.left() == ["test_b.py", "test_c.py"]


def test_after_the_end_nothing_begins(place):
    lanes = suite.Lanes()
    lanes.end()
    with pytest.raises(LabError, match="the other lane broke"):
        lanes.share(1, session(place), suite.Handout(sizes))
    with pytest.raises(LabError, match="the other lane broke"):
        lanes.guest(1, suite.Handout(sizes), suite.Rest([], b""))
    assert not (place / "log").exists()


def test_a_cell_belongs_to_the_machine_and_a_marked_test_to_it_alone(place, capsys):
    (place / "test_a.py").write_text("import pytest\n@pytest.mark.machine\ndef test_it():\n    pass\n")
    (place / "book.ipynb").write_text(
        nbformat.writes(v4.new_notebook(cells=[v4.new_code_cell("one = 1", execution_count=1)]))
    )
    handout = suite.Handout(lambda path: (path.endswith(".ipynb"), 1))
    assert suite.Lanes().share(1, session(place, "--nbval", "--nbval-current-env", "-m", "machine"), handout) == 0
    output = capsys.readouterr().out
    assert "2 passed, 3 deselected" in output and handout.known == {"book.ipynb", "test_a.py"}


def test_the_end_takes_what_a_command_started_too(place):
    """A test's own child ends with the suite."""
    (place / "test_a.py").write_text(
        f"import subprocess\ndef test_it():\n    subprocess.run(['sh', '-c', 'echo $$ >{place}/pid; exec sleep 600'])\n"
    )
    lanes, pid = suite.Lanes(), place / "pid"
    running = threading.Thread(target=lanes.share, args=(1, session(place), suite.Handout(sizes)))
    running.start()
    assert comes_about(lambda: pid.exists() and pid.read_text(), 60)
    lanes.end()
    running.join(30)
    assert comes_about(lambda: not alive(pid.read_text().strip()), 10)  # SIGKILL is sent, and then the kernel's work
