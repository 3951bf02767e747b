"""The leak plugin itself: a leak of each kind, in a test and in a notebook, is reported where it was made."""

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from nbformat.v4 import new_code_cell, new_notebook

from labs import machine
from tests.lint.normalise import dumps

ROOT = Path(__file__).resolve().parents[1]
HELD = f"{machine.STATE}/leaked-netns"
SHARED = f"{machine.ROOTFS['busybox']}/leaked"


class Leak(NamedTuple):
    """Shell lines that leave something, and take it away; and how the report calls it."""

    make: str
    undo: str
    report: str


LEAKS = {
    "process": Leak(
        "setsid sleep 987 >/dev/null 2>&1 & echo $! >leaked.pid", "kill $(cat leaked.pid)", "+ process sleep 987"
    ),
    "mount": Leak("mount -t tmpfs leaked /mnt", "umount /mnt", "+ mount tmpfs /mnt"),
    "cgroup": Leak(f"mkdir -p {machine.CGROUP}/leaked", f"rmdir {machine.CGROUP}/leaked", "+ cgroup "),
    "netns": Leak(
        f"mkdir -p {machine.STATE} && touch {HELD} && unshare --net={HELD} true",
        f"umount {HELD}; rm {HELD}",
        "+ namespace net:[",
    ),
    "link": Leak("ip link add labs-leaked type bridge", "ip link delete labs-leaked", "+ link labs-leaked"),
    "file": Leak("touch /tmp/leaked", "rm /tmp/leaked", "+ file /tmp/leaked"),
    "rootfs": Leak(f"mkdir {SHARED}", f"rmdir {SHARED}", f"+ file {SHARED}"),
}
# Only looked for around a module or a notebook.
SLOW = {
    "nft": Leak("nft add table inet labs-leaked", "nft delete table inet labs-leaked", "+ nft table inet labs-leaked"),
    "image": Leak("docker tag busybox:lab leaked:lab", "docker rmi leaked:lab", "+ docker image "),
}


@pytest.fixture
def run(tmp_path):
    """Run pytest on what the test wrote into tmp_path; take all leaks away afterwards."""
    (tmp_path / "pytest.ini").write_text("[pytest]\nleak_deadline = 2\n")
    (tmp_path / "conftest.py").write_text('pytest_plugins = ("tests.leaks",)\n')

    def inner(*arguments):
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rA", *arguments]
        env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False).stdout

    yield inner
    for leak in (LEAKS | SLOW).values():
        subprocess.run(["sh", "-c", leak.undo], cwd=tmp_path, stderr=subprocess.DEVNULL, check=False)


def section(output, name):
    """What the report says about the error at the teardown of one test."""
    return output.partition(f"ERROR at teardown of {name} ")[2].partition("\n____")[0]


def write_tests(path, leaks):
    lines = ["import subprocess", "def test_clean(): pass"]
    for name, leak in leaks.items():
        lines.append(f"def test_{name}(): subprocess.run(['sh', '-c', {leak.make!r}], check=True)")
    path.write_text("\n".join(lines) + "\n")


def write_notebook(path, *sources):
    cells = [new_code_cell(source, execution_count=number) for number, source in enumerate(sources, 1)]
    path.write_text(dumps(new_notebook(cells=cells)))


def test_each_kind_is_reported_at_the_test_that_left_it(run, tmp_path):
    write_tests(tmp_path / "test_inner.py", LEAKS | {"last": Leak("true", "", "")})
    output = run()
    for name, leak in LEAKS.items():
        assert leak.report in section(output, f"test_{name}"), output
        if name not in ("process", "netns"):  # these two bring a namespace or a file with them
            others = [other.report for other in LEAKS.values() if other is not leak]
            assert not [report for report in others if report in section(output, f"test_{name}")], output
    # One an own test, and all of them once more at the end of the module.
    assert f"{len(LEAKS) + 2} passed, {len(LEAKS) + 1} errors" in output.splitlines()[-1]
    assert "ERROR at teardown of test_clean" not in output


@pytest.mark.machine
def test_slow_kinds_are_reported_at_the_last_test_of_the_module(run, tmp_path):
    write_tests(tmp_path / "test_inner.py", SLOW | {"last": Leak("true", "", "")})
    output = run()
    for leak in SLOW.values():
        assert leak.report in section(output, "test_last"), output
    assert "1 error" in output.splitlines()[-1]


def test_a_module_fixture_is_no_leak_of_its_first_test(run, tmp_path):
    (tmp_path / "test_inner.py").write_text(
        "import subprocess, pytest\n"
        "@pytest.fixture(scope='module')\n"
        "def sleeper():\n"
        "    with subprocess.Popen(['sleep', '600']) as child:\n"
        "        yield\n"
        "        child.kill()\n"
        "def test_one(sleeper): pass\n"
        "def test_two(sleeper): pass\n"
    )
    output = run()
    assert "2 passed in" in output.splitlines()[-1], output


@pytest.mark.machine
def test_a_notebook_is_held_to_account_after_its_kernel_is_gone(run, tmp_path):
    leaks = LEAKS | SLOW
    write_notebook(tmp_path / "a_clean.ipynb", "import subprocess\nchild = subprocess.Popen(['sleep', '1'])")
    makes = [
        f"import subprocess\n_ = subprocess.run(['sh', '-c', {leak.make!r}], check=True)" for leak in leaks.values()
    ]
    write_notebook(tmp_path / "b_leaks.ipynb", *makes)
    write_notebook(tmp_path / "c_clean.ipynb", "one = 1")
    output = run("--nbval", "--nbval-current-env")
    assert "1 error" in output.splitlines()[-1], output
    told = section(output, f"b_leaks.ipynb::Cell {len(leaks) - 1}")
    for leak in leaks.values():
        assert leak.report in told, output
    assert f"ERROR b_leaks.ipynb::Cell {len(leaks) - 1}" in output


def test_nothing_is_watched_outside_a_lab(run, tmp_path):
    (tmp_path / "conftest.py").write_text(
        "from labs import machine\nmachine.MARKER = '/nowhere'\npytest_plugins = ('tests.leaks',)\n"
    )
    write_tests(tmp_path / "test_inner.py", {"file": LEAKS["file"]})
    output = run()
    assert "2 passed in" in output.splitlines()[-1], output


def test_lint_tests_are_not_watched(run, tmp_path):
    (tmp_path / "tests" / "lint").mkdir(parents=True)
    write_tests(tmp_path / "tests" / "lint" / "test_inner.py", {"file": LEAKS["file"]})
    output = run()
    assert "2 passed in" in output.splitlines()[-1], output
